"""AWQ's channel scales, then GPTQ's rounding: the two compose.

AWQ makes the channels that matter easier to round (awq.py), GPTQ lets the columns still to come
make up for rounding errors (gptq.py).  Scaling an input by 1/s turns its moments into
H / (s sᵀ) and C / (s sᵀ), so GPTQ runs on these, and no activation is collected again.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

from compress.core.stage import Block
from compress.quant.awq import AwqScaling
from compress.quant.config import Grid
from compress.quant.gptq import GptqConfig, GptqStage, LinearInput


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
        self.scaling = AwqScaling(config.scale_points, grids)

    def state(self) -> Any:
        """The folds found so far."""
        return self.scaling.state()

    def restore(self, state: Any) -> None:
        """Take over folds found before."""
        self.scaling.restore(state)

    def inputs_of(self, block: Block, linears: Mapping[str, nn.Linear]) -> list[LinearInput]:
        """The block's inputs, scaled."""
        notes = self.scaling.apply(block, linears)
        inputs = super().inputs_of(block, linears)
        return [replace(given, note=note) for given, note in zip(inputs, notes, strict=True)]
