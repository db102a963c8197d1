"""What recipes cost in quality, where it was measured: `quality.json`, and the tables behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.roofline import ModelShape

CALIBRATION = "self"  # CalibrationConfig's default


@dataclass(frozen=True)
class Quality:
    """One measured row.

    perplexity_ratio  to the original's; `interval` is its 95% interval
    kl_mean           from the original's distributions, nats a token
    same_top_token    share of tokens on which both predict the same
    source            the table it is from, and `model` the model it was measured on
    """

    method: str
    perplexity_ratio: float
    interval: tuple[float, float]
    kl_mean: float
    same_top_token: float
    model: str
    source: str


@cache
def measurements() -> dict[str, Any]:
    """quality.json."""
    return json.loads(Path(__file__).with_name("quality.json").read_text(encoding="utf-8"))


def measured(bits: int, group_size: int) -> Quality | None:
    """The method that lost least on this symmetric grid, calibrated as `compress quantize` does
    unless it is told otherwise; None where no grid like it was measured.

    Least by the mean KL, whose interval is the narrower.
    """
    found = measurements()
    if group_size != found["group_size"]:
        return None
    own = (CALIBRATION, None)  # None: the method uses no text
    rows = [row for row in found["rows"] if row["bits"] == bits and row["calibration"] in own]
    if not rows:
        return None
    best = min(rows, key=lambda row: (row["kl_mean"], row["perplexity_ratio"]))
    low, high = best["interval"]
    return Quality(
        best["method"],
        best["perplexity_ratio"],
        (low, high),
        best["kl_mean"],
        best["same_top_token"],
        found["model"],
        found["results"],
    )


def is_measured_model(shape: ModelShape) -> bool:
    """Whether the measurements are of a model of this shape; elsewhere they are only a hint."""
    return all(getattr(shape, key) == value for key, value in measurements()["shape"].items())
