"""Searching the scale of each group by the error that it leaves in the linear's output.

A group is g input columns of R rows; its metric M [g, g], symmetric and positive, says what a
rounding error d of a row costs: d M dᵀ.  With M the group's block of the second moment that is
the mean squared output error of this group alone.

On a symmetric grid both signs of the scale are tried: codes reach one step further on the negative
side (-8 .. 7 at 4 bits), and a negative scale points that step at the group's largest weight
whatever its sign, as llama.cpp's Q4_0 does.  De-quantization multiplies by the scale, so formats
and kernels need not know.

Groups lie here as [G, g, R]: a column of the weight is a run of memory.
"""

from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from compress.quant.weight import code_range

AT_ONCE = 1 << 18  # weights; 2.5 times the speed of all of a large matrix at once
LEAST_ROWS = 64
LEAST_OF_FALLBACK = 0.1
REFITS = 2  # least-squares refits of each group's scale; a third changes nothing


@dataclass(frozen=True)
class ScaleSearch:
    """Which scales are tried: `points` shrink factors, evenly from 1 down to `least`."""

    points: int
    least: float

    def best(
        self,
        weight: Tensor,
        metric: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: int,
    ) -> Tensor:
        """Return the scale [G, R] of least error, starting from a covering one.

        weight [G, g, R], metric [G, g, g], scale and zero_point [G, R]; all float32.
        """
        groups, _, rows = weight.shape
        if weight.numel() > AT_ONCE and (groups > 1 or rows > LEAST_ROWS):
            # Piece by piece: what is tried on a piece stays in the processor's cache.
            along = 0 if groups > 1 else -1
            pieces = -(-weight.numel() // AT_ONCE)
            size = max(1, groups // pieces) if groups > 1 else max(LEAST_ROWS, rows // pieces)
            zeros = repeat(None) if zero_point is None else zero_point.split(size, along)
            metrics = metric.split(size) if groups > 1 else repeat(metric)
            pairs = zip(weight.split(size, along), scale.split(size, along), strict=True)
            parts = zip(pairs, metrics, zeros, strict=False)
            return torch.cat([self.best(w, m, s, z, bits) for (w, s), m, z in parts], along)
        best = scale
        best_loss = torch.full_like(scale, float("inf"))

        def consider(candidate: Tensor) -> None:
            nonlocal best, best_loss
            change = steps_of(weight, candidate, zero_point, bits).mul_(candidate.unsqueeze(1))
            change -= weight
            loss = (metric @ change).mul_(change).sum(dim=1)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best = torch.where(better, candidate, best)

        for factor in torch.linspace(1, self.least, self.points).tolist():
            consider(scale * factor)
            if zero_point is None:
                consider(scale * -factor)
        for _ in range(REFITS):
            steps = steps_of(weight, best, zero_point, bits)
            consider(fitted_scale(steps, weight, metric, best))
        return best


def steps_of(weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Codes less zero point of the nearest grid values; weight [G, g, R], scale [G, R]."""
    qmin, qmax = code_range(bits)
    steps = weight / scale.unsqueeze(1)
    if zero_point is None:
        return steps.round_().clamp_(qmin, qmax)
    zero = zero_point.unsqueeze(1)
    return steps.add_(zero).round_().clamp_(qmin, qmax).sub_(zero)


def fitted_scale(steps: Tensor, weight: Tensor, metric: Tensor, fallback: Tensor) -> Tensor:
    """argmin over s of (w - s c) M (w - s c)ᵀ for steps c [G, g, R]; `fallback` if unusable."""
    weighted = metric @ steps
    fitted = (weighted * weight).sum(dim=1) / (weighted * steps).sum(dim=1)
    return torch.where(usable(fitted, fallback), fitted, fallback)


def usable(scale: Tensor, fallback: Tensor) -> Tensor:
    """Where a scale is finite, and a normal number in every dtype that scales are stored in, or
    not far below the one it would replace (rows of latents are of 1e-9, prune/mla_weights.py)."""
    floor = (LEAST_OF_FALLBACK * fallback.abs()).clamp_max(torch.finfo(torch.float16).tiny)
    return torch.isfinite(scale) & (scale.abs() > floor)
