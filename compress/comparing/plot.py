"""A comparison as a picture: loss against size, time and cache."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.comparing.comparison import mark_frontier
from compress.core.files import replacing
from compress.core.progress import say

Row = dict[str, Any]

# What loss is drawn against: label, and the unit's share.
COSTS = {
    "bytes": ("size, MB", 1e-6),
    "seconds_per_token": ("ms a token, one request", 1e3),
    "kv_bytes_per_token": ("KV cache, kB a token", 1e-3),
}

BESIDE = 10  # points of print: about the height of a name


def write_plot(path: Path, rows: Sequence[Row]) -> bool:
    """Draw loss against each cost, with the frontier; False where there is nothing to draw with.

    The original has no loss: a dotted line stands where it is.
    """
    costs = {
        cost: shown
        for cost, shown in COSTS.items()
        if len({row[cost] for row in rows if row.get(cost)}) > 1
        and any(row.get(cost) and row.get("kl_mean") for row in rows[1:])
    }
    if not costs:
        return False
    if importlib.util.find_spec("matplotlib") is None:
        say("No plot: matplotlib is not installed; pip install matplotlib")
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(costs), 4.8), layout="constrained")
    panels = figure.subplots(1, len(costs), squeeze=False)[0]
    labels = []
    for axes, (cost, (label, scale)) in zip(panels, costs.items(), strict=True):
        marks = mark_frontier(rows, cost, "kl_mean")
        drawn = [
            (row[cost] * scale, row["kl_mean"], row["name"], best)
            for row, best in zip(rows[1:], marks[1:], strict=True)
            if row.get(cost) and row.get("kl_mean")
        ]
        for x, y, _, best in drawn:
            axes.plot(x, y, "o" if best else "x", color="#2f6db3" if best else "#b35c00")
        line = sorted((x, y) for x, y, _, best in drawn if best)
        axes.plot([x for x, _ in line], [y for _, y in line], color="#2f6db3", alpha=0.4)
        if rows[0].get(cost):
            at = rows[0][cost] * scale
            axes.axvline(at, linestyle=":", color="#59626c", label=rows[0]["name"])
            axes.legend()
        axes.set(xlabel=label, ylabel="KL from the original, nats a token", yscale="log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
        axes.grid(alpha=0.3)
        axes.margins(x=0.12, y=0.1)
        labels.append((axes, [(x, y, name) for x, y, name, _ in drawn]))
    figure.draw_without_rendering()  # places of points are final from here
    for axes, points in labels:
        label_points(axes, points)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return True


def label_points(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name where no other name and no point is, as near to its own as there is room; a
    line leads to what is not beside its point."""
    from matplotlib.transforms import Bbox

    places = [tuple(axes.transData.transform((x, y))) for x, y, _ in points]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places]
    # Where a name's near end may stand, seen from its point, in points of print; the right first.
    ends = [(x, y) for x in range(-126, 127, 12) for y in range(-131, 132, 5)]
    ends.sort(key=lambda end: (round(math.hypot(*end) / BESIDE), end[0] < 0, math.hypot(*end)))
    for number, (x, y, name) in enumerate(points):
        others = taken[:number] + taken[number + 1 :]
        text = axes.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=9)
        for end in ends:
            text.set(position=end, ha="left" if end[0] > 0 else "right")
            box = text.get_window_extent()
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in others):
                break
        taken.append(text.get_window_extent())
        if math.hypot(*text.get_position()) > 1.5 * BESIDE:
            line = {"arrowstyle": "-", "color": "#59626c", "linewidth": 0.6, "alpha": 0.6}
            axes.annotate(
                "", (x, y), xytext=text.get_position(), textcoords="offset points", arrowprops=line
            )
