"""Linears of a Llama-3-8B layer that round their inputs to 8 bits, beside cuBLAS in bfloat16.

"llm.int8" has half a percent of its columns stored in 16 bits, and finds one input element in a
thousand above its threshold.  Rounding of the inputs is in the times.  Some tokens of every product
are first compared with the reference, and one that is wrong gets no time.  Weights are used in turn
from copies that no L2 cache holds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.lowbit_matmul.weight import InputRounding
from compress.kernels.w8a8_matmul import reference
from compress.kernels.w8a8_matmul.triton import TritonRoundingLinear
from compress.kernels.workspace import Workspace
from gpu.place import Place
from gpu.timing import relative_error, seconds
from gpu.weights import shape_of

ROWS = (1, 16, 256, 4096)
TINY_ROWS = (1, 3)
MOST_COPIES = 32
CHECKED = 2  # tokens at either end of a product
STORED_SHARE, FOUND_SHARE, THRESHOLD = 5e-3, 1e-3, 6.0
# y is rounded to bfloat16, by up to 2^-9 of it, and so are stored outlier weights already; all
# else is exact or float32's.
TOLERANCE = 4e-3


def measure(place: Place, kind: str) -> dict[str, Any]:
    """Times and errors of each linear at each number of tokens."""
    found, problems = [], []
    for name, (out, width) in shape_of(place).linears.items():
        for row in _linear(place, name, out, width, kind):
            found.append(row)
            if not row["error"] <= TOLERANCE:
                problems.append(
                    f"{kind} {name}, {row['rows']} rows: off by {row['error']:.2g} of the result"
                )
        if not place.stand_in:
            torch.cuda.empty_cache()
    return {"kind": kind, "linears": found, "problems": problems}


def _linear(place: Place, name: str, out: int, width: int, kind: str) -> list[dict[str, Any]]:
    device, dtype = place.device, place.dtype
    weight = _weight(kind, out, width, place)
    workspace, surplus = Workspace(device), torch.zeros(1, dtype=torch.int64, device=device)
    packed = TritonRoundingLinear(weight, dtype, device, workspace, surplus)
    shared = {id(part): part for part in (workspace, surplus)}
    count = min(MOST_COPIES, place.copies(packed.bytes))
    ours = [packed] + [copy.deepcopy(packed, dict(shared)) for _ in range(count - 1)]
    dense = weight.dequantize(dtype).to(device)
    theirs = [dense.clone() for _ in range(place.copies(dense.nbytes))]
    found = []
    for number in TINY_ROWS if place.stand_in else ROWS:
        x = _inputs(number, width).to(device, dtype)
        y = ours[-1](x)
        ends = sorted({*range(number)[:CHECKED], *range(number)[-CHECKED:]})
        row: dict[str, Any] = {"linear": name, "rows": number, "kind": kind}
        row["error"] = relative_error(y[ends].cpu(), reference.linear(x[ends].cpu(), weight))
        row["bytes"] = packed.bytes + x.nbytes + y.nbytes
        row["operations"] = 2 * number * out * width
        if row["error"] <= TOLERANCE:
            row["seconds"] = seconds(place, [partial(one, x) for one in ours])
            row["dense_seconds"] = seconds(place, [partial(F.linear, x, one) for one in theirs])
        found.append(row)
    return found


def _weight(kind: str, out: int, width: int, place: Place) -> LinearWeight:
    """Random normal numbers, products of unit x of order 1, one scale a row; on the CPU."""
    generator = torch.Generator().manual_seed(out * width)
    dense = torch.randn(out, width, generator=generator) * width**-0.5
    most = dense.abs().amax(dim=1, keepdim=True)
    inputs = InputRounding("fp8", 448.0) if kind == "fp8" else InputRounding("int8", 127.0)
    if kind == "llm.int8":
        index = torch.randperm(width, generator=generator)[: max(1, round(STORED_SHARE * width))]
        index = index.sort().values
        stored = dense[:, index].to(place.dtype)
        inputs = InputRounding("int8", 127.0, index, stored, THRESHOLD)
    scaled = dense / most * inputs.largest
    codes = scaled.to(torch.float8_e4m3fn) if kind == "fp8" else scaled.round().to(torch.int8)
    return LinearWeight(None, codes, most / inputs.largest, None, width, 8, None, inputs)


def _inputs(tokens: int, width: int) -> Tensor:
    """float32 [tokens, width], of which FOUND_SHARE exceed the threshold."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=generator).clamp(-5, 5)
    x[torch.rand(tokens, width, generator=generator) < FOUND_SHARE] = 20.0
    return x


def summed(data: Mapping[str, Any], copy_bytes_per_s: float) -> list[dict[str, Any]]:
    """One row for each number of tokens: the four linears together."""
    sums = []
    for number in dict.fromkeys(row["rows"] for row in data["linears"]):
        rows = [row for row in data["linears"] if row["rows"] == number]
        if not all("seconds" in row for row in rows):
            continue
        taken = sum(row["seconds"] for row in rows)
        sums.append(
            {
                "kind": data["kind"],
                "rows": number,
                "seconds": taken,
                "of_copy": sum(row["bytes"] for row in rows) / taken / copy_bytes_per_s,
                "operations_per_s": sum(row["operations"] for row in rows) / taken,
                "of_dense": sum(row["dense_seconds"] for row in rows) / taken,
                "least_of_dense": min(row["dense_seconds"] / row["seconds"] for row in rows),
            }
        )
    return sums
