"""A comparison as a table for the terminal, Markdown and a page."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from compress.comparing.comparison import mark_frontier
from compress.comparing.plot import COSTS, write_plot
from compress.core.files import write_text
from compress.page_template import page_template

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
    style = files("compress").joinpath("page.css").read_text(encoding="utf-8")
    return page_template("compress.comparing", "page.html.jinja").render(
        original=rows[0]["name"], headings=headings, cells=cells, facts=facts, image=image,
        style=style,
    )  # fmt: skip
