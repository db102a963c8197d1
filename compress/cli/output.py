"""Printing results: one JSON object for scripts, a table for people."""

import json
import re
from collections import defaultdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_pairs(title: str, rows: dict[str, str]) -> None:
    """Print a two-column table on standard output."""
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    Console(highlight=False).print(table)


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """Print what `run_recipe` returned."""
    if as_json:
        print_json(report)
        return
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    left: dict[str, list[str]] = defaultdict(list)
    for layer in report["layers"]:
        if layer["method"]:
            by_kind[layer["name"].rpartition(".")[2]].append(layer)
        else:
            left[layer["note"]].append(layer["name"])
    table = Table(title="Relative squared error", title_justify="left")
    for column in ("linears", "count", "weight, mean", "output, mean", "output, worst", "in block"):
        table.add_column(column, justify="left" if column == "linears" else "right")
    for kind, layers in by_kind.items():
        table.add_row(kind, str(len(layers)), *_error_cells(layers))
    console = Console(highlight=False)
    console.print(table)
    sizes = report["sizes"]
    ratio = sizes["original_bytes"] / sizes["bytes"]
    rows = {
        "output": report["out"],
        "report": f"{report['out']}/report.html",
        "size": f"{_megabytes(sizes['bytes'])}, was {_megabytes(sizes['original_bytes'])} "
        f"({ratio:.2f}x smaller)",
        "quantized": f"{sizes['quantized_weights']:,} of {sizes['parameters']:,} parameters",
        "time": f"{report['seconds']:.0f} s, of which calibration text and first inputs "
        f"{report['calibration_seconds']:.0f} s",
    }
    for note, names in left.items():
        rows[note] = ", ".join(names[:4]) + (
            f" and {len(names) - 4} more" if len(names) > 4 else ""
        )
    print_pairs("Result", rows)


def _error_cells(layers: list[dict[str, Any]]) -> list[str]:
    weight = sum(layer["weight_error"] for layer in layers) / len(layers)
    measured = [layer for layer in layers if layer["output_error"] is not None]
    if not measured:
        return [f"{weight:.2e}", "not measured", "", ""]
    mean = sum(layer["output_error"] for layer in measured) / len(measured)
    worst = max(measured, key=lambda layer: layer["output_error"])
    place = re.findall(r"\d+", worst["name"])[-1:]
    return [f"{weight:.2e}", f"{mean:.2e}", f"{worst['output_error']:.2e}", *place]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
