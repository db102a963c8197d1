"""A comparison as a table for the terminal, Markdown, a plot and a page."""

from __future__ import annotations

import base64
import importlib.util
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from compress.comparing.comparison import mark_frontier
from compress.core.files import replacing, write_text
from compress.core.progress import say

Row = dict[str, Any]

# Heading, key, and how a number is written; a column that no row has is left out.
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("size, MB", "bytes", lambda n: f"{n / 1e6:,.1f}"),
    ("KV, bytes a token", "kv_bytes_per_token", lambda n: f"{n:,.0f}"),
    ("first token, ms", "time_to_first_token_s", lambda s: f"{1000 * s:.1f}"),
    ("ms a token", "seconds_per_token", lambda s: f"{1000 * s:.2f}"),
    ("tokens/s, batch {batch}", "tokens_per_s", lambda n: f"{n:,.0f}"),
    ("perplexity", "perplexity", lambda n: f"{n:.3f}"),
    ("KL", "kl_mean", lambda n: f"{n:.4f}"),
    ("same top token", "top1_agreement", lambda n: f"{100 * n:.1f}%"),
)
# What loss is drawn against: label, and the unit's share.
COSTS = {
    "bytes": ("size, MB", 1e-6),
    "seconds_per_token": ("ms a token, one request", 1e3),
    "kv_bytes_per_token": ("KV cache, kB a token", 1e-3),
}


def table_of(rows: Sequence[Row], intervals: bool = True) -> tuple[list[str], list[list[str]]]:
    """Headings, and cells as text; a star marks who is on a frontier of cost and loss."""
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    batch = next((row["batch"] for row in rows if "batch" in row), "")
    headings = ["model", *(heading.format(batch=batch) for heading, _, _ in columns)]
    tasks = _tasks(rows)
    recall = _recall(rows)
    headings += [f"{task}, {metric}" for task, metric in tasks]
    headings += [f"{task} {distance} back" for task, distance in recall]
    on_frontier = _on_frontier(rows)
    cells = []
    for row, best in zip(rows, on_frontier, strict=True):
        line = [f"{row['name']} *" if best else row["name"]]
        line += [_cell(row, key, write) for _, key, write in columns]
        line += [_accuracy(row["tasks"].get(task, {}), metric) for task, metric in tasks]
        line += [_found(row["recall"], *of) for of in recall]
        if not intervals:
            line[1:] = [re.sub(r" (\(.*\)|± .*)$", "", cell) for cell in line[1:]]
        cells.append(line)
    return headings, cells


def _on_frontier(rows: Sequence[Row]) -> list[bool]:
    marks = [mark_frontier(rows, cost, "kl_mean") for cost in COSTS]
    return [any(of_row) for of_row in zip(*marks, strict=True)]


def _cell(row: Row, key: str, write: Callable[[Any], str]) -> str:
    """A number with its interval, if it has one."""
    if row.get(key) is None:
        return ""
    bounds = row.get(f"{key}_interval")
    return write(row[key]) + (f" ({write(bounds[0])} to {write(bounds[1])})" if bounds else "")


def _tasks(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Tasks and their metrics, without those that only say how sure another is."""
    found = dict.fromkeys(
        (task, name)
        for row in rows
        for task, metrics in row.get("tasks", {}).items()
        for name, value in metrics.items()
        if name != "samples" and "_stderr" not in name and value is not None
    )
    return list(found)


def _accuracy(metrics: Row, name: str) -> str:
    """A metric with its 95 % interval, by the standard error beside it."""
    if metrics.get(name) is None:
        return ""
    metric, comma, filter_name = name.partition(",")
    error = metrics.get(f"{metric}_stderr{comma}{filter_name}")
    return f"{metrics[name]:.3f}" + (f" ± {1.96 * error:.3f}" if error is not None else "")


def _recall(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Tasks of recall and their distances."""
    found = dict.fromkeys(
        (task, asked["distance"])
        for row in rows
        for task, all_asked in row.get("recall", {}).items()
        for asked in all_asked
    )
    return list(found)


def _found(recall: Row, task: str, distance: int) -> str:
    """The share of answers that were found, with its interval."""
    for asked in recall[task]:
        if asked["distance"] == distance:
            low, high = asked["found_interval"]
            return f"{asked['found']:.0%} ({low:.0%} to {high:.0%})"
    return ""


def write_all(out: Path, rows: Sequence[Row], facts: Sequence[str]) -> list[Path]:
    """Write comparison.md, .png (with matplotlib) and .html; returns what was written.

    facts  sentences on how it was measured
    """
    headings, cells = table_of(rows)
    lines = ["# Comparison", "", f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    lines += [f"| {' | '.join(line)} |" for line in cells]
    lines += ["", *facts, ""]
    write_text(out / "comparison.md", "\n".join(lines))
    written = [out / "comparison.md"]
    plot = out / "comparison.png"
    if write_plot(plot, rows):
        written.append(plot)
    write_text(out / "comparison.html", page_html(rows, facts, plot if plot in written else None))
    return [*written, out / "comparison.html"]


def page_html(rows: Sequence[Row], facts: Sequence[str], plot: Path | None) -> str:
    """The page as text; it needs nothing beside it."""
    headings, cells = table_of(rows)
    image = base64.b64encode(plot.read_bytes()).decode() if plot else None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = files("compress.comparing").joinpath("page.html.jinja").read_text(encoding="utf-8")
    style = files("compress").joinpath("page.css").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        original=rows[0]["name"], headings=headings, cells=cells, facts=facts, image=image,
        style=style,
    )  # fmt: skip


def write_plot(path: Path, rows: Sequence[Row]) -> bool:
    """Draw loss against each cost, with the frontier; False where there is nothing to draw with.

    The original has no loss: a dotted line stands where it is.
    """
    costs = {
        cost: shown
        for cost, shown in COSTS.items()
        if len({row[cost] for row in rows if row.get(cost)}) > 1
    }
    if not costs or not any(row.get("kl_mean") for row in rows[1:]):
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
        _label(axes, points)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return True


def _label(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside its point, where no other name and no point is, if there is room."""
    from matplotlib.transforms import Bbox

    places = [tuple(axes.transData.transform((x, y))) for x, y, _ in points]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places]
    sides = [("left", 6), ("right", -6)]
    shifts = [(dx, dy, side) for dy in (4, -11, 16, -23, 28) for side, dx in sides]
    for number, (x, y, name) in enumerate(points):
        others = taken[:number] + taken[number + 1 :]
        for dx, dy, side in shifts:
            text = axes.annotate(
                name, (x, y), textcoords="offset points", xytext=(dx, dy), ha=side, fontsize=9
            )
            box = text.get_window_extent()
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in others):
                break
            if (dx, dy, side) != shifts[-1]:
                text.remove()
        taken.append(box)
