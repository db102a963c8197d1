"""Tables of what `compress bench serve` measured, for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from compress.cli.output import print_pairs

LATENCIES = {
    "ttft": "first token",
    "tpot": "a token after it",
    "itl": "between events",
    "e2e": "whole answer",
}
SEVERAL = 1.1  # tokens an event from which it is said; characters of several tokens give 1.0x
LATE = 50  # milliseconds after which the client's own lateness is said


def print_serving(report: dict[str, Any]) -> None:
    """Print what `measure_serving` returned: a load, or a table of several."""
    title = f"{report['model']} at {report['url']}, {report['endpoint']}, {report['dataset']}"
    loads = report["loads"]
    if len(loads) > 1:
        _print_sweep(title, report)
    else:
        _print_load(title, report)
    rows = {}
    if limits := report["goodput_objective_ms"]:
        words = ", ".join(f"{name} {limit:g} ms" for name, limit in limits.items())
        rows["goodput"] = f"answers within {words}" + (
            f": {loads[0]['request_goodput']:.2f}/s, {loads[0]['good']} of "
            f"{loads[0]['completed'] + loads[0]['failed']}"
            if len(loads) == 1
            else ""
        )
    for load in loads:
        for kind, number in load["errors"].items():
            words = f"{number} at {_name(load)}, such as: {load['error_messages'][kind]}"
            rows[kind] = f"{rows[kind]}\n{words}" if kind in rows else words
    if report["prompts_repeat"]:
        rows["prompts"] = "the dataset's come again: a cache may know them"
    if any(load["tokens_counted_by"] != "the server" for load in loads):
        rows["tokens"] = "counted by events, at most one a token: the server sent no usage"
    several = [load for load in loads if (load["tokens_per_event"] or 0) >= SEVERAL]
    if several and not report["count_events"]:
        words = ", ".join(f"{load['tokens_per_event']:.2f} at {_name(load)}" for load in several)
        rows["ITL"] = f"events bring several tokens ({words}); --count-events has a token's time"
    late = max(load["p99_late_ms"] for load in loads)
    if late > LATE:
        rows["client"] = f"up to {late:.0f} ms late (p99): this machine is short of time"
    if rows:
        print_pairs("", rows)


def _print_load(title: str, report: dict[str, Any]) -> None:
    (load,) = report["loads"]
    latencies = LATENCIES | ({"itl": "between tokens"} if report["count_events"] else {})
    table = Table(title=f"{title}, {_name(load)}", title_justify="left")
    table.add_column("ms")
    for kind in ("mean", "median", "p90", "p99"):
        table.add_column(kind, justify="right")
    for name, words in latencies.items():
        cells = [_number(load[f"{kind}_{name}_ms"]) for kind in ("mean", "median", "p90", "p99")]
        table.add_row(f"{name.upper()}, {words}", *cells)
    Console(highlight=False).print(table)
    print_pairs(
        "",
        {
            "answered": f"{load['completed']:,} of {load['completed'] + load['failed']:,} in "
            f"{load['duration']:.1f} s, {load['request_throughput']:.2f}/s",
            "tokens/s": f"{load['output_throughput']:,.1f} new, "
            f"{load['total_token_throughput']:,.1f} with prompts",
        },
    )


def _print_sweep(title: str, report: dict[str, Any]) -> None:
    loads, objective = report["loads"], report["goodput_objective_ms"]
    table = Table(title=f"{title}; ms: median, p99", title_justify="left")
    table.add_column("clients" if loads[0]["max_concurrency"] else "load")
    columns = [
        "answered",
        "req/s",
        "tok/s",
        "TTFT",
        "TPOT",
        "E2E",
        *(["good/s"] if objective else []),
    ]
    for name in columns:
        table.add_column(name, justify="right")
    for load in loads:
        times = [
            "\n".join(_number(load[f"{kind}_{name}_ms"]) for kind in ("median", "p99"))
            for name in ("ttft", "tpot", "e2e")
        ]
        table.add_row(
            str(load["max_concurrency"] or _name(load)),
            f"{load['completed']}/{load['completed'] + load['failed']}",
            f"{load['request_throughput']:.2f}",
            f"{load['output_throughput']:,.0f}",
            *times,
            *([f"{load['request_goodput']:.2f}"] if objective else []),
        )
    Console(highlight=False).print(table)


def _name(load: dict[str, Any]) -> str:
    if load["max_concurrency"]:
        return f"{load['max_concurrency']} at a time"
    return f"{load['request_rate']:g}/s" if load["request_rate"] else "all at once"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
