"""How fast this machine's memory is, to hold a decode step against: it reads all weights once."""

import time
from collections.abc import Callable

import torch

LARGE = 512 << 20  # bytes; no cache holds that
REPEATS = 5


def read_bandwidth(size: int) -> float:
    """Bytes/s of adding up `size` bytes of float32, on PyTorch's threads; the best of REPEATS.

    As large as a step's weights, it finds in the caches what a step would.
    """
    numbers = torch.ones(max(size // 4, 1))
    return numbers.nbytes / _best(lambda: numbers.sum())


def copy_bandwidth(size: int = LARGE, device: torch.device | None = None) -> float:
    """Bytes/s of a copy of `size` bytes on a device, which count twice: read and written."""
    source = torch.ones(max(size // 4, 1), device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize(source.device)

    return 2 * source.nbytes / _best(copy)


def _best(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
