"""`compress convert --to mla`: what is exact, what its class computes, what is refused."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from compress.calibration import calibration_tokens
from compress.cli import main
from compress.conversion import run_conversion
from compress.core.errors import InputError
from compress.core.source import resolve_model
from compress.loading import load_model
from compress.recipe import build_conversion
from compress.recipe_file import load_recipe
from tests.conftest import tiny_config

# of the tiny models: 6 heads of 8 on 2 KV heads, but for `mha`; llama is tied, qwen2 has biases
WIDTHS = {"llama": 16, "mistral": 16, "qwen2": 16, "mha": 48}


@pytest.fixture
def stage_values(stage_values, model_folder):
    """As for all conversions, of tiny models of two blocks."""

    def make(family="llama", folder=None, **more):
        return stage_values(folder=folder or model_folder(family), **more)

    return make


@pytest.fixture
def source_folder(model_folder, tmp_path_factory):
    """A function that returns the folder of a tiny model; `mha` is a Llama with 6 KV heads, and
    `llama3` one whose frequencies are scaled as in Llama 3."""

    def get(family):
        if family not in ("mha", "llama3"):
            return model_folder(family)
        config = tiny_config("llama")
        if family == "mha":
            config.num_key_value_heads = 6
        else:
            config.rope_parameters = {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        folder = tmp_path_factory.mktemp(family)
        shutil.copytree(model_folder("llama"), folder, dirs_exist_ok=True)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return folder

    return get


def logits_of(folder):
    tokens = torch.randint(3, 120, (4, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits


def convert(given, **more):
    return run_conversion(build_conversion(given | {"compute_dtype": "float32"} | more))


@pytest.mark.parametrize("basis", ["activations", "weights"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "granite", "mha", "llama3"])
def test_all_of_rope_and_of_the_values_is_the_same_model(
    family, basis, source_folder, stage_values, tmp_path
):
    """d = K H and R = K H: the same logits, from a stock class."""
    width = WIDTHS.get(family, 16)
    folder = source_folder(family)
    stage = {"to": "mla", "kv_rank": width, "rope_dim": width, "basis": basis, "refit": False}
    if family == "qwen2":
        stage["q_rank"] = 48
    report = convert(stage_values(folder=folder, **stage))
    expected, found = logits_of(folder), logits_of(tmp_path / "out")
    # float32 sums in another order through two blocks
    assert (found - expected).abs().max() < 5e-6 * expected.abs().max()
    assert report["conversion"]["kv_values"] == report["conversion"]["original_kv_values"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "mha"])
def test_a_converted_model_is_a_stock_model(family, source_folder, stage_values, tmp_path):
    """It loads as DeepSeek-V3's class, with as many parameters as reported, and what the report
    says of each block's attention is what that class computes, frequencies included."""
    folder = source_folder(family)
    stage = {"to": "mla", "kv_rank": 10, "rope_dim": 6}
    if family == "qwen2":
        stage["q_rank"] = 40
    given = stage_values(folder=folder, **stage)
    report = convert(given)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(converted) is DeepseekV3ForCausalLM
    assert sum(p.numel() for p in converted.parameters()) == report["sizes"]["parameters"]
    assert report["conversion"]["kv_values"] == 2 * (10 + 6)
    assert report["conversion"]["kv_bytes"] == 4 * 2 * (10 + 6)

    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    recipe = build_conversion(given)
    tokens = calibration_tokens(
        recipe.calibration, resolve_model(given["model"]), 128, torch.device("cpu")
    )
    angles = converted.model.rotary_emb(torch.zeros(1), torch.arange(32)[None])
    pairs = []

    def beside(index):
        def hook(_module, args, kwargs, output):
            with_own = {**kwargs, "position_embeddings": angles}
            pairs.append((output[0], converted.model.layers[index].self_attn(*args, **with_own)[0]))

        return hook

    for index, layer in enumerate(original.model.layers):
        layer.self_attn.register_forward_hook(beside(index), with_kwargs=True)
    with torch.inference_mode():
        original(tokens, use_cache=False)
    for (own, other), block in zip(pairs, report["conversion"]["blocks"], strict=True):
        found = float((own - other).square().sum() / own.square().sum())
        # float32 sums, and a difference of 1/80 of what it is taken of: measured 1.1e-3
        assert found == pytest.approx(block["error"], rel=5e-3)
        assert block["error"] < block["plain_error"] < 1


def test_frequencies_are_those_of_the_original(stage_values, source_folder, tmp_path):
    """Any of them, as often as the report says; the class computes them to the last bits."""
    folder = source_folder("llama3")
    report = convert(stage_values(folder=folder, to="mla", kv_rank=12, rope_dim=10))
    original = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    rotary = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.rotary_emb
    (counts,) = {tuple(block["pairs"]) for block in report["conversion"]["blocks"]}
    expected = original.repeat_interleave(torch.tensor(counts))
    # float32: a factor, a power and their product are rounded
    assert torch.allclose(rotary.inv_freq, expected, rtol=3e-7, atol=0)
    assert rotary.attention_scaling == 1


def test_the_norm_of_latents_does_nothing(stage_values, tmp_path):
    convert(stage_values(to="mla", kv_rank=8, rope_dim=4))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    states = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    latent = attention.kv_a_proj_with_mqa(states)[:, :8]
    # two roundings in float32
    assert torch.allclose(attention.kv_a_layernorm(latent), latent * (2**14 / 1e-3), rtol=1e-6)


def test_weights_without_refit_are_a_singular_value_decomposition(stage_values, tmp_path):
    """With all of the keys under RoPE the latent holds values alone."""
    given = stage_values(to="mla", kv_rank=9, rope_dim=16, basis="weights", refit=False)
    report = convert(given)
    assert report["calibration_sha256"] is None
    before = load_file(f"{given['model']}/model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for index in range(2):
        place = f"model.layers.{index}.self_attn"
        values = before[f"{place}.v_proj.weight"].double()
        u, s, v = torch.linalg.svd(values, full_matrices=False)
        expected = (u[:, :9] * s[:9] @ v[:9]).unflatten(0, (2, 8)).repeat_interleave(3, 0)
        down = after[f"{place}.kv_a_proj_with_mqa.weight"][:9].double() * (2**14 / 1e-3)
        up = after[f"{place}.kv_b_proj.weight"].double().unflatten(0, (6, 16))[:, 8:]
        # stored in float32
        assert torch.allclose(up @ down, expected, atol=1e-5 * float(expected.abs().max()))


def test_queries_of_a_rank(stage_values, tmp_path):
    """As many as there are lose nothing; fewer lose something, and give a smaller model."""
    exact = {"to": "mla", "kv_rank": 16, "rope_dim": 16, "refit": False}
    given = stage_values(q_rank=48, **exact)
    convert(given)
    expected, found = logits_of(given["model"]), logits_of(tmp_path / "out")
    # two more products in float32
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    report = convert(stage_values(q_rank=12, out="fewer", **exact))
    assert (logits_of(tmp_path / "fewer") - expected).abs().max() > 1e-3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fewer")
    assert model.config.q_lora_rank == 12
    assert sum(p.numel() for p in model.parameters()) == report["sizes"]["parameters"]


def test_a_stage_of_a_chain(stage_values, tmp_path):
    """Converted, then quantized, with what each cost."""
    from compress.chain import run_chain

    given = stage_values()
    text = given["calibration"]["source"]
    convert_stage = {"method": "convert", "to": "mla", "kv_rank": 16, "rope_dim": 8}
    given["stages"] = [convert_stage, {"method": "gptq", "group_size": 16}]
    given["eval"] = {"text": text, "windows": 4, "seq_len": 32}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**given, "out": str(given["out"])}))
    report = run_chain(load_recipe(path))
    assert [stage["method"] for stage in report["stages"]] == ["convert", "gptq"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["quantization_config"]
    for layer in report["layers"]:
        if "kv_a_proj" in layer["name"]:  # rows of 1e-9 are rounded as any others
            assert 0 < layer["weight_error"] < 0.05


def test_what_is_reported(stage_values, tmp_path, text_file):
    command = ["convert", stage_values()["model"], "--to", "mla", "--kv-rank", "8"]
    command += ["--rope-dim", "4", "--samples", "8", "--seq-len", "32"]
    command += ["--calibration", str(text_file), "--out", str(tmp_path / "out")]
    plan = CliRunner().invoke(main, [*command, "--dry-run", "--json"])
    assert plan.exit_code == 0, plan.output
    assert list(tmp_path.iterdir()) == []
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "24 numbers a token, were 64 (62.5% fewer)" in done.stdout
    assert "up to 32 tokens were looked at" in " ".join(done.stdout.split())
    report = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert json.loads(plan.stdout)["output_bytes"] == report["sizes"]["bytes"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "converted to MLA of rank 8 and 4 RoPE channels" in card
    assert "rotation kept" in (tmp_path / "out" / "report.html").read_text()


def test_text_as_long_as_the_context_says_nothing_of_distances(stage_values, tmp_path, text_file):
    command = ["convert", stage_values()["model"], *MLA, "--samples", "2", "--seq-len", "128"]
    command += ["--calibration", str(text_file), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "looked at" not in " ".join(done.stdout.split())


MLA = ["--to", "mla", "--kv-rank", "8", "--rope-dim", "4"]


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("llama", ["--to", "mla", "--rope-dim", "4"], "kv_rank is not given"),
        ("llama", [*MLA, "--rope-dim", "3"], "rope_dim = 3 is not possible: even numbers from 2"),
        ("llama", [*MLA, "--rope-dim", "18"], "from 2 to 16"),
        ("llama", [*MLA, "--kv-rank", "29"], "give 1 to 28"),
        ("llama", [*MLA, "--q-rank", "49"], "give 1 to 48"),
        (
            "llama",
            [*MLA, "--kv-heads", "1"],
            "kv_heads is a setting of 'to: gqa', not of 'to: mla'",
        ),
        ("llama", [*MLA, "--to", "gqa", "--kv-heads", "1"], "kv_rank is a setting of 'to: mla'"),
        ("llama", [*MLA, "--dtype", "float16"], "give --dtype bfloat16 or float32"),
        ("qwen2", MLA, "has biases on queries"),
        ("qwen3", MLA, "norms of queries and keys (qk-norm)"),
        ("gemma2", MLA, "has no form as DeepseekV3ForCausalLM"),
        ("smollm3", MLA, "has no form as DeepseekV3ForCausalLM"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    family, more, message, model_folder, text_file, tmp_path
):
    layers = 4 if family == "smollm3" else 2  # of which the fourth has no RoPE
    command = ["convert", str(model_folder(family, layers=layers)), "--out", str(tmp_path / "out")]
    command += ["--calibration", str(text_file), "--samples", "4", "--seq-len", "32"]
    done = CliRunner().invoke(main, [*command, *more])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "setting"), [("mistral", {"sliding_window": 64}), ("granite", {"logits_scaling": 2})]
)
def test_what_the_class_does_not_do_is_refused(
    family, setting, model_folder, stage_values, tmp_path
):
    """Though names and shapes of all tensors are the same."""
    folder = shutil.copytree(model_folder(family), tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | setting))
    given = stage_values(folder=folder, to="mla", kv_rank=8, rope_dim=4)
    with pytest.raises(InputError, match="with the same weights it gives other logits"):
        convert(given)


def test_scales_of_latents_are_not_stored_as_zero(stage_values, tmp_path, text_file):
    """A format with float16 scales is refused, unless the latents stay in float."""
    convert(stage_values(to="mla", kv_rank=16, rope_dim=16, refit=False))
    command = ["quantize", str(tmp_path / "out"), "--method", "rtn", "--group-size", "16"]
    command += ["--format", "gptq", "--out", str(tmp_path / "gptq")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert "too coarse for model.layers.0.self_attn.kv_a_proj_with_mqa" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    command += ["--ignore", "kv_a_proj_with_mqa"]
    done = CliRunner().invoke(main, [*command, "--dtype", "float16"])
    assert done.exit_code == 2
    assert "dtype float16 does not hold" in done.stderr
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "in few bits, little in 8: --set kv_b_proj:bits=8 (`overrides`" in done.stderr
    command += ["--out", str(tmp_path / "other"), "--set", "kv_b_proj:bits=8", "--dry-run"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "in few bits" not in done.stderr
    train = ["distill", "--student", str(tmp_path / "out"), "--teacher", str(tmp_path / "out")]
    train += ["--dtype", "float16", "--seq-len", "64", "--out", str(tmp_path / "healed")]
    done = CliRunner().invoke(main, train)
    assert done.exit_code == 2
    assert "dtype float16 does not hold model.layers.0.self_attn.kv_a_proj_with_mqa" in done.stderr
    for made in ("out", "gptq"):  # as they are, and unpacked
        with pytest.raises(InputError, match=r"float16 does not hold .*0.self_attn.kv_a_proj_with"):
            load_model(tmp_path / made, "float16")
        load_model(tmp_path / made, "bfloat16")
