"""Chains that are broken off, and recipes that changed since."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compress import chain
from compress.chain import run_chain
from compress.chain_preflight import look_ahead
from compress.chain_recipe import build_chain
from compress.chain_stages import identities
from compress.core.commits import Commits, numbered
from compress.core.errors import InputError
from tests.compress.chains import DISTILL, GPTQ, METHODS, PRUNE, TRAIN, noting_runs, three_stages
from tests.compress.test_resume import kill


@pytest.fixture
def values(model_folder, text_file, tmp_path):
    return three_stages(model_folder(layers=4), text_file, tmp_path / "out")


@pytest.fixture
def ran(monkeypatch):
    return noting_runs(monkeypatch)


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
    assert not finished(values).exists()  # known by the shapes that pruning will give
    del values["stages"][GPTQ]["format"]
    run_chain(build_chain(values), overwrite=True)
    assert not (out / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_another_teacher_is_another_stage(values, model_folder, tmp_path):
    """Of a teacher that is neither the original nor a stage, the files count too."""
    values["model"] = str(shutil.copytree(model_folder(layers=4), tmp_path / "model"))
    teacher = shutil.copytree(model_folder(layers=2), tmp_path / "teacher")
    values["stages"][DISTILL]["teacher"] = str(teacher)
    recipe = build_chain(values)
    before = identities(recipe, look_ahead(recipe).original)
    change_weight({"model": str(teacher)})
    after = identities(recipe, look_ahead(recipe).original)
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
