"""Pearson's test of counts against a distribution that is known exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

LEAST = 5.0  # expected count of a cell: below, the statistic is not distributed as chi-square
ALPHA = 1e-4


@dataclass(frozen=True)
class Verdict:
    """What a test says."""

    samples: int
    cells: int
    statistic: float
    p: float  # probability of a statistic at least as large, if the distribution is the true one

    @property
    def rejected(self) -> bool:
        """Whether it is not the true one, at level ALPHA."""
        return self.p < ALPHA


def compare(counts: Counter[Any], probabilities: Mapping[Any, float]) -> Verdict:
    """Compare counts with what is expected, rare outcomes pooled to an expectation of LEAST.

    An outcome that cannot be rejects at once.
    """
    samples = counts.total()
    cells: list[tuple[float, int]] = []
    expected, observed = 0.0, 0
    for outcome in sorted(probabilities, key=lambda key: probabilities[key]):  # rarest first
        expected += probabilities[outcome] * samples
        observed += counts[outcome]
        if expected >= LEAST:
            cells.append((expected, observed))
            expected, observed = 0.0, 0
    if expected and cells:  # less than a cell's worth is left over
        last, seen = cells.pop()
        cells.append((last + expected, seen + observed))
    statistic = sum((seen - mean) ** 2 / mean for mean, seen in cells)
    if any(outcome not in probabilities for outcome in counts):
        return Verdict(samples, len(cells), statistic, 0.0)
    return Verdict(samples, len(cells), statistic, _tail(statistic, len(cells) - 1))


def _tail(statistic: float, freedom: int) -> float:
    """Probability that chi-square with so many degrees of freedom is at least `statistic`."""
    if freedom < 1:
        return 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
