"""Scales of keys and values that a run measures and stores."""

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from compress.calibration import calibration_tokens
from compress.chain import run_chain
from compress.chain_recipe import build_chain
from compress.cli import main
from compress.core.errors import InputError
from compress.core.shards import ShardReader
from compress.core.source import ModelSource, resolve_model
from compress.export import export_model
from compress.inspection import inspect_folder
from compress.loading import load_model
from compress.pipeline import run_recipe
from compress.planning.question import Question
from compress.preflight import needs_of, preflight
from compress.quant.formats.compressed_tensors import KV_TYPES
from compress.recipe import build_recipe
from compress.runtime.loading import load_decoder
from compress.runtime.scoring import Span, logits

LARGEST = {"int8": 127, "fp8": 448}
TOKENS = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(3))


def recipe_of(folder, out, text_file, kind, method="awq", **changes):
    stage = {"method": method, "group_size": 16} | changes.pop("stage", {})
    values = {
        "model": str(folder),
        "out": out,
        "compute_dtype": "float32",
        "kv_cache": kind,
        "calibration": {"source": str(text_file), "samples": 6, "seq_len": 64},
        "stages": [stage],
    }
    return build_recipe(values | changes)


def stored_scales(folder):
    """Of each layer: (k_scale, v_scale)."""
    reader = ShardReader(folder)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    names = ("k_scale", "v_scale")
    found = [
        [reader.load(f"model.layers.{layer}.self_attn.{name}") for name in names]
        for layer in range(layers)
    ]
    assert all(x.shape == (1,) and x.dtype == torch.float32 for layer in found for x in layer)
    return torch.tensor(found)


def plain_copy(folder, place):
    """The same weights without scales of keys and values."""
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("method", ["rtn", "awq"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_scales_are_of_what_the_compressed_model_caches(
    family, method, model_folder, text_file, tmp_path
):
    """transformers' own cache of the result on the same text; AWQ's folds change values.

    Weights there are rounded to the checkpoint's float32 as in the walk, so only the order of sums
    differs: 1e-4.
    """
    folder, out = model_folder(family), tmp_path / "out"
    recipe = recipe_of(folder, out, text_file, "int8", method)
    job = preflight(recipe)
    report = run_recipe(recipe)
    assert report["sizes"]["bytes"] == needs_of(job, 0).output
    model = load_model(plain_copy(out, tmp_path / "plain"))
    source = resolve_model(str(folder))
    tokens = calibration_tokens(recipe.calibration, source, 128, torch.device("cpu"))
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    expected = [[layer.keys.abs().max(), layer.values.abs().max()] for layer in cache.layers]
    if family == "gemma2":  # a window's layers keep the end of a sequence alone
        expected = [[float("nan")] * 2 if i % 2 == 0 else x for i, x in enumerate(expected)]
    expected = torch.tensor(expected) / 127
    found = stored_scales(out).where(expected.isfinite(), torch.nan)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_transformers_and_the_runtime_give_the_same_logits(kind, model_folder, text_file, tmp_path):
    """compressed-tensors rounds keys and values by the same scales; where a number lies between two
    codes the last bit decides, so a few codes differ: a tenth of what rounding changes."""
    out = tmp_path / "out"
    run_recipe(recipe_of(model_folder("llama"), out, text_file, kind))
    plain = plain_copy(out, tmp_path / "plain")
    theirs = {}
    for folder in (out, plain):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            theirs[folder] = model(TOKENS[None]).logits[0, :-1]
    decoder = load_decoder(ModelSource(str(out), out), torch.device("cpu"), "float32")
    assert decoder.kv_cache_dtype == kind
    ours = torch.cat([piece.logits for piece in logits(decoder, [Span(TOKENS.numpy(), first=1)])])
    change = (theirs[out] - theirs[plain]).norm()
    assert change > 1e-4 * theirs[plain].norm()
    assert (ours - theirs[out]).norm() < 0.1 * change


def test_a_run_that_is_broken_off_gives_the_same_bytes(
    model_folder, text_file, tmp_path, monkeypatch
):
    from compress import pipeline

    folder = model_folder("llama")
    run_recipe(recipe_of(folder, tmp_path / "a" / "out", text_file, "fp8", "rtn"))
    recipe = recipe_of(folder, tmp_path / "b" / "out", text_file, "fp8", "rtn")
    visits, write = [], pipeline._apply_and_write

    def breaks(*arguments):
        visits.append(arguments)
        if len(visits) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(pipeline, "_apply_and_write", breaks)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe)
    run_recipe(recipe)
    assert len(visits) == 3  # the first block was not visited again
    for name in ("model.safetensors", "config.json", "compress.json"):
        assert (tmp_path / "a/out" / name).read_bytes() == (tmp_path / "b/out" / name).read_bytes()


def test_a_target_of_bits_measures_them_too(model_folder, text_file, tmp_path):
    """The stage is made again once bits are chosen, and RTN by itself would run no block."""
    out = tmp_path / "out"
    stage = {"group_size": None, "target_bits": 5, "choose_group_sizes": [16]}
    recipe = recipe_of(model_folder("llama"), out, text_file, "int8", "rtn", stage=stage)
    report = run_recipe(recipe)
    assert report["allocation"]["bits"] <= 5
    assert (stored_scales(out) > 0).all()
    assert report["sizes"]["bytes"] <= needs_of(preflight(recipe), 0).output


def test_what_kv_cache_refuses(model_folder, text_file, tmp_path):
    def refused(match, **changes):
        with pytest.raises(InputError, match=match):
            run_recipe(recipe_of(model_folder("llama"), tmp_path / "x", text_file, **changes))

    refused("format gptq cannot hold scales", kind="int8", stage={"format": "gptq"})
    refused("propagate_error: false does not compute", kind="fp8", propagate_error=False)
    refused("set tokens=0", kind="fp8", stage={"method": "qat", "tokens": 1000})
    done = CliRunner().invoke(
        main, ["quantize", "m", "--method", "rtn", "--out", "o", "--kv-cache", "int4"]
    )
    assert done.exit_code == 2
    assert "kv_cache" in done.output
    assert "int8" in done.output


def test_export_keeps_scales_or_refuses(model_folder, text_file, tmp_path):
    out = tmp_path / "out"
    run_recipe(recipe_of(model_folder("llama"), out, text_file, "int8", "rtn"))
    export_model(str(out), "compressed-tensors", tmp_path / "again")
    assert torch.equal(stored_scales(tmp_path / "again"), stored_scales(out))
    decoder = load_decoder(ModelSource("again", tmp_path / "again"), torch.device("cpu"), "float32")
    assert decoder.kv_cache_dtype == "int8"
    with pytest.raises(InputError, match="format gptq cannot hold the scales of keys and values"):
        export_model(str(out), "gptq", tmp_path / "gptq")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_is_said_of_it(kind, model_folder, text_file, tmp_path):
    """The card of a chain, `inspect`, and `plan`, which counts keys and values as they are kept."""
    out = tmp_path / "out"
    convert = {"method": "convert", "to": "gqa", "kv_heads": 1}
    values = {"model": str(model_folder("llama")), "out": str(out), "eval": None, "kv_cache": kind}
    values["calibration"] = {"source": str(text_file), "samples": 6, "seq_len": 64}
    values["stages"] = [convert, {"method": "smoothquant"}]
    run_chain(build_chain(values))
    card = (out / "README.md").read_text()
    assert f"scales of keys and values in {kind}" in card
    assert "Activations are rounded to int8 as well" in card
    assert inspect_folder(out)["quantization"]["kv_cache"]["type"] == KV_TYPES[kind]
    printed = CliRunner().invoke(main, ["inspect", str(out)]).output
    assert f"{kind}, calibrated scales" in printed
    assert Question(str(out)).kv_as == kind
    assert Question(str(out), kv="bf16").kv_as == "bf16"
    assert Question(str(model_folder("llama"))).kv_as == "bf16"
    decoder = load_decoder(ModelSource("out", out), torch.device("cpu"), "float32")
    assert decoder.kv_cache_dtype == kind
