"""The record of a check: one JSON file, and tables of it in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.core.resources import in_words
from gpu import lowbit, rounded
from gpu.stages import Outcome

Lines = list[str]
LONG = 32768  # tokens of context that the target for attention speaks of


def collected(facts: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything, as it goes into the JSON file; targets and sums are computed here."""
    data = {outcome.name: outcome.data for outcome in outcomes if outcome.data}
    copy = data.get("bandwidth", {}).get("copy_bytes_per_s")
    sums, of_rounded = [], []
    if copy:
        for name, found in data.items():
            if name.startswith("lowbit"):
                sums += lowbit.summed(found, copy)
            if name.startswith("rounded"):
                of_rounded += rounded.summed(found, copy)
    record: dict[str, Any] = {
        "facts": dict(facts),
        "stages": {outcome.name: vars(outcome) | {"data": None} for outcome in outcomes},
        "data": data,
        "lowbit": sums,
        "rounded": of_rounded,
    }
    return record | {"targets": targets(record)}


def targets(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is aimed at on an H200-class device, what was found, and whether that will do."""
    four = {row["rows"]: row for row in record["lowbit"] if row["bits"] == 4}
    data = record["data"]
    copy = data.get("bandwidth", {}).get("copy_bytes_per_s")

    def ratio(least: int, most: int) -> float | None:
        """The smallest; None unless every number of rows was measured."""
        rows = [number for number in lowbit.ROWS if least <= number <= most]
        return min(four[n]["of_dense"] for n in rows) if four.keys() >= set(rows) else None

    found: list[tuple[str, float, float | None]] = [
        ("W4 products at 1 row, of the copy bandwidth", 0.80,
         four[1]["of_copy"] if 1 in four else None),
        ("W4 products to 16 rows, times cuBLAS", 3.0, ratio(1, 16)),
        ("W4 products to 64 rows, times cuBLAS", 1.0, ratio(1, 64)),
        ("W4 products from 1,024 rows, times cuBLAS", 0.85, ratio(1024, max(lowbit.ROWS))),
    ]  # fmt: skip
    outliers = {row["rows"]: row["of_dense"] for row in record["rounded"]
                if row["kind"] == "llm.int8"}  # fmt: skip
    found.append((
        "LLM.int8 at 1 to 4,096 rows, times cuBLAS in bfloat16 (1 / 1.15 is published)", 1 / 1.15,
        min(outliers.values()) if outliers.keys() >= set(rounded.ROWS) else None,
    ))  # fmt: skip
    long = [row for row in data.get("attention", {}).get("cases", ()) if row["context"] == LONG]
    least = None
    if copy and long and all("seconds" in row for row in long):
        least = min(row["bytes"] / row["seconds"] / copy for row in long)
    found.append((f"paged decode at {LONG:,} of context, of the copy bandwidth", 0.80, least))
    ours, theirs = _first(data.get("model")), _first(data.get("model-gemlite"))
    share = ours["bytes"] / ours["seconds"] / copy if ours and copy else None
    found.append(("decode at batch 1, of its roofline", 0.65, share))
    faster = theirs["seconds"] / ours["seconds"] if ours and theirs else None
    found.append(("decode at batch 1, times gemlite's kernels", 1.0, faster))
    return [
        {
            "target": name,
            "least": least,
            "found": value,
            "met": None if value is None else value >= least,
        }
        for name, least, value in found
    ]


def _first(model: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    rows = (model or {}).get("decode", [])
    return next((row for row in rows if row["batch"] == 1), None)


def markdown(record: Mapping[str, Any]) -> str:
    """All tables."""
    facts, data = record["facts"], record["data"]
    lines = [f"# {facts['device']}", ""]
    if facts.get("stand_in"):
        lines += ["**Made in Triton's interpreter: no time or share below means anything.**", ""]
    lines.append(_facts(facts))
    lines += ["", *_stages(record), *_targets(record)]
    if copy := data.get("bandwidth", {}).get("copy_bytes_per_s"):
        read = data["bandwidth"]["read_bytes_per_s"]
        said = f"A large copy moves {copy / 1e9:,.0f} GB/s (read and written), reading alone "
        said += f"{read / 1e9:,.0f}.  L2 is cold, unless a table says otherwise."
        lines += ["", said]
        lines += [*_lowbit(record["lowbit"]), *_rounded(record["rounded"])]
        lines += [*_attention(data, copy), *_models(data, copy), *_verify(data), *_small(data)]
    lines += [*_parity(data), *_speculation(data)]
    return "\n".join(lines) + "\n"


def _facts(facts: Mapping[str, Any]) -> str:
    """Where, with what and when, in one line."""
    said = []
    for name, value in facts.items():
        if name in ("device", "stand_in") or value is None:
            continue
        if name.endswith("_bytes"):
            name, value = name.removesuffix("_bytes"), in_words(value)
        said.append(f"{name} {value}")
    return ", ".join(said) + "."


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Lines:
    """A table in Markdown under a heading; nothing where there are no rows."""
    if not rows:
        return []
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return ["", f"## {title}", "", *head, *(f"| {' | '.join(row)} |" for row in rows)]


def _stages(record: Mapping[str, Any]) -> Lines:
    rows = []
    for name, stage in record["stages"].items():
        counts = record["data"].get(name, {}).get("counts", {})
        said = stage["reason"] or ", ".join(f"{count} {kind}" for kind, count in counts.items())
        rows.append([name, stage["status"], f"{stage['seconds']:.1f}", said.replace("|", "/")])
    return table("Stages", ("stage", "", "seconds", ""), rows)


def _targets(record: Mapping[str, Any]) -> Lines:
    said = {True: "met", False: "**missed**", None: "not measured"}
    if record["facts"].get("stand_in"):
        said = dict.fromkeys(said, "no meaning")
    rows = [
        [row["target"], f"{row['least']:.2f}", _number(row["found"]), said[row["met"]]]
        for row in record["targets"]
    ]
    return table("Targets for an H200", ("", "at least", "found", ""), rows)


def _lowbit(sums: Sequence[Mapping[str, Any]]) -> Lines:
    rows = [
        [str(row["bits"]), f"{row['rows']:,}", _micro(row["seconds"]), f"{row['of_copy']:.0%}",
         f"{row['of_dense']:.2f}", f"{row['least_of_dense']:.2f}"]
        for row in sums
    ]  # fmt: skip
    columns = ("bits", "rows", "microseconds", "of copy", "times cuBLAS", "least of the four")
    return table("Low-bit products: the linears of a Llama-3-8B layer", columns, rows)


def _rounded(sums: Sequence[Mapping[str, Any]]) -> Lines:
    rows = [
        [row["kind"], f"{row['rows']:,}", _micro(row["seconds"]), f"{row['of_copy']:.0%}",
         f"{row['operations_per_s'] / 1e12:,.1f}", f"{row['of_dense']:.2f}",
         f"{row['least_of_dense']:.2f}"]
        for row in sums
    ]  # fmt: skip
    columns = (
        "codes", "rows", "microseconds", "of copy", "TFLOP/s", "times cuBLAS", "least of the four",
    )  # fmt: skip
    title = "Products that round their inputs: the linears of a Llama-3-8B layer"
    return table(title, columns, rows)


def _attention(data: Mapping[str, Any], copy: float) -> Lines:
    rows = []
    for row in data.get("attention", {}).get("cases", ()):
        if "seconds" not in row:
            continue
        ours, theirs = (row["bytes"] / row[key] / copy for key in ("seconds", "torch_seconds"))
        rows.append([f"{row['context']:,}", str(row["batch"]), _micro(row["seconds"]),
                     f"{ours:.0%}", f"{theirs:.0%}"])  # fmt: skip
    columns = ("context", "batch", "microseconds", "of copy", "torch, contiguous")
    return table("Paged decode attention", columns, rows)


def _small(data: Mapping[str, Any]) -> Lines:
    rows = [
        [row["name"], str(row["tokens"]), _micro(row["seconds"])]
        for row in data.get("small", {}).get("launches", ())
        if "seconds" in row
    ]  # fmt: skip
    return table("Other launches, on data in the L2 cache", ("", "tokens", "microseconds"), rows)


def _models(data: Mapping[str, Any], copy: float) -> Lines:
    rows = []
    for name in ("model", "model-gemlite", "model-dense"):
        found = data.get(name, {})
        for row in found.get("decode", ()):
            prefill = found.get("prefill_tokens_per_s")
            rows.append([
                {"model": "ours", "model-gemlite": "gemlite", "model-dense": "cuBLAS"}[name],
                str(row["batch"]), f"{row['seconds'] * 1e3:.2f}",
                f"{row['bytes'] / row['seconds'] / copy:.0%}",
                f"{prefill:,.0f}" if prefill else "",
            ])  # fmt: skip
    columns = ("linears", "batch", "ms a step", "of its roofline", "prefill, tokens/s")
    return table("Llama-3-8B's shape, random weights, 512 tokens of context", columns, rows)


def _parity(data: Mapping[str, Any]) -> Lines:
    rows = [
        [row["model"], row["dtype"], f"{row['equal']} of {row['prompts']}",
         _number(row["worst_gap"])]
        for name in ("parity-families", "parity-real", "parity-itself")
        for row in data.get(name, {}).get("rows", ())
    ]  # fmt: skip
    columns = ("model", "dtype", "answers equal", "worst gap of logits")
    return table("Greedy answers against transformers, and against other ways", columns, rows)


def _speculation(data: Mapping[str, Any]) -> Lines:
    rows = [
        [row["model"], row["draft"], row["tokens"], f"{row['equal']} of {row['prompts']}",
         _number(row["worst_gap"]), f"{row['accepted']} of {row['drafted']}",
         f"{row['plain_seconds'] / row['seconds']:.2f}"]
        for name in ("speculation", "speculation-real")
        for row in data.get(name, {}).get("rows", ())
    ]  # fmt: skip
    columns = ("model", "draft", "tokens", "answers equal", "worst gap", "accepted", "times faster")
    return table("Speculative decoding against the plain run", columns, rows)


def _verify(data: Mapping[str, Any]) -> Lines:
    rows = [
        [str(row["batch"]), str(row["drafted"]), f"{row['seconds'] * 1e3:.2f}",
         f"{row['seconds'] / row['plain_seconds']:.2f}"]
        for row in data.get("verify", {}).get("rows", ())
    ]  # fmt: skip
    columns = ("batch", "drafted tokens each", "ms a step", "times a plain step")
    return table("Verifying drafts: Llama-3-8B's shape, 512 tokens of context", columns, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"
