"""GPTQ: rounding column by column, with each error made up for by the columns still to come.

For a linear with weight W [R, K] and inputs with second moment H the mean squared output error
of Ŵ = W + D is tr(D H Dᵀ).  With Uᵀ U = H⁻¹, U upper triangular, that error is minimized over the
columns not yet rounded by (Frantar et al., "GPTQ", arXiv 2210.17323, algorithm 1)

    e_j = (w_j - ŵ_j) / U_jj,    W[:, j+1:] -= e_j U[j, j+1:]

and the total is then the sum of all e_j².  What differs from the paper:

- Order: groups by mean H_jj, largest first, and inside a group columns by H_jj.  Groups stay runs
  of consecutive columns of the stored weight (no `g_idx`), and each is reached as a whole.
- A group's scale is searched when its columns are reached, on the weights as they then are.  The
  metric of the search is the Schur complement of the columns still to come, which is what an
  error in this group costs after they have made up for what they can; it is (U_ggᵀ U_gg)⁻¹.
- H is shrunk towards its diagonal, H ← (1 - a) H + a diag(H).  Correlations between channels seen
  in the calibration text hold less well elsewhere, and GPTQ leans on them: without this it gets the
  smallest error on its own statistics and a worse model (benchmarks/LOG.md).
- Sweeps of coordinate descent follow: each code in turn goes to its best value given all others,
  then each scale to its least-squares value given the codes.  Neither can raise the error.
- Optionally the target is the original model's output on the original inputs x₀ instead of W x:
  E‖W x₀ - Ŵ x‖² is least at W C H⁻¹ with C = E[x₀ xᵀ], and that is what is rounded
  (Li et al., "GPTAQ", arXiv 2504.02692).  This holds for the block's first input alone: the
  moments of the later ones were collected before the linears ahead of them changed, and making
  up there for what those have made up for already overshoots, block after block.

All linears that share an input share the factor U and run through one column loop, one above the
other.  Weights lie transposed here, [K, R], so that a column is a run of memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.core.shards import all_finite
from compress.core.stage import Block
from compress.quant.config import Grid, WeightOnlyConfig
from compress.quant.scales import ScaleSearch, usable
from compress.quant.stage import (
    UNREACHED,
    QuantizationStage,
    QuantizedLinear,
    relative_output_error,
)
from compress.quant.weight import QuantizedWeight, code_range, minmax_grid, never_zero

BLOCK = 128  # columns whose errors are gathered before the columns after them are updated
DAMPING_STEP, DAMPING_TRIES = 10.0, 8


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GptqConfig(WeightOnlyConfig):
    """Settings of GPTQ beside the grid.

    damping       share of the mean of H's diagonal that is added to it; raised tenfold until the
                  factorization succeeds, and reported
    shrinkage     share a by which H is shrunk towards its diagonal
    act_order     most active groups and columns first, else in the order that they are stored
    sweeps        sweeps of coordinate descent over codes and scales after the column loop
    cross_moment  aim at the original model's output instead of W x in the linears that read a
                  block's first input; costs a third pass over the calibration data
    clip_points   shrink factors tried for each group's scale, evenly from 1 down to `clip_least`
    """

    damping: float = Field(default=0.01, gt=0, le=1)
    shrinkage: float = Field(default=0.3, ge=0, le=1)
    act_order: bool = True
    sweeps: int = Field(default=2, ge=0, le=1000)
    cross_moment: bool = False
    clip_points: int = Field(default=12, ge=1, le=1000)
    clip_least: float = Field(default=0.5, gt=0, le=1)

    def stage(self, grids: Mapping[str, Grid]) -> "GptqStage":
        return GptqStage(self, grids)


@dataclass(frozen=True)
class LinearInput:
    """What GPTQ rounds against: H [K, K], C [K, K] or None, and a remark for the report."""

    linears: tuple[str, ...]
    moment: Tensor
    cross: Tensor | None
    note: str = ""


class GptqStage(QuantizationStage):
    """Round the linears of a block, input by input."""

    method: ClassVar[str] = "gptq"
    needs_statistics = True
    workspace: ClassVar[int] = 6  # in Factor.of, and what the sweeps hold

    def __init__(self, config: GptqConfig, grids: Mapping[str, Grid]) -> None:
        super().__init__(config, grids)
        self.config: GptqConfig = config
        self.needs_reference = config.cross_moment

    def inputs_of(self, block: Block, linears: Mapping[str, nn.Linear]) -> list[LinearInput]:
        """The block's inputs, as they are; a method composed with GPTQ may first scale them."""
        return [
            LinearInput(stats.linears, stats.second_moment, stats.cross_moment if i == 0 else None)
            for i, stats in enumerate(block.inputs)
        ]

    def quantize_linears(
        self, block: Block, linears: Mapping[str, nn.Linear]
    ) -> dict[str, QuantizedLinear]:
        """Quantize the linears input by input (see QuantizationStage.quantize_linears)."""
        results = {}
        inputs = self.inputs_of(block, linears)
        reached = {name for given in inputs for name in given.linears}
        for name in linears.keys() - reached:
            equal = torch.eye(linears[name].in_features, device=linears[name].weight.device)
            inputs.append(LinearInput((name,), equal, None, UNREACHED))
        for given in inputs:
            by_grid: dict[Grid, list[str]] = {}
            for name in given.linears:
                if name in linears:
                    by_grid.setdefault(self.grids[block.full_name(name)], []).append(name)
            factors: dict[int, Factor] = {}
            for grid, names in by_grid.items():
                group = grid.group_size or len(given.moment)
                if group not in factors:
                    factors[group] = Factor.of(given.moment, group, self.config)
                factor = factors[group]
                weight = torch.cat([linears[name].weight.data for name in names])
                target = weight
                if given.cross is not None:
                    target = weight + weight @ factor.correction(given.moment, given.cross)
                rounded = self.round(target, factor, grid, self.format.scale_dtype(block.dtype))
                note = ", ".join(part for part in (given.note, factor.note) if part)
                heights = [linears[name].out_features for name in names]
                for name, part in zip(names, _split_rows(rounded, heights), strict=True):
                    dense = part.dequantize().float()
                    error = relative_output_error(linears[name].weight.data, dense, given.moment)
                    results[name] = QuantizedLinear(part, error if name in reached else None, note)
        return {name: results[name] for name in linears}

    def round(
        self, weight: Tensor, factor: "Factor", grid: Grid, dtype: torch.dtype
    ) -> QuantizedWeight:
        """Round a weight [R, K], with scales in `dtype`."""
        group = grid.group_size or weight.shape[1]
        target = weight.T[factor.order].contiguous()  # [K, R]
        codes = _Codes(target, grid, group, dtype)
        column_loop(target.clone(), codes, factor.upper, self.config)
        for _ in range(self.config.sweeps):
            sweep(target, codes, factor.moment)
        place = torch.argsort(factor.order)
        group_place = torch.argsort(factor.order[::group] // group)
        stored = (codes.steps + _spread(codes.zero_point, group))[place].T.to(torch.int8)
        zero_point = None
        if not grid.symmetric:
            zero_point = codes.zero_point[group_place].T.to(torch.int8).contiguous()
        return QuantizedWeight(
            stored.contiguous(),
            codes.scale[group_place].T.to(dtype).contiguous(),
            zero_point,
            grid.bits,
            group,
        )


@dataclass(frozen=True)
class Factor:
    """The second moment of an input, shrunk and damped, in rounding order, and its factor.

    order    int64 [K], columns in the order in which they are rounded; groups stay together
    moment   [K, K] in that order
    upper    U [K, K] with Uᵀ U = moment⁻¹
    damping  what was added to the diagonal, as a share of its mean
    """

    order: Tensor
    moment: Tensor
    upper: Tensor
    damping: float
    note: str

    @staticmethod
    def of(moment: Tensor, group: int, config: GptqConfig) -> "Factor":
        """Prepare H [K, K] for linears whose scales cover `group` columns each.

        Raises InputError when no damping makes H positive definite.
        """
        diagonal = moment.diagonal()
        order = torch.arange(len(moment), device=moment.device)
        if config.act_order:
            by_group = diagonal.view(-1, group)
            inside = by_group.argsort(dim=1, descending=True, stable=True)
            groups = by_group.mean(dim=1).argsort(descending=True, stable=True)
            order = (inside + group * order[: len(by_group)].unsqueeze(1))[groups].flatten()
        shrunk = (1 - config.shrinkage) * moment[order][:, order]
        shrunk.diagonal().copy_(diagonal[order])
        mean = diagonal.mean()
        mean = torch.where(mean > 0, mean, 1.0)  # an input that is always zero
        damping = config.damping
        for attempt in range(DAMPING_TRIES):
            damping = config.damping * DAMPING_STEP**attempt
            damped = shrunk.clone()
            damped.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if failed:
                continue
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and all_finite(upper):
                raised = f"damping raised to {damping:g}" if attempt else ""
                return Factor(order, damped, upper, damping, raised)
        raise InputError(
            f"an input of width {len(moment)} has no Cholesky factor, even with damping "
            f"{damping:g}; its activations are broken, try --compute-dtype float32"
        )

    def correction(self, moment: Tensor, cross: Tensor) -> Tensor:
        """(C - H) H⁻¹ [K, K], by which the best target for the original's output differs."""
        change = torch.empty_like(moment)
        solved = (cross - moment)[:, self.order] @ (self.upper.T @ self.upper)
        change[:, self.order] = solved
        return change


class _Codes:
    """Codes and scales under way, in rounding order; groups are runs of `group` columns.

    steps       codes less zero points, float32 [K, R]
    scale       float32 [G, R], always a value of the stored dtype
    zero_point  float32 [G, R], 0 on a symmetric grid
    """

    def __init__(self, target: Tensor, grid: Grid, group: int, dtype: torch.dtype) -> None:
        columns, rows = target.shape
        self.grid, self.group, self.dtype = grid, group, dtype
        self.range = code_range(grid.bits)
        self.steps = torch.zeros_like(target)
        self.scale = torch.ones(columns // group, rows, device=target.device)
        self.zero_point = torch.zeros_like(self.scale)

    def set_grid(self, index: int, weight: Tensor, metric: Tensor, search: ScaleSearch) -> None:
        """Choose group `index`'s scale and zero point for its columns as they are, [g, R]."""
        bits, symmetric = self.grid.bits, self.grid.symmetric
        scale, zero_point = minmax_grid(weight.T.contiguous(), bits, self.group, symmetric)
        zero = None if zero_point is None else zero_point.T.float()
        best = search.best(weight.unsqueeze(0), metric.unsqueeze(0), scale.T, zero, bits)
        self.scale[index] = self.storable(best[0])
        if zero is not None:
            self.zero_point[index] = zero[0]

    def storable(self, scale: Tensor) -> Tensor:
        return never_zero(scale.to(self.dtype)).float()

    def nearest(self, index: int, weight: Tensor) -> Tensor:
        """Steps of the nearest grid values of one column of group `index`, weight [R]."""
        steps = weight / self.scale[index]
        if self.grid.symmetric:
            return steps.round_().clamp_(*self.range)
        zero = self.zero_point[index]
        return steps.add_(zero).round_().clamp_(*self.range).sub_(zero)

    def dense(self) -> Tensor:
        """Values [K, R]."""
        return self.steps * _spread(self.scale, self.group)


def column_loop(weight: Tensor, codes: _Codes, upper: Tensor, config: GptqConfig) -> None:
    """Fill `codes` column by column; weight [K, R] is overwritten."""
    search = ScaleSearch(config.clip_points, config.clip_least)
    columns, group = len(weight), codes.group
    # whole groups, or parts of one where a group is larger than a block
    span = group * max(1, BLOCK // 2 // group) if group <= BLOCK else BLOCK
    starts = [
        start
        for outer in range(0, columns, max(span, group))
        for start in range(outer, min(outer + max(span, group), columns), span)
    ]
    pivots = upper.diagonal().tolist()
    for start, stop in zip(starts, [*starts[1:], columns], strict=True):
        errors = torch.empty_like(weight[start:stop])
        rows = zip(weight[start:stop], codes.steps[start:stop], errors, strict=True)
        for column, (values, steps, error) in enumerate(rows, start):
            index = column // group
            if column % group == 0:
                end = column + group
                metric = torch.cholesky_inverse(upper[column:end, column:end], upper=True)
                codes.set_grid(index, weight[column:end], metric, search)
            steps.copy_(codes.nearest(index, values))
            torch.addcmul(values, steps, codes.scale[index], value=-1, out=error)
            error /= pivots[column]
            weight[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
        weight[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)


def sweep(target: Tensor, codes: _Codes, moment: Tensor) -> None:
    """One pass of coordinate descent on tr(D H Dᵀ) over all codes, then all scales, in place.

    target [K, R] and moment [K, K] in rounding order.
    """
    columns, group = len(target), codes.group
    values = codes.dense()
    pull = moment @ (values - target)  # half the gradient, kept up to date where it is read again
    curvatures = moment.diagonal().tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block = moment[start:stop, start:stop]
        changes = torch.empty_like(pull[start:stop])
        rows = zip(values[start:stop], pull[start:stop], codes.steps[start:stop], strict=True)
        for column, (value, slope, steps) in enumerate(rows, start):
            index, change = column // group, changes[column - start]
            best = torch.add(value, slope, alpha=-1 / curvatures[column])
            steps.copy_(codes.nearest(index, best))
            torch.sub(steps * codes.scale[index], value, out=change)
            value += change
            pull[start:stop].addr_(block[column - start], change)
        pull[:start].addmm_(moment[:start, start:stop], changes)
        pull[stop:].addmm_(moment[stop:, start:stop], changes)
    for index, start in enumerate(range(0, columns, group)):
        stop = start + group
        steps = codes.steps[start:stop]
        curvature = (steps * (moment[start:stop, start:stop] @ steps)).sum(dim=0)
        scale = codes.scale[index] - (steps * pull[start:stop]).sum(dim=0) / curvature
        scale = torch.where(
            usable(scale, codes.scale[index]), codes.storable(scale), codes.scale[index]
        )
        pull[stop:].addmm_(moment[stop:, start:stop], steps * (scale - codes.scale[index]))
        codes.scale[index] = scale


def _spread(per_group: Tensor, group: int) -> Tensor:
    return per_group.repeat_interleave(group, dim=0)


def _split_rows(weight: QuantizedWeight, heights: Sequence[int]) -> list[QuantizedWeight]:
    """Take linears that lie one above the other apart again."""
    zero_points = [None] * len(heights)
    if weight.zero_point is not None:
        zero_points = weight.zero_point.split(heights)
    return [
        QuantizedWeight(codes, scale, zero_point, weight.bits, weight.group_size)
        for codes, scale, zero_point in zip(
            weight.codes.split(heights), weight.scale.split(heights), zero_points, strict=True
        )
    ]
