"""The gate of a feed-forward network on a GPU: silu(gate) * up, as reference.py rounds it."""

# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.entry import Entry

BLOCK = 1024
"""Columns of a program: 16 bytes of each operand a thread with four warps."""


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + 2 * row + column, mask=inside, other=0.0)
    up = tl.load(gate_up + 2 * row + width + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    y = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row + column, y.to(gate.dtype), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F], gate first, contiguous, any float dtype -> [T, F] in that dtype."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(rows, triton.cdiv(width, BLOCK))](gate_up, out, width, BLOCK=BLOCK, num_warps=4)
    return out


def entries(capability: int) -> list[Entry]:
    """16 bits, F a multiple of 16."""
    return [
        Entry(
            f"silu_mul {kind}",
            _silu_mul,
            {"gate_up": f"*{kind}", "out": f"*{kind}", "width": "i32"},
            {"BLOCK": BLOCK},
            aligned=frozenset(["gate_up", "out", "width"]),
        )
        for kind in ("fp16", "bf16")
    ]
