"""The same training shared out over processes by `accelerate launch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress.distill.data import pack
from tests.distill.conftest import documents
from tests.distill.test_loop import rows_of

SCRIPT = Path(__file__).with_name("runs.py")


def launch(count, model, tokens, folder, settings, *more):
    folder.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count)]
    command += [*(["--multi_gpu"] if count > 1 and not more else []), *more]
    command += [str(SCRIPT), "run", str(model), str(tokens), str(folder), json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True, "ema": 0.5}])
def test_two_processes_do_what_one_does(settings, model_folder, tmp_path):
    pack(documents(60), tmp_path / "tokens")
    for count in (1, 2):
        place = tmp_path / str(count)
        done = launch(count, model_folder(), tmp_path / "tokens", place, settings)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Training, loss") == 6  # one speaks
    one, two = (rows_of(tmp_path / str(count)) for count in (1, 2))
    assert len(one) == len(two) == 13
    for row, other in zip(one, two, strict=True):
        # the same sums in another order, in float32, over six steps
        value, twin = (r.get("loss") or r["evaluation"]["loss"] for r in (row, other))
        assert value == pytest.approx(twin, rel=1e-5)
    weights = [torch.load(tmp_path / str(count) / "weights.pt") for count in (1, 2)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


def test_sequences_that_cannot_be_shared_out(model_folder, tmp_path):
    pack(documents(60), tmp_path / "tokens")
    settings = {"batch_size": 3}
    done = launch(2, model_folder(), tmp_path / "tokens", tmp_path / "run", settings)
    assert done.returncode != 0
    assert (
        "a batch_size of 3 sequences cannot be shared out evenly over 2 processes; give a multiple "
        "of 2" in done.stderr
    )
