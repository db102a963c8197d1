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
    # requests that come all at once stand at the rate at which they were answered
    places = [
        load["max_concurrency"] or load["request_rate"] or load["request_throughput"]
        for load in loads
    ]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    *latencies, throughput = figure.subplots(1, 3)
    for axes, (name, title) in zip(latencies, PANELS.items(), strict=True):
        for kind, colour in COLOURS.items():
            values = [load[f"{kind}_{name}_ms"] for load in loads]
            axes.plot(places, values, "o-", color=colour, label=kind)
        limit = report["goodput_objective_ms"].get(name)
        if limit is not None:
            axes.axhline(limit, color="grey", linestyle=":", label="objective")
        axes.set(title=title, ylabel="ms", ylim=(0, None))
        axes.legend()
    answered = [load["request_throughput"] for load in loads]
    throughput.plot(places, answered, "o-", color=COLOURS["median"], label="answered")
    if report["goodput_objective_ms"]:
        good = [load["request_goodput"] for load in loads]
        throughput.plot(places, good, "s--", color=COLOURS["p99"], label="within the objective")
    throughput.set(title="Throughput", ylabel="requests/s", ylim=(0, None))
    tokens = throughput.twinx()
    tokens.plot(
        places, [load["output_throughput"] for load in loads], "^:", color="grey", label="tokens/s"
    )
    tokens.set(ylabel="new tokens/s", ylim=(0, None))
    throughput.legend(loc="lower right")
    for axes in (*latencies, throughput):
        axes.set_xticks(places, [_name(load) for load in loads])
        axes.set_xlabel(label)
    figure.suptitle(f"{report['model']}, {report['endpoint']}, {report['dataset']}")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _name(load: dict[str, Any]) -> str:
    offered = load["max_concurrency"] or load["request_rate"]
    return f"{offered:g}" if offered else "all at once"
