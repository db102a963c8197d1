"""What a GPU is fed with: inputs in one copy, drawn tokens back in another, and captured steps.

Everything is asynchronous and in the order of one stream.  On a CPU (Triton's interpreter) the
same calls compute at once, so that all around them can be tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of each array in an upload: kernels read vectors
BUFFERS = 3  # of the host: two steps may be on their way while a third is written


class Uploads:
    """Sends arrays to `device`, all of a step in one copy from pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [_HostBuffer(device) for _ in range(BUFFERS)]
        self._next = 0

    def send(self, arrays: Items[np.ndarray], target: Tensor | None = None) -> list[Tensor]:
        """Tensors on the device with the contents of `arrays`, in the order of the stream.

        They are views of `target`, uint8 on the device, from its beginning; of a new one without.
        """
        places = offsets(arrays)
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % BUFFERS
        host = buffer.memory(places[-1])
        for array, place in zip(arrays, places, strict=False):
            host[place : place + array.nbytes] = (
                np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            )
        if target is None:
            target = torch.empty(places[-1], dtype=torch.uint8, device=self._device)
        buffer.copy_to(target[: places[-1]])
        return views(target, arrays)


class _HostBuffer:
    """Memory that the device reads; it is not written again before that is done."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._tensor = torch.empty(0, dtype=torch.uint8)
        self._read = torch.cuda.Event() if self._pinned else None

    def memory(self, size: int) -> np.ndarray:
        if self._read is not None:
            self._read.synchronize()
        if len(self._tensor) < size:
            self._tensor = torch.empty(2 * size, dtype=torch.uint8, pin_memory=self._pinned)
        return self._tensor.numpy()

    def copy_to(self, target: Tensor) -> None:
        target.copy_(self._tensor[: len(target)], non_blocking=True)
        if self._read is not None:
            self._read.record()


class Download:
    """Token ids on their way from the device."""

    def __init__(self, drawn: Tensor) -> None:
        on_gpu = drawn.device.type == "cuda"
        self._host = torch.empty(len(drawn), dtype=drawn.dtype, pin_memory=on_gpu)
        self._host.copy_(drawn, non_blocking=True)
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record()

    def tokens(self) -> list[int]:
        """Wait for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class Graph:
    """Work that is launched as a whole: a CUDA graph; in the interpreter, the work itself.

    `work` reads and writes tensors that stay where they are, and is run once beforehand, so that
    kernels are compiled and memory is taken before the capture.
    """

    def __init__(self, work: Callable[[], Any], device: torch.device, pool: Any) -> None:
        if device.type != "cuda":
            self.replay = work
            return
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            work()
        torch.cuda.current_stream(device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work()
        self.replay = graph.replay


def offsets(arrays: Items[np.ndarray]) -> list[int]:
    """Where each array begins in an upload, and where the last ends, in bytes."""
    places = [0]
    for array in arrays:
        places.append(places[-1] + -(-array.nbytes // ALIGNMENT) * ALIGNMENT)
    return places


def views(buffer: Tensor, arrays: Items[np.ndarray]) -> list[Tensor]:
    """The parts of a buffer, uint8, as tensors of the arrays' shapes and dtypes."""
    return [
        buffer[place : place + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, place in zip(arrays, offsets(arrays), strict=False)
    ]
