"""Other kernels in the linears of our engine: what a user would take instead."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.silu_mul.triton import silu_mul
from gpu import model
from gpu.place import Place
from gpu.stages import Skip


class _Peer:
    """A linear layer, with our gate after it where gate and up are one weight."""

    def __init__(self, size: int, gated: bool) -> None:
        self.bytes, self._gated = size, gated

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        y = self.product(x)
        if self._gated:
            y = silu_mul(y)
        return y if out_dtype is None else y.to(out_dtype)


class Dense(_Peer):
    """cuBLAS on de-quantized weights."""

    kind = "cuBLAS"

    def __init__(self, weight: Tensor, gated: bool) -> None:
        super().__init__(weight.nbytes, gated)
        self._weight = weight

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight)


class Gemlite(_Peer):
    """gemlite's kernels on the same codes and scales."""

    kind = "gemlite"

    def __init__(self, weight: LinearWeight, dtype: torch.dtype, gated: bool) -> None:
        from gemlite import DType, GemLiteLinear  # type: ignore[import-not-found]

        assert weight.codes is not None
        assert weight.scale is not None
        out, width = weight.shape
        kind = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}[dtype]
        self._linear = GemLiteLinear(
            weight.bits, group_size=weight.group_size, in_features=width, out_features=out,
            input_dtype=kind, output_dtype=kind,
        )  # fmt: skip
        # (W_q - zeros) * scales, with codes from 0: half of their range is the zero
        middle = 1 << (weight.bits - 1)
        codes = (weight.codes.to(torch.int16) + middle).to(torch.uint8)
        scale = weight.scale.to(dtype)
        self._linear.pack(codes, scale, middle, None)
        super().__init__(self._linear.W_q.nbytes + self._linear.scales.nbytes, gated)

    def product(self, x: Tensor) -> Tensor:
        return self._linear(x)


def dense_pack(
    weight: LinearWeight, dtype: torch.dtype, device: torch.device, _: Any, silu_mul: bool = False
) -> Dense:
    """In the place of `pack_for_triton`: everything de-quantized."""
    return Dense(weight.dequantize(dtype).to(device), silu_mul)


def gemlite_pack(
    weight: LinearWeight, dtype: torch.dtype, device: torch.device, _: Any, silu_mul: bool = False
) -> _Peer:
    """In the place of `pack_for_triton`: gemlite for codes, cuBLAS for the head."""
    if weight.codes is None:
        return dense_pack(weight, dtype, device, _, silu_mul)
    return Gemlite(weight, dtype, silu_mul)


def dense(place: Place) -> dict[str, Any]:
    """The model of 16-bit weights."""
    return model.measure(place, (1, 16, 64), dense_pack)


def gemlite(place: Place) -> dict[str, Any]:
    """The same codes with gemlite's kernels, which are tuned as they meet new sizes."""
    if place.stand_in:
        raise Skip("gemlite's kernels do not run in the interpreter")
    if find_spec("gemlite") is None:
        raise Skip("gemlite is not installed; pip install gemlite")
    return model.measure(place, (1, 16), gemlite_pack, prefill=False)
