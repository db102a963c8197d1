"""Printing results: one JSON object for scripts, a table for people."""

import json
import re
from collections import defaultdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from compress.cli.allocation_table import print_allocation
from compress.core.progress import say
from compress.core.resources import in_words


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_pairs(title: str, rows: dict[str, str]) -> None:
    """Print a two-column table on standard output."""
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    Console(highlight=False).print(table)


def print_plan(plan: dict[str, Any]) -> None:
    """Print what a plan of `compress.dry_run` returned."""
    sizes = {name: in_words(count) for name, count in plan.items() if name.endswith("_bytes")}
    rows = {
        "model": f"{plan['model']}: {plan['blocks']} blocks, {plan['parameters']:,} parameters, "
        f"{sizes['original_bytes']}",
    }
    if "method" in plan:
        rows |= {
            "method": f"{plan['method']}, on {plan['device']} in {plan['compute_dtype']}",
            "linears": f"{plan['linears']} to quantize, {len(plan['left_in_float'])} left in float",
        }
    elif "steps" in plan:
        teacher = f" from {plan['teacher']}" if plan["teacher"] else ""
        rows["trained"] = f"{plan['tokens']:,} tokens in {plan['steps']:,} steps{teacher}"
    elif "conversion" in plan:
        rows["converted"] = f"to {plan['conversion']['words']}"
        rows["KV cache"] = _fewer(*plan["conversion"]["kv_values"])
    else:
        rows["pruned"] = "a shape is looked for; sizes are the largest there could be"
        if plan["shape"]:
            kept = f"{plan['output_parameters']:,} parameters"
            rows["pruned"] = f"{_changed(plan['original_shape'], plan['shape'])}; {kept}"
    rows |= {
        "output": f"{plan['out']}, {sizes['output_bytes']} "
        f"({plan['original_bytes'] / plan['output_bytes']:.2f}x smaller)",
        "disk": f"up to {sizes['disk_bytes']} while it is made, {sizes['disk_free_bytes']} free",
        "memory": f"about {sizes['memory_bytes']}, {sizes['memory_free_bytes']} free",
    }
    if note := plan.get("output_note"):
        rows["output"] += f", {note}"
    if plan["activation_bytes"]:
        rows["hidden states"] = (
            f"{sizes['activation_bytes']}, of which in memory up to "
            f"{sizes['activation_memory_bytes']}"
        )
    if "seconds" in plan:
        rows["time"] = f"about {_duration(plan['seconds'])}, by the second block on one batch"
    if plan.get("sampling_seconds"):
        rows["of that, sampling"] = f"{_duration(plan['sampling_seconds'])}, of calibration text"
    if plan["gpu_memory_bytes"]:
        rows["GPU memory"] = f"about {sizes['gpu_memory_bytes']}"
    print_pairs("Plan (nothing was written; weights were not checked)", rows)


def print_chain_plan(plan: dict[str, Any]) -> None:
    """Print what `compress.dry_run.plan_chain` returned."""
    title = "Plan (nothing was written; weights were not checked)"
    table = Table(title=title, title_justify="left")
    for column in ("after", "parameters", "size", "memory", "GPU memory"):
        table.add_column(column, justify="left" if column == "after" else "right")
    before = {"method": "original", "parameters": plan["parameters"]}
    rows = [before | {"bytes": plan["original_bytes"]}, *plan["stages"]]
    rows += [row | {"method": f"draft: {row['method']}"} for row in plan["draft"]]
    for row in rows:
        count = "" if row["parameters"] is None else f"{row['parameters']:,}"
        sizes = (row.get(key) for key in ("bytes", "memory_bytes", "gpu_memory_bytes"))
        table.add_row(row["method"], count, *(in_words(size) if size else "" for size in sizes))
    Console(highlight=False).print(table)
    sizes = {name: in_words(count) for name, count in plan.items() if name.endswith("_bytes")}
    print_pairs(
        "In all",
        {
            "output": plan["out"],
            "disk": f"up to {sizes['disk_bytes']}, {sizes['disk_free_bytes']} free",
            "memory": f"about {sizes['memory_bytes']}, {sizes['memory_free_bytes']} free",
        },
    )


def _changed(before: dict[str, int], after: dict[str, int]) -> str:
    """What pruning changes of a shape."""
    return ", ".join(
        f"{key} {before[key]} to {after[key]}" for key in after if before[key] != after[key]
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def print_report(report: dict[str, Any]) -> None:
    """Print what `run_recipe` returned."""
    if "allocation" in report:
        print_allocation(report)
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
        "size": f"{in_words(sizes['bytes'])}, was {in_words(sizes['original_bytes'])} "
        f"({ratio:.2f}x smaller)",
        "quantized": f"{sizes['quantized_weights']:,} of {sizes['parameters']:,} parameters",
        "time": f"{report['seconds']:.0f} s, of which calibration text "
        f"{report['calibration_seconds']:.0f} s",
    }
    if training := report.get("training"):
        before, after = training["held_out_kl"][0], training["held_out_kl"][-1]
        rows["training"] = (
            f"{training['tokens']:,} tokens in {report['training_seconds']:.0f} s; "
            + (
                f"{training['codes_moved']:.2%} of the codes moved"
                if training["helped"]
                else "it did not help, and the model is as it was before"
            )
        )
        rows["KL to the original"] = (
            f"{after['kl']:.4f} after training, {before['kl']:.4f} before, on text held out"
        )
    for note, names in left.items():
        rows[note] = ", ".join(names[:4]) + (
            f" and {len(names) - 4} more" if len(names) > 4 else ""
        )
    print_pairs("Result", rows)


def print_training(report: dict[str, Any]) -> None:
    """Print what `run_distillation` returned."""
    training, sizes = report["training"], report["sizes"]
    table = Table(title="On the sequences held out", title_justify="left")
    evaluations = training["evaluations"]
    names = list(evaluations[0]["parts"]) if evaluations else []
    for column in ("tokens", "loss", *names):
        table.add_column(column.replace("_", " "), justify="right")
    for row in evaluations:
        values = (row["loss"], *(row["parts"][name] for name in names))
        table.add_row(f"{row['tokens']:,}", *(f"{value:.4f}" for value in values))
    if evaluations:
        Console(highlight=False).print(table)
    rate = training["tokens"] / max(report["seconds"], 0.1)
    rows = {
        "output": report["out"],
        "report": f"{report['out']}/report.html",
        "size": in_words(sizes["bytes"]),
        "trained": f"{training['tokens']:,} tokens in {training['steps']:,} steps",
        "last loss": f"{training['loss']:.4f}",
        "time": f"{report['seconds']:.0f} s of training, {rate:,.0f} tokens/s",
    }
    print_pairs("Result", rows)


def print_pruning(report: dict[str, Any]) -> None:
    """Print what `run_pruning` returned, of a ranking alone or of a model."""
    pruning = report.get("pruning", report)
    if "search" in pruning:
        _print_search(pruning["search"])
    if "pruning" not in report:
        return
    sizes = report["sizes"]
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for layer in pruning["refitted"]:
        by_kind[layer["name"].rpartition(".")[2]].append(layer)
    if by_kind:
        table = Table(title="Relative squared error of outputs", title_justify="left")
        for column in ("linears", "count", "cut, mean", "refitted, mean", "worst", "in block"):
            table.add_column(column, justify="left" if column == "linears" else "right")
        for kind, layers in by_kind.items():
            cut = sum(layer["cut_error"] for layer in layers) / len(layers)
            mean = sum(layer["error"] for layer in layers) / len(layers)
            worst = max(layers, key=lambda layer: layer["error"])
            block = re.findall(r"\d+", worst["name"])[-1]
            errors = (f"{value:.2e}" for value in (cut, mean, worst["error"]))
            table.add_row(kind, str(len(layers)), *errors, block)
        Console(highlight=False).print(table)
    rows = {
        "output": report["out"],
        "report": f"{report['out']}/report.html",
        "pruned": _changed(pruning["original_shape"], pruning["shape"]),
        "blocks removed": ", ".join(map(str, pruning["removed_blocks"])) or "none",
        "parameters": f"{sizes['parameters']:,}, was {sizes['original_parameters']:,} "
        f"({1 - sizes['parameters'] / sizes['original_parameters']:.1%} fewer)",
        "size": f"{in_words(sizes['bytes'])}, was {in_words(sizes['original_bytes'])}",
        "time": f"{report['seconds']:.0f} s, of which calibration text "
        f"{report['calibration_seconds']:.0f} s",
    }
    print_pairs("Result", rows)


def print_conversion(report: dict[str, Any]) -> None:
    """Print what `run_conversion` returned."""
    from compress.report import in_cell

    conversion, sizes = report["conversion"], report["sizes"]
    table = Table(title="Each block", title_justify="left")
    table.add_column("block")
    for heading in conversion["columns"].values():
        table.add_column(heading, justify="right")
    for block in conversion["blocks"]:
        cells = (in_cell(block[field]) for field in conversion["columns"])
        table.add_row(re.findall(r"\d+", block["name"])[-1], *cells)
    console = Console(highlight=False)
    console.print(table)
    console.print(conversion["legend"])
    for note in dict.fromkeys(block["note"] for block in conversion["blocks"] if block["note"]):
        say(note)
    rows = {
        "output": report["out"],
        "report": f"{report['out']}/report.html",
        **{name: f"{was} to {now}" for name, (was, now) in conversion["changes"].items()},
        "KV cache": _fewer(conversion["original_kv_values"], conversion["kv_values"]),
        "in bytes": f"{in_words(conversion['kv_bytes'])} a token in the weights' dtype, were "
        f"{in_words(conversion['original_kv_bytes'])}",
        "parameters": f"{sizes['parameters']:,}, was {sizes['original_parameters']:,}",
        "size": f"{in_words(sizes['bytes'])}, was {in_words(sizes['original_bytes'])}",
        "time": f"{report['seconds']:.0f} s, of which calibration text "
        f"{report['calibration_seconds']:.0f} s",
    }
    if reason := report["loads_in"]:
        rows["loads in"] = reason
    print_pairs("Result", rows)


def _fewer(was: int, now: int) -> str:
    return f"{now:,} numbers a token, were {was:,} ({1 - now / was:.1%} fewer)"


def _print_search(search: dict[str, Any]) -> None:
    """Print the shapes that were looked at, with the one taken first."""
    made, alone, left = search["measured"], search["alone"], search["others"]
    title = f"At most {search['asked']}: {search['count']} shapes that cannot grow by a step"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = (
        f"KL: nats a token on {search['sequences']} calibration sequences, before any training; "
        "guess: by what each axis alone lost; left: not made"
    )
    timed = made[0]["milliseconds"] is not None
    names = ["depth", "hidden", "ffn", "heads"]
    if len({found["shape"]["kv_heads"] for found in (*made, *alone, *left)}) > 1:
        names.append("kv_heads")
    for column in ("", *names, "params", "guess", "KL", *(["ms"] if timed else [])):
        table.add_column(column.replace("_", " "), justify="right" if column else "left")
    rows = [("alone", found) for found in alone]
    rows += [("taken", made[0]), *(("made", found) for found in made[1:])]
    rows += [("left", found) for found in left]
    for what, found in rows:
        losses = ("" if found[key] is None else f"{found[key]:.3f}" for key in ("predicted", "kl"))
        numbers = (str(found["shape"][name]) for name in names)
        time = (f"{found['milliseconds']:.2f}",) if timed else ()
        params = f"{found['parameters'] / 1e6:.1f}M"
        table.add_row(what, *numbers, params, *losses, *time)
    Console(highlight=False).print(table)


def print_chain(report: dict[str, Any]) -> None:
    """Print what `run_chain` returned."""
    sizes, measured = report["sizes"], report.get("eval")
    table = Table(title=_measured_on(report), title_justify="left")
    losses = ("perplexity", "KL", "of it added here") if measured else ()
    for column in ("after", "parameters", "size", *losses, "time"):
        table.add_column(column, justify="left" if column == "after" else "right")
    start = [f"{sizes['original_parameters']:,}", in_words(sizes["original_bytes"])]
    if measured:
        start += [f"{measured['perplexity_original']:.5g}", "", ""]
    table.add_row("original", *start, "")
    for row, seconds in zip(report["stages"], report["stage_seconds"], strict=True):
        cells = [row["method"], f"{row['parameters']:,}", in_words(row["bytes"])]
        if measured:
            cells += [f"{row['perplexity']:.5g}"]
            cells += [f"{row['kl_mean']:.4f}", f"{row['kl_added']:+.4f}"]
        table.add_row(*cells, _duration(seconds))
    Console(highlight=False).print(table)
    if "speed" in report:
        _print_stage_speeds(report["speed"])
    rows = {"output": report["out"]}
    if draft := report.get("draft"):
        rows["draft"] = f"{draft['parameters']:,} parameters, {in_words(draft['bytes'])}"
        if "top1_agreement" in draft:
            rows["draft"] += f", the same most likely token at {draft['top1_agreement']:.1%}"
    rows["report"] = f"{report['out']}/report.html"
    print_pairs("Result", rows)


def _print_stage_speeds(speed: dict[str, Any]) -> None:
    """Print what the original and the results of stages were timed at."""
    table = Table(title=speed["how"], title_justify="left")
    columns = ("after", "KV of a token", "first token", "each token", "together")
    for column in columns:
        table.add_column(column, justify="left" if column == "after" else "right")
    for row in speed["rows"]:
        cells = []
        if "seconds_per_token" in row:
            cells = [f"{row['kv_bytes_per_token']:,.0f} B"]
            times = (row["time_to_first_token_s"], row["seconds_per_token"])
            cells += [f"{1000 * times[0]:.1f} ms", f"{1000 * times[1]:.2f} ms"]
            cells.append(f"{row['tokens_per_s']:,.0f} tokens/s")
        table.add_row(row["name"], *cells)
    Console(highlight=False).print(table)


def _measured_on(report: dict[str, Any]) -> str:
    if not (measured := report.get("eval")):
        return "Stages"
    text = report["recipe"]["eval"]["text"]
    of = "that the original wrote" if text == "self" else f"of {text}"
    return f"On {measured['windows']} windows of {measured['seq_len']} tokens {of}"


def _error_cells(layers: list[dict[str, Any]]) -> list[str]:
    weight = sum(layer["weight_error"] for layer in layers) / len(layers)
    measured = [layer for layer in layers if layer["output_error"] is not None]
    if not measured:
        return [f"{weight:.2e}", "not measured", "", ""]
    mean = sum(layer["output_error"] for layer in measured) / len(measured)
    worst = max(measured, key=lambda layer: layer["output_error"])
    place = re.findall(r"\d+", worst["name"])[-1:]
    return [f"{weight:.2e}", f"{mean:.2e}", f"{worst['output_error']:.2e}", *place]
