"""Recipes of several stages: that they are the stages by hand, killed, changed, and bad input."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress import chain
from compress.chain import run_chain
from compress.chain_eval import Comparison
from compress.chain_preflight import check_chain
from compress.chain_recipe import build_chain
from compress.chain_stages import identities
from compress.cli import main
from compress.core.commits import Commits, numbered
from compress.core.errors import InputError
from compress.core.shards import hashed_file
from compress.core.source import ModelSource
from compress.distillation import run_distillation
from compress.evaluate import TextEvalConfig, evaluate_text
from compress.pipeline import run_recipe
from compress.pruning import run_pruning
from compress.recipe import build_distillation, build_pruning, build_recipe, method_of
from tests.compress.test_resume import kill

TRAIN = {
    "tokens": 4 * 4 * 32,
    "seq_len": 32,
    "batch_size": 4,
    "micro_batch": 2,
    "learning_rate": 1e-3,
    "precision": "float32",
    "save_every": 2,
}
METHODS = ["prune", "distill", "gptq"]
PRUNE, DISTILL, GPTQ = range(3)


@pytest.fixture
def values(model_folder, text_file, tmp_path):
    """A recipe's values: prune, distill, gptq on a tiny model of four blocks, and little text."""
    return {
        "model": str(model_folder(layers=4)),
        "out": str(tmp_path / "out"),
        "calibration": {"source": str(text_file), "samples": 8, "seq_len": 32},
        "eval": {"text": str(text_file), "windows": 4, "seq_len": 32},
        "stages": [
            {"method": "prune", "layers_out": 1, "ffn": 64},
            {
                "method": "distill",
                "data": {"source": str(text_file), "held_out": 4},
                "train": TRAIN,
            },
            {"method": "gptq", "group_size": 16, "calibration": {"samples": 6}},
        ],
    }


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


def test_killed_at_20_random_moments(values, tmp_path):
    """In any stage, while it is measured, or when all is done: the same weights and report."""
    (tmp_path / "place").mkdir()
    values["stages"][DISTILL]["train"] = TRAIN | {"save_every": 1}
    del values["out"]
    found = kill(values, tmp_path / "place" / "out", "random")
    assert found["killed"] == 20
    assert {"model.safetensors", "compress.json", "quality.json"} < set(found["files"])


class BrokenOff(BaseException):
    """In the place of a kill."""


@pytest.fixture
def broken_off(values, model_folder, tmp_path, monkeypatch):
    """A chain that ended when its third stage had begun: its recipe's values."""
    values["model"] = str(shutil.copytree(model_folder(layers=4), tmp_path / "model"))

    def refuse(self, name, value):
        if name == numbered("apply", 1):
            raise BrokenOff
        put(self, name, value)

    put = Commits.put
    run = chain.run_recipe

    def broken(*arguments, **named):
        with monkeypatch.context() as patched:
            patched.setattr(Commits, "put", refuse)
            return run(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(chain, "run_recipe", broken)
        with pytest.raises(BrokenOff):
            run_chain(build_chain(values))
    assert not (tmp_path / "out").exists()
    return values


@pytest.fixture
def ran(monkeypatch):
    """The methods of the stages that are carried out from here on, and what is measured."""
    found = []
    for name in ("run_recipe", "run_pruning", "run_distillation"):
        run = getattr(chain, name)

        def noted(recipe, *arguments, run=run, **named):
            found.append(method_of(recipe.stages[0]))
            return run(recipe, *arguments, **named)

        monkeypatch.setattr(chain, name, noted)
    measure = Comparison.measure

    def measured(self, model):
        found.append("measure")
        return measure(self, model)

    monkeypatch.setattr(Comparison, "measure", measured)
    return found


def test_what_is_done_is_not_done_again(broken_off, ran, tmp_path, capsys):
    run_chain(build_chain(broken_off))
    assert ran == ["gptq", "measure"]
    said = capsys.readouterr().err
    assert "Stage 1 of 3: prune, done before" in said
    assert "Stage 3 of 3: gptq\n" in said
    assert "Going on after block 1 of 3" in said
    whole = broken_off | {"out": str(tmp_path / "whole")}
    run_chain(build_chain(whole))
    for name in ("model.safetensors", "quality.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def finished(values):
    return Path(values["out"]).with_name(".out.stages")


def test_a_change_of_a_later_stage_keeps_the_earlier_ones(broken_off, ran):
    broken_off["stages"][GPTQ]["bits"] = 3
    recipe = build_chain(broken_off)
    place = finished(broken_off) / "3-gptq"
    refusal = rf"stage 3 is with another recipe.bits \(4, now 3\); to .* remove '{place}'.*restart"
    with pytest.raises(InputError, match=refusal):
        run_chain(recipe)
    shutil.rmtree(place)
    run_chain(recipe)
    assert ran == ["gptq", "measure"]
    report = json.loads((Path(broken_off["out"]) / "compress.json").read_text())
    assert report["recipe"]["stages"][GPTQ]["bits"] == 3


def test_a_stage_that_has_not_begun_can_change(broken_off, ran):
    shutil.rmtree(finished(broken_off) / "3-gptq")
    broken_off["stages"][GPTQ] = {"method": "rtn", "group_size": 16}
    run_chain(build_chain(broken_off))
    assert ran == ["rtn", "measure"]


def change_weight(values):
    path = Path(values["model"]) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(tensors, path, {"format": "pt"})


def change_text(values):
    text = Path(values["stages"][DISTILL]["data"]["source"]).read_text()
    place = Path(values["model"]).with_name("text.txt")
    place.write_text(text.replace("w1 ", "w2 "))
    values["stages"][DISTILL]["data"]["source"] = str(place)


def insert_stage(values):
    values["stages"].insert(0, values["stages"][DISTILL])


def drop_stage(values):
    values["stages"].pop()


CHANGES = [
    (lambda values: values["stages"][PRUNE].update(layers_out=2), 1, "recipe.layers_out"),
    (lambda values: values["stages"][PRUNE].update(calibration={"samples": 7}), 1, "recipe.calib"),
    (lambda values: values.update(compute_dtype="float32"), 1, "recipe.compute_dtype"),
    (lambda values: values["stages"][DISTILL].update(lora={"rank": 2}), 2, "recipe.lora"),
    (lambda values: values["stages"][DISTILL].update(teacher="stage 1"), 2, "recipe.teacher"),
    (change_text, 2, "text file"),
    (change_weight, 1, "model.weights"),
    (insert_stage, 1, r"recipe.method \(prune, now distill\)"),
    (drop_stage, 3, r"number of stages \(3 or more, now 2\)"),
]


@pytest.mark.parametrize(("change", "number", "named"), CHANGES)
def test_a_change_of_what_is_done_is_refused(change, number, named, broken_off, ran):
    change(broken_off)
    recipe = build_chain(broken_off)
    before = sorted(finished(broken_off).rglob("*"))
    for _ in range(2):  # a refusal changes nothing
        with pytest.raises(InputError, match=f"stage {number} is with another {named}"):
            run_chain(recipe)
    assert sorted(finished(broken_off).rglob("*")) == before
    assert ran == []


def test_restart_drops_all_stages(broken_off, ran):
    broken_off["stages"][PRUNE]["layers_out"] = 2
    run_chain(build_chain(broken_off), restart=True)
    assert [name for name in ran if name != "measure"] == METHODS


@pytest.mark.parametrize("index", [PRUNE, DISTILL])
def test_removing_a_stage_drops_what_was_made_from_it(index, broken_off, ran):
    shutil.rmtree(finished(broken_off) / f"{index + 1}-{METHODS[index]}")
    run_chain(build_chain(broken_off))
    assert [name for name in ran if name != "measure"] == METHODS[index:]


def test_another_text_is_measured_on_anew(broken_off, ran):
    """The stages stay as they are."""
    broken_off["eval"]["windows"] = 3
    report = run_chain(build_chain(broken_off))
    assert ran == ["measure", "measure", "gptq", "measure"]
    assert report["eval"]["windows"] == 3


def test_an_existing_output_stays_until_the_end(values, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(InputError, match="pass --overwrite"):
        run_chain(build_chain(values))
    values["stages"][PRUNE]["ffn"] = 60
    values["stages"][GPTQ]["format"] = "gptq"  # which takes 80 neurons, and not 60
    with pytest.raises(InputError, match=r"stage 3 \(gptq\): .* 60 .*words of 32 bits"):
        run_chain(build_chain(values), overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert (finished(values) / "2-distill" / "model" / "config.json").is_file()
    del values["stages"][GPTQ]["format"]
    run_chain(build_chain(values), overwrite=True)
    assert not (out / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


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
        ("eval", {"text": "no.txt"}, "eval: cannot read text"),
        ("eval", {"windows": 100_000}, "eval: text"),
        ("eval", {"text": "self", "seq_len": 4096}, "eval: seq_len is 4096"),
        ("model", "./absent", "model folder './absent' does not exist"),
    ],
)  # fmt: skip
def test_what_will_not_do_is_refused_before_any_work(stage, change, message, values, tmp_path, ran):
    if stage == GPTQ:
        values["propagate_error"] = False
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
    refused = CliRunner().invoke(main, [*command, "--dry-run"])
    assert refused.exit_code == 2
    assert refused.stderr == "Error: a recipe of several stages takes no --dry-run; leave it out\n"
    shown = CliRunner().invoke(main, [*command, "--activation-memory", "1MB"])
    assert shown.exit_code == 0, shown.output
    report = json.loads((tmp_path / "out" / "compress.json").read_text())
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


def test_another_teacher_is_another_stage(values, model_folder, tmp_path):
    """Of a teacher that is neither the original nor a stage, the files count too."""
    values["model"] = str(shutil.copytree(model_folder(layers=4), tmp_path / "model"))
    teacher = shutil.copytree(model_folder(layers=2), tmp_path / "teacher")
    values["stages"][DISTILL]["teacher"] = str(teacher)
    recipe = build_chain(values)
    before = identities(recipe, check_chain(recipe))
    change_weight({"model": str(teacher)})
    after = identities(recipe, check_chain(recipe))
    assert [one == two for one, two in zip(before, after, strict=True)] == [True, False, True]


def test_stages_stay_after_an_interrupt(values, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(chain, "run_distillation", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_chain(build_chain(values))
    assert f"Finished stages are in {finished(values)}" in capsys.readouterr().err
    assert (finished(values) / "1-prune" / "model" / "config.json").is_file()


def test_broken_weights_are_refused_and_leave_nothing(values, model_folder, tmp_path):
    values["model"] = str(shutil.copytree(model_folder(layers=4), tmp_path / "model"))
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="NaN"):
        run_chain(build_chain(values))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
