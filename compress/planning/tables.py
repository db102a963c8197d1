"""The tables that `compress plan` prints of its reports."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from compress.cli.output import print_pairs
from compress.core.resources import in_words

PART_NAMES = {
    "embedding": "embedding",
    "attention": "attention",
    "attention_projections": "attention's linears",
    "mlp": "MLP",
    "norms": "norms",
    "head": "head",
    "link": "link between devices",
    "overhead": "overhead",
}
STEP_NAMES = PART_NAMES | {"attention": "keys and values"}


def print_report(report: dict[str, Any]) -> None:
    """Print what `plan_report` returned."""
    console = Console(highlight=False)
    device, load = report["device"], f"batch {report['batch']}, context {report['context']:,}"
    if report["new_tokens"]:
        load += f" + {report['new_tokens']:,} new tokens"
    many = f", {report['tensor_parallel']} devices" if report["tensor_parallel"] > 1 else ""
    title = (
        f"{report['model']}, weights {report['weights']}, KV {report['kv']}, {load}, "
        f"on {device['name']}{many}"
    )
    parts = _table(title, "part", "parameters", "bytes", "share")
    for part, found in report["parts"].items():
        if found["parameters"] or found["bytes"]:
            parts.add_row(
                PART_NAMES[part],
                f"{found['parameters']:,}",
                size(found["bytes"]),
                f"{found['bytes'] / report['weight_bytes']:.0%}",
            )
    parts.add_section()
    parts.add_row("all", f"{report['parameters']:,}", size(report["weight_bytes"]), "")
    console.print(parts)
    for name in ("prefill", "decode"):
        console.print(_step_table(name, report))
    print_pairs("Result", _result(report))
    for note in report["notes"]:
        console.print(f"Note: {note}.", soft_wrap=True)


def _step_table(name: str, report: dict[str, Any]) -> Table:
    step = report[name]
    said = {
        "prefill": f"Prefill of {report['batch']:,} x {report['context']:,} tokens",
        "decode": f"Decode step at {report['context']:,} tokens",
    }
    each = " (of each device)" if report["tensor_parallel"] > 1 else ""
    columns = ("FLOPs", "bytes", "FLOP a byte", "time", "limit")
    table = _table(said[name] + each, "part", *columns)
    for part, found in step["parts"].items():
        if found["seconds"]:
            table.add_row(STEP_NAMES[part], *_step_cells(found))
    table.add_section()
    table.add_row("all", *_step_cells(step))
    return table


def _step_cells(found: dict[str, Any]) -> tuple[str, ...]:
    moved = found["bytes"]
    return (
        flops(found["flops"]) if found["flops"] else "",
        size(moved) if moved else "",
        f"{found['intensity']:,.4g}" if moved else "",
        seconds(found["seconds"]),
        found["limit"],
    )


def _result(report: dict[str, Any]) -> dict[str, str]:
    device, memory = report["device"], report["memory"]
    last = report["context"] + report["new_tokens"]
    held = f"weights {size(memory['weights'])} + KV {size(memory['kv'])}"
    if memory["draft"]:
        held += f" + draft {size(memory['draft'])}"
    verdict = "fits in" if report["fits"] else "DOES NOT FIT in"
    rows = {
        "device": f"{size(device['memory_bytes'])}, {rate(device['bandwidth_bytes_per_s'])}, "
        f"{flops(device['flops_per_s'])}/s {device['compute']}: limited by memory below "
        f"{device['intensity']:,.4g} FLOP a byte",
        "keys and values": f"{report['attention']}: {bytes_exact(report['kv_bytes_per_token'])} a "
        f"token, {bytes_exact(report['kv_bytes_per_sequence'])} a sequence of {last:,}",
        "time to first token": seconds(report["time_to_first_token_s"]),
        "latency": f"{seconds(report['seconds_per_token'])} a token",
        "throughput": f"{report['tokens_per_s']:,.4g} tokens/s, limited by "
        f"{report['decode_limit']}",
        "memory": f"{size(report['memory_bytes'])} ({held}) {verdict} "
        f"{size(device['memory_bytes'])}",
        "largest batch": f"{report['largest_batch']:,}",
    }
    if report["new_tokens"]:
        rows["whole answer"] = seconds(report["answer_s"])
    draft = report.get("draft")
    if draft:
        name = draft["model"] or "a draft"
        rows["speculation"] = (
            f"{draft['tokens']} tokens of {name} at {draft['cost']:.3g} of a step each, "
            f"{draft['acceptance']:.0%} accepted (assumed): {draft['expected_tokens']:.3g} tokens "
            f"a pass, {draft['speed_up']:.3g}x as fast (if only memory limits: "
            f"{draft['speed_up_limited_by_memory']:.3g}x; linear approximation: "
            f"{draft['speed_up_linear_approximation']:.3g}x)"
        )
    share = device["efficiency"]
    if share["overhead"] or share["bandwidth"] != 1 or share["matmul"] != 1:
        rows["reached here"] = (
            f"{share['bandwidth']:.0%} of the bandwidth, {share['matmul']:.0%} of the rate, "
            f"{seconds(share['overhead'])} a step on top"
        )
    rows["device's numbers"] = device["source"]
    return rows


def print_sweep(key: str, rows: list[dict[str, Any]]) -> None:
    """Print what `sweep_report` returned."""
    columns = ("1st token", "a token", "tokens/s", "FLOP/B", "limit", "memory", "largest")
    table = _table(f"By {key} (with the largest batch that fits)", key, *columns)
    for row in rows:
        value = row["value"]
        table.add_row(
            f"{value:,}" if isinstance(value, int) else value,
            seconds(row["time_to_first_token_s"]),
            seconds(row["seconds_per_token"]),
            f"{row['tokens_per_s']:,.4g}",
            f"{row['decode_intensity']:,.4g}",
            row["decode_limit"],
            size(row["memory_bytes"]),
            f"{row['largest_batch']:,}" + " (NO)" * (not row["fits"]),
        )
    Console(highlight=False).print(table)


def print_fit(report: dict[str, Any]) -> None:
    """Print what `fit_report` returned."""
    console = Console(highlight=False)
    many = report["tensor_parallel"]
    each = f" on each of {many} devices" if many > 1 else ""
    title = (
        f"{report['model']} in {size(report['memory_bytes'])}{each} at the speed of "
        f"{report['device']}, {report['context']:,} tokens, by {report['optimize']}: "
        f"{len(report['recipes'])} of {report['fitting']} recipes that fit"
    )
    numbers = _table(title, "", "recipe", "batch", "tokens/s", "a token", "weights", "KV a token")
    numbers.columns[1].justify, numbers.columns[1].no_wrap = "left", False
    costs = _table("What they cost, and how they are made", "", "quality", "standing")
    for number, recipe in enumerate(report["recipes"], start=1):
        numbers.add_row(
            str(number),
            recipe["recipe"],
            f"{recipe['batch']:,}",
            f"{recipe['tokens_per_s']:,.4g}",
            seconds(recipe["seconds_per_token"]),
            size(recipe["weight_bytes"]),
            size(recipe["kv_bytes_per_token"]),
        )
        costs.add_row(str(number), recipe["quality"], recipe["standing"])
    for column in costs.columns[1:]:
        column.justify, column.no_wrap = "left", False
    console.print(numbers)
    console.print(costs)
    sources = sorted({r["results"] for r in report["recipes"] if r["results"]})
    notes = [*report["notes"], *(f"quality is from {source}" for source in sources)]
    if any(recipe["standing"] == "costly" for recipe in report["recipes"]):
        notes.append(
            f"'costly' is a perplexity of more than {report['max_loss']:g} times the original's"
        )
    for note in notes:
        console.print(f"Note: {note}.", soft_wrap=True)
    for number, recipe in enumerate(report["recipes"], start=1):
        for command in recipe["commands"]:
            console.print(f"{number}:  {command}", soft_wrap=True, markup=False)


def print_calibration(report: dict[str, Any]) -> None:
    """Print what `calibrate` returned."""
    console = Console(highlight=False)
    reached = report["reached"]
    rows = {
        "copies": rate(report["copy_bytes_per_s"]) + ", read and written",
        "multiplies matrices": f"{flops(report['matmul_flops_per_s'])}/s in {report['dtype']}",
    }
    for kind, found in reached.items():
        rows[f"a step on {kind}"] = (
            f"reads {rate(found['bandwidth'])}, prefill {flops(found['matmul'])}/s, "
            f"{seconds(found['overhead_s'])} a step on top for {report['layers']} layers"
        )
    rows["kernels"] = report["kernels"]
    if "saved" in report:
        rows["saved"] = f"{report['saved']}; use it as --device {report['saved']}"
    print_pairs(report["device"], rows)
    title = (
        f"{report['model']}, {report['weights']} weights, head {report['head']}, batch "
        f"{report['batch']}, {report['context']:,} + {report['new_tokens']:,} tokens"
    )
    columns = ("measured", "uncalibrated", "error", "calibrated", "error")
    table = _table(title, "", *columns)
    for name, found in report["compared"].items():
        table.add_row(
            name,
            seconds(found["measured_s"]),
            *_predicted(found["uncalibrated_s"], found["uncalibrated_error"]),
            *_predicted(found["calibrated_s"], found["calibrated_error"]),
        )
    console.print(table)
    for note in report["notes"]:
        console.print(f"Note: {note}.", soft_wrap=True)


def _predicted(value: float | None, error: float | None) -> tuple[str, str]:
    if value is None or error is None:
        return "not known", ""
    return seconds(value), f"{error:+.0%}"


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def size(count: float) -> str:
    """Bytes to three digits: `26.9 GB`, `141 kB`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{digits(count / unit)} {name}"
    return in_words(count) if count >= 1e3 else f"{count:g} B"


def bytes_exact(count: float) -> str:
    """All digits, and in words."""
    return f"{count:,.0f} bytes" + (f" ({size(count)})" if count >= 1e6 else "")


def flops(count: float) -> str:
    """`26.5 GFLOP`."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= unit:
            return f"{digits(count / unit)} {name}FLOP"
    return f"{digits(count / 1e6)} MFLOP"


def rate(count: float) -> str:
    """`3.35 TB/s`."""
    return f"{count / 1e12:,.3g} TB/s" if count >= 1e12 else f"{count / 1e9:,.3g} GB/s"


def seconds(count: float) -> str:
    """`8.02 ms`."""
    for unit, name in ((1, "s"), (1e-3, "ms")):
        if count >= unit:
            return f"{digits(count / unit)} {name}"
    return f"{digits(count * 1e6)} us"


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
