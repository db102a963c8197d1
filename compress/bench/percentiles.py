"""Percentiles, as every measurement here has them."""

from collections.abc import Sequence


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
