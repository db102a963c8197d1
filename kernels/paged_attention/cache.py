"""How keys and values lie in blocks: in the model's dtype, or as 8-bit codes with scales.

A row is what one token leaves for one head, x of H numbers.  In 8 bits it is

    s = max(max_i |x[i]| / largest, 2^-126)
    code[i] = x[i] / s, rounded to even, between -largest and largest        x[i] ~ s * code[i]

with `largest` 127 for int8 and 448 for fp8 (e4m3).  s is float32, so that a row takes H + 4 bytes.
It needs no calibration, and what is written of a token depends on nothing but the token.  Where a
checkpoint brings scales that were calibrated (`fixed`), all rows of a layer have that one, and what
lies beyond it is cut off.

A row that holds NaN or an infinity has the scale NaN, and so has all that is computed of it.

Sources: int8 by rows, Dettmers et al., LLM.int8(), 2022, arXiv:2208.07339, section 2; e4m3,
Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMALLEST = 2.0**-126  # of float32's normal numbers


@dataclass(frozen=True)
class Codes:
    """A dtype of 8 bits for keys and values, and the largest number that it is used for."""

    name: str
    dtype: torch.dtype
    largest: float


INT8 = Codes("int8", torch.int8, 127.0)
FP8 = Codes("fp8", torch.float8_e4m3fn, 448.0)
CODES = {codes.name: codes for codes in (INT8, FP8)}


@dataclass(frozen=True)
class QuantizedBlocks:
    """Keys, or values, of a layer in 8 bits.

    codes   [num_blocks, ...] as the way of computing lays blocks out, of `kind.dtype`
    scales  float32 [num_blocks, K, block_size]
    fixed   the scale of every row that is written; None for each row's own
    """

    kind: Codes
    codes: Tensor
    scales: Tensor
    fixed: float | None = None


Blocks = Tensor | QuantizedBlocks


def tensors_of(blocks: Blocks) -> tuple[Tensor, ...]:
    """All tensors of keys or of values; a block is the first dimension of each."""
    return (blocks,) if isinstance(blocks, Tensor) else (blocks.codes, blocks.scales)


def parts_of(blocks: Blocks) -> tuple[Tensor, Tensor | None]:
    """What a Triton kernel gets of keys or values: numbers, or codes' bits as int8, and scales."""
    if isinstance(blocks, Tensor):
        return blocks, None
    return blocks.codes.view(torch.int8), blocks.scales


def new_blocks(
    shape: tuple[int, ...],
    scales: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    codes: Codes | None,
) -> Blocks:
    """Keys or values of a layer, not filled: `shape` in `dtype`, or in `codes` with `scales`."""
    if codes is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return QuantizedBlocks(
        codes,
        torch.empty(shape, dtype=codes.dtype, device=device),
        torch.empty(scales, dtype=torch.float32, device=device),
    )


def with_scales(
    cache: tuple[Blocks, Blocks], fixed: tuple[float, float] | None
) -> tuple[Blocks, Blocks]:
    """The keys and values of a layer, from now on written with calibrated scales if any."""
    keys, values = cache
    if fixed and isinstance(keys, QuantizedBlocks) and isinstance(values, QuantizedBlocks):
        return replace(keys, fixed=fixed[0]), replace(values, fixed=fixed[1])
    return cache


def quantize(x: Tensor, kind: Codes, fixed: float | None = None) -> tuple[Tensor, Tensor]:
    """Codes of rows x [..., H] and their scales, float32 [...]."""
    x = x.float()
    most = x.abs().amax(dim=-1)
    scales = (most / kind.largest).clamp(min=SMALLEST)
    if fixed is not None:
        scales = torch.full_like(scales, fixed)
    scales = torch.where(most.isfinite(), scales, torch.nan)
    codes = (x / scales[..., None]).clamp(-kind.largest, kind.largest).nan_to_num(0.0)
    return (codes.round() if kind is INT8 else codes).to(kind.dtype), scales
