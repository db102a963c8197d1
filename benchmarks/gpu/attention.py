"""Paged decode attention as a share of the copy bandwidth, beside PyTorch's on contiguous keys.

Blocks lie anywhere in the cache, as after a while of serving.  Results are compared with float32
first.  Bytes are those of keys and values, read once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources

from compress.kernels.eager import BLOCK_SIZE
from compress.kernels.paged_attention import reference
from compress.kernels.paged_attention.plan import splits_of
from compress.kernels.paged_attention.shapes import Shape, candidates, capability_of
from compress.kernels.paged_attention.triton import paged_attention
from compress.kernels.workspace import Workspace
from gpu.place import Place
from gpu.timing import relative_error, seconds
from gpu.weights import shape_of

CASES = (
    (1024, (1, 16, 64, 256)),
    (4096, (1, 16, 64)),
    (8192, (1, 16)),
    (32768, (1, 4, 16)),
    (131072, (1, 4)),
)  # tokens of context, numbers of sequences
TINY_CASES = ((40, (1, 3)),)
TUNED = ((32768, 1), (4096, 16))  # tokens of context, sequences
TINY_TUNED = ((40, 1),)
BEST = 5  # that are printed
MOST_COPIES = 64
# Probabilities are rounded to bfloat16 (2^-9) before they meet the values, and so is the result.
TOLERANCE = 1e-2


def measure(place: Place) -> dict[str, Any]:
    """Times and errors of each case."""
    rows, problems = [], []
    for context, batches in TINY_CASES if place.stand_in else CASES:
        for batch in batches:
            if not _fits(place, context, batch):
                continue
            row = _case(place, context, batch)
            rows.append(row)
            if "seconds" not in row:
                problems.append(f"context {context}, batch {batch}: off by {row['error']:.2g}")
    return {"cases": rows, "problems": problems}


def _fits(place: Place, context: int, batch: int) -> bool:
    """Whether the copies, and float32 ones of a sequence, leave half of the memory free."""
    if place.stand_in:
        return True
    shape, free = shape_of(place), torch.cuda.mem_get_info()[0]
    moved = 2 * batch * context * shape.K * shape.H * place.dtype.itemsize
    return place.copies(moved) * moved < free // 2


def _case(place: Place, context: int, batch: int) -> dict[str, Any]:
    case = Case(place, context, batch)
    row: dict[str, Any] = {"context": context, "batch": batch, "splits": case.splits}
    row |= {"bytes": case.bytes, "error": case.error()}
    if row["error"] <= TOLERANCE:
        row |= {"seconds": case.seconds(), "torch_seconds": case.torch_seconds()}
    return row


class Case:
    """Decode of `batch` sequences of one context, on copies of the cache that are used in turn."""

    def __init__(self, place: Place, context: int, batch: int) -> None:
        shape, device, dtype = shape_of(place), place.device, place.dtype
        blocks = -(-context // BLOCK_SIZE)
        self.bytes = 2 * batch * context * shape.K * shape.H * dtype.itemsize
        self.splits = splits_of(batch, shape.K, context, place.processors)
        generator = torch.Generator(device).manual_seed(context + batch)
        kind = {"device": device, "dtype": dtype, "generator": generator}
        size = (batch * blocks, shape.K, BLOCK_SIZE, shape.H)
        self._caches = [
            (torch.randn(size, **kind), torch.randn(size, **kind))
            for _ in range(min(MOST_COPIES, place.copies(self.bytes)))
        ]
        places = torch.randperm(batch * blocks, device=device, generator=generator)
        self._q = torch.randn(batch, shape.N, shape.H, **kind)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        contexts = torch.full((batch,), context, dtype=torch.int32, device=device)
        self._where = (starts, contexts, places.view(batch, blocks).int(), 1 / math.sqrt(shape.H))
        self._place, self._workspace = place, Workspace(device)

    def ours(self, keys: Tensor, values: Tensor, shape: Shape | None = None) -> Tensor:
        """By the kernel, cut up as `shape` says."""
        return paged_attention(
            self._q, keys, values, *self._where, tiles=None, most_new=1, splits=self.splits,
            workspace=self._workspace, shape=shape,
        )  # fmt: skip

    def error(self, shape: Shape | None = None) -> float:
        """Relative error against float32."""
        keys, values = self._caches[0]
        exact = reference.paged_attention(self._q.float(), keys, values, *self._where)
        return relative_error(self.ours(keys, values, shape), exact)

    def seconds(self, shape: Shape | None = None) -> float:
        """Median seconds of a call."""
        calls = [partial(self.ours, *pair, shape) for pair in self._caches]
        return seconds(self._place, calls)

    def torch_seconds(self) -> float:
        """The same by PyTorch, on contiguous keys and values in the place of the blocks."""
        blocks, heads, positions, width = self._caches[0][0].shape
        size = (len(self._q), heads, blocks // len(self._q) * positions, width)

        def theirs(keys: Tensor, values: Tensor) -> Tensor:
            q = self._q[:, :, None]
            return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

        calls = [partial(theirs, *(part.view(size) for part in pair)) for pair in self._caches]
        return seconds(self._place, calls)


def shape_times(place: Place, deadline: float) -> Iterator[str]:
    """Lines for each case of TUNED: the candidates of shapes.py by their times, and `choose`'s."""
    shape, count = shape_of(place), 2 if place.stand_in else None
    group = shape.N // shape.K
    device = capability_of(torch.device(place.device))
    found = candidates(group, group, shape.H, place.dtype, device)[:count]
    for context, batch in TINY_TUNED if place.stand_in else TUNED:
        case, times = Case(place, context, batch), {}
        for candidate in found:
            if time.monotonic() > deadline:
                return
            try:
                if case.error(candidate) <= TOLERANCE:
                    times[candidate] = case.seconds(candidate)
            except OutOfResources:  # more shared memory than there is
                continue
        yield f"context {context}, batch {batch}: {len(times)} of {len(found)} candidates are right"
        for candidate in [*sorted(times, key=lambda one: times[one])[:BEST], found[0]]:
            taken = times.get(candidate, math.nan)
            yield f"  {1e6 * taken:8.1f} us  {case.bytes / taken / 1e12:5.2f} TB/s  {candidate}"
