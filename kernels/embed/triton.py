"""Embeddings of tokens, those included that the launch before has drawn.

    out[t] = table[tokens[t]]                  tokens[t] >= 0
    out[t] = table[drawn[-1 - tokens[t]]]      otherwise

A draw of -1 (the logits held NaN) reads row 0: the host ends such a sequence.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.entry import Entry

BLOCK = 1024


@triton.jit
def _embed(tokens, drawn, table, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row)
    if token < 0:
        token = tl.load(drawn - 1 - token)
    token = tl.maximum(token, 0)
    mask = columns < width
    found = tl.load(table + token * width + columns, mask=mask)
    tl.store(out + row * width + columns, found, mask=mask)


def embed(tokens: Tensor, drawn: Tensor, table: Tensor) -> Tensor:
    """The tokens' embeddings [T, D] in the dtype of the table.

    tokens  int64 [T]; -1 - i stands for drawn[i]
    drawn   int64 [R]
    table   [V, D]
    """
    width = table.shape[1]
    out = torch.empty(len(tokens), width, dtype=table.dtype, device=table.device)
    _embed[len(tokens), triton.cdiv(width, BLOCK)](tokens, drawn, table, out, width, BLOCK=BLOCK)
    return out


def entries(capability: int) -> list[Entry]:
    """What `embed` launches, the same on every device."""
    del capability
    types = {"tokens": "*i64", "drawn": "*i64", "width": "i32"}
    return [
        Entry(
            f"embed {dtype}",
            _embed,
            types | {"table": f"*{dtype}", "out": f"*{dtype}"},
            {"BLOCK": BLOCK},
        )
        for dtype in ("fp16", "bf16")
    ]
