"""A run that is broken off goes on, and gives the same losses and weights, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress.core.errors import InputError
from compress.distill.checkpoint import Checkpoints
from compress.distill.config import TrainConfig
from compress.distill.data import PackedData, pack
from compress.distill.loop import train
from tests.distill.conftest import documents
from tests.distill.test_loop import losses_of, rows_of, settings

SCRIPT = Path(__file__).with_name("runs.py")


def test_killed_before_every_event(model_folder, tmp_path):
    """With dropout, weight decay and a moving average."""
    pack(documents(60), tmp_path / "tokens")
    (tmp_path / "run").mkdir()
    places = [str(place) for place in (model_folder(), tmp_path / "tokens", tmp_path / "run")]
    command = [sys.executable, str(SCRIPT), "killed", *places]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    # six steps, three checkpoints that get their names, one dropped; six steps and evaluations
    found = json.loads(done.stdout)
    assert found["events"] > 10
    assert found["rows"] == 13


class BrokenOff(Exception):  # noqa: N818 (no error)
    """In the place of a kill, within one process."""


@pytest.fixture
def broken_off(make_student, packed, tmp_path, monkeypatch):
    """A run that ended after 5 of 6 steps with a checkpoint after 4: its data and settings."""
    from compress.distill.training import Training

    data, config = packed(), settings(save_every=2, evaluate_every=1)
    step = Training.step

    def interrupted(self, number):
        if number == 5:
            raise BrokenOff
        return step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "step", interrupted)
        with pytest.raises(BrokenOff):
            train(make_student().requires_grad_(True), data, config, tmp_path)
    return data, config


def test_rows_of_steps_that_are_done_again_are_dropped(broken_off, make_student, tmp_path, capsys):
    data, config = broken_off
    assert len(losses_of(tmp_path)) == 5
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write('{"step": 6, "tok')  # a line that a kill cut off
    train(make_student().requires_grad_(True), data, config, tmp_path)
    assert "Going on after step 4 of 6" in capsys.readouterr().err
    assert [row["step"] for row in rows_of(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows_of(tmp_path) if "evaluation" in row] == list(range(7))
    seconds = [row["seconds"] for row in rows_of(tmp_path)]
    assert seconds == sorted(seconds)


def test_a_finished_run_is_only_loaded(make_student, packed, tmp_path):
    data, config = packed(), settings(ema=0.5)
    one = make_student().requires_grad_(True)
    result = train(one, data, config, tmp_path)
    before = (tmp_path / "losses.jsonl").read_bytes()
    other = make_student().requires_grad_(True)
    assert train(other, data, config, tmp_path) == result
    assert (tmp_path / "losses.jsonl").read_bytes() == before
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, r"settings.learning_rate \(0.003, now 0.001\)"),
        ({"tokens": 4096}, r"settings.tokens \(1536, now 4096\)"),
        ({"seed": 1}, "settings.seed"),
    ],
)
def test_other_settings(changes, message, broken_off, make_student, tmp_path):
    config = TrainConfig(**{**vars(broken_off[1]), **changes})
    with pytest.raises(InputError, match=f"training run with another {message}"):
        train(make_student().requires_grad_(True), broken_off[0], config, tmp_path)


def test_other_data_or_parameters(broken_off, make_student, packed, tmp_path):
    (tmp_path / "other").mkdir()
    pack(documents(60, seed=1), tmp_path / "other" / "tokens")
    other = PackedData.read(tmp_path / "other" / "tokens", 32, 4)
    with pytest.raises(InputError, match="with another data"):
        train(make_student().requires_grad_(True), other, broken_off[1], tmp_path)
    student = make_student().requires_grad_(True)
    student.model.model.norm.weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"with another trained.*model\.norm\.weight"):
        train(student, broken_off[0], broken_off[1], tmp_path)


def test_a_full_disk(make_student, packed, tmp_path, monkeypatch):
    from torch.distributed.checkpoint import filesystem

    save = Checkpoints.save

    def write_data(*_):
        raise OSError(28, "No space left on device")

    def full(self, step, state):
        if step == 4:
            monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", write_data)
        save(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(InputError, match=r"cannot write checkpoint .*No space left on device"):
        train(make_student().requires_grad_(True), packed(), settings(save_every=2), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000002"]
