"""Round to nearest (RTN): the honest floor under every comparison.

Each group's grid just covers its weights (compressed-tensors' min-max observer), and each weight
goes to the nearest code.  No data is used.  Codes equal that library's bit for bit, so a method's
gain over RTN here is its gain over what peers call RTN.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import nn

from compress.core.stage import Block
from compress.quant.config import Grid, WeightOnlyConfig
from compress.quant.stage import QuantizationStage, QuantizedLinear
from compress.quant.weight import minmax_grid, round_to_grid


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RtnConfig(WeightOnlyConfig):
    """Round to nearest has no settings beyond its grid."""

    def stage(self, grids: Mapping[str, Grid]) -> "RtnStage":
        return RtnStage(self, grids)


class RtnStage(QuantizationStage):
    """Round every linear to nearest, in the dtype that the checkpoint stores."""

    method: ClassVar[str] = "rtn"
    needs_statistics = False

    def quantize_linears(
        self, block: Block, linears: Mapping[str, nn.Linear]
    ) -> dict[str, QuantizedLinear]:
        """Quantize each linear by itself (see QuantizationStage.quantize_linears)."""
        results = {}
        for name, linear in linears.items():
            grid = self.grids[block.full_name(name)]
            weight = linear.weight.data.to(self.format.scale_dtype(block.dtype))
            group_size = grid.group_size or linear.in_features
            scale, zero_point = minmax_grid(weight, grid.bits, group_size, grid.symmetric)
            rounded = round_to_grid(weight, scale, zero_point, grid.bits, group_size)
            results[name] = QuantizedLinear(rounded)
        return results
