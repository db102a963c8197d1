"""Latency against load as one PNG, of what `compress bench serve` measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.files import replacing

PANELS = {"ttft": "Time to first token", "tpot": "Time per token after it"}
COLOURS = {"median": "#4477aa", "p90": "#ccbb44", "p99": "#ee6677"}


def check_plots() -> None:
    """Raise InputError without matplotlib: said before a long measurement, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib; run: pip install 'compress-llm[plots]'")


def write_plot(path: Path, report: dict[str, Any]) -> None:
    """Write the plot to `path`, whole or not at all.  Raises OSError."""
    from matplotlib.figure import Figure

    loads = report["loads"]
    by_clients = loads[0]["max_concurrency"] is not None
    label = "clients" if by_clients else "requests/s offered"
    offered = [load["max_concurrency"] or load["request_rate"] for load in loads]
    # requests that come all at once stand one step to the right of the largest rate
    last = max((rate for rate in offered if rate), default=0.5)
    places = [rate or 2 * last for rate in offered]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    *latencies, throughput = figure.subplots(1, 3)
    for axes, (name, title) in zip(latencies, PANELS.items(), strict=True):
        for kind, colour in COLOURS.items():
            values = [load[f"{kind}_{name}_ms"] for load in loads]
            axes.plot(places, values, "o-", color=colour, label=kind)
        limit = report["goodput_objective_ms"].get(name)
        if limit is not None:
            axes.axhline(limit, color="grey", linestyle=":", label="objective")
        axes.set(title=title, ylabel="ms")
        axes.legend()
    answered = [load["request_throughput"] for load in loads]
    throughput.plot(places, answered, "o-", color=COLOURS["median"], label="answered")
    if report["goodput_objective_ms"]:
        good = [load["request_goodput"] for load in loads]
        throughput.plot(places, good, "s--", color=COLOURS["p99"], label="within the objective")
    throughput.set(title="Throughput", ylabel="requests/s")
    throughput.legend()
    for axes in (*latencies, throughput):
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{rate:g}" if rate else "all at once" for rate in offered])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(label)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    figure.suptitle(f"{report['model']}, {report['endpoint']}, {report['dataset']}")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
