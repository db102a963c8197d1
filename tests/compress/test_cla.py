"""`compress convert --to cla`: what is exact, what is measured, who loads it, and bad input."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compress.calibration import calibration_tokens
from compress.cli import main
from compress.conversion import run_conversion
from compress.core.errors import InputError
from compress.core.own_class import ONLY_HERE
from compress.core.source import ModelSource, resolve_model
from compress.distillation import run_distillation
from compress.evaluate import TextEvalConfig, evaluate_text
from compress.loading import load_model
from compress.pruning import run_pruning
from compress.recipe import build_conversion, build_distillation, build_pruning
from compress.recipe_file import load_recipe
from compress.shapes import find_shape
from tests.compress.test_resume import kill

# Qwen2 has biases, Qwen3 norms on queries and keys
FAMILIES = ("llama", "qwen2", "mistral", "qwen3")
TOKENS = torch.randint(3, 120, (4, 48), generator=torch.Generator().manual_seed(0))
CLA = {"method": "convert", "to": "cla", "share": 2}


@torch.inference_mode()
def logits_of(folder):
    return load_model(folder)(TOKENS).logits


@pytest.fixture
def converted(stage_values, tmp_path):
    """A function that converts a tiny model in float32: the folder, the original, the report."""

    def make(family="llama", **stage):
        given = stage_values(family, to="cla", **{"share": 2, **stage})
        report = run_conversion(build_conversion(given | {"compute_dtype": "float32"}))
        return Path(given["out"]), given["model"], report

    return make


def changed(folder, out, change):
    """A copy of a model with other weights."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_give_nothing_cost_nothing(family, refit, model_folder, converted, tmp_path):
    """Where the second layer's attention has no effect, the shared keys and values are, but for
    what may be undone, the first one's."""

    def silence(tensors):
        for index in (1, 3):
            tensors[f"model.layers.{index}.self_attn.o_proj.weight"].zero_()

    folder = changed(model_folder(family, layers=4), tmp_path / "silent", silence)
    expected = logits_of(folder)
    out, _, report = converted(folder=folder, refit=refit)
    # float32, and a millionth of the energy, by which a layer of no effect counts
    assert (logits_of(out) - expected).abs().max() < 3e-3 * expected.abs().max()
    blocks = report["conversion"]["blocks"]
    assert [block["reads"] for block in blocks] == ["its own", "layer 0", "its own", "layer 2"]
    assert max(blocks[0]["values_lost"], blocks[0]["keys_lost"]) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_agree_share_without_loss(family, model_folder, converted, tmp_path):
    """The second layer sees what the first did, with the same keys and values but for what may be
    undone: other heads in its place, and without norms a turn and a scale, and values mixed."""
    config = json.loads((model_folder(family, layers=4) / "config.json").read_text())
    head_dim = config.get("head_dim", 8)
    half = head_dim // 2
    draw = torch.Generator().manual_seed(0)
    angle = 6.3 * torch.rand(half, 1, generator=draw)
    factor = torch.polar(1 + angle / 6, angle)
    mix = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=draw))[0]

    def agree(tensors):
        for name, value in tensors.items():
            if "q_norm" in name:  # whose gain goes into the projection
                value.fill_(1.3)
        for first in (0, 2):
            here, there = (f"model.layers.{index}" for index in (first, first + 1))
            for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                tensors[f"{here}.{name}"].zero_()
            for name in tensors:
                if name.startswith(there) and any(x in name for x in ("k_", "v_", "input_")):
                    tensors[name].copy_(tensors[name.replace(there, here)])
            for name, value in tensors.items():
                if not name.startswith(there) or not any(x in name for x in ("k_proj", "v_proj")):
                    continue
                heads = value.view(2, head_dim, -1).flip(0)
                if "v_proj" in name:
                    heads = mix @ heads
                elif family != "qwen3":
                    turned = torch.complex(heads[:, :half], heads[:, half:]) * factor
                    heads = torch.cat([turned.real, turned.imag], dim=1)
                value.copy_(heads.reshape(value.shape))

    folder = changed(model_folder(family, layers=4), tmp_path / "alike", agree)
    expected = logits_of(folder)
    out, _, report = converted(folder=folder, refit=False)
    # float32 moments, whose small eigenvalues are lost
    assert (logits_of(out) - expected).abs().max() < 2e-3 * expected.abs().max()
    for block in report["conversion"]["blocks"][1::2]:  # the others give nothing
        assert block["keys_lost"] < 1e-5
        assert block["values_lost"] < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_out(family, converted, text_file):
    """Keys and values in every second layer alone, and the same perplexity by both engines."""
    out, _, report = converted(family)
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    keys = {name.split(".")[2] for name in tensors if "k_proj" in name or "v_proj" in name}
    assert keys == {"0", "2"}
    assert (config["model_type"], config["kv_share"]) == (f"{family}_cla", 2)
    sizes = report["sizes"]
    assert sum(tensor.numel() for tensor in tensors.values()) == sizes["parameters"]
    assert sizes["parameters"] < sizes["original_parameters"]
    conversion = report["conversion"]
    assert 2 * conversion["kv_values"] == conversion["original_kv_values"]
    source = ModelSource("out", out)
    found = [
        evaluate_text(source, TextEvalConfig(text_file, 32, 4, engine=engine))["perplexity"]
        for engine in ("runtime", "transformers")
    ]
    assert math.isfinite(found[0])
    # float32 both; differences of 1e-5 in logits of some tens
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    shape = find_shape(str(out))
    assert shape.kv_share == 2
    assert len(shape.kv_groups) == 2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_run_that_is_shorter(family, converted, stage_values, model_folder):
    """Four layers in runs of three: the last is one layer, which stays as it is."""
    out, folder, report = converted(family, share=3)
    before, after = (load_file(f"{place}/model.safetensors") for place in (folder, out))
    last = {name for name in before if name.startswith("model.layers.3.")}
    assert all(torch.equal(before[name], after[name]) for name in last)
    assert [block["reads"] for block in report["conversion"]["blocks"]] == [
        "its own", "layer 0", "layer 0", "its own"
    ]  # fmt: skip
    assert report["conversion"]["changes"] == {"layers with keys and values of their own": (4, 2)}
    assert report["conversion"]["words"].endswith("shared by 3 layers, the last run of 1")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_refit_is_what_is_reported(family, converted, stage_values):
    """The error of each attention's output, computed anew: both models' attention on what the
    original's layers are given, with keys and values of the converted first layer."""
    out, folder, report = converted(family)
    recipe = build_conversion(stage_values(family, to="cla", share=2))
    tokens = calibration_tokens(recipe.calibration, resolve_model(folder), 128, torch.device("cpu"))
    original, other = load_model(Path(folder)), load_model(out)
    found, handed = [], [None]

    def beside(index):
        def hook(_module, args, kwargs, output):
            attention = other.model.layers[index].self_attn
            given = handed[0] if index % 2 else None
            converted, *keys_values = attention(*args, **kwargs, handed=given)
            handed[0] = tuple(keys_values)
            found.append(float((output[0] - converted).square().sum() / output[0].square().sum()))

        return hook

    for index, layer in enumerate(original.model.layers):
        layer.self_attn.register_forward_hook(beside(index), with_kwargs=True)
    with torch.inference_mode():
        original(tokens, use_cache=False)
    for error, block in zip(found, report["conversion"]["blocks"], strict=True):
        assert error == pytest.approx(block["error"], rel=2e-3)  # float32 sums
        assert block["error"] < block["merged_error"]


def test_only_compress_loads_it(converted):
    """transformers alone refuses it; the card, compress.json and `inspect --target` say so."""
    out, _, report = converted()
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(out)!r})"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert alone.returncode != 0
    assert "model type `llama_cla`" in alone.stderr
    card = (out / "README.md").read_text()
    assert "only compress loads this model" in card
    assert "import compress.core.cross_layer" in card
    assert json.loads((out / "compress.json").read_text())["loads_in"] == ONLY_HERE
    assert report["loads_in"] == ONLY_HERE
    for target in ("vllm", "sglang", "transformers"):
        said = CliRunner().invoke(main, ["inspect", str(out), "--target", target, "--json"])
        assert said.exit_code == 1
        assert json.loads(said.stdout)["loads"] is False
        assert json.loads(said.stdout)["reasons"] == [ONLY_HERE]
    assert "only compress loads" in " ".join(
        CliRunner().invoke(main, ["inspect", str(out)]).stdout.replace("│", " ").split()
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_killed_before_every_step(family, stage_values, model_folder, tmp_path):
    (tmp_path / "place").mkdir()
    given = stage_values(folder=model_folder(family, layers=3)) | {"stages": [CLA]}
    given.pop("out")
    found = kill(given, tmp_path / "place" / "out", "every")
    assert found["killed"] > 15  # a commit for each block in both walks, parts, side files


@pytest.mark.parametrize(
    "stage",
    [
        {"method": "rtn", "group_size": 16},
        {"method": "gptq", "group_size": 16},
        {"method": "awq", "group_size": 16, "scale_points": 3, "clip_points": 3},
    ],
)
def test_quantized_afterwards(stage, stage_values, tmp_path, text_file):
    """As a chain, for the runtime and for transformers alike; with scales of keys and values of
    the layers that have some."""
    from compress.chain import run_chain

    given = stage_values()
    given["stages"] = [CLA, stage]
    given["eval"] = {"text": given["calibration"]["source"], "windows": 4, "seq_len": 32}
    if stage["method"] == "gptq":
        given["kv_cache"] = "int8"
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**given, "out": str(given["out"])}))
    run_chain(load_recipe(path))
    out = tmp_path / "out"
    tensors = load_file(out / "model.safetensors")
    packed = {name for name in tensors if name.endswith("weight_packed")}
    assert len(packed) == 4 * 7 - 2 * 2
    scales = {name.split(".")[2] for name in tensors if name.endswith("k_scale")}
    assert scales == ({"0", "2"} if stage["method"] == "gptq" else set())
    assert "only compress loads this model" in (out / "README.md").read_text()
    found = [
        evaluate_text(ModelSource("out", out), TextEvalConfig(text_file, 32, 4, engine=engine))
        for engine in ("runtime", "transformers")
    ]
    # the runtime rounds keys and values to the scales' codes, transformers too, some otherwise
    rel = 1e-2 if stage["method"] == "gptq" else 1e-3
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=rel)


def test_healing_brings_it_nearer_to_the_original(stage_values, model_folder, text_file, tmp_path):
    """Attention's outputs first, then logits, as in recipes/cla.yaml."""

    def stir(tensors):  # as initialized it predicts next to nothing
        draw = torch.Generator().manual_seed(0)
        for tensor in tensors.values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=draw))

    original = changed(model_folder(layers=4), tmp_path / "original", stir)
    run_conversion(build_conversion(stage_values(folder=original, to="cla", share=2, refit=False)))
    model, kl = tmp_path / "out", []
    for name, loss in (
        ("a", {"forward_kl": 0.1, "attention_mse": 1.0, "hidden_mse": 0.1}),
        ("b", {}),
    ):
        train = {"tokens": 16 * 4 * 32, "seq_len": 32, "batch_size": 4, "precision": "float32"}
        stage = {"teacher": str(original), "data": {"source": str(text_file)}, "train": train}
        stage |= {"loss": loss} if loss else {}
        values = {
            "model": str(model),
            "out": tmp_path / name,
            "stages": [{"method": "distill", **stage}],
        }
        run_distillation(build_distillation(values))
        config = TextEvalConfig(text_file, 32, 8)
        for folder in (model, tmp_path / name):
            source, against = ModelSource("x", folder), ModelSource("y", original)
            kl.append(evaluate_text(source, config, against)["kl_mean"])
        model = tmp_path / name
    assert kl[0] > kl[1] > kl[3]
    assert (model / "config.json").read_text().count("llama_cla") == 1


def test_the_command(stage_values, tmp_path, text_file):
    command = ["convert", stage_values()["model"], "--to", "cla", "--share", "2"]
    command += ["--calibration", str(text_file), "--samples", "8", "--seq-len", "32", "--out"]
    plan = CliRunner().invoke(main, [*command, str(tmp_path / "out"), "--dry-run", "--json"])
    assert plan.exit_code == 0, plan.output
    assert list(tmp_path.iterdir()) == []
    done = CliRunner().invoke(main, [*command, str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert json.loads(plan.stdout)["output_bytes"] == report["sizes"]["bytes"]
    shown = CliRunner().invoke(main, [*command, str(tmp_path / "shown")])
    assert "50.0%" in shown.stdout
    assert "only compress loads" in " ".join(shown.stdout.replace("│", " ").split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "share is not given"),
        (["--share", "1"], "share"),
        (["--share", "5"], "share = 5 is not possible: the model has 4 layers; give 2 to 4"),
        (["--share", "2", "--kv-heads", "1"], "kv_heads is a setting of 'to: gqa'"),
        (["--share", "2", "--set", "dampin=1"], "did you mean 'damping'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(more, message, stage_values, tmp_path):
    command = ["convert", stage_values()["model"], "--to", "cla", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*command, *more])
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        ("granite", {}, "is of type 'granite'; layers that share keys and values are for llama"),
        ("deepseek_v3", {}, "known are attention of q_proj, k_proj, v_proj, o_proj"),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "layers 0 to 1 of .* would share keys and values, and some have a window",
        ),
    ],
)
def test_models_that_cannot_share_are_refused(
    family, entries, message, model_folder, converted, tmp_path
):
    folder = shutil.copytree(model_folder(family, layers=4), tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(InputError, match=message):
        converted(folder=folder)


def test_what_shares_already_is_refused(converted, stage_values):
    out, _, _ = converted()
    for stage in ({"to": "cla", "share": 2}, {"to": "gqa", "kv_heads": 1}):
        given = stage_values(folder=out, out="again", **stage)
        with pytest.raises(InputError, match="shares keys and values between layers already"):
            run_conversion(build_conversion(given))
    for axis in ("depth", "ffn"):
        given = stage_values(folder=out, out="again", method="prune", **{axis: 3})
        with pytest.raises(InputError, match="shares keys and values between layers already"):
            run_pruning(build_pruning(given))


def test_the_recipe_is_read():
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "cla.yaml")
    assert recipe.stages[0].stages[0].share == 2
