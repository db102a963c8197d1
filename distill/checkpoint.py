"""What a training run has reached, so that after a kill it goes on from there, bit for bit.

A checkpoint is a folder in PyTorch's distributed format: what is trained, the optimizer's state
and the moving average, each process writing its own shards.  Everything else (the order of data,
the learning rate, random numbers) is a function of the step, which is the folder's name.
A checkpoint is written beside its name, brought to the disk and renamed: it is whole or not there.
"""

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from compress.core.commits import Commits
from compress.core.errors import InputError, reason_of
from compress.core.processes import processes
from compress.distill.ema import MovingAverage

KEPT = 2  # checkpoints; the one before the last is good where the last was on its way to diverge
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


class Checkpoints:
    """The checkpoints of one run in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, identity: Mapping[str, Any]) -> int:
        """The step of the newest checkpoint, 0 where there is none.

        `identity` says what the run is of.  Raises InputError when the checkpoints are of another
        run, with the first difference.
        """
        processes().first(lambda: self._begin(identity))
        processes().wait()
        return self.newest()

    def newest(self) -> int:
        """The step of the newest checkpoint, 0 where there is none."""
        return max(self._steps(), default=0)

    def _begin(self, identity: Mapping[str, Any]) -> None:
        run = Commits(self.folder / "run")
        for leftover in self.folder.glob(".*.partial"):
            shutil.rmtree(leftover)
        if not self._steps():
            run.begin(identity)
        elif difference := run.difference(identity):
            raise InputError(
                f"'{self.folder}' has checkpoints of a training run with another {difference}; "
                "remove that folder to begin anew, or train as before"
            )

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the state after `step` steps, and drop checkpoints that are too old.

        Raises InputError when it cannot be written.
        """
        place = self._place(step)
        partial = place.with_name(f".{place.name}.partial")
        try:
            _quietly(lambda: save(dict(state), checkpoint_id=partial))
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise InputError(
                f"cannot write checkpoint '{place}': {reason_of(cause)}; mend that and run the "
                "same command again to go on from the last one"
            ) from None
        processes().first(lambda: self._name(partial, place))
        processes().wait()

    def _name(self, partial: Path, place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
        _synced(self.folder)
        for step in self._steps()[:-KEPT]:
            shutil.rmtree(self._place(step))

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Read the state after `step` steps into the tensors of `state`, in place."""
        _quietly(lambda: load(state, checkpoint_id=self._place(step)))

    def _steps(self) -> list[int]:
        found = self.folder.glob("step-*/.metadata")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in found)

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage | None
) -> dict[str, Any]:
    """What changes in training, as tensors that share memory with it; sharded ones stay so."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    state: dict[str, Any] = {"weights": weights, "optimizer": moments}
    if average is not None:
        state["average"] = {str(index): value for index, value in enumerate(average.averages)}
    return state


def put_back(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Hand a loaded state to the model and the optimizer; an average was read in place."""
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["weights"],
        optim_state_dict=state["optimizer"],
        options=TRAINED_ONLY,
    )


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """All parameters and buffers of a model by name, on the CPU, gathered where they are sharded.

    Of several processes that shard a model only the first gets them.
    """
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def _quietly(action: Any) -> None:
    """Without the library's remark that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        action()


def _synced(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
