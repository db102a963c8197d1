"""LLM.int8(): 8 bits for weights and activations, but for the columns that do not bear it.

    y = sum over other columns of round(x) round(W)  +  sum over outlier columns of x W

Rounding is vector-wise: each row of W and each token of x has a scale, its largest magnitude over
127 (Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv
2208.07339, sections 2 and 3).  A few channels of large models are tens of times larger than the
others; one of them in a token takes all but a few of the 255 steps from the rest.  So some columns
are not rounded, nor are their weights, which are stored as they were:

    the few columns with the largest |x| in calibration, whatever the threshold: in a layer whose
    inputs are small an outlier may be far below it (benchmarks/LOG.md);
    columns that reach the threshold in more than 6% of the tokens, the paper's criterion;
    as many more, commonest first, as leave a few elements a token to be found at run time.

What else reaches the threshold is caught at run time, element by element, and multiplied with the
rounded weight.  bitsandbytes does so with all outliers.

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
from compress.kernels.lowbit_matmul.weight import MOST_FOUND
from compress.quant.config import Grid, RoundedConfig, RoundedGrid
from compress.quant.input_rounding import VECTORWISE, rounding_of
from compress.quant.stage import (
    UNREACHED,
    QuantizationStage,
    QuantizedLinear,
    relative_output_error,
)
from compress.quant.weight import QuantizedWeight

COMMON = 0.06  # share of tokens
LEFT_TO_RUN_TIME = MOST_FOUND / 4  # a token, on average: few tokens have four times as many
LEAST_WIDTH = 16  # input columns for each one of `outlier_columns`, at least


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LlmInt8Config(RoundedConfig):
    """Settings of LLM.int8.

    outlier_threshold  inputs of this size and above are not rounded; 0 rounds all of them (and
                       needs no calibration)
    outlier_columns    columns of each linear that are not rounded, at least: those with the largest
                       |x| in calibration (of narrow inputs one in 16)
    """

    format: Literal["bitsandbytes"] = "bitsandbytes"
    outlier_threshold: float = Field(default=6.0, ge=0, allow_inf_nan=False)
    outlier_columns: int = Field(default=16, ge=0, le=1024)

    def grid(self) -> RoundedGrid:
        return RoundedGrid(inputs="int8", outlier_threshold=self.outlier_threshold)

    def stage(self, grids: Mapping[str, Grid]) -> "LlmInt8Stage":
        return LlmInt8Stage(self, grids)


class LlmInt8Stage(QuantizationStage):
    """Round weights row by row, and take out the columns that are outliers in calibration."""

    method: ClassVar[str] = "llm-int8"

    def __init__(self, config: LlmInt8Config, grids: Mapping[str, Grid]) -> None:
        super().__init__(config, grids)
        self.grid, self.columns = config.grid(), config.outlier_columns
        self.needs_statistics = config.outlier_threshold > 0
        self.counts_above = config.outlier_threshold or None

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
        index = torch.empty(0, dtype=torch.int64, device=weight.device)
        if stats is not None:
            index = outlier_columns(stats, self.columns)
        inputs = rounding_of(self.grid, index, weight[:, index].to(dtype))
        rounded = QuantizedWeight(codes, scale, None, 8, weight.shape[1], inputs=inputs)
        if stats is None:
            return QuantizedLinear(rounded, note=UNREACHED if self.needs_statistics else "")
        error = relative_output_error(weight, rounded.dequantize(), stats.second_moment)
        note = f"{len(index)} of {weight.shape[1]} input columns not rounded"
        return QuantizedLinear(rounded, error, note)


def outlier_columns(stats: InputStatistics, least: int) -> Tensor:
    """The columns of an input that are not rounded, int64 [k], ascending (see the module).

    stats  with `share_above` of the threshold
    least  columns with the largest |x|
    """
    share = stats.share_above
    kept = share > COMMON
    largest = stats.max_abs.topk(min(least, stats.width // LEAST_WIDTH)).indices
    kept[largest] = True
    rare, order = share.masked_fill(kept, 0).sort(descending=True, stable=True)
    left = rare.sum() - rare.cumsum(dim=0) + rare  # elements a token, from this column on
    kept[order[(left > LEFT_TO_RUN_TIME) & (rare > 0)]] = True
    return kept.nonzero().squeeze(1)


def vectorwise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales float32 [out, 1] of a weight [out, in]: max|row| / 127.

    In bitsandbytes' arithmetic: float32, by the reciprocal.  A row of zeros has scale 0.
    """
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True)
    codes = (weight * (VECTORWISE / largest)).nan_to_num(nan=0.0).round().clamp(-127, 127)
    return codes.to(torch.int8), largest / VECTORWISE
