"""FP8: weights and activations as float8_e4m3fn, a scale for each row and each token.

    W ≈ codes * scale,    scale = max|row| / 448

float8_e4m3fn has 3 bits of mantissa and 4 of exponent, largest value 448 (Micikevicius et al., "FP8
Formats for Deep Learning", arXiv 2209.05433).  A rounding error is a share of the value itself, up
to 2^-4, where that of an integer is the same for large and small values: outliers do not hurt the
rest, and nothing needs calibrating.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from compress.core.stage import Block
from compress.quant.config import Grid, RoundedConfig, RoundedGrid
from compress.quant.input_rounding import LARGEST, rounding_of, to_fp8
from compress.quant.stage import QuantizationStage, QuantizedLinear
from compress.quant.weight import QuantizedWeight, never_zero


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Fp8Config(RoundedConfig):
    """FP8 has no settings of its own."""

    format: Literal["compressed-tensors"] = "compressed-tensors"

    def grid(self) -> RoundedGrid:
        return RoundedGrid(inputs="fp8")

    def stage(self, grids: Mapping[str, Grid]) -> "Fp8Stage":
        return Fp8Stage(self, grids)


class Fp8Stage(QuantizationStage):
    """Round every linear to the nearest float8_e4m3fn."""

    method: ClassVar[str] = "fp8"
    needs_statistics = False

    def quantize_linears(
        self, block: Block, linears: Mapping[str, nn.Linear]
    ) -> dict[str, QuantizedLinear]:
        """Quantize each linear by itself (see QuantizationStage.quantize_linears)."""
        dtype = self.format.scale_dtype(block.dtype)
        return {
            name: QuantizedLinear(rounded_to_fp8(linear.weight.data, dtype))
            for name, linear in linears.items()
        }


def rounded_to_fp8(weight: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    """A weight [out, in] in float8_e4m3fn, with one scale a row, kept in `dtype`."""
    scale = never_zero((weight.abs().amax(dim=1, keepdim=True) / LARGEST["fp8"]).to(dtype))
    codes = to_fp8(weight / scale.float())
    inputs = rounding_of(RoundedGrid(inputs="fp8"))
    return QuantizedWeight(codes, scale, None, 8, weight.shape[1], inputs=inputs)
