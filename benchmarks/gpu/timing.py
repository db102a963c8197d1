"""Seconds of device work, and the bandwidth that it is held against.

Calls are captured in one CUDA graph, so that the host's part is not in the time, and the graph is
replayed until the median is steady.  The calls of a graph take their data from copies in turn that
together are several times the L2 cache: what a decode step meets.  In the interpreter each call is
timed once by the host's clock, and means nothing.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpu.place import Place

REPLAYS = 30
LEAST_SECONDS = 0.02  # that the replays take together; short ones are repeated more often
MOST_REPLAYS = 400
LARGE = 2 << 30  # bytes of the copy that bandwidth is measured with


def seconds(place: Place, calls: Sequence[Callable[[], object]]) -> float:
    """Median seconds of one of `calls`, which are run in turn."""
    if place.stand_in:
        started = time.perf_counter()
        calls[0]()
        return time.perf_counter() - started
    return _graph_seconds(calls) / len(calls)


def _graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # kernels are compiled and tuned before the capture
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    first = _timed(graph, 3)
    replays = min(MOST_REPLAYS, max(REPLAYS, int(LEAST_SECONDS / statistics.median(first))))
    return statistics.median(_timed(graph, replays))


def _timed(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    """Seconds of each replay."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(events)
    return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def bandwidth(place: Place) -> dict[str, float]:
    """Bytes/s of a large copy, what is read and what is written counted, and of reading alone."""
    size = 1 << 16 if place.stand_in else LARGE
    source = torch.randn(size // 4, device=place.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(place, [lambda: target.copy_(source)])
    if not torch.equal(source, target):
        raise ArithmeticError("the copy is not what was copied")
    reading = source.nbytes / seconds(place, [lambda: source.sum()])
    return {"copy_bytes_per_s": copy, "read_bytes_per_s": reading}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, Frobenius; NaN where either holds it."""
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm())
