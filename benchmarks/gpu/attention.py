"""Paged decode attention as a share of the copy bandwidth, beside PyTorch's on contiguous keys.

Blocks lie anywhere in the cache, as after a while of serving.  Results are compared with float32
first.  Bytes are those of keys and values, read once.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.kernels.eager import BLOCK_SIZE
from compress.kernels.paged_attention import reference
from compress.kernels.paged_attention.plan import splits_of
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
    shape, device, dtype = shape_of(place), place.device, place.dtype
    blocks = -(-context // BLOCK_SIZE)
    moved = 2 * batch * context * shape.K * shape.H * dtype.itemsize
    generator = torch.Generator(device).manual_seed(context + batch)
    kind = {"device": device, "dtype": dtype, "generator": generator}
    size = (batch * blocks, shape.K, BLOCK_SIZE, shape.H)
    caches = [
        (torch.randn(size, **kind), torch.randn(size, **kind))
        for _ in range(min(MOST_COPIES, place.copies(moved)))
    ]
    places = torch.randperm(batch * blocks, device=device, generator=generator)
    tables = places.view(batch, blocks).int()
    q = torch.randn(batch, shape.N, shape.H, **kind)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    contexts = torch.full((batch,), context, dtype=torch.int32, device=device)
    scale = 1 / math.sqrt(shape.H)
    splits = splits_of(batch, shape.K, context, place.processors)
    workspace = Workspace(device)

    def ours(keys: Tensor, values: Tensor) -> Tensor:
        return paged_attention(
            q, keys, values, starts, contexts, tables, scale,
            tiles=None, most_new=1, splits=splits, workspace=workspace,
        )  # fmt: skip

    row: dict[str, Any] = {"context": context, "batch": batch, "splits": splits, "bytes": moved}
    keys, values = caches[0]
    exact = reference.paged_attention(q.float(), keys, values, starts, contexts, tables, scale)
    row["error"] = relative_error(ours(keys, values), exact)
    if not row["error"] <= TOLERANCE:
        return row
    row["seconds"] = seconds(place, [partial(ours, *pair) for pair in caches])
    # contiguous keys and values, in the place of the blocks
    size = (batch, shape.K, blocks * BLOCK_SIZE, shape.H)
    contiguous = [(keys.view(size), values.view(size)) for keys, values in caches]

    def theirs(keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

    row["torch_seconds"] = seconds(place, [partial(theirs, *pair) for pair in contiguous])
    return row
