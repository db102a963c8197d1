"""Activation-aware weight quantization (AWQ), computed on the second moment.

Input channels that carry large activations matter more, so their weights are scaled up before
rounding and the producer of the channel is scaled down by as much (Lin et al., "AWQ:
Activation-aware Weight Quantization", arXiv 2306.00978, section 3.2):

    s = x̄^a / w̄^(1-a),    a in [0, 1]

with x̄ the mean |x| and w̄ the mean |w| / max|w| of its group, per input channel.  The paper, and
other implementations, run the block on all calibration data for each a.  Here the loss of a
candidate is arithmetic on the input's second moment H, exact on all tokens:

    loss(s) = tr(dW H dWᵀ),    dW = Q(W diag(s)) diag(s)^-1 - W

Then each group's scale is searched (the paper's clipping): from the range that just covers the
group downwards, by the group's diagonal block of H, exact on all tokens,

    loss = d H_gg dᵀ    for each row's rounding error d in the group

with either sign on a symmetric grid, and refitted by least squares to the codes it led to
(scales.py).

Which channels can be scaled is found by experiment (folds.py); linears without a fold still get
the second step.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor, nn

from compress.core.stage import Block
from compress.core.statistics import InputStatistics, bfloat16_products
from compress.quant.channel_scaling import ChannelScaling
from compress.quant.config import Grid, WeightOnlyConfig
from compress.quant.folds import Fold
from compress.quant.scales import ScaleSearch
from compress.quant.stage import (
    UNREACHED,
    QuantizationStage,
    QuantizedLinear,
    output_error,
    relative_output_error,
)
from compress.quant.weight import (
    QuantizedWeight,
    covering_grid,
    minmax_grid,
    never_zero,
    round_to_grid,
)

LEAST_SCALE = 1e-4  # a channel that is never active would otherwise get scale 0
SEARCH_ROWS = 512  # rows of the weight that the search for s looks at; all rows give the same s


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AwqConfig(WeightOnlyConfig):
    """Settings of AWQ beside the grid.

    scale_points  values of the exponent a that are tried, evenly over [0, 1]
    clip          search each group's scale
    clip_points   shrink factors that are tried, evenly from 1 down to `clip_least`
    """

    scale_points: int = Field(default=10, ge=1, le=1000)
    clip: bool = True
    clip_points: int = Field(default=20, ge=1, le=1000)
    clip_least: float = Field(default=0.5, gt=0, le=1)

    def stage(self, grids: Mapping[str, Grid]) -> "AwqStage":
        return AwqStage(self, grids)


class AwqScaling(ChannelScaling):
    """AWQ's first step, for any rounding that follows: find scales and fold them into the block."""

    def __init__(self, points: int, grids: Mapping[str, Grid]) -> None:
        super().__init__(grids)
        self.points = points

    def search(
        self,
        weights: Sequence[tuple[Tensor, Grid]],
        stats: InputStatistics,
        fold: Fold,
    ) -> tuple[Tensor, float]:
        """Return the best scale of the fold's producer channels, [P], and its exponent a.

        weights [out, K] are the linears that share the input, with their grids; of many rows,
        evenly spaced ones stand for all.
        """
        every = max(1, sum(len(weight) for weight, _ in weights) // SEARCH_ROWS)
        weights = [(weight[::every], grid) for weight, grid in weights]
        shares = []
        for weight, grid in weights:
            grouped = weight.abs().view(len(weight), -1, grid.group_size or weight.shape[1])
            share = grouped / grouped.amax(dim=-1, keepdim=True).clamp(min=1e-12)
            shares.append(share.view_as(weight))
        w_mean = fold.to_producer(torch.cat(shares).mean(dim=0)).clamp(min=LEAST_SCALE)
        x_mean = fold.to_producer(stats.mean_abs).clamp(min=LEAST_SCALE)
        best_loss, best_scale, best_exponent = float("inf"), torch.ones_like(x_mean), 0.0
        for exponent in torch.linspace(0, 1, self.points).tolist():
            scale = x_mean**exponent / w_mean ** (1 - exponent)
            scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(min=LEAST_SCALE)
            spread = fold.to_consumers(scale)
            loss = 0.0
            for weight, grid in weights:
                scaled, group_size = weight * spread, grid.group_size or weight.shape[1]
                covering = covering_grid(scaled, grid.bits, group_size, grid.symmetric)
                rounded = round_to_grid(scaled, *covering, grid.bits, group_size).dequantize()
                with bfloat16_products():  # 8 bits of each factor are plenty for a ranking
                    loss += output_error(rounded / spread - weight, stats.second_moment).item()
            if loss < best_loss:
                best_loss, best_scale, best_exponent = loss, scale, exponent
        return best_scale, best_exponent


class AwqStage(QuantizationStage):
    """Scale, fold, clip and round the linears of a block."""

    method: ClassVar[str] = "awq"
    needs_statistics = True

    def __init__(self, config: AwqConfig, grids: Mapping[str, Grid]) -> None:
        super().__init__(config, grids)
        self.config: AwqConfig = config
        self.scaling = AwqScaling(config.scale_points, grids)

    def state(self) -> Any:
        """The folds found so far."""
        return self.scaling.state()

    def restore(self, state: Any) -> None:
        """Take over folds found before."""
        self.scaling.restore(state)

    def quantize_linears(
        self, block: Block, linears: Mapping[str, nn.Linear]
    ) -> dict[str, QuantizedLinear]:
        """Quantize the linears input by input (see QuantizationStage.quantize_linears)."""
        results = {}
        dtype = self.format.scale_dtype(block.dtype)
        notes = self.scaling.apply(block, linears)
        for stats, note in zip(block.inputs, notes, strict=True):
            for name in stats.linears:
                if name in linears:
                    weight, grid = linears[name].weight.data, self.grids[block.full_name(name)]
                    rounded = self.round(weight, stats.second_moment, grid, dtype)
                    dense = rounded.dequantize().float()
                    error = relative_output_error(weight, dense, stats.second_moment)
                    results[name] = QuantizedLinear(rounded, error, note)
        for name in linears.keys() - results.keys():
            weight, grid = linears[name].weight.data, self.grids[block.full_name(name)]
            rounded = self.round(weight, None, grid, dtype)
            results[name] = QuantizedLinear(rounded, note=UNREACHED)
        return {name: results[name] for name in linears}

    def round(
        self, weight: Tensor, moment: Tensor | None, grid: Grid, dtype: torch.dtype
    ) -> QuantizedWeight:
        """Round a (folded) weight [out, K] on the scales that lose least, kept in `dtype`.

        Without a second moment the grids just cover the weights.
        """
        group_size = grid.group_size or weight.shape[1]
        scale, zero_point = minmax_grid(weight, grid.bits, group_size, grid.symmetric)
        if self.config.clip and moment is not None:
            search = ScaleSearch(self.config.clip_points, self.config.clip_least)
            starts = range(0, weight.shape[1], group_size)
            metric = [moment[i : i + group_size, i : i + group_size] for i in starts]
            zero = None if zero_point is None else zero_point.T.float()
            by_group = weight.T.reshape(len(starts), group_size, -1).contiguous()
            scale = search.best(by_group, torch.stack(metric), scale.T, zero, grid.bits).T
        stored = never_zero(scale.to(dtype))
        rounded = round_to_grid(weight, stored.float(), zero_point, grid.bits, group_size)
        return QuantizedWeight(rounded.codes, stored, zero_point, grid.bits, group_size)
