"""Gradients of a student in one process of several, wrapped as its second argument says.

accelerate launch --multi_gpu --num_processes 2 wrapped_student.py FOLDER KIND OUT
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from compress.distill.objective import LossConfig, Objective, Student
from compress.distill.teacher import LiveTeacher
from compress.loading import load_model
from tests.distill.batches import batch_of, noisy, split

CONFIG = LossConfig(forward_kl=1.0, cross_entropy=0.5, hidden_mse=0.25, attention_mse=0.25)


def student_of(folder: Path) -> Student:
    """A student that differs from its teacher, whose blocks 0 and 1 stand for 1 and 3."""
    teacher, model = folder / "teacher", folder / "student"
    model = noisy(load_model(model))
    torch.manual_seed(0)
    return Student(model, Objective(CONFIG, model, LiveTeacher(load_model(teacher))))


def wrap(student: Student, kind: str) -> nn.Module:
    """The student as a loop would wrap it; `fsdp-head` shards the head by itself too."""
    if kind == "ddp":
        return DistributedDataParallel(student)
    policy = MixedPrecisionPolicy()
    if kind == "fsdp-bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in student.model.model.layers:
        fully_shard(block, mp_policy=policy)
    if kind == "fsdp-head":
        fully_shard(student.model.lm_head, mp_policy=policy)
    return fully_shard(student, mp_policy=policy)


def gradients(folder: Path, kind: str) -> dict[str, Tensor]:
    """The sum over the processes, of which each has its half of a batch."""
    student = student_of(folder)
    wrapped = wrap(student, kind)
    for _ in range(2):  # the second time parameters were in shards in between
        wrapped.zero_grad()
        wrapped(**split(batch_of(4), 2)[distributed.get_rank()]).total.backward()
    found = {}
    for name, parameter in student.named_parameters():
        gradient: Any = parameter.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        found[name] = gradient * distributed.get_world_size()  # wrappers average
    return found


def main() -> None:
    folder, kind, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    distributed.init_process_group("gloo")
    found = gradients(folder, kind)
    if distributed.get_rank() == 0:
        torch.save(found, out)
    # By now the wrapper is gone. One that outlives its process group can lock up in PyTorch 2.13:
    # its end waits for gloo's thread with the interpreter's lock, which that thread asks for.
    gc.collect()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
