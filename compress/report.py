"""`report.html`: what was done to a model and what it cost, on one page that needs nothing else.

The page is a pure function of files in the output folder: compress.json, run.json and quality.json
where they are, and the headers of the shards.  Each number on it stands in one of these, or is a
sum or a quotient of such numbers; `<data value=...>` holds it in full beside the rounded text.

quality.json holds what `compress eval` measured on the folder, the latest of each kind (KEYS):

    {"texts": [{"text": "wiki.txt", "text_sha256": ..., "against": ..., "perplexity": ..., ...}],
     "tasks": [{"task": "piqa", "limit": null, "dtype": ..., "metrics": {"acc": ..., ...}}]}
"""

import json
import math
import re
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import UndefinedError

from compress.core.device import TOLD, told_of
from compress.core.errors import InputError
from compress.core.files import write_text
from compress.core.source import public_name
from compress.frontier_plot import chart_of
from compress.inspection import inspect_folder
from compress.page_template import page_template

QUALITY = "quality.json"
Layer = dict[str, Any]  # a LayerReport, as compress.json holds it

# A measurement replaces an earlier one that agrees with it in these, and in what the runtime
# rounded (ServedAs), of which only what is not as stored is there.
KEYS = {
    "texts": ("text", "against", "windows", "seq_len", "dtype"),
    "tasks": ("task", "limit", "dtype"),
}
# metric -> label and format; top1_agreement is shown in percent
TEXT_METRICS = {
    "perplexity_original": ("perplexity of the original", "%#.5g"),
    "perplexity": ("perplexity, compressed", "%#.5g"),
    "perplexity_ratio": ("perplexity ratio, compressed to original", "%.4f"),
    "kl_mean": ("KL from the original, mean (nats a token)", "%#.4g"),
    "kl_p99": ("KL from the original, 99th percentile", "%#.4g"),
    "top1_agreement": ("same most likely token", "%.2f %%"),
}
FEW_WINDOWS = 20  # below this the intervals cover less often than they say
STEPS = 7  # colours of the error chart
WORST = 10
CHART_WIDTH = 760
ROW = 24  # height of a row of the error chart


def write_report(folder: Path) -> None:
    """Write report.html into a finished output folder, from the files in it.

    Raises InputError when compress.json, run.json or quality.json is not as this version writes it.
    """
    report = _read_json(folder / "compress.json")
    inspection = inspect_folder(folder)
    with _as_written_here(folder):
        html = _render(report, inspection, _read_json(folder / "run.json"), _quality(folder))
    write_text(folder / "report.html", html)


def record_quality(folder: Path, result: dict[str, Any]) -> None:
    """Put what `compress eval` measured (its JSON object) into quality.json, and renew the report.

    Raises OSError when the folder cannot be written, InputError as `write_report` does.
    """
    quality = _quality(folder)
    found: dict[str, list[dict[str, Any]]] = {"texts": [], "tasks": []}
    if "perplexity" in result:
        told = {k: v for k, v in result.items() if k not in ("model", "tasks", "limit", "recall")}
        against = result["against"] and public_name(result["against"])
        names = {"text": Path(result["text"]).name, "against": against}
        found["texts"].append(told | names)
    shared = {name: result.get(name) for name in ("limit", "dtype", "seed", "engine")}
    shared |= {name: result[name] for name in TOLD if name in result}
    for task, metrics in result.get("tasks", {}).items():
        found["tasks"].append({"task": task, **shared, "metrics": metrics})
    for task, rows in result.get("recall", {}).items():
        for row in rows:
            name = f"recall: {task} {row['distance']} tokens back"
            metrics = {key: row[key] for key in ("found", "surprise")}
            found["tasks"].append({"task": name, **shared, "metrics": metrics})
    with _as_written_here(folder):
        for kind, new in found.items():
            by_key = {
                (*(m[key] for key in KEYS[kind]), *map(m.get, TOLD)): m
                for m in [*quality[kind], *new]
            }
            quality[kind] = list(by_key.values())
    write_text(folder / QUALITY, json.dumps(quality, indent=2) + "\n")
    write_report(folder)


def spread(values: Iterable[str]) -> str:
    """`4 bits` where all are equal, else `4 bits (180 linears), 8 bits (30)`, commonest first."""
    counted = Counter(values).most_common()
    if len(counted) < 2:
        return "".join(value for value, _ in counted)
    first, *rest = counted
    return ", ".join([f"{first[0]} ({first[1]} linears)", *(f"{v} ({n})" for v, n in rest)])


def in_cell(value: Any) -> str:
    """What a conversion says of a block, in a cell: of several numbers their mean."""
    if value is None or value == []:
        return ""
    if isinstance(value, list):
        if isinstance(value[0], list):
            return " ".join("+".join(map(str, group)) for group in value)
        return in_cell(statistics.fmean(value))
    return f"{value:.2e}" if isinstance(value, float) else str(value)


def mean_bits(layers: Sequence[Layer]) -> float:
    """Bits of a code, on average over the weights of quantized layers."""
    return sum(layer["bits"] * _weights(layer) for layer in layers) / sum(map(_weights, layers))


@contextmanager
def _as_written_here(folder: Path) -> Iterator[None]:
    """Turn what goes wrong on files of another version, or edited ones, into an InputError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, UndefinedError) as error:
        raise InputError(
            f"the JSON files in '{folder}' are not as this version writes them ({error!r}); "
            "make the folder again, or remove quality.json if you edited it"
        ) from error


def _quality(folder: Path) -> dict[str, Any]:
    return {"texts": [], "tasks": []} | (_read_json(folder / QUALITY) or {})


def _read_json(path: Path) -> Any:
    """The object in a JSON file, None where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"cannot read {path}: {error}; remove it") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object; remove it")
    return value


def _render(
    report: dict[str, Any], inspection: dict[str, Any], run: Any, quality: dict[str, Any]
) -> str:
    recipe, sizes = report["recipe"], report["sizes"]
    quantized = [layer for layer in report["layers"] if layer["method"]]
    has_output = any(layer["output_error"] is not None for layer in quantized)
    error = "output_error" if has_output else "weight_error"
    measured = [layer for layer in quantized if _is_number(layer[error])]
    parts = inspection["bytes_by_part"]
    original_parts = sizes.get("original_bytes_by_part") or {
        "not recorded by part": sizes["original_bytes"]
    }
    part_rows = _part_rows(original_parts, parts)
    weights = sizes["quantized_weights"]
    original = None if "stages" in report else recipe["stages"][0].get("teacher")
    arguments = ("eval", recipe["out"], "--against", original or recipe["model"], "--text", "FILE")
    return page_template("compress", "report.html.jinja").render(
        style=files("compress").joinpath("page.css").read_text(encoding="utf-8"),
        report=report,
        recipe=recipe,
        recipe_yaml=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        methods=" → ".join(stage["method"] for stage in recipe["stages"]),
        stages=_stages(report),
        eval_text=_eval_text(recipe),
        model_name=Path(recipe["model"]).name,
        bits=spread(f"{layer['bits']} bits" for layer in quantized),
        stored_bits=8 * parts.get("quantized linears", 0) / weights if weights else None,
        eval_command=shlex.join(["compress", *arguments]),
        compared=[m for m in quality["texts"] if "perplexity_ratio" in m],
        quality=quality,
        text_metrics=TEXT_METRICS,
        few_windows=FEW_WINDOWS,
        told_of=told_of,
        task_rows=_task_rows(quality["tasks"]),
        error=error,
        quantized=quantized,
        unmeasured=len(quantized) - len(measured),
        grids=_grid_rows(quantized),
        kinds=_kind_rows(measured, error),
        worst=sorted(measured, key=lambda layer: -layer[error])[:WORST],
        chart=_error_chart(report["layers"], error),
        parts=part_rows,
        bars=_part_bars(part_rows),
        left=_left_rows(report["layers"]),
        run=run,
        in_cell=in_cell,
    )


def _eval_text(recipe: dict[str, Any]) -> str | None:
    """What the stages of a chain were measured on."""
    measured = recipe.get("eval")
    if not measured:
        return None
    return "text that the original wrote" if measured["text"] == "self" else measured["text"]


def _stages(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What each stage reports, with its settings and the parameters before it.

    `suffix` tells the sections of a chain's stages apart; a recipe of one stage needs none.
    """
    sizes = report["sizes"]
    rows = report.get("stages") or [report | {"parameters": sizes["parameters"]}]
    before = sizes.get("original_parameters", sizes["parameters"])
    stages = []
    for number, (row, settings) in enumerate(
        zip(rows, report["recipe"]["stages"], strict=True), start=1
    ):
        suffix = f"-{number}" if len(rows) > 1 else ""
        stage = row | {"settings": settings, "parameters_before": before, "suffix": suffix}
        if "allocation" in row:
            stage["frontier"] = chart_of(row["allocation"])
        stages.append(stage)
        before = row["parameters"]
    return stages


def _task_rows(tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each metric of each task, with the standard error of that metric."""
    rows = []
    for task in tasks:
        for name, value in task["metrics"].items():
            if name == "samples" or "_stderr" in name or value is None:
                continue
            metric, comma, filter_name = name.partition(",")
            stderr = task["metrics"].get(f"{metric}_stderr{comma}{filter_name}")
            samples = task["metrics"].get("samples")
            rows.append(task | {"metric": name, "value": value, "stderr": stderr, "n": samples})
    return rows


def _grid_rows(quantized: Sequence[Layer]) -> list[dict[str, Any]]:
    """How many linears, and weights in them, lie on each kind of grid."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for layer in quantized:
        names = ("method", "bits", "group_size", "inputs")
        key = tuple(layer.get(name) for name in names)
        row = rows.setdefault(key, dict(zip(names, key, strict=True)) | {"n": 0, "weights": 0})
        row["n"] += 1
        row["weights"] += _weights(layer)
    return sorted(rows.values(), key=lambda row: -row["weights"])


def _kind_rows(measured: Sequence[Layer], error: str) -> list[dict[str, Any]]:
    by_kind: dict[str, list[Layer]] = defaultdict(list)
    for layer in measured:
        by_kind[_place(layer["name"])[1]].append(layer)
    return [
        {
            "kind": kind,
            "n": len(layers),
            "median": statistics.median(layer[error] for layer in layers),
            "worst": max(layers, key=lambda layer: layer[error]),
        }
        for kind, layers in by_kind.items()
    ]


def _left_rows(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Layers that no method changed, by the reason."""
    by_note: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        if not layer["method"]:
            by_note[layer["note"].removeprefix("left in float: ")].append(layer)
    return [
        {
            "reason": note,
            "weights": sum(map(_weights, layers)),
            "names": [layer["name"] for layer in layers],
        }
        for note, layers in by_note.items()
    ]


def _is_number(error: float | None) -> bool:
    return error is not None and math.isfinite(error)


def _weights(layer: Layer) -> int:
    return math.prod(layer["shape"])


def _place(name: str) -> tuple[int | None, str]:
    """Block and kind of a layer: `model.layers.3.mlp.up_proj` -> 3, `mlp.up_proj`."""
    found = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (None, name)


def _error_chart(layers: Sequence[Layer], error: str) -> dict[str, Any] | None:
    """Geometry of the chart: a row a kind of linear, a column a block, colour steps in log(error).

    The steps are equal from the 5th percentile up; the lowest reaches down to the least error,
    so that a few tiny ones do not use up the colours.  None when no error is positive.
    """
    errors = [layer[error] for layer in layers if layer["method"] and _is_number(layer[error])]
    positive = sorted(value for value in errors if value > 0)
    placed = [(*_place(layer["name"]), layer) for layer in layers]
    placed = [(block, kind, layer) for block, kind, layer in placed if block is not None]
    if not positive or not placed:
        return None
    low, high = math.log10(positive[len(positive) // 20]), math.log10(positive[-1])
    in_order = sorted(placed, key=lambda item: item[2]["method"] is None)  # stable
    kinds = list(dict.fromkeys(kind for _, kind, _ in in_order))
    last = max(block for block, _, _ in placed)
    left = 12 + 7 * max(len(kind) for kind in kinds)
    width = min(ROW, (CHART_WIDTH - left) / (last + 1))
    cells = []
    for block, kind, layer in placed:
        value = layer[error]
        if not layer["method"]:
            style, said = "float", "left in float"
        elif not _is_number(value):
            style, said = "unmeasured", "not measured" if value is None else str(value)
        else:
            share = (math.log10(value) - low) / (high - low) if value > 0 and high > low else 0
            style = f"step{min(STEPS - 1, max(0, int(share * STEPS)))}"
            said = f"{value:.2e}"
        x, y = round(left + block * width, 2), kinds.index(kind) * ROW
        cells.append({"x": x, "y": y, "style": style, "title": f"{layer['name']}: {said}"})
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * width >= ROW)
    return {
        "left": left,
        "width": CHART_WIDTH,
        "height": len(kinds) * ROW,
        "cell": round(width, 2),
        "row": ROW,
        "kinds": kinds,
        "cells": cells,
        "ticks": [(b, round(left + (b + 0.5) * width, 2)) for b in range(0, last + 1, every)],
        "edges": [
            min(errors),
            *(10 ** (low + (high - low) * n / STEPS) for n in range(1, STEPS + 1)),
        ],
        "styles": {cell["style"] for cell in cells},
    }


def _part_rows(original: dict[str, int], compressed: dict[str, int]) -> list[dict[str, Any]]:
    rows = [
        {"part": name, "original": original.get(name, 0), "compressed": compressed.get(name, 0)}
        for name in dict.fromkeys([*original, *compressed])
    ]
    return sorted(rows, key=lambda row: -row["original"] - row["compressed"])


def _part_bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two stacked bars on one scale, with the parts in the order of the rows."""
    left = right = 90
    labels = ("original", "compressed")
    totals = {label: sum(row[label] for row in rows) for label in labels}
    scale = (CHART_WIDTH - left - right) / max(totals.values())
    bars = []
    for label in labels:
        x, segments = float(left), []
        for row in rows:
            width = row[label] * scale
            if width:
                place = {"x": round(x, 2), "width": round(width, 2)}
                fits = width > 8 * len(row["part"])
                segments.append({"part": row["part"], "bytes": row[label], "fits": fits} | place)
            x += width
        bars.append(
            {"label": label, "segments": segments, "end": round(x, 2), "bytes": totals[label]}
        )
    return bars
