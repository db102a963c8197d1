"""Low-bit products for the linears of a Llama-3-8B layer, beside cuBLAS on 16-bit weights.

Every product is first compared with float32, and one that is wrong gets no time.  Weights are used
in turn from copies that no L2 cache holds.  A row of the table sums the four linears: what must be
read and written over the time, as a share of the copy bandwidth.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from compress.kernels.lowbit_matmul.triton import TritonLinear
from compress.kernels.workspace import Workspace
from gpu.place import Place
from gpu.timing import relative_error, seconds
from gpu.weights import quantized, shape_of

GROUP = 128
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
FEW_ROWS = (1, 16, 64, 1024)  # for the widths that are not the main one
TINY_ROWS = (1, 3)
MOST_COPIES = 64
# bfloat16 rounds a result by up to 2^-9 of it, float16 by less; sums are in float32.
TOLERANCE = 4e-3


def measure(place: Place, bits: int, few: bool = False) -> dict[str, Any]:
    """Times and errors of each linear at each number of rows, or at a few."""
    rows = TINY_ROWS if place.stand_in else FEW_ROWS if few else ROWS
    found, problems = [], []
    for name, (out, width) in shape_of(place).linears.items():
        for row in _linear(place, name, out, width, bits, rows):
            found.append(row)
            if row["error"] > TOLERANCE or row["error"] != row["error"]:
                problems.append(
                    f"w{bits} {name}, {row['rows']} rows: off by {row['error']:.2g} of the result"
                )
        if not place.stand_in:
            torch.cuda.empty_cache()
    return {"bits": bits, "group": GROUP, "linears": found, "problems": problems}


def _linear(
    place: Place, name: str, out: int, width: int, bits: int, rows: tuple[int, ...]
) -> list[dict[str, Any]]:
    device, dtype = place.device, place.dtype
    weight = quantized(out, width, bits, GROUP, place)
    workspace = Workspace(device)
    packed = TritonLinear(weight, dtype, device, workspace)
    shared = {id(workspace): workspace}
    count = min(MOST_COPIES, place.copies(packed.bytes))
    ours = [packed] + [copy.deepcopy(packed, dict(shared)) for _ in range(count - 1)]
    exact = weight.dequantize(torch.float32)
    dense = exact.to(dtype)
    theirs = [dense.clone() for _ in range(place.copies(dense.nbytes))]
    generator = torch.Generator(device).manual_seed(1)
    found = []
    for number in rows:
        x = torch.randn(number, width, device=device, dtype=dtype, generator=generator)
        row: dict[str, Any] = {"linear": name, "rows": number, "kind": packed.kind}
        row["error"] = relative_error(ours[-1](x), F.linear(x.float(), exact))
        row["bytes"] = packed.bytes + x.nbytes + number * out * dtype.itemsize
        if row["error"] <= TOLERANCE:
            row["seconds"] = seconds(place, [partial(one, x) for one in ours])
            row["dense_seconds"] = seconds(place, [partial(F.linear, x, one) for one in theirs])
        found.append(row)
    return found


def summed(data: dict[str, Any], copy_bytes_per_s: float) -> list[dict[str, Any]]:
    """One row for each number of rows: the four linears together."""
    table = []
    for number in dict.fromkeys(row["rows"] for row in data["linears"]):
        rows = [row for row in data["linears"] if row["rows"] == number]
        if not all("seconds" in row for row in rows):
            continue
        taken = sum(row["seconds"] for row in rows)
        dense = sum(row["dense_seconds"] for row in rows)
        moved = sum(row["bytes"] for row in rows)
        table.append(
            {
                "bits": data["bits"],
                "rows": number,
                "seconds": taken,
                "of_copy": moved / taken / copy_bytes_per_s,
                "of_dense": dense / taken,
                "least_of_dense": min(row["dense_seconds"] / row["seconds"] for row in rows),
            }
        )
    return table
