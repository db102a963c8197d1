"""`compress prune` from checkpoint to checkpoint: what is kept, that it loads, and bad input."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress import pruning
from compress.calibration import calibration_tokens
from compress.cli import main
from compress.core.errors import InputError
from compress.core.source import ModelSource, resolve_model
from compress.evaluate import TextEvalConfig, evaluate_text
from compress.prune import stock
from compress.pruning import run_pruning
from compress.recipe import CalibrationConfig, build_pruning
from tests.compress.test_resume import kill

# of the tiny models: 48 channels, 80 neurons, 6 heads on 2 KV heads
AXES = {
    "depth": {"depth": 3},
    "ffn": {"ffn": 56},
    "heads": {"heads": 4},
    "kv_heads": {"heads": 3, "kv_heads": 1},
    "hidden": {"hidden": 40},
}
ALL = {"layers_out": 1, "ffn": 56, "heads": 4, "hidden": 40}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


def logits_of(folder):
    tokens = torch.randint(3, 120, (4, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits


def silence(folder, head_dim):
    """Let some units of a checkpoint give exactly zero: block 2, a quarter of the neurons, heads 1
    and 5, and every sixth hidden channel."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if ".2." in name and ("o_proj" in name or "down_proj" in name):
            value.zero_()
        if "up_proj" in name:
            value[::4] = 0
        if "o_proj.weight" in name:
            for head in (1, 5):
                value[:, head * head_dim : (head + 1) * head_dim] = 0
        if "embed_tokens" in name:
            value[:, ::6] = 0
        if "o_proj" in name or "down_proj" in name:
            value[::6] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_taking_out_what_gives_zero_changes_nothing(family, model_folder, stage_values, tmp_path):
    """Block, neurons, heads and channels, each and together; the gains make up for the mean square
    of a norm that is now over fewer channels."""
    folder = shutil.copytree(model_folder(family, layers=4), tmp_path / "silent")
    silence(folder, json.loads((folder / "config.json").read_text()).get("head_dim", 8))
    expected = logits_of(folder)
    cases = {"depth": {"depth": 3}, "ffn": {"ffn": 60}, "heads": {"heads": 4}}
    cases |= {"hidden": {"hidden": 40}, "all": {"depth": 3, "ffn": 60, "heads": 4, "hidden": 40}}
    for name, asked in cases.items():
        run_pruning(build_pruning(stage_values(folder=folder, out=name, **asked, damping=1e-6)))
        found = logits_of(tmp_path / name)
        # float32, with sums in another order and a refit that solves for the same weights; logits
        # reach some tens
        scale = expected.abs().max()
        assert (found - expected).abs().max() < 2e-4 * scale, name


def indices(ranges, count):
    """The indices that a report gives as 0-3,5."""
    if ranges == "all":
        return list(range(count))
    pairs = [part.partition("-") for part in ranges.split(",")]
    return [i for low, _, high in pairs for i in range(int(low), int(high or low) + 1)]


def cut_by_hand(folder, report, head_dim):
    """The tensors that a pruned model without refit should have, from the original's."""
    pruning, original = report["pruning"], load_file(folder / "model.safetensors")
    hidden = indices(pruning["hidden"], 48)
    blocks = {block["block"]: (n, block) for n, block in enumerate(pruning["blocks"])}
    expected = {}
    for name, value in original.items():
        if ".layers." not in name:
            expected[name] = value[..., hidden]
            continue
        number, _, leaf = name.partition(".layers.")[2].partition(".")
        if int(number) not in blocks:
            continue
        place, block = blocks[int(number)]
        queries, keys = (
            [h * head_dim + i for h in indices(block[key], count) for i in range(head_dim)]
            for key, count in (("heads", 6), ("kv_heads", 2))
        )
        ffn = indices(block["ffn"], 80)
        rows = {"q": queries, "k": keys, "v": keys, "o": hidden}
        rows |= {"gate": ffn, "up": ffn, "down": hidden}
        columns = {"o": queries, "down": ffn}
        linear = leaf.split(".")[1].removesuffix("_proj")
        if leaf.split(".")[0].endswith("layernorm"):
            value = value[hidden]
        elif linear in rows:
            value = value[rows[linear]]
            value = value[:, columns.get(linear, hidden)] if value.dim() == 2 else value
        expected[name.replace(f".layers.{number}.", f".layers.{place}.")] = value
    return expected


@pytest.mark.parametrize("score", ["contribution", "activation", "magnitude", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_refit_weights_are_those_that_are_kept(family, score, stage_values, tmp_path):
    depth_score = {"contribution": "influence", "activation": "influence"}.get(score, score)
    given = stage_values(family, **ALL, score=score, depth_score=depth_score, refit=False)
    report = run_pruning(build_pruning(given))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = cut_by_hand(Path(given["model"]), report, config["head_dim"])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert report["pruning"]["refitted"] == []
    for block in report["pruning"]["blocks"]:  # two of three heads on each KV head
        assert [head // 3 for head in indices(block["heads"], 6)] == [0, 0, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("axis", [*AXES, "all"])
def test_a_pruned_model_is_a_stock_model(family, axis, stage_values, tmp_path, text_file):
    """It loads in transformers, with as many parameters as reported, and in our runtime, which
    scores a text the same."""
    asked = AXES.get(axis, ALL)
    report = run_pruning(build_pruning(stage_values(family, **asked)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == report["sizes"]["parameters"]
    assert report["sizes"]["parameters"] < report["sizes"]["original_parameters"]
    odd_llama = family == "llama" and axis == "hidden"  # 40 channels of 6 heads
    assert type(model).__name__.lower().startswith("mistral" if odd_llama else family)
    source = ModelSource("out", tmp_path / "out")
    perplexities = [
        evaluate_text(source, TextEvalConfig(text_file, 32, 4, engine=engine))["perplexity"]
        for engine in ("runtime", "transformers")
    ]
    assert math.isfinite(perplexities[0])
    # float32 both; differences of 1e-5 in logits of some tens
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
    for linear in report["pruning"]["refitted"]:
        assert linear["error"] <= linear["cut_error"]


def test_the_refit_is_what_is_reported(stage_values, tmp_path, text_file):
    """Fewer neurons: the one linear that reads them loses less with the refit than without."""
    report = run_pruning(build_pruning(stage_values(ffn=40)))
    refitted = report["pruning"]["refitted"]
    assert [linear["name"] for linear in refitted] == [
        f"model.layers.{n}.mlp.down_proj" for n in range(4)
    ]
    assert all(linear["error"] < 0.95 * linear["cut_error"] for linear in refitted)
    assert (tmp_path / "out" / "report.html").is_file()
    assert "80 to 40" in (tmp_path / "out" / "README.md").read_text()


def test_the_refit_looks_at_the_first_sequences(stage_values, tmp_path):
    """Scores by weights, so that the sequences matter to the refit alone."""
    given = stage_values(ffn=40, score="magnitude", refit_samples=2)
    run_pruning(build_pruning(given))
    given["calibration"] = given["calibration"] | {"samples": 2}
    run_pruning(build_pruning(given | {"out": tmp_path / "two"}))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "two")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("name", ["intermediate_size", "hidden_size"])
def test_a_class_that_takes_other_shapes_is_refused(name, stage_values, monkeypatch, tmp_path):
    """Before anything is written, whatever the config says."""
    right = stock.config_entries

    def wrong(config, target, layers):
        entries = right(config, target, layers)
        return entries | {name: entries[name] + 6}

    monkeypatch.setattr("compress.prune_preflight.config_entries", wrong)
    with pytest.raises(InputError, match=r"cannot be made depth 4, hidden 42.*takes"):
        run_pruning(build_pruning(stage_values(hidden=42)))
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_or_disk(stage_values, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.setattr("compress.preflight.free_memory", lambda: 1000)
        with pytest.raises(InputError, match="of memory, and 1 kB are free"):
            run_pruning(build_pruning(stage_values(ffn=40)))
    monkeypatch.setattr("compress.core.outfolder.free_disk", lambda _: 1000)
    with pytest.raises(InputError, match="of disk while it is made"):
        run_pruning(build_pruning(stage_values(ffn=40)))
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_unknown_parts_can_be_removed(stage_values, tmp_path):
    """Phi 3 has fused projections."""
    report = run_pruning(build_pruning(stage_values("phi3", depth=2)))
    assert len(report["pruning"]["removed_blocks"]) == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
    with pytest.raises(InputError, match="known are attention of"):
        run_pruning(build_pruning(stage_values("phi3", out="other", ffn=40)))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_removal_losses(family, stage_values, tmp_path, model_folder):
    """As those of models from whose lists of blocks one was taken out."""
    given = stage_values(family, depth=3, depth_score="removal", removal_samples=2)
    given["compute_dtype"] = "float32"
    report = run_pruning(build_pruning(given))
    tokens = calibration_tokens(
        CalibrationConfig(given["calibration"]["source"], 8, 32),
        resolve_model(given["model"]),
        1 << 30,
        torch.device("cpu"),
    )[:2]
    losses = []
    for index in (None, 0, 1, 2, 3):
        model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
        if index is not None:
            del model.model.layers[index]
            model.config.num_hidden_layers = 3
        with torch.inference_mode():
            losses.append(float(model(tokens, labels=tokens, use_cache=False).loss))
    expected = [loss - losses[0] for loss in losses[1:]]
    # differences of float32 losses of about 5, whose logits of some tens are off by 1e-5
    assert report["pruning"]["depth_scores"] == pytest.approx(expected, abs=1e-4)
    assert report["pruning"]["removed_blocks"] == [expected.index(min(expected))]


def test_removal_losses_of_a_broken_off_run_are_kept(stage_values, monkeypatch, tmp_path):
    right, calls = pruning.loss_without, []

    def counted(model, block, tokens):
        if len(calls) == 2:
            calls.append("broken off")
            raise KeyboardInterrupt
        calls.append(block)
        return right(model, block, tokens)

    monkeypatch.setattr(pruning, "loss_without", counted)
    recipe = build_pruning(stage_values(depth=3, depth_score="removal"))
    with pytest.raises(KeyboardInterrupt):
        run_pruning(recipe)
    report = run_pruning(recipe)
    assert len(calls) == 1 + 1 + 4  # the whole model, each block, and the one that broke off
    again = run_pruning(build_pruning(stage_values(depth=3, depth_score="removal", out="again")))
    assert again["pruning"]["depth_scores"] == report["pruning"]["depth_scores"]


def test_killed_before_every_step(stage_values, model_folder, tmp_path):
    (tmp_path / "place").mkdir()
    given = stage_values(folder=model_folder(layers=2)) | {"stages": [{"method": "prune", **ALL}]}
    given.pop("out")
    found = kill(given, tmp_path / "place" / "out", "every")
    assert found["killed"] > 20  # a commit for each block in both walks, parts, side files
    assert {"model.safetensors", "compress.json", "config.json"} < set(found["files"])


def test_the_command(stage_values, tmp_path, text_file):
    given = stage_values()
    command = ["prune", given["model"], "--ffn", "56", "--calibration", str(text_file)]
    command += ["--samples", "8", "--seq-len", "32", "--out"]
    done = CliRunner().invoke(main, [*command, str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["pruning"]["shape"]["ffn"] == 56
    shown = CliRunner().invoke(main, [*command, str(tmp_path / "shown")])
    assert "ffn 80 to 56" in shown.stdout
    assert "down_proj" in shown.stdout


@pytest.mark.parametrize("more", [["--ffn", "56"], ["--target-params", "45k"]])
def test_a_dry_run_writes_nothing_and_foretells_sizes(more, stage_values, tmp_path, text_file):
    given = stage_values()
    command = ["prune", given["model"], *more, "--calibration", str(text_file), "--samples", "8"]
    command += ["--seq-len", "32", "--out", str(tmp_path / "out")]
    plan = CliRunner().invoke(main, [*command, "--dry-run", "--json"])
    shown = CliRunner().invoke(main, [*command, "--dry-run"])
    assert plan.exit_code == shown.exit_code == 0, plan.output
    assert list(tmp_path.iterdir()) == []
    assert "nothing was written" in shown.stdout
    plan = json.loads(plan.stdout)
    report = run_pruning(build_pruning(given | {"stages": [{"ffn": 56}]}))
    if "--ffn" in more:
        assert plan["shape"] == report["pruning"]["shape"]
        assert plan["output_parameters"] == report["sizes"]["parameters"]
        assert plan["output_bytes"] == report["sizes"]["bytes"]
        assert "ffn 80 to 56" in shown.stdout
    else:
        assert plan["shape"] is None
        assert plan["output_parameters"] == report["sizes"]["original_parameters"]  # at most


def test_what_libraries_print_is_not_among_the_results(
    stage_values, tmp_path, text_file, monkeypatch
):
    """Trackers such as trackio print to standard output."""
    monkeypatch.setattr("compress.pruning.write_report", lambda folder: print("a library speaks"))
    command = ["prune", stage_values()["model"], "--ffn", "56", "--calibration", str(text_file)]
    command += ["--samples", "8", "--seq-len", "32", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(main, command)
    assert json.loads(done.stdout)["pruning"]
    assert "a library speaks" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--depth", "0"], "depth = 0 is not possible: the model has 4; give 1 to 4"),
        (["--heads", "5"], "possible are 2, 4, 6"),
        (["--hidden", "4096"], "hidden = 4096 is not possible: the model has 48"),
        ([], "nothing would be pruned"),
        (["--ffn", "40", "--score", "taylor"], "score"),
        (["--ffn", "40", "--set", "dampin=1"], "did you mean 'damping'"),
        (["--ffn", "40", "--calibration", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(more, message, stage_values, tmp_path):
    command = ["prune", stage_values()["model"], "--out", str(tmp_path / "out"), *more]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
