"""The losses of a run as a picture."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.core.files import replacing
from compress.distill.run_log import Row

SMOOTHING = 0.1  # of the way that a smoothed line goes to each new value


def write_plot(path: Path, steps: Sequence[Row], evaluations: Sequence[Row]) -> None:
    """Draw loss, learning rate and gradient norm by tokens as PNG; nothing without matplotlib."""
    if not steps or importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    losses, rates = figure.subplots(1, 2, width_ratios=(2, 1))
    _plot_losses(losses, steps, evaluations)
    tokens = [row["tokens"] for row in steps]
    rates.plot(tokens, [row["learning_rate"] for row in steps], color="#4477aa")
    rates.set(xlabel="tokens", ylabel="learning rate (blue)", ylim=(0, None))
    norms = rates.twinx()
    norms.plot(tokens, [row["gradient_norm"] for row in steps], color="#ee6677", alpha=0.7)
    norms.set(ylabel="gradient norm before clipping (red)", ylim=(0, None))
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _plot_losses(axes: Any, steps: Sequence[Row], evaluations: Sequence[Row]) -> None:
    tokens = [row["tokens"] for row in steps]
    values = [row["loss"] for row in steps]
    axes.plot(tokens, values, color="#4477aa", alpha=0.3, label="training, each step")
    axes.plot(tokens, _smoothed(values), color="#4477aa", label="training, smoothed")
    if evaluations:
        axes.plot(
            [row["tokens"] for row in evaluations],
            [row["evaluation"]["loss"] for row in evaluations],
            "o-",
            color="#ee6677",
            label="held out",
        )
    axes.set(xlabel="tokens", ylabel="loss, nats a token", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()


def _smoothed(values: Sequence[float]) -> list[float]:
    smoothed = [values[0]]
    for value in values[1:]:
        smoothed.append(smoothed[-1] + SMOOTHING * (value - smoothed[-1]))
    return smoothed
