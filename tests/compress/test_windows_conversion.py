"""`compress convert --to windows`: exact inside a window, what is measured, what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.calibration import calibration_tokens
from compress.conversion import run_conversion
from compress.core.errors import InputError
from compress.core.source import ModelSource, resolve_model
from compress.evaluate import TextEvalConfig, evaluate_text
from compress.recipe import build_conversion
from compress.recipe_file import load_recipe

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
WINDOW = 12
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.fixture
def converted(stage_values, tmp_path):
    """A function that converts a tiny model in float32: the folder, the original, the report."""

    def make(family="llama", **stage):
        given = stage_values(family, to="windows", **{"window": WINDOW, **stage})
        report = run_conversion(build_conversion(given | {"compute_dtype": "float32"}))
        return tmp_path / "out", given["model"], report

    return make


def logits_of(folder, tokens=40, **settings):
    ids = torch.randint(3, 120, (2, tokens), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_inside_the_window_nothing_changes(family, every, converted):
    """Weights to the byte, and the logits of the first W tokens; of later ones they change."""
    out, model, report = converted(family, global_every=every)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (model, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected, found = logits_of(model), logits_of(out)
    # the same arithmetic but for masks, whose sums may run in another order
    torch.testing.assert_close(found[:, :WINDOW], expected[:, :WINDOW], rtol=0, atol=1e-5)
    assert (found[:, WINDOW:] - expected[:, WINDOW:]).abs().max() > 1e-2
    kinds = [block["kind"] for block in report["conversion"]["blocks"]]
    assert kinds == (["window", "global"] * 2 if every else ["window"] * 4)


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_a_stock_model_that_the_runtime_computes(family, every, converted, text_file):
    out, _, report = converted(family, global_every=every)
    model = AutoModelForCausalLM.from_pretrained(out)
    name = family if family.startswith("qwen") else ("cwm" if every else "mistral")
    assert type(model).__name__.lower() == f"{name}forcausallm"
    assert model.config.sliding_window == WINDOW
    if name != "mistral":
        assert model.config.layer_types == ([SLIDING, FULL] * 2 if every else [SLIDING] * 4)
    source = ModelSource("out", out)
    perplexities = [
        evaluate_text(source, TextEvalConfig(text_file, 32, 4, engine=engine))["perplexity"]
        for engine in ("runtime", "transformers")
    ]
    assert math.isfinite(perplexities[0])
    # float32 both; differences of 1e-5 in logits of some tens
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
    assert f"windows of {WINDOW}" in (out / "README.md").read_text()
    assert "attention inside the window" in (out / "report.html").read_text()
    conversion = report["conversion"]
    length, wide = 128, 2 if every else 0
    share = (wide + (4 - wide) * WINDOW / length) / 4
    assert conversion["kv_values"] == round(share * conversion["original_kv_values"])


def test_rope_and_tokens_of_a_llama_with_its_own_are_kept(model_folder, converted, tmp_path):
    """The class with windows by layer has another default for RoPE, and other special tokens."""
    rope = {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 5000.0,
    }  # fmt: skip
    for number, entries in enumerate(({"rope_parameters": rope}, {"rope_theta": 5000.0})):
        folder = shutil.copytree(model_folder("llama", layers=4), tmp_path / f"own{number}")
        config = json.loads((folder / "config.json").read_text())
        if "rope_theta" in entries:
            del config["rope_parameters"]
        (folder / "config.json").write_text(json.dumps(config | entries))
        converted(folder=folder, global_every=2, out=f"out{number}")
        out = tmp_path / f"out{number}"
        torch.testing.assert_close(
            logits_of(out)[:, :WINDOW], logits_of(folder)[:, :WINDOW], rtol=0, atol=1e-5
        )
        model = AutoModelForCausalLM.from_pretrained(out)
        assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)


def test_what_is_measured_is_what_transformers_attends(converted, stage_values):
    """Its own probabilities, of its eager attention, and the output of its windowed class."""
    out, folder, report = converted("llama", global_every=0)
    recipe = build_conversion(stage_values("llama", to="windows", window=WINDOW))
    tokens = calibration_tokens(recipe.calibration, resolve_model(folder), 128, torch.device("cpu"))
    original = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    windowed = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    first = []
    for model in (original, windowed):
        attention = model.model.layers[0].self_attn
        attention.register_forward_hook(lambda _m, _a, output: first.append(output[0]))
    with torch.inference_mode():
        attentions = original(tokens, output_attentions=True).attentions
        windowed(tokens)
    places = torch.arange(tokens.shape[1])
    inside = places[None] > places[:, None] - WINDOW
    for block, weights in zip(report["conversion"]["blocks"], attentions, strict=True):
        kept = (weights * inside).sum(-1)[:, :, WINDOW:].mean((0, 2))  # of each head
        # float32 sums of some thousand probabilities
        assert block["mass_kept"] == pytest.approx(float(kept.mean()), abs=1e-5)
        assert block["least_kept"] == pytest.approx(float(kept.min()), abs=1e-5)
    own, other = (output[:, WINDOW:] for output in first)
    error = float((own - other).square().sum() / own.square().sum())
    assert report["conversion"]["blocks"][0]["error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("by", ["mass", "error"])
def test_the_layers_that_lose_most_stay_global(by, converted):
    _, _, report = converted("qwen3", global_every=2, global_by=by)
    blocks = report["conversion"]["blocks"]
    lost = [block["error"] if by == "error" else 1 - block["mass_kept"] for block in blocks]
    chosen = [value for value, block in zip(lost, blocks, strict=True) if block["kind"] == "global"]
    assert sorted(chosen) == sorted(lost)[-2:]


def test_without_text_beyond_the_window_none_is_read(converted):
    _, _, report = converted("llama", window=60)
    assert report["calibration_sha256"] is None
    assert {block["mass_kept"] for block in report["conversion"]["blocks"]} == {None}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"global_every": 1}, "global_every = 1 is not possible: .* 2 to 4$"),
        ({"global_every": 5}, "global_every = 5 is not possible: .* 2 to 4$"),
        ({"window": 0}, "window"),
        ({"window": 128}, "window = 128 changes nothing: the model's context is 128 tokens"),
        ({"window": 32, "global_by": "mass"}, "global_by = mass .* give --seq-len 64, or"),
        ({"global_by": "chance"}, "global_by"),
        ({"kv_heads": 2}, "kv_heads is a setting of 'to: gqa', not of 'to: windows'"),
    ],
)
def test_what_cannot_be_is_refused(stage, message, converted):
    with pytest.raises(InputError, match=message):
        converted("llama", **stage)


def changed(model_folder, family, out, **entries):
    folder = shutil.copytree(model_folder(family, layers=4), out)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    return folder


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        ("mistral", {"sliding_window": 64}, "has windows of 64 tokens already"),
        ("cwm", {}, "has windows of 21 tokens already"),
        ("smollm3", {}, "is of type 'smollm3'; windows by layer are for llama, mistral, qwen2, qw"),
    ],
)
def test_models_without_such_a_class_are_refused(
    family, entries, message, model_folder, converted, tmp_path
):
    folder = changed(model_folder, family, tmp_path / "other", **entries)
    with pytest.raises(InputError, match=message):
        converted(folder=folder)


def test_the_recipe_is_read():
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "windows.yaml")
    assert recipe.stages[0].stages[0].global_every == 5
