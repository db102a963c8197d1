"""LLM.int8(): 8 bits for weights and activations, but for the columns that do not bear it.

    y = sum over other columns of round(x) round(W)  +  sum over outlier columns of x W

Rounding is vector-wise: each row of W and each token of x has a scale, its largest magnitude over
127 (Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv
2208.07339, sections 2 and 3).  A few channels of large models are tens of times larger than the
others; one of them in a token takes all but a few of the 255 steps from the rest.  So columns whose
inputs reach the threshold in calibration are not rounded, nor are their weights, which are stored
as they were.  Columns that reach it later, at run time, are caught then, element by element, and
multiplied with the rounded weight; bitsandbytes does so with all outliers.

Outlier columns count for a row's scale, as in bitsandbytes, which needs their codes.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from compress.core.stage import Block
from compress.core.statistics import InputStatistics
from compress.quant.config import Grid, RoundedConfig, RoundedGrid
from compress.quant.input_rounding import VECTORWISE, rounding_of
from compress.quant.weight import QuantizedWeight
from compress.quant.weight_only import (
    UNREACHED,
    QuantizationStage,
    QuantizedLinear,
    relative_output_error,
)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LlmInt8Config(RoundedConfig):
    """Settings of LLM.int8.

    outlier_threshold  inputs of this size and above are not rounded; 0 rounds all of them (and
                       needs no calibration)
    """

    format: Literal["bitsandbytes"] = "bitsandbytes"
    outlier_threshold: float = Field(default=6.0, ge=0, allow_inf_nan=False)

    def grid(self) -> RoundedGrid:
        return RoundedGrid(inputs="int8", outlier_threshold=self.outlier_threshold)

    def stage(self, grids: Mapping[str, Grid]) -> "LlmInt8Stage":
        return LlmInt8Stage(self, grids)


class LlmInt8Stage(QuantizationStage):
    """Round weights row by row, and take out the columns that are outliers in calibration."""

    method: ClassVar[str] = "llm-int8"

    def __init__(self, config: LlmInt8Config, grids: Mapping[str, Grid]) -> None:
        super().__init__(config, grids)
        self.threshold = config.outlier_threshold
        self.grid = config.grid()
        self.needs_statistics = self.threshold > 0

    def quantize_linears(
        self, block: Block, linears: Mapping[str, nn.Linear]
    ) -> dict[str, QuantizedLinear]:
        """Quantize each linear by itself (see QuantizationStage.quantize_linears)."""
        stats_of = {name: stats for stats in block.inputs for name in stats.linears}
        return {
            name: self._quantized(linear.weight.data, stats_of.get(name), block.dtype)
            for name, linear in linears.items()
        }

    def _quantized(
        self, weight: Tensor, stats: InputStatistics | None, dtype: torch.dtype
    ) -> QuantizedLinear:
        codes, scale = vectorwise(weight)
        outliers = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        if stats is not None:
            outliers = stats.max_abs >= self.threshold
        index = outliers.nonzero().squeeze(1)
        inputs = rounding_of(self.grid, index, weight[:, index].to(dtype))
        rounded = QuantizedWeight(codes, scale, None, 8, weight.shape[1], inputs=inputs)
        if stats is None:
            return QuantizedLinear(rounded, note=UNREACHED if self.needs_statistics else "")
        error = relative_output_error(weight, rounded.dequantize(), stats.second_moment)
        note = f"{len(index)} of {weight.shape[1]} input columns are outliers"
        return QuantizedLinear(rounded, error, note)


def vectorwise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales float32 [out, 1] of a weight [out, in]: max|row| / 127.

    In bitsandbytes' arithmetic: float32, by the reciprocal.  A row of zeros has scale 0.
    """
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True)
    codes = (weight * (VECTORWISE / largest)).nan_to_num(nan=0.0).round().clamp(-127, 127)
    return codes.to(torch.int8), largest / VECTORWISE
