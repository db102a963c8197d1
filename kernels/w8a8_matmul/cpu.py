"""Linear layers that round their inputs, by PyTorch's operations, on any device.

reference.py has the arithmetic.  Int8 codes are multiplied by `torch._int_mm` on a CPU where that
is exact: oneDNN's product of two signed operands is, with VNNI, and saturates in 16 bits without.
That is tried, once.  Everywhere else, and for fp8, codes are kept in bfloat16 (float32 for other
activations), which holds them exactly, and multiplied as such: sums are float32's, and in bfloat16
a sum is rounded to 8 bits before it is scaled, as the result is afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.kernels.lowbit_matmul.weight import MOST_FOUND, InputRounding, LinearWeight
from compress.kernels.w8a8_matmul.reference import FP8_LARGEST, INT8


@dataclass(frozen=True)
class _Rounded:
    """Inputs after rounding.

    codes  [T, in], in the dtype that products are made in
    scale  float32 [T, 1]
    found  bool [T, in], the elements that exceed the threshold and are multiplied as they are; None
           where there are none
    """

    codes: Tensor
    scale: Tensor
    found: Tensor | None


class RoundingLinear:
    """A linear layer on 8-bit codes whose inputs are rounded; activations in any float dtype.

    `surplus`, int64 [1], is added to: the elements for which a token had no room.
    """

    def __init__(
        self, weight: LinearWeight, dtype: torch.dtype, device: torch.device, surplus: Tensor
    ) -> None:
        assert weight.codes is not None
        assert weight.scale is not None
        assert weight.inputs is not None
        self._inputs: InputRounding = weight.inputs
        whole = device.type == "cpu" and weight.inputs.kind == "int8" and int_mm_is_exact()
        held = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self._held = torch.int8 if whole else held
        self.kind = f"w8a8 {weight.inputs.kind} ({'aten' if whole else 'emulated'})"
        self._codes = weight.codes.to(device, self._held).contiguous()
        self._scale = weight.scale.to(device).mT  # [1, out]
        self._bias = None if weight.bias is None else weight.bias.to(device)
        self._surplus = surplus
        self._index = self._outlier_weight = None
        self.bytes = self._codes.nbytes + self._scale.nbytes
        if weight.inputs.outlier_index is not None:
            assert weight.inputs.outlier_weight is not None
            self._index = weight.inputs.outlier_index.to(device)
            self._outlier_weight = weight.inputs.outlier_weight.to(device, torch.float32)
            self.bytes += self._outlier_weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in], any float dtype -> [T, out] in that dtype."""
        exact = x.float()
        rounded = self._round(exact)
        y = self._product(rounded.codes)
        y *= rounded.scale
        y *= self._scale
        if rounded.found is not None:
            columns = rounded.found.any(dim=0).nonzero().flatten()
            kept = torch.where(rounded.found, exact, 0)[:, columns]
            y += F.linear(kept, self._codes[:, columns].float()) * self._scale
        if self._index is not None:
            assert self._outlier_weight is not None
            y += F.linear(exact[:, self._index], self._outlier_weight)
        if self._bias is not None:
            y += self._bias
        return y.to(x.dtype)

    def _product(self, codes: Tensor) -> Tensor:
        """Sums of products of codes, float32 [T, out]."""
        if self._held == torch.int8:
            return torch._int_mm(codes, self._codes.mT).float()  # pyright: ignore[reportPrivateImportUsage]
        return F.linear(codes, self._codes).float()

    def _round(self, x: Tensor) -> _Rounded:
        """x float32 [T, in]"""
        inputs, found = self._inputs, None
        if self._index is not None:
            x = x.index_fill(1, self._index, 0)
        if inputs.threshold is not None:
            exceeding = x.abs() >= inputs.threshold
            if exceeding.any():
                found = exceeding & (exceeding.cumsum(dim=1) <= MOST_FOUND)
                self._surplus += exceeding.sum() - found.sum()
                x = x.masked_fill(found, 0)
        scale = x.abs().amax(dim=1, keepdim=True) / inputs.largest
        scale = torch.where(scale == 0, 1.0, scale)
        ratio = x / scale
        if inputs.kind == "int8":
            codes = ratio.round_().clamp_(*INT8)
        else:
            codes = ratio.clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
        return _Rounded(codes.to(self._held), scale, found)


@cache
def int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` multiplies the largest codes without saturating, on this CPU."""
    for rows in (1, 16):
        x, w = (
            torch.tensor([[127], [-128]], dtype=torch.int8).repeat(count, 256)[:count]
            for count in (rows, 64)
        )
        found = torch._int_mm(x, w.mT)  # pyright: ignore[reportPrivateImportUsage]
        if not torch.equal(found.double(), x.double() @ w.double().mT):
            return False
    return True
