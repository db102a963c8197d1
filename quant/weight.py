"""Weights on a grid: the one representation that every method makes and every format packs.

    W ≈ (codes - zero_point) * scale + offset      per row and group of `group_size` input columns

Methods make grids without an offset; imported GGUF weights (Q4_1) have one.  Where a linear's
inputs are rounded to fp8, its codes are floats of that kind, and columns that LLM.int8 keeps in
float stand beside the codes (`inputs`).

Integer codes are signed, in [-2^(b-1), 2^(b-1) - 1].  Arithmetic follows compressed-tensors
operation by operation (dtype of each step included), so that codes and de-quantized weights are
equal to that library's bit for bit: in the dtype of the weight for rounding, in the dtype of the
scale for de-quantization.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.lowbit_matmul.weight import InputRounding


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear's weight as codes.

    codes       int8 [out, in]; float8_e4m3fn where inputs are rounded to fp8
    scale       float [out, groups], the dtype in which it is de-quantized
    zero_point  int8 [out, groups], or None when symmetric
    group_size  input columns that share a scale; groups = ceil(in / group_size)
    offset      float [out, groups], added after scaling, or None
    group_of    int32 [in], the group of each column; None when groups are runs of consecutive
                columns.  GPTQ checkpoints written in activation order need it
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    offset: Tensor | None = None
    group_of: Tensor | None = None
    inputs: InputRounding | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None

    def dequantize(self) -> Tensor:
        """Return the weight [out, in] in the scale's dtype."""
        weight = self.codes.to(self.scale.dtype)
        if self.zero_point is not None:
            weight -= self._by_column(self.zero_point.to(weight.dtype))
        weight *= self._by_column(self.scale)
        if self.offset is not None:
            weight += self._by_column(self.offset)
        if self.inputs is not None and self.inputs.outlier_index is not None:
            assert self.inputs.outlier_weight is not None
            weight[:, self.inputs.outlier_index] = self.inputs.outlier_weight.to(weight.dtype)
        return weight

    def _by_column(self, per_group: Tensor) -> Tensor:
        """Spread [out, groups] over the columns, [out, in]."""
        if self.group_of is not None:
            return per_group[:, self.group_of]
        return per_group.repeat_interleave(self.group_size, dim=1)[:, : self.codes.shape[1]]


def code_range(bits: int) -> tuple[int, int]:
    """The least and the greatest code of a signed integer with `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def minmax_grid(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """The grid that just covers each group, as compressed-tensors' min-max observer sets it.

    Symmetric: scale = max|w| / ((qmax - qmin) / 2), i.e. max|w| / 7.5 at 4 bits.  Asymmetric:
    scale = (max - min) / (qmax - qmin) with 0 inside the range, zero point rounded and clamped.

    weight [out, in], any float dtype; returns scale [out, in / group_size] in that dtype and
    zero_point int8 of the same shape (None when symmetric).  Raises ValueError when group_size
    does not divide `in`.
    """
    if weight.shape[1] % group_size:
        raise ValueError(f"group size {group_size} does not divide the width {weight.shape[1]}")
    qmin, qmax = code_range(bits)
    grouped = weight.view(weight.shape[0], -1, group_size)
    low, high = grouped.amin(dim=-1).clamp(max=0), grouped.amax(dim=-1).clamp(min=0)
    # Divisors are tensors of the weight's dtype: PyTorch divides a 16-bit tensor by a Python
    # number in float32 and rounds once, which compressed-tensors does not.
    span = torch.tensor(float(qmax - qmin), dtype=weight.dtype, device=weight.device)
    if symmetric:
        return never_zero(torch.maximum(low.abs(), high.abs()) / (span / 2)), None
    scale = (high - low) / span
    zero_point = (qmin - low / scale).nan_to_num(nan=qmin).clamp(qmin, qmax).round().to(torch.int8)
    return never_zero(scale), zero_point


def covering_grid(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """The tightest grid that covers each group: like `minmax_grid`, but signed when symmetric.

    The weight of largest magnitude m in a group is put on the code furthest from zero, -2^(b-1),
    by scale = -m / 2^(b-1), which is negative when m is positive (llama.cpp's Q4_0).
    """
    if not symmetric:
        return minmax_grid(weight, bits, group_size, symmetric)
    grouped = weight.view(weight.shape[0], -1, group_size)
    largest = grouped.gather(-1, grouped.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    return never_zero(largest / code_range(bits)[0]), None


def never_zero(scale: Tensor) -> Tensor:
    """Replace scales of zero (all-zero groups, or too small for the dtype): they are divided by."""
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def round_to_grid(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int
) -> QuantizedWeight:
    """Round each weight to the nearest code (ties to even) of a given grid.

    weight [out, in] and scale [out, in / group_size] share a dtype, in which the division and
    the addition of the zero point are done.
    """
    rows, columns = weight.shape
    qmin, qmax = code_range(bits)
    scaled = weight.view(rows, -1, group_size) / scale.unsqueeze(-1)
    if zero_point is not None:
        scaled += zero_point.to(scaled.dtype).unsqueeze(-1)
    codes = scaled.clamp_(qmin, qmax).round_().to(torch.int8).view(rows, columns)
    return QuantizedWeight(codes, scale, zero_point, bits, group_size)
