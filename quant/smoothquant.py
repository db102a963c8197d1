"""SmoothQuant: what activations cannot bear is moved into the weights, then both get 8 bits.

    s_j = max|x_j|^a / max|w_j|^(1-a)        x̂ = x diag(s)^-1,   Ŵ = W diag(s)

per input channel j, with max|w_j| over the linears that share the input (Xiao et al., "SmoothQuant:
Accurate and Efficient Post-Training Quantization for Large Language Models", arXiv 2211.10438,
section 4).  The scales go into what produces the channels (channel_scaling.py): norms, as in the
paper, and linears too where they are found.  To these it costs nothing, since every row of a weight
has its own scale.  Weights are then rounded with one scale a row and inputs, at run time, with one
scale a token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from compress.core.stage import Block
from compress.core.statistics import InputStatistics
from compress.quant.channel_scaling import ChannelScaling
from compress.quant.config import Grid, RoundedConfig, RoundedGrid
from compress.quant.folds import Fold
from compress.quant.input_rounding import rounding_of
from compress.quant.stage import (
    UNREACHED,
    QuantizationStage,
    QuantizedLinear,
    relative_output_error,
)
from compress.quant.weight import QuantizedWeight, minmax_grid, never_zero, round_to_grid

LEAST = 1e-5  # of max|x| and max|w|, as in the authors' code


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SmoothQuantConfig(RoundedConfig):
    """Settings of SmoothQuant.

    alpha  how much of the difficulty goes into the weights: 0 none, 1 all
    """

    format: Literal["compressed-tensors"] = "compressed-tensors"
    alpha: float = Field(default=0.5, ge=0, le=1)

    def grid(self) -> RoundedGrid:
        return RoundedGrid(inputs="int8")

    def stage(self, grids: Mapping[str, Grid]) -> "SmoothQuantStage":
        return SmoothQuantStage(self, grids)


class Smoothing(ChannelScaling):
    """SmoothQuant's scales."""

    def __init__(self, alpha: float, grids: Mapping[str, Grid]) -> None:
        super().__init__(grids)
        self.alpha = alpha

    def search(
        self,
        weights: Sequence[tuple[Tensor, Grid]],
        stats: InputStatistics,
        fold: Fold,
    ) -> tuple[Tensor, float]:
        """The formula's scale (see ChannelScaling.search); 1 for channels that were never active.

        Where several consumer channels read one producer channel, the largest of each counts.
        """
        w_max = torch.stack([weight.abs().amax(dim=0) for weight, _ in weights]).amax(dim=0)
        x_max = fold.largest_of(stats.max_abs)
        w_max = fold.largest_of(w_max).clamp(min=LEAST)
        scale = x_max.clamp(min=LEAST) ** self.alpha / w_max ** (1 - self.alpha)
        return torch.where(x_max > 0, scale, 1.0), self.alpha


class SmoothQuantStage(QuantizationStage):
    """Smooth and fold the inputs of a block, then round its weights to nearest."""

    method: ClassVar[str] = "smoothquant"
    needs_statistics = True

    def __init__(self, config: SmoothQuantConfig, grids: Mapping[str, Grid]) -> None:
        super().__init__(config, grids)
        self.smoothing = Smoothing(config.alpha, grids)
        self.inputs = rounding_of(config.grid())

    def state(self) -> Any:
        """The folds found so far."""
        return self.smoothing.state()

    def restore(self, state: Any) -> None:
        """Take over folds found before."""
        self.smoothing.restore(state)

    def quantize_linears(
        self, block: Block, linears: Mapping[str, nn.Linear]
    ) -> dict[str, QuantizedLinear]:
        """Quantize the linears (see QuantizationStage.quantize_linears)."""
        notes = self.smoothing.apply(block, linears)
        dtype = self.format.scale_dtype(block.dtype)
        rounded = {name: self.round(linear.weight.data, dtype) for name, linear in linears.items()}
        results = {name: QuantizedLinear(rounded[name], note=UNREACHED) for name in linears}
        for stats, note in zip(block.inputs, notes, strict=True):
            for name in stats.linears:
                if name in linears:
                    weight, dense = linears[name].weight.data, rounded[name].dequantize().float()
                    error = relative_output_error(weight, dense, stats.second_moment)
                    results[name] = QuantizedLinear(rounded[name], error, note)
        return results

    def round(self, weight: Tensor, dtype: torch.dtype) -> QuantizedWeight:
        """Round a (folded) weight [out, in] to int8, with one scale a row, kept in `dtype`."""
        width = weight.shape[1]
        stored = never_zero(minmax_grid(weight, 8, width, symmetric=True)[0].to(dtype))
        codes = round_to_grid(weight, stored.float(), None, 8, width).codes
        return QuantizedWeight(codes, stored, None, 8, width, inputs=self.inputs)
