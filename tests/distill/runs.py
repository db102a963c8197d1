"""Training runs in processes of their own; used by test_resume.py and test_processes.py.

python runs.py killed MODEL TOKENS FOLDER    a run that is killed before each of its events
accelerate launch runs.py run|sharded MODEL TOKENS FOLDER SETTINGS    one run; settings as JSON
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).parents[2]))

from compress.core.processes import processes
from compress.distill.checkpoint import whole_weights
from compress.distill.config import TrainConfig
from compress.distill.data import PackedData
from compress.distill.loop import train
from compress.distill.training import Training
from tests.distill.conftest import predictor

torch.set_num_threads(1)  # a forked process cannot use the threads that its parent has started
DROPOUT = 0.2
SETTINGS = {
    "tokens": 6 * 8 * 32,
    "seq_len": 32,
    "batch_size": 8,
    "micro_batch": 3,
    "learning_rate": 3e-3,
    "save_every": 2,
    "evaluate_every": 1,
    "precision": "float32",
}


def run(arguments: list[str], **changes: Any) -> None:
    """Train, and write the weights beside the losses."""
    model, tokens, folder = map(Path, arguments)
    student = predictor(model).requires_grad_(True)
    for module in student.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = changes.get("dropout", 0.0)
    changes.pop("dropout", None)
    if number := changes.pop("die_after", None):
        die_at(number + 1, ((Training, "step"),))
    data = PackedData.read(tokens, 32, held_out=4)
    train(student, data, TrainConfig(**SETTINGS | changes), folder)
    weights = whole_weights(student)  # all of several processes take part
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(weights, folder / "weights.pt")


def shard_on_cpus() -> None:
    """Switch FSDP2 on as `accelerate launch --use_fsdp` does.

    accelerate shards over GPUs alone, by its own word; told that these are GPUs it does it here.
    """
    processes()  # joins the process group
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }


def killed_before_each_event(arguments: list[str]) -> None:
    """Kill a run before each step, each renaming and each removal; go on; compare with a whole one.

    Prints how many events there were.
    """
    folder = Path(arguments[2])
    changes = {"dropout": DROPOUT, "ema": 0.5, "weight_decay": 0.1}
    run(arguments, **changes)  # here, so that no other process has to import
    whole = outcome(folder)
    count = 0
    while True:
        shutil.rmtree(folder)
        folder.mkdir()
        count += 1

        def broken_off(number: int = count) -> None:
            die_at(number)
            run(arguments, **changes)

        if not in_another_process(broken_off):
            break
        if in_another_process(lambda: run(arguments, **changes)):
            sys.exit("a run that was to be left alone was killed")
        if outcome(folder) != whole:
            sys.exit(f"killed before event {count}, it came out differently")
    print(json.dumps({"events": count - 1, "rows": len(whole[0])}))


def outcome(folder: Path) -> tuple[list[Any], Any]:
    """All rows but the time, and the bytes of the weights."""
    rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    weights = torch.load(folder / "weights.pt")
    return rows, [(name, value.numpy().tobytes()) for name, value in weights.items()]


def in_another_process(action: Callable[[], None]) -> bool:
    """Do something in a forked process; whether it was killed.  Any other failure is an error."""
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            return True
        if os.waitstatus_to_exitcode(status):
            sys.exit("a run failed by itself")
        return False
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
            action()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


EVENTS = ((Path, "replace"), (Path, "rename"), (shutil, "rmtree"), (Training, "step"))


def die_at(number: int, events: tuple[tuple[Any, str], ...] = EVENTS) -> None:
    """Kill this process instead of the `number`th event."""
    left = number

    def counted(act: Callable) -> Callable:
        def instead(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments, **named)

        return instead

    for owner, name in events:
        setattr(owner, name, counted(getattr(owner, name)))


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        killed_before_each_event(sys.argv[2:5])
    else:
        if sys.argv[1] == "sharded":
            shard_on_cpus()
        run(sys.argv[2:5], **json.loads(sys.argv[5]))
