"""The processes of one run: several under `accelerate launch`, else this one alone.

Calibration sequences are shared out, statistics summed over processes, and the first process does
the rest: it compresses each block, writes it, and hands its weights to the others.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import TypeVar

from torch import Tensor, distributed, nn

from compress.core.device import default_device
from compress.core.errors import InputError

T = TypeVar("T")

PATIENCE = timedelta(days=1)  # the others wait while the first compresses a block


class Processes:
    """How many processes there are, which one this is, and what they exchange.

    With one process nothing is exchanged, and no process group is made.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = 0
        if self.count > 1:
            from accelerate import PartialState

            # Joins the process group.  Unless told, it takes each process on a CPU to be alone.
            PartialState(cpu=default_device().type == "cpu", timeout=PATIENCE)
            self.rank = distributed.get_rank()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first(self, action: Callable[[], T]) -> T | None:
        """Do something in the first process while the others wait; they get None.

        An InputError is raised in all of them.
        """
        result, refused = None, [""]
        if self.is_first:
            try:
                result = action()
            except InputError as error:
                refused = [str(error)]
        if self.count > 1:
            distributed.broadcast_object_list(refused)
        if refused[0]:
            raise InputError(refused[0])
        return result

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def share(self, rows: Tensor) -> Tensor:
        """This process's share of the rows of a tensor that all have."""
        return rows.tensor_split(self.count)[self.rank]

    def add(self, *tensors: Tensor) -> None:
        """Sum tensors over the processes, in place; all get the same sums."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def largest(self, tensor: Tensor) -> None:
        """The element-wise maximum over the processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX)

    def spread(self, module: nn.Module) -> None:
        """Give all processes the first one's parameters and buffers, in place."""
        if self.count > 1:
            for tensor in module.state_dict().values():
                distributed.broadcast(tensor, 0)


@cache
def processes() -> Processes:
    """The processes of this run, found once."""
    return Processes()
