"""A run that is broken off goes on, and gives the same bytes as one that was left alone."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import walk
from compress.core.activations import Activations
from compress.core.blocks import linears_of
from compress.core.commits import Commits, numbered
from compress.core.errors import InputError
from compress.core.shards import ShardWriter
from compress.core.stage import BlockOutcome
from compress.pipeline import run_recipe
from compress.quant.awq import AwqConfig
from compress.quant.awq_gptq import AwqGptqConfig
from compress.quant.config import Grid
from compress.quant.folds import Fold
from compress.quant.rtn import RtnConfig, RtnStage
from compress.recipe import build_recipe

QUICK = {"scale_points": 3, "clip_points": 3}


def values_for(folder, text_file, method="awq", **settings):
    grid = {} if method == "llm-int8" else {"group_size": 16}
    return {
        "model": str(folder),
        "calibration": {"source": str(text_file), "samples": 10, "seq_len": 64},
        "stages": [{"method": method, **grid, **settings}],
    }


def kill(values, out, mode) -> dict:
    """What killing.py, which stands beside this file, says of killed runs."""
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(script), json.dumps(values), str(out), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("awq", QUICK),
        ("gptq", {"cross_moment": True, "clip_points": 2}),
        ("rtn", {}),
        ("llm-int8", {"outlier_threshold": 2.0}),
    ],
)
def test_killed_before_every_step(method, settings, model_folder, text_file, tmp_path):
    """Three batches, of which some are kept in memory; every change of a name on the disk."""
    values = values_for(model_folder(layers=3), text_file, method, **settings)
    (tmp_path / "place").mkdir()
    found = kill(values, tmp_path / "place" / "out", "every")
    assert found["killed"] > 12  # at least a part and a commit for each of 4, and the side files
    assert {"model.safetensors", "compress.json", "config.json"} < set(found["files"])
    assert ("outliers/model.safetensors" in found["files"]) == (method == "llm-int8")


def test_killed_at_20_random_moments(model_folder, text_file, tmp_path):
    (tmp_path / "place").mkdir()
    values = values_for(model_folder("qwen3", layers=6), text_file, "awq+gptq", **QUICK)
    assert kill(values, tmp_path / "place" / "out", "random")["killed"] == 20


@pytest.fixture
def broken_off(model_folder, text_file, tmp_path, monkeypatch):
    """A run that ended after two of three blocks: its recipe's values, and its output's place."""
    folder = shutil.copytree(model_folder(layers=3), tmp_path / "model")
    values = values_for(folder, text_file) | {"out": tmp_path / "out"}
    put = Commits.put

    def full(self, name, value):
        if name == numbered("apply", 2):
            raise OSError(28, "No space left on device")
        put(self, name, value)

    with monkeypatch.context() as patched:
        patched.setattr(Commits, "put", full)
        with pytest.raises(InputError, match="No space left on device; what was done is kept"):
            run_recipe(build_recipe(values))
    assert not (tmp_path / "out").exists()
    return values, tmp_path / "out"


def test_a_full_disk_costs_one_block(broken_off, capsys):
    values, out = broken_off
    run_recipe(build_recipe(values))
    assert "Going on after block 2 of 3" in capsys.readouterr().err
    assert json.loads((out / "run.json").read_text())["seconds"] > 0
    assert [path.name for path in out.parent.glob(".out*")] == []


def change_weight(values):
    path = Path(values["model"]) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(tensors, path, {"format": "pt"})


def change_config(values):
    path = Path(values["model"]) / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def change_text(values):
    path = Path(values["model"]).with_name("other.txt")
    path.write_text(Path(values["calibration"]["source"]).read_text().replace("w1 ", "w2 "))
    values["calibration"]["source"] = str(path)


CHANGES = [
    (change_weight, "model weights"),
    (change_config, "model files.config.json"),
    (change_text, "recipe.calibration.source"),
    (lambda values: values["stages"][0].update(bits=3), r"recipe.stages.0.bits \(4, now 3\)"),
    (lambda values: values.update(propagate_error=False), "recipe.propagate_error"),
    (lambda values: values.update(compute_dtype="float16"), "recipe.compute_dtype"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_another_recipe_or_model_is_refused_or_begins_again(change, named, broken_off, capsys):
    values, out = broken_off
    change(values)
    recipe = build_recipe(values)
    for _ in range(2):  # a refusal changes nothing
        with pytest.raises(InputError, match=f"unfinished run with another {named}.*--restart"):
            run_recipe(recipe)
    report = run_recipe(recipe, restart=True)
    assert "Going on" not in capsys.readouterr().err
    fresh = run_recipe(build_recipe(values | {"out": out.parent / "fresh" / "out"}))
    assert report["layers"] == fresh["layers"]
    assert (out / "model.safetensors").read_bytes() == (
        out.parent / "fresh" / "out" / "model.safetensors"
    ).read_bytes()


def test_what_cannot_be_finished_is_not_kept(broken_off, monkeypatch):
    """An error in the input itself would come again: the next run begins with nothing."""
    values, out = broken_off

    def refuse(*_):
        raise InputError("a tensor is broken")

    monkeypatch.setattr(ShardWriter, "write", refuse)
    with pytest.raises(InputError, match="a tensor is broken"):
        run_recipe(build_recipe(values))
    assert [path.name for path in out.parent.glob(".out*")] == []


@pytest.mark.parametrize("memory", [0, 60_000, 1 << 30])
@pytest.mark.parametrize("settings", [{}, {"propagate_error": False}])
def test_hidden_states_on_disk_change_nothing(
    memory, settings, model_folder, text_file, tmp_path, monkeypatch
):
    """All on disk, two of three batches in memory, all in memory: the same bytes as by default."""
    monkeypatch.setattr(walk, "TOKENS_PER_BATCH", 256)
    values = values_for(model_folder(), text_file) | settings
    for name, given in (("default", None), ("given", memory)):
        out = tmp_path / name / "out"
        run_recipe(build_recipe(values | {"out": out}), activation_memory=given)
    for file in ("model.safetensors", "compress.json"):
        one, two = (tmp_path / name / "out" / file for name in ("default", "given"))
        assert one.read_bytes() == two.read_bytes()


def test_activations_keep_what_fits(tmp_path):
    batches = [torch.full((2, 3, 4), float(index)) for index in range(5)]  # 96 bytes each
    stored = Activations.store(tmp_path / "states", iter(batches), 200)
    assert sorted(stored._kept) == [0, 1]
    for again in (stored, stored.drain(), Activations(tmp_path / "states")):
        assert all(torch.equal(a, b) for a, b in zip(again, batches, strict=True))
    assert not stored._kept
    stored.remove()
    assert not list(tmp_path.iterdir())


class _CarryingStage(RtnStage):
    """Decides on all blocks together, and carries a number from block to block."""

    needs_statistics = True
    decides_globally = True
    calls: ClassVar[list[str]] = []

    def __init__(self, *given):
        super().__init__(*given)
        self.seen = 0

    def collect(self, block):
        self.calls.append(f"collect {block.index}")
        return block.inputs[0].mean_abs

    def decide(self, summaries):
        self.calls.append("decide")
        return {"sums": torch.stack([summary.sum() for summary in summaries])}

    def apply(self, block, plan):
        self.calls.append(f"apply {block.index}")
        self.seen += 1
        outcome = super().apply(block, None)
        note = f"{self.seen} of {len(plan['sums'])}, {plan['sums'][block.index]:.3f}"
        layers = [replace(layer, note=note) for layer in outcome.layers]
        return BlockOutcome(outcome.tensors, outcome.replaces, layers)

    def state(self):
        return self.seen

    def restore(self, state):
        self.seen = state


@pytest.mark.parametrize("broken", ["collect-00001", "plan", "apply-00001"])
def test_a_stage_that_decides_globally_and_carries_a_state(
    broken, model_folder, text_file, tmp_path, monkeypatch
):
    """Broken off before a commit and taken up again: what was committed is not done twice."""
    calls = _CarryingStage.calls
    monkeypatch.setattr(RtnConfig, "stage", lambda *given: _CarryingStage(*given))
    values = values_for(model_folder(layers=3), text_file, "rtn")
    calls.clear()
    whole = run_recipe(build_recipe(values | {"out": tmp_path / "whole"}))
    in_order = [f"{act} {index}" for act in ("collect", "apply") for index in range(3)]
    assert calls == [*in_order[:3], "decide", *in_order[3:]]

    put = Commits.put

    def full(self, name, value):
        if name == broken:
            raise OSError(28, "No space left on device")
        put(self, name, value)

    recipe = build_recipe(values | {"out": tmp_path / "out"})
    calls.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Commits, "put", full)
        with pytest.raises(InputError, match="No space left"):
            run_recipe(recipe)
    again = run_recipe(recipe)
    assert again["layers"] == whole["layers"]
    repeated = "decide" if broken == "plan" else broken.replace("-0000", " ")
    assert {call for call in calls if calls.count(call) > 1} == {repeated}


@pytest.mark.parametrize("config", [AwqConfig, AwqGptqConfig])
def test_folds_are_carried_over(config, one_block, tmp_path):
    """The state of one stage, through a commit, makes another know the same folds."""
    block, _ = one_block("llama")
    linears = linears_of(block.module)
    grids = {block.full_name(name): Grid(group_size=16) for name in linears}
    stage, other = (config(group_size=16).stage(grids) for _ in range(2))
    stage.apply(block, None)
    commits = Commits(tmp_path)
    commits.put("state", stage.state())
    other.restore(commits.get("state"))
    assert other.scaling._folds == stage.scaling._folds
    assert len(other.scaling._folds) == 4
    assert all(isinstance(fold, Fold) for fold in other.scaling._folds.values())
