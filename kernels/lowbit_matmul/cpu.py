"""Quantized linear layers on a CPU, by PyTorch's native operations.  All take bfloat16 x.

Int4   `_weight_int4pack_mm_for_cpu`: codes of up to 4 bits in groups of 32, 64, 128 or 256 columns
       (a multiple of these is split, with its scale repeated), out widths in sixteens (rows are
       padded).  w = (u - 8) * scale + zero with u = code + 8, so zero is our shift; scale and zero
       are bfloat16.  One that bfloat16 does not hold is rounded, by up to 2^-9 of its value: with
       codes of up to 8 steps a weight moves by up to 1/64 of a step for the scale, and as much for
       a shift of 8 steps, where rounding to codes moved it by up to half a step.
Int8   `_weight_int8pack_mm`: codes of up to 8 bits, one scale a row and no shift.  The scale is
       bfloat16 too, so that a row's results are off by up to 2^-9.  Widths that are no multiple of
       16 are not taken: the operation reads beyond the end of a row then (PyTorch 2.13).

Both are made for few rows.  From DENSE_ROWS rows of x on (prefill) it is faster to de-quantize in
bfloat16 and multiply: 3072 x 576 in int4 takes 48 microseconds at one row, 0.7 ms at 32 and 1.3 ms
at 64, against 0.5 ms for de-quantizing and 0.3 and 0.5 ms for the product.  The codes are kept as
int8 for that, which makes 1.5 bytes a weight with Int4's own copy.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.kernels.lowbit_matmul.dense import DenseLinear
from compress.kernels.lowbit_matmul.weight import LinearWeight

DENSE_ROWS = 48
INT4_GROUPS = (256, 128, 64, 32)
INT4_ROWS = 16  # of the weight, at a time
INT8_COLUMNS = 16


class Int4Linear:
    """Codes of up to 4 bits in groups, for bfloat16 activations."""

    kind = "int4 (aten)"

    def __init__(self, weight: LinearWeight) -> None:
        assert weight.codes is not None
        assert weight.scale is not None
        self._rows = weight.shape[0]
        size = _int4_group(weight.group_size)
        assert size
        self._group_size = size
        self._codes = weight.codes
        times = weight.group_size // size
        shift = torch.zeros_like(weight.scale) if weight.shift is None else weight.shift
        grid = torch.stack([weight.scale, shift], dim=-1).to(torch.bfloat16)
        self._by_row = grid = grid.repeat_interleave(times, dim=1)  # [out, in / size, 2]
        padding = -self._rows % INT4_ROWS
        unsigned = F.pad(weight.codes, (0, 0, 0, padding)).to(torch.int32) + 8
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        self._grid = F.pad(grid, (0, 0, 0, 0, 0, padding)).transpose(0, 1).contiguous()
        self._bias = None if weight.bias is None else weight.bias.to(torch.bfloat16)
        self.bytes = self._packed.nbytes + self._grid.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x bfloat16 [T, in] -> [T, out]"""
        if len(x) >= DENSE_ROWS:
            return F.linear(x, self._dequantized(), self._bias)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self._packed, self._group_size, self._grid
        )[:, : self._rows]
        return y if self._bias is None else y + self._bias

    def _dequantized(self) -> Tensor:
        scale, shift = self._by_row.unsqueeze(-2).unbind(-1)  # [out, in / size, 1]
        groups = self._codes.view(self._rows, -1, self._group_size).to(torch.bfloat16)
        return torch.addcmul(shift, groups, scale).view(self._codes.shape)


class Int8Linear:
    """Codes of up to 8 bits with one scale a row, for bfloat16 activations."""

    kind = "int8 (aten)"

    def __init__(self, weight: LinearWeight) -> None:
        assert weight.codes is not None
        assert weight.scale is not None
        self._codes = weight.codes.contiguous()
        self._scale = weight.scale.squeeze(1).to(torch.bfloat16)  # [out]
        self._bias = None if weight.bias is None else weight.bias.to(torch.bfloat16)
        self.bytes = self._codes.nbytes + self._scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x bfloat16 [T, in] -> [T, out]"""
        if len(x) >= DENSE_ROWS:
            return F.linear(x, self._codes * self._scale[:, None], self._bias)
        y = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self._codes, self._scale)
        return y if self._bias is None else y + self._bias


def pack(weight: LinearWeight, dtype: torch.dtype) -> DenseLinear | Int4Linear | Int8Linear:
    """The fastest of these that takes a weight and activations in `dtype`."""
    if dtype != torch.bfloat16 or weight.dense is not None:
        return DenseLinear(weight, dtype)
    if weight.bits <= 4 and _int4_group(weight.group_size):
        return Int4Linear(weight)
    columns = weight.shape[1]
    if weight.group_size == columns and weight.shift is None and columns % INT8_COLUMNS == 0:
        return Int8Linear(weight)
    return DenseLinear(weight, dtype)


def _int4_group(group_size: int) -> int | None:
    """The largest group that the int4 operation takes and that divides this one."""
    return next((size for size in INT4_GROUPS if group_size % size == 0), None)
