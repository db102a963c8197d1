"""Rounding a linear's inputs in PyTorch, for models that transformers computes.

    y = W x̂,    x̂[t, i] = code[t, i] * s[t],  or x[t, i] itself where it is an outlier

With the weight that `QuantizedWeight.dequantize` gives, outlier columns in their place, that is all
there is to 8-bit activations: integer products of codes times two scales are the same numbers.  It
costs a float product, so it measures quality; the runtime has the kernels.

Outliers (LLM.int8, Dettmers et al., arXiv 2208.07339, section 3) are columns found in calibration,
and elements at or above the threshold elsewhere, of each token by itself.  bitsandbytes takes a
column out for all tokens of a batch if it is at the threshold for one of them; here a token's
result never depends on the others.  For one token alone the two are equal.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.kernels.lowbit_matmul.weight import MOST_FOUND, InputRounding
from compress.quant.config import RoundedGrid

# The code of a token's largest |x|.  compressed-tensors divides integers by half their range.
LARGEST = {"int8": 127.5, "fp8": torch.finfo(torch.float8_e4m3fn).max}
VECTORWISE = 127.0  # of LLM.int8, in bitsandbytes


def rounding_of(
    grid: RoundedGrid, outlier_index: Tensor | None = None, outlier_weight: Tensor | None = None
) -> InputRounding:
    """How inputs of a linear on this grid are rounded (shapes as in InputRounding)."""
    largest = LARGEST[grid.inputs] if grid.outlier_threshold is None else VECTORWISE
    threshold = grid.outlier_threshold or None  # 0, in bitsandbytes' files, is none
    return InputRounding(grid.inputs, largest, outlier_index, outlier_weight, threshold)


def round_inputs(x: Tensor, rounding: InputRounding) -> Tensor:
    """Inputs x [..., in], rounded token by token (see the module), in float32; x's dtype again."""
    values = x.float()
    exact = _outliers(values, rounding)
    others = values.masked_fill(exact, 0)
    step = others.abs().amax(dim=-1, keepdim=True) / rounding.largest
    step = torch.where(step == 0, 1.0, step)
    return torch.where(exact, values, to_codes(others / step, rounding.kind) * step).to(x.dtype)


def to_codes(scaled: Tensor, kind: str) -> Tensor:
    """The nearest codes, ties to even, saturating; float32 in and out."""
    if kind == "int8":
        return scaled.round().clamp(-128, 127)
    return to_fp8(scaled).float()


def to_fp8(scaled: Tensor) -> Tensor:
    """float8_e4m3fn of values that may be out of its range, which saturate."""
    return scaled.clamp(-LARGEST["fp8"], LARGEST["fp8"]).to(torch.float8_e4m3fn)


def _outliers(values: Tensor, rounding: InputRounding) -> Tensor:
    """bool, like values: what is not rounded."""
    exact = torch.zeros_like(values, dtype=torch.bool)
    if rounding.threshold is not None:
        exact = values.abs() >= rounding.threshold
    if rounding.outlier_index is not None:
        index = rounding.outlier_index.to(values.device)
        exact[..., index] = False
        exact &= exact.cumsum(dim=-1) <= MOST_FOUND
        exact[..., index] = True
        return exact
    return exact & (exact.cumsum(dim=-1) <= MOST_FOUND)


def round_inputs_of(model: nn.Module, roundings: Mapping[str, InputRounding]) -> None:
    """Have linears of a model, by name, round their inputs from now on."""
    for name, rounding in roundings.items():
        model.get_submodule(name).register_forward_pre_hook(partial(_before, rounding))


def _before(rounding: InputRounding, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (round_inputs(args[0], rounding), *args[1:])
