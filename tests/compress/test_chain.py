"""Recipes of several stages: that they are the stages by hand, what is reported, and bad input."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from compress import chain
from compress.chain import run_chain
from compress.chain_recipe import build_chain
from compress.cli import main
from compress.core.errors import InputError
from compress.core.shards import hashed_file
from compress.core.source import ModelSource
from compress.distillation import run_distillation
from compress.dry_run import plan_chain
from compress.evaluate import TextEvalConfig, evaluate_text
from compress.pipeline import run_recipe
from compress.pruning import run_pruning
from compress.recipe import build_distillation, build_pruning, build_recipe
from tests.compress.chains import DISTILL, GPTQ, METHODS, PRUNE, noting_runs, three_stages


@pytest.fixture
def values(model_folder, text_file, tmp_path):
    return three_stages(model_folder(layers=4), text_file, tmp_path / "out")


@pytest.fixture
def ran(monkeypatch):
    return noting_runs(monkeypatch)


def weights_sum(folder):
    return hashed_file(Path(folder) / "model.safetensors")


def test_a_chain_is_its_stages_one_by_one(values, tmp_path, text_file):
    """Byte for byte; a stage's own calibration is laid over the recipe's."""
    run_chain(build_chain(values))
    prune, distill, gptq = values["stages"]
    data = values["calibration"]
    places = [str(tmp_path / name) for name in ("one", "two", "three")]
    starts = [values["model"], *places]
    first = {"model": starts[0], "out": places[0], "calibration": data, "stages": [prune]}
    run_pruning(build_pruning(first))
    taught = distill | {"teacher": values["model"]}
    second = {"model": starts[1], "out": places[1], "stages": [taught]}
    run_distillation(build_distillation(second))
    own = gptq.pop("calibration")
    third = {"model": starts[2], "out": places[2], "stages": [gptq], "calibration": data | own}
    run_recipe(build_recipe(third))
    assert weights_sum(tmp_path / "out") == weights_sum(places[2])
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (Path(places[2]) / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "three", "two"]


def test_what_a_chain_reports(values, tmp_path, text_file):
    report = run_chain(build_chain(values))
    out = tmp_path / "out"
    told = json.loads((out / "compress.json").read_text())
    assert json.loads(json.dumps({key: report[key] for key in told})) == told
    rows = told["stages"]
    assert [row["method"] for row in rows] == METHODS
    original = ModelSource("original", Path(values["model"]))
    found = evaluate_text(ModelSource("out", out), TextEvalConfig(text_file, 32, 4), original)
    assert rows[-1]["kl_mean"] == found["kl_mean"]
    assert rows[-1]["perplexity"] == found["perplexity"]
    assert told["eval"]["perplexity_original"] == found["perplexity_original"]
    # differences of float64 numbers add up but for rounding
    assert math.isclose(sum(row["kl_added"] for row in rows), found["kl_mean"], rel_tol=1e-12)
    assert rows[DISTILL]["kl_added"] < 0  # it was healed
    model = AutoModelForCausalLM.from_pretrained(original.folder)
    assert told["sizes"]["original_parameters"] == model.num_parameters()
    assert told["sizes"]["original_bytes"] == (original.folder / "model.safetensors").stat().st_size
    assert told["sizes"]["bytes"] == rows[-1]["bytes"] < rows[DISTILL]["bytes"]
    assert rows[PRUNE]["parameters"] < told["sizes"]["original_parameters"]
    assert rows[PRUNE]["pruning"]["shape"]["depth"] == 3
    assert rows[DISTILL]["training"]["steps"] == 4
    quality = json.loads((out / "quality.json").read_text())
    expected = found | {"text": text_file.name, "against": original.folder.name, "seed": 0}
    assert quality == {"texts": [expected], "tasks": []}
    assert len(json.loads((out / "run.json").read_text())["stage_seconds"]) == 3
    assert (out / "losses-2.jsonl").read_text().count("\n") >= 4


def test_the_page_and_the_card(values, tmp_path):
    run_chain(build_chain(values))
    out = tmp_path / "out"
    rows = json.loads((out / "compress.json").read_text())["stages"]
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    table = page[page.index('id="stage-table"') :]
    table = table[: table.index("</table>")]
    for row in rows:
        for key in ("parameters", "bytes", "perplexity", "kl_mean", "kl_added"):
            assert f'<data value="{row[key]}">' in table, key
        assert f"| {row['method']} | {row['parameters']:,} |" in card
    for place in ("pruning-1", "training-2"):
        assert page.count(f'<section id="{place}">') == 1
    assert "prune, distill, gptq" in card
    for path in out.iterdir():  # whatever a file says, it says no place of this machine
        if path.is_file() and path.suffix in (".json", ".md", ".html", ".jsonl"):
            assert str(tmp_path.parent) not in path.read_text(), path.name


def test_other_commands_take_the_result(values, tmp_path, text_file):
    values["eval"] = None
    run_chain(build_chain(values))
    out = str(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"compress eval out --against {Path(values['model']).name} --text FILE" in page
    seen = CliRunner().invoke(main, ["inspect", out, "--json"])
    assert seen.exit_code == 0, seen.output
    assert json.loads(seen.stdout)["quantization"]["quantized_linears"] == 21
    command = ["eval", out, "--text", str(text_file), "--windows", "2", "--seq-len", "16"]
    done = CliRunner().invoke(main, [*command, "--against", values["model"]])
    assert done.exit_code == 0, done.output
    assert "perplexity_ratio" in (tmp_path / "out" / "quality.json").read_text()
    assert "kl_mean" not in (tmp_path / "out" / "compress.json").read_text()


def test_measured_on_text_of_the_original(values, tmp_path, model_folder):
    """By hand with transformers: the windows are sampled from the original, and kept."""
    values["eval"] = {"windows": 3, "seq_len": 24}
    values["stages"] = values["stages"][:2]
    windows = []
    measure = chain.StagesFolder.measure

    def watched(self, index, original):
        measure(self, index, original)
        windows.append(self.eval.get("windows"))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chain.StagesFolder, "measure", watched)
        report = run_chain(build_chain(values))
    assert torch.equal(*windows)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (values["model"], tmp_path / "out")
    ]
    with torch.inference_mode():
        p, q = (model(windows[0]).logits[:, :-1].double().log_softmax(-1) for model in models)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    nll = -q.gather(-1, windows[0][:, 1:, None]).mean()
    # float32 logits of some tens by two programs, in another order of sums
    assert report["stages"][-1]["kl_mean"] == pytest.approx(kl.item(), rel=1e-4)
    assert report["stages"][-1]["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)
    assert "text that the original wrote" in (tmp_path / "out" / "report.html").read_text()


def teachers(recipe):
    return [stage.stages[0].teacher for stage in recipe.stages if hasattr(stage.stages[0], "train")]


def test_who_teaches(values):
    """The original, unless no loss asks for a teacher; or what an earlier stage gave."""
    prune, distill, gptq = values["stages"]
    alone = distill | {"loss": {"cross_entropy": 1}}
    own_text = alone | {"data": {"source": "self"}}
    corrected = distill | {"teacher": "stage 1"}
    recipe = build_chain(values | {"stages": [alone, own_text, prune, corrected, gptq]})
    first = str(recipe.stages[0].out)
    assert teachers(recipe) == [None, values["model"], first]
    assert recipe.stages[1].model == first


def test_in_every_stage_the_original_writes_the_text(values, tmp_path):
    """Not what it became; and no path to it stands in the report."""
    prune, _, gptq = values["stages"]
    del gptq["calibration"]
    values["calibration"] = {"source": "self", "samples": 3, "seq_len": 32}
    values["stages"] = [prune, gptq]
    recipe = build_chain(values)
    assert [stage.calibration.writer for stage in recipe.stages] == [None, values["model"]]
    report = run_chain(recipe)
    one, two = (stage["calibration_sha256"] for stage in report["stages"])
    assert one == two
    sources = [stage["calibration"]["source"] for stage in report["recipe"]["stages"]]
    assert sources == ["self", "self"]


def test_teacher_correction(values, tmp_path):
    """The teacher is trained on the text first, and what was pruned learns from that."""
    prune, distill, _ = values["stages"]
    alone = distill | {"loss": {"cross_entropy": 1}}
    values["stages"] = [alone, prune, distill | {"teacher": "stage 1"}]
    run_chain(build_chain(values))
    told = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert told["recipe"]["stages"][2]["teacher"] == "stage 1"
    assert "training" in told["stages"][0]
    places = [str(tmp_path / name) for name in ("one", "two", "three")]
    first = {"model": values["model"], "out": places[0], "stages": [alone]}
    run_distillation(build_distillation(first))
    data = values["calibration"]
    second = {"model": places[0], "out": places[1], "stages": [prune], "calibration": data}
    run_pruning(build_pruning(second))
    third = {"model": places[1], "out": places[2], "stages": [distill | {"teacher": places[0]}]}
    run_distillation(build_distillation(third))
    assert weights_sum(tmp_path / "out") == weights_sum(places[2])


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (PRUNE, {"ffn": 4096}, "stage 1 (prune): ffn = 4096 is not possible"),
        (PRUNE, {"calibration": {"source": "no.txt"}}, "stage 1 (prune): calibration file 'no.txt"),
        (DISTILL, {"data": {"source": "no.txt"}}, "stage 2 (distill): training file 'no.txt' does"),
        (DISTILL, {"teacher": "./absent"}, "stage 2 (distill): model folder './absent' does not"),
        (DISTILL, {"train": {"seq_len": 4096}}, "stage 2 (distill): seq_len is 4096"),
        (GPTQ, {"calibration": {"source": "no.txt"}}, "stage 3 (gptq): calibration file 'no.txt'"),
        (GPTQ, {"cross_moment": True}, "stage 3 (gptq): cross_moment compares"),
        (GPTQ, {"method": "llm-int8"}, "stage 3 (llm-int8): format bitsandbytes cannot hold"),
        ("eval", {"text": "no.txt"}, "eval: cannot read text"),
        ("eval", {"windows": 100_000}, "eval: text"),
        ("eval", {"text": "self", "seq_len": 4096}, "eval: seq_len is 4096"),
        ("model", "./absent", "model folder './absent' does not exist"),
    ],
)  # fmt: skip
def test_what_will_not_do_is_refused_before_any_work(stage, change, message, values, tmp_path, ran):
    if stage == GPTQ:
        values["propagate_error"] = False
    if "method" in change:
        values["stages"][stage].pop("group_size")
        values |= {"kv_cache": "int8", "propagate_error": True}
    if isinstance(stage, int):
        values["stages"][stage].update(change)
    else:
        values[stage] = change if isinstance(change, str) else {**values[stage], **change}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(main, ["run", str(tmp_path / "r.yaml")])
    assert done.exit_code == 2
    assert f"Error: {message}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    assert ran == []


def test_the_command(values, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    command = ["run", str(tmp_path / "r.yaml")]
    plan = json.loads(CliRunner().invoke(main, [*command, "--dry-run", "--json"]).stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml"]
    shown = CliRunner().invoke(main, [*command, "--activation-memory", "1MB"])
    assert shown.exit_code == 0, shown.output
    report = json.loads((tmp_path / "out" / "compress.json").read_text())
    planned = [(row["parameters"], row["bytes"]) for row in plan["stages"]]
    assert planned == [(row["parameters"], row["bytes"]) for row in report["stages"]]
    for row in report["stages"]:
        assert f"{row['parameters']:,}" in shown.stdout
        assert f"{row['kl_added']:+.4f}" in shown.stdout
    assert "Stage 2 of 3: distill" in shown.stderr
    again = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "two"), "--json"])
    assert json.loads(again.stdout)["stages"] == report["stages"]


def test_two_processes(values, tmp_path):
    """They agree on what is done, and the first measures and writes; no stage is in pieces."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--multi_gpu", "-m", "compress", "run", str(tmp_path / "r.yaml"), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    one = run_chain(build_chain(values | {"out": str(tmp_path / "one")}))
    two = json.loads(done.stdout)
    # the gradients and moments of half the text each are summed in float32 or bfloat16 in another
    # order, and codes that lay on an edge moved
    assert two["stages"][-1]["kl_mean"] == pytest.approx(one["stages"][-1]["kl_mean"], rel=0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "r.yaml"]


@pytest.mark.parametrize(
    "to", [{"to": "gqa", "kv_heads": 1}, {"to": "mla", "kv_rank": 10, "rope_dim": 6}]
)
def test_what_a_conversion_gives_is_known_beforehand(to, values, tmp_path):
    """Size and parameters, and of all that comes after it."""
    _, distill, gptq = values["stages"]
    values["stages"] = [{"method": "convert", **to}, distill, gptq | {"group_size": 2}]
    values["eval"] = None
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    command = ["run", str(tmp_path / "r.yaml"), "--json"]
    plan = json.loads(CliRunner().invoke(main, [*command, "--dry-run"]).stdout)
    report = json.loads(CliRunner().invoke(main, command).stdout)
    for planned, row in zip(plan["stages"], report["stages"], strict=True):
        assert (planned["parameters"], planned["bytes"]) == (row["parameters"], row["bytes"])


def test_shapes_that_a_stage_gives_are_refused_before_any_work(values, tmp_path, ran):
    """Of what comes after it: the second pruning would leave more blocks than there are."""
    prune, _, gptq = values["stages"]
    values["stages"] = [prune, {"method": "prune", "depth": 4}]
    with pytest.raises(InputError, match=r"^stage 2 \(prune\): depth = 4 is not possible"):
        run_chain(build_chain(values))
    mla = {"method": "convert", "to": "mla", "kv_rank": 10, "rope_dim": 6}
    values["stages"] = [mla, {"method": "prune", "heads": 3}, gptq]
    with pytest.raises(InputError, match=r"^stage 2 \(prune\): .*its model"):
        run_chain(build_chain(values))
    assert ran == []
    assert list(tmp_path.iterdir()) == []


def test_after_a_search_little_is_known(values, tmp_path):
    values["stages"][PRUNE] = {"method": "prune", "target_params": "20k"}
    plan = plan_chain(build_chain(values))
    searched, *others = plan["stages"]
    assert searched["parameters"] > 20_000  # at most
    assert [row["parameters"] for row in others] == [None, None]
    values["stages"][GPTQ]["cross_moment"] = True
    values["propagate_error"] = False
    with pytest.raises(InputError, match=r"stage 3 \(gptq\): cross_moment"):
        plan_chain(build_chain(values))
