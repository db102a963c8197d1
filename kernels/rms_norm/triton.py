"""RMSNorm with an optional residual sum on a GPU: one launch, one program a row.

    h = x + residual
    y = cast(h / sqrt(mean(h²) + eps)) * weight

in the order of casts of reference.py.  A program holds its row in registers, so that x is read once
and h and y are written once; rows are few in decode, where 8 numbers a thread (one load of 16
bytes) make the chain of loads, sum and stores shortest.
"""

# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.entry import Entry


@triton.jit
def _rms_norm(
    x, residual, weight, total, out, width, stride, eps, RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x + tl.program_id(0).to(tl.int64) * stride + column, mask=inside, other=0.0)
    gain = tl.load(weight + column, mask=inside, other=0.0)
    if RESIDUAL:
        added = tl.load(residual + row + column, mask=inside, other=0.0)
        h = (h.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row + column, h, mask=inside)
    wide = h.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide) / width + eps)
    y = normed.to(h.dtype).to(tl.float32) * gain.to(h.dtype).to(tl.float32)
    tl.store(out + row + column, y.to(h.dtype), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See reference.py; D is up to 65536; models' gains are float32.

    Tensors are contiguous, but for an x of two dimensions, whose rows alone are.
    """
    width = x.shape[-1]
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    block, num_warps = choose(width)
    stride = x.stride(0) if x.dim() == 2 else width
    _rms_norm[(x.numel() // width,)](
        x, residual, weight, total, out, width, stride, eps,
        RESIDUAL=residual is not None, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    return total, out


def choose(width: int) -> tuple[int, int]:
    """Numbers that a program holds, and its warps."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 256))


def entries(capability: int) -> list[Entry]:
    """Rows of 576 and of 4096 numbers, with a residual sum and without one."""
    found = []
    for kind in ("fp16", "bf16"):
        for width in (576, 4096):
            for with_residual in (True, False):
                block, num_warps = choose(width)
                pointers = ["x", "weight", "total", "out"]
                constants: dict[str, object] = {"RESIDUAL": with_residual, "BLOCK": block}
                if with_residual:
                    pointers.append("residual")
                else:
                    constants["residual"] = None
                found.append(
                    Entry(
                        f"rms_norm {block}{' residual' if with_residual else ''} {kind}",
                        _rms_norm,
                        dict.fromkeys(pointers, f"*{kind}")
                        | {"weight": "*fp32", "width": "i32", "stride": "i32", "eps": "fp32"},
                        constants,
                        num_warps,
                        aligned=frozenset([*pointers, "width", "stride"]),
                    )
                )
    return found
