"""The runtime and transformers measure the same, on every family and format that both read.

In float32 the two differ by the order of sums alone: some 1e-6 of logits that reach 20 here, so
1e-5 of a log-probability of about 5, and less on average over tokens.  A divergence is a difference
of such numbers, hence the absolute tolerance.
"""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from compress.cli import main
from compress.core.errors import InputError
from compress.core.source import resolve_model
from compress.engines import settle_engine
from compress.evaluate import TextEvalConfig, evaluate_text
from compress.pipeline import run_recipe
from compress.recipe import build_recipe

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
TOLERANCE = {"perplexity": 1e-5, "perplexity_original": 1e-5, "kl_mean": 1e-4, "kl_p99": 1e-4}


def assert_same_measures(model, against, text, **settings):
    found = {}
    for engine in ("runtime", "transformers"):
        config = TextEvalConfig(text, **{"seq_len": 65, "windows": 5, "engine": engine} | settings)
        found[engine] = evaluate_text(
            resolve_model(str(model)), config, resolve_model(str(against))
        )
        assert found[engine]["engine"] == engine
    ours, theirs = found["runtime"], found["transformers"]
    assert theirs["kl_mean"] > 1e-3, "the two models should differ"
    for name, tolerance in TOLERANCE.items():
        assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=1e-6), name
    assert ours["top1_agreement"] == theirs["top1_agreement"]
    assert ours.keys() == theirs.keys()


def changed_and_quantized(folder, tmp_path, **settings):
    """Changed first: rounding alone leaves a divergence of some 1e-4 on these models."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    shutil.copytree(folder, tmp_path / "changed")
    model.save_pretrained(tmp_path / "changed")
    stage = {"method": "rtn", "group_size": 16, **settings}
    recipe = {"model": str(tmp_path / "changed"), "out": tmp_path / "out", "stages": [stage]}
    run_recipe(build_recipe(recipe))
    return tmp_path / "out"


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, model_folder, text_file, tmp_path):
    out = changed_and_quantized(model_folder(family), tmp_path)
    assert_same_measures(out, model_folder(family), text_file)


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_formats(format_name, symmetric, model_folder, text_file, tmp_path):
    folder = model_folder("qwen2", torch.float16)
    out = changed_and_quantized(folder, tmp_path, format=format_name, symmetric=symmetric)
    # windows that share a batch, and windows that need several
    assert_same_measures(out, folder, text_file, seq_len=20, windows=40)
    assert_same_measures(out, folder, text_file, seq_len=128, windows=3)


@pytest.mark.parametrize("tied", [False, True])
def test_head_bits_round_the_output_layer_alone(tied, model_folder, text_file, tmp_path):
    """What transformers measures where it was rounded by hand; embeddings stay."""
    folder = tmp_path / "changed"
    shutil.copytree(model_folder("llama"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=tied)
    torch.manual_seed(7)
    with torch.no_grad():
        head = 0.1 * torch.randn_like(model.lm_head.weight)
        model.lm_head.weight.copy_(head)
        model.save_pretrained(folder)
        scale = head.abs().amax(dim=1, keepdim=True) / 127
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter((head / scale).round() * scale)
    shutil.copytree(folder, tmp_path / "rounded")
    model.save_pretrained(tmp_path / "rounded")
    asked = ["--text", str(text_file), "--seq-len", "65", "--windows", "5", "--json"]
    asked += ["--against", str(folder)]
    found = {}
    for name, head_bits in (("changed", ("--head-bits", "8")), ("rounded", ())):
        done = CliRunner().invoke(main, ["eval", str(tmp_path / name), *asked, *head_bits])
        assert done.exit_code == 0, done.output
        found[name] = json.loads(done.stdout)
    ours, theirs = found["changed"], found["rounded"]
    assert ours.pop("lm_head_bits") == 8
    # Rounding moves a logit by 1e-3, sums in another order by 1e-6: a divergence goes by squares.
    assert ours["kl_mean"] == pytest.approx(theirs["kl_mean"], rel=1e-2)
    assert ours["kl_mean"] > 1e-7
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)


def test_gguf(write_gguf, tmp_path, monkeypatch):
    """A .gguf file in its own blocks, against the float32 copy that transformers gets."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    kinds = dict.fromkeys(["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate"], "Q4_1")
    kinds |= {"ffn_up": "Q4_0", "ffn_down": "Q8_0", "token_embd": "Q8_0"}
    write_gguf(tmp_path / "a.gguf", kinds)
    write_gguf(tmp_path / "b.gguf", {}, seed=1)
    text = tmp_path / "text.txt"
    text.write_text("t1" * 400, encoding="utf-8")
    assert_same_measures(tmp_path / "a.gguf", tmp_path / "b.gguf", text, seq_len=30)


def test_auto_is_the_runtime_only_for_two_models_that_it_serves(model_folder, capsys):
    llama, gemma = (resolve_model(str(model_folder(family))) for family in ("llama", "gemma2"))
    assert settle_engine("auto", [llama, llama]) == "runtime"
    assert capsys.readouterr().err.endswith("Engine: runtime\n")
    for sources in ([llama, gemma], [gemma, llama], [gemma]):
        assert settle_engine("auto", sources) == "transformers"
        assert "Engine: transformers" in (told := capsys.readouterr().err)
        assert "is a Gemma2ForCausalLM)" in told
    with pytest.raises(
        InputError, match=r"Gemma2.*; the runtime serves classes .*LlamaForCausalLM"
    ):
        settle_engine("runtime", [llama, gemma])
    assert settle_engine("transformers", [llama]) == "transformers"
    with pytest.raises(InputError, match="engine 'vllm' is unknown; allowed are auto, runtime"):
        settle_engine("vllm", [llama])


def test_what_is_not_served_is_refused_before_weights_are_read(
    model_folder, text_file, monkeypatch
):
    def never(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr("compress.runtime.loading.load_decoder", never)
    monkeypatch.setattr("compress.engines.load_model", never)
    config = TextEvalConfig(text_file, seq_len=32, windows=2, engine="runtime")
    llama, gemma = (resolve_model(str(model_folder(family))) for family in ("llama", "gemma2"))
    with pytest.raises(InputError, match="the runtime serves"):
        evaluate_text(llama, config, gemma)


@pytest.mark.parametrize(("family", "engine"), [("qwen3", "runtime"), ("phi", "transformers")])
def test_the_command_says_which_engine_it_was(family, engine, model_folder, text_file):
    arguments = ["eval", str(model_folder(family)), "--text", str(text_file), "--seq-len", "32"]
    done = CliRunner().invoke(main, [*arguments, "--windows", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["engine"] == engine
    assert f"Engine: {engine}" in done.stderr
