"""Keys and values in 8 bits, through the whole runtime and in all its ways of computing."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compress.cli import main
from compress.core.device import KV_CACHE_DTYPES, ServedAs
from compress.core.errors import InputError
from compress.core.source import ModelSource, resolve_model
from compress.evaluate import TextEvalConfig, evaluate_text
from compress.kernels.paged_attention.cache import CODES, tensors_of
from compress.kernels.program.build import reason_against
from compress.pipeline import run_recipe
from compress.recipe import build_recipe
from compress.runtime.llm import LLM
from compress.runtime.loading import load_decoder, make_decoder
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.scoring import Span, logits
from compress.runtime.weights import load_weights

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(3))
WAYS = ["program", "torch", "triton"]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture
def compute(request, monkeypatch):
    """A function that chooses one of WAYS for what is loaded next."""

    def choose(way):
        if way == "program" and (reason := reason_against()):
            pytest.skip(reason)
        if way == "program":
            monkeypatch.delenv("COMPRESS_CPU_KERNELS", raising=False)
        else:
            monkeypatch.setenv("COMPRESS_CPU_KERNELS", way)

    return choose


def decoder_of(folder, kv_cache_dtype, most_tokens=32):
    return load_decoder(
        ModelSource(str(folder), folder), CPU, "float32", None, most_tokens, kv_cache_dtype
    )


def all_logits(decoder, tokens=TOKENS):
    span = Span(tokens.numpy(), first=1)
    return torch.cat([piece.logits for piece in logits(decoder, [span], most_tokens=32)])


def test_names_are_those_of_the_codes():
    assert ("auto", *CODES) == KV_CACHE_DTYPES


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", list(CODES))
def test_bytes_of_a_block(kind, way, compute, model_folder):
    """Codes of one byte and a float32 scale for each token, head, key and value; the program's
    heads are padded to whole vectors."""
    compute(way)
    folder = model_folder("llama")
    shape = load_weights(ModelSource("m", folder))
    dims = -(-shape.head_dim // 16) * 16 if way == "program" else shape.head_dim
    decoder = decoder_of(folder, kind)
    expected = len(decoder.windows) * 2 * 16 * shape.kv_heads * (dims + 4)
    assert decoder.bytes_per_block == expected
    assert decoder.kv_cache_dtype == kind
    decoder.allocate(5)
    held = [tensor for layer in decoder._cache for part in layer for tensor in tensors_of(part)]
    assert sum(tensor.nbytes for tensor in held) == 5 * expected
    plain = decoder_of(folder, "auto")
    assert plain.kv_cache_dtype == "float32"
    assert plain.bytes_per_block == len(decoder.windows) * 2 * 16 * shape.kv_heads * dims * 4


@pytest.mark.parametrize("family", ["llama", "qwen3", "youtu", "qwen3_cla"])
@pytest.mark.parametrize("kind", list(CODES))
def test_all_ways_give_the_same_logits(kind, family, compute, model_folder):
    """In float32 ways differ by the order of sums, and where that puts a number on the other side
    of a rounding by a step of its code, 1/127 or 1/16 of it: a hundredth of what codes change."""
    found = {}
    for way in WAYS:
        compute(way)
        found[way] = all_logits(decoder_of(model_folder(family), kind))
    compute("torch")
    exact = all_logits(decoder_of(model_folder(family), "auto"))
    change = (found["torch"] - exact).square().mean().sqrt()
    assert 1e-4 < change / exact.std() < 0.1
    for way in ("program", "triton"):
        apart = (found[way] - found["torch"]).square().mean().sqrt()
        assert apart < 0.1 * change, way


@pytest.mark.parametrize("way", WAYS)
def test_copying_blocks_copies_scales(way, compute, model_folder):
    compute(way)
    decoder = decoder_of(model_folder("llama"), "int8")
    decoder.allocate(4)
    held = [tensor for layer in decoder._cache for part in layer for tensor in tensors_of(part)]
    for tensor in held:
        tensor.copy_(torch.arange(4).view(-1, *[1] * (tensor.dim() - 1)).expand_as(tensor))
    decoder.copy_blocks([(2, 0), (3, 1)])
    for tensor in held:
        assert [tensor[block].float().mean() for block in range(4)] == [2, 3, 2, 3]


@pytest.mark.parametrize(
    ("draft", "family"),
    [("ngram", "qwen3"), ("self", "qwen3"), ("ngram", "youtu"), ("self", "youtu")],
)
def test_drafts_change_nothing(draft, family, compute, model_folder):
    """On the program, whose rows have the same bits alone and beside proposed tokens."""
    compute("program")
    folder = str(model_folder(family, layers=6))
    settings = {"kv_cache_dtype": "int8", "kv_cache_memory": "2MiB", "max_sequences": 4}
    prompts = [TOKENS[:30].tolist() * 2, TOKENS[30:50].tolist()]
    several = SamplingParams(max_tokens=12, seed=3, n=3, ignore_eos=True)
    params = [GREEDY, several]
    with LLM(folder, **settings) as llm:
        expected = [output.outputs for output in llm.generate(prompts, params)]
        plain = llm.statistics().cache_bytes_per_token
    with LLM(folder, draft=draft, num_speculative_tokens=3, **settings) as llm:
        assert [output.outputs for output in llm.generate(prompts, params)] == expected
        assert llm.statistics().drafted_tokens
        assert llm.statistics().cache_bytes_per_token == plain
        assert f"take {plain:,} bytes a token; room for" in llm.cache_description


def test_a_draft_models_cache_is_in_8_bits_too(compute, model_folder):
    folder = str(model_folder("llama"))
    settings = {"kv_cache_memory": "2MiB", "dtype": "float32", "max_sequences": 4}
    sizes = {}
    for kind in ("auto", "int8"):
        with LLM(
            folder, draft=folder, num_speculative_tokens=2, kv_cache_dtype=kind, **settings
        ) as llm:
            sizes[kind] = llm.statistics().cache_bytes_per_token
            own = llm.engine.model.bytes_per_block // 16
        assert sizes[kind] == 2 * own
    assert sizes["int8"] < sizes["auto"] / 3


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "llama_cla"])
def test_the_gpus_steps_give_the_tokens_of_plain_operations(family, compute, model_folder):
    """Prefill, decode and verified drafts of the Triton kernels, in the interpreter."""
    folder = str(model_folder(family))
    found = {}
    for way in ("torch", "triton"):
        compute(way)
        settings = {"kv_cache_dtype": "int8", "kv_cache_memory": "1MiB", "dtype": "float32"}
        with LLM(
            folder, draft="ngram", num_speculative_tokens=2, max_sequences=2, **settings
        ) as llm:
            asked = [TOKENS[:20].tolist() * 2, TOKENS[20:33].tolist()]
            outputs = llm.generate(asked, SamplingParams(max_tokens=5, temperature=0))
            found[way] = [output.outputs[0].token_ids for output in outputs]
    assert found["torch"] == found["triton"]


@pytest.fixture
def calibrated(model_folder, tmp_path):
    """A checkpoint with calibrated scales, as compressed-tensors writes them."""

    def make(kind="int", **changes):
        stage = {"method": "rtn", "group_size": 16}
        recipe = {"model": str(model_folder("llama")), "out": str(tmp_path / "out")}
        run_recipe(build_recipe({**recipe, "stages": [stage]}))
        folder = tmp_path / "calibrated"
        shutil.copytree(tmp_path / "out", folder)
        config = json.loads((folder / "config.json").read_text())
        scheme = {"num_bits": 8, "type": kind, "strategy": "tensor", "symmetric": True}
        scheme |= {"dynamic": False} | changes
        config["quantization_config"]["kv_cache_scheme"] = scheme
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        for layer in range(2):
            for name, scale in (("k", 0.05), ("v", 0.02)):
                place = f"model.layers.{layer}.self_attn.{name}_scale"
                tensors[place] = torch.tensor([scale])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "name"), [("int", "int8"), ("float", "fp8")])
def test_calibrated_scales_are_used_unless_others_are_asked_for(
    kind, name, way, compute, calibrated
):
    compute(way)
    folder = calibrated(kind)
    decoder = decoder_of(folder, "auto")
    assert decoder.kv_cache_dtype == name
    by_checkpoint = all_logits(decoder)
    for layer in decoder._cache:
        for part, scale in zip(layer, (0.05, 0.02), strict=True):
            written = part.scales.flatten()  # places that nothing was written to hold anything
            assert (written == scale).sum() >= 2 * 58
    by_row = all_logits(decoder_of(folder, name))
    exact = all_logits(make_exact(folder))
    assert not torch.equal(by_checkpoint, by_row)
    assert (by_row - exact).norm() < (by_checkpoint - exact).norm() < exact.norm()


def make_exact(folder):
    """The same model with keys and values in float32."""
    weights = load_weights(ModelSource(str(folder), folder))
    object.__setattr__(weights, "kv_cache_dtype", None)
    return make_decoder(weights, CPU, torch.float32, 32)


@pytest.mark.parametrize("changes", [{"strategy": "attn_head"}, {"dynamic": True}, {"num_bits": 4}])
def test_other_schemes_of_a_checkpoint_are_refused(changes, calibrated):
    folder = calibrated(**changes)
    with pytest.raises(InputError, match=r"kv_cache_scheme in config.json has .*; read are 8 bits"):
        load_weights(ModelSource(str(folder), folder))


@pytest.mark.parametrize("scale", [[0.0], [-1.0], [1.0, 2.0]])
def test_a_scale_that_is_none_is_refused(scale, calibrated):
    folder = calibrated()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_scale"] = torch.tensor(scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layers.1.self_attn.v_scale in .* is not one number"):
        load_weights(ModelSource(str(folder), folder))


def test_what_cannot_be_asked_for(model_folder, text_file):
    folder = str(model_folder("llama"))
    with pytest.raises(InputError, match="kv_cache_dtype 'int4' is unknown; allowed are auto, "):
        LLM(folder, kv_cache_dtype="int4")
    config = TextEvalConfig(text_file, seq_len=64, engine="transformers", served=ServedAs("int8"))
    with pytest.raises(InputError, match=r"'int8' is for the runtime, .* leave out one of the two"):
        evaluate_text(resolve_model(folder), config)


def test_eval_compares_a_model_with_itself_without_codes(model_folder, text_file):
    folder = str(model_folder("llama"))
    asked = ["eval", folder, "--against", folder, "--text", str(text_file), "--json"]
    sizes = ["--seq-len", "64", "--windows", "4", "--kv-cache-dtype", "int8"]
    done = CliRunner().invoke(main, [*asked, *sizes])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["kv_cache_dtype"] == "int8"
    assert 0 < found["kl_mean"] < 1e-3
    assert found["perplexity_ratio"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("command", ["latency", "throughput"])
def test_bench_reports_memory_a_token(command, model_folder):
    sizes = ["--prompt-tokens", "20", "--new-tokens", "4", "--batch", "1", "--repeat", "1"]
    found = {}
    for kind in ("auto", "fp8"):
        asked = ["bench", command, str(model_folder("llama")), "--dtype", "float32", "--json"]
        done = CliRunner().invoke(main, [*asked, *sizes, "--kv-cache-dtype", kind])
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        found[report["kv_cache_dtype"]] = report["kv_bytes_per_token"]
    assert found["fp8"] < found["float32"] / 3
