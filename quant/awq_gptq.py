"""AWQ's channel scales, then GPTQ's rounding: the two compose.

AWQ makes the channels that matter easier to round (awq.py), GPTQ lets the columns still to come
make up for rounding errors (gptq.py).  Scaling an input by 1/s turns its moments into
H / (s sᵀ) and C / (s sᵀ), so GPTQ runs on these, and no activation is collected again.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

from compress.core.stage import Block
from compress.quant.awq import ChannelScaling
from compress.quant.config import Grid
from compress.quant.gptq import GptqConfig, GptqStage, LinearInput, first_cross_moment


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AwqGptqConfig(GptqConfig):
    """GPTQ's settings, and AWQ's for the channel scales.

    scale_points  values of AWQ's exponent that are tried, evenly over [0, 1]
    """

    scale_points: int = Field(default=10, ge=1, le=1000)

    def stage(self, grids: Mapping[str, Grid]) -> "AwqGptqStage":
        return AwqGptqStage(self, grids)


class AwqGptqStage(GptqStage):
    """Scale and fold the inputs of a block, then round as GPTQ does."""

    method: ClassVar[str] = "awq+gptq"

    def __init__(self, config: AwqGptqConfig, grids: Mapping[str, Grid]) -> None:
        super().__init__(config, grids)
        self.scaling = ChannelScaling(config.scale_points, grids)

    def inputs_of(self, block: Block, linears: Mapping[str, nn.Linear]) -> list[LinearInput]:
        """The block's inputs, scaled."""
        inputs = []
        scaled = self.scaling.apply(block, linears)
        crosses = first_cross_moment(block)
        for stats, given, cross in zip(block.inputs, scaled, crosses, strict=True):
            if cross is not None and given.spread is not None:
                cross = cross / torch.outer(given.spread, given.spread)
            inputs.append(LinearInput(stats.linears, given.moment, cross, given.note))
        return inputs
