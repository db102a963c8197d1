"""`compress convert` from checkpoint to checkpoint: what is exact, that it loads, and bad input."""

import json
import math
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.cli import main
from compress.conversion import run_conversion
from compress.core.errors import InputError
from compress.core.source import ModelSource
from compress.evaluate import TextEvalConfig, evaluate_text
from compress.recipe import build_conversion
from compress.recipe_file import load_recipe
from tests.compress.test_resume import kill

# of the tiny models: 6 heads on 2 KV heads; Qwen2 has biases, Qwen3 norms on queries and keys
FAMILIES = ("llama", "qwen2", "mistral", "qwen3")
ONE = {"method": "convert", "to": "gqa", "kv_heads": 1}


def logits_of(folder):
    tokens = torch.randint(3, 120, (4, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits


def make_alike(folder, head_dim, turn):
    """Let the second KV head's keys be the first's, turned and scaled pair by pair if `turn`, and
    its values the first's, mixed; with biases where there are some."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    half = head_dim // 2
    for name, value in tensors.items():
        if "v_proj" in name:
            mix = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator))[0]
            value[head_dim:] = mix @ value[:head_dim]
        elif "k_proj" in name:
            key = torch.complex(value[:half], value[half:head_dim])
            if turn:
                angle = 6.3 * torch.rand(half, generator=torch.Generator().manual_seed(len(name)))
                factor = torch.polar(1 + angle / 3, angle)
                key = key * (factor[:, None] if value.dim() == 2 else factor)
            value[head_dim:] = torch.cat([key.real, key.imag])
    # weight and bias of one linear are turned by one factor, and mixed by one matrix
    for name in [name for name in tensors if name.endswith(("k_proj.bias", "v_proj.bias"))]:
        weight = tensors[name.replace("bias", "weight")].double()
        onto = weight[head_dim:] @ torch.linalg.pinv(weight[:head_dim])
        tensors[name][head_dim:] = (onto @ tensors[name][:head_dim].double()).float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_alike_heads_are_merged_exactly(family, refit, model_folder, stage_values, tmp_path):
    """Alike but for what may be undone; under norms on keys that is nothing."""
    folder = shutil.copytree(model_folder(family, layers=4), tmp_path / "alike")
    head_dim = json.loads((folder / "config.json").read_text()).get("head_dim", 8)
    make_alike(folder, head_dim, turn=family != "qwen3")
    expected = logits_of(folder)
    given = stage_values(folder=folder, to="gqa", kv_heads=1, refit=refit)
    report = run_conversion(build_conversion(given | {"compute_dtype": "float32"}))
    # float32, with products in another order; logits reach some tens
    assert (logits_of(tmp_path / "out") - expected).abs().max() < 2e-4 * expected.abs().max()
    for block in report["conversion"]["blocks"]:
        assert block["groups"] == [[0, 1]]
        # the moments are sums of float32 products
        assert block["values_lost"] == pytest.approx([0], abs=1e-6)
        assert block["keys_lost"] == pytest.approx([0], abs=1e-6)
        assert bool(block["note"]) == (family == "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_is_a_stock_model(family, stage_values, tmp_path, text_file):
    """It loads in transformers, with as many parameters as reported, and in our runtime, which
    scores a text the same."""
    report = run_conversion(build_conversion(stage_values(family, to="gqa", kv_heads=1)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__.lower().startswith(family)
    assert model.config.num_key_value_heads == 1
    assert sum(p.numel() for p in model.parameters()) == report["sizes"]["parameters"]
    source = ModelSource("out", tmp_path / "out")
    perplexities = [
        evaluate_text(source, TextEvalConfig(text_file, 32, 4, engine=engine))["perplexity"]
        for engine in ("runtime", "transformers")
    ]
    assert math.isfinite(perplexities[0])
    # float32 both; differences of 1e-5 in logits of some tens
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
    assert report["conversion"]["kv_values"] * 2 == report["conversion"]["original_kv_values"]
    assert "1 KV head, merged" in (tmp_path / "out" / "README.md").read_text()
    assert 'id="conversion"' in (tmp_path / "out" / "report.html").read_text()


def test_the_mean_without_refit_is_the_mean_of_the_heads(stage_values, tmp_path):
    given = stage_values("qwen2", to="gqa", kv_heads=1, merge="mean", refit=False)
    run_conversion(build_conversion(given))
    before = load_file(f"{given['model']}/model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, value in before.items():
        if "k_proj" in name or "v_proj" in name:
            value = value.unflatten(0, (2, -1)).mean(0)
        # the output projection is multiplied by an identity, and means are rounded once
        assert torch.allclose(after[name], value, rtol=1e-6, atol=1e-7), name


def test_the_refit_is_what_is_reported(stage_values, tmp_path):
    """The error of the attention's output, on the text it was solved for: computed anew, by
    running both models' attention on what the original's blocks are given."""
    given = stage_values("llama", to="gqa", kv_heads=1) | {"compute_dtype": "float32"}
    report = run_conversion(build_conversion(given))
    for block in report["conversion"]["blocks"]:
        assert block["error"] < block["merged_error"]
    from compress.calibration import calibration_tokens
    from compress.core.source import resolve_model

    recipe = build_conversion(given)
    source = resolve_model(given["model"])
    tokens = calibration_tokens(recipe.calibration, source, 128, torch.device("cpu"))
    original = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    outputs = []

    def beside(index):
        def hook(_module, args, kwargs, output):
            other = converted.model.layers[index].self_attn(*args, **kwargs)[0]
            outputs.append((output[0], other))

        return hook

    for index, layer in enumerate(original.model.layers):
        layer.self_attn.register_forward_hook(beside(index), with_kwargs=True)
    with torch.inference_mode():
        original(tokens, use_cache=False)
    for (own, other), block in zip(outputs, report["conversion"]["blocks"], strict=True):
        found = float((own - other).square().sum() / own.square().sum())
        assert found == pytest.approx(block["error"], rel=1e-3)  # float32 sums


def test_killed_before_every_step(stage_values, model_folder, tmp_path):
    (tmp_path / "place").mkdir()
    given = stage_values(folder=model_folder(layers=2)) | {"stages": [ONE]}
    given.pop("out")
    found = kill(given, tmp_path / "place" / "out", "every")
    assert found["killed"] > 15  # a commit for each block in both walks, parts, side files
    assert {"model.safetensors", "compress.json", "config.json"} < set(found["files"])


def test_a_stage_of_a_chain(stage_values, tmp_path):
    """Converted, then quantized, with what each cost."""
    from compress.chain import run_chain

    given = stage_values()
    text = given["calibration"]["source"]
    given["stages"] = [ONE, {"method": "rtn", "group_size": 16}]
    given["eval"] = {"text": text, "windows": 4, "seq_len": 32}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**given, "out": str(given["out"])}))
    report = run_chain(load_recipe(path))
    assert [stage["method"] for stage in report["stages"]] == ["convert", "rtn"]
    assert report["stages"][0]["conversion"]["changes"] == {"KV heads": [2, 1]}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_key_value_heads"] == 1
    assert config["quantization_config"]


def test_the_command(stage_values, tmp_path, text_file):
    command = ["convert", stage_values()["model"], "--to", "gqa", "--kv-heads", "1"]
    command += ["--calibration", str(text_file), "--samples", "8", "--seq-len", "32", "--out"]
    plan = CliRunner().invoke(main, [*command, str(tmp_path / "out"), "--dry-run", "--json"])
    assert plan.exit_code == 0, plan.output
    assert list(tmp_path.iterdir()) == []
    done = CliRunner().invoke(main, [*command, str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert json.loads(plan.stdout)["output_bytes"] == report["sizes"]["bytes"]
    assert json.loads(plan.stdout)["conversion"]["changes"] == {"KV heads": [2, 1]}
    shown = CliRunner().invoke(main, [*command, str(tmp_path / "shown")])
    assert "2 to 1" in shown.stdout
    assert "50.0% fewer" in shown.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--to", "mqa", "--kv-heads", "1"], "'to' = 'mqa' is unknown; allowed: gqa"),
        (["--to", "gqa"], "kv_heads is not given"),
        (["--to", "gqa", "--kv-heads", "0"], "kv_heads"),
        (["--to", "gqa", "--kv-heads", "2"], "the model has 2, which come together in groups of"),
        (["--to", "gqa", "--kv-heads", "3"], "possible are 1"),
        (["--to", "gqa", "--kv-heads", "1", "--merge", "median"], "merge"),
        (["--to", "gqa", "--kv-heads", "1", "--set", "dampin=1"], "did you mean 'damping'"),
        (["--to", "gqa", "--kv-heads", "1", "--calibration", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(more, message, stage_values, tmp_path):
    command = ["convert", stage_values()["model"], "--out", str(tmp_path / "out"), *more]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_one_kv_head_is_as_few_as_there_are(stage_values, tmp_path):
    given = stage_values(to="gqa", kv_heads=1)
    run_conversion(build_conversion(given))
    again = given | {"model": str(tmp_path / "out"), "out": tmp_path / "again"}
    with pytest.raises(InputError, match="1 KV heads of 6 heads; there are no fewer"):
        run_conversion(build_conversion(again))
