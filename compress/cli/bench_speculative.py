"""`compress bench speculative`: what speculation gains on a set of prompts."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compress.cli.output import print_json
from compress.cli.runtime_options import (
    DTYPE,
    HEAD_BITS,
    JSON,
    KV_CACHE_DTYPE,
    ModelChoice,
    add_options,
)
from compress.core.errors import InputError, reason_of

COUNT = click.IntRange(min=1)
FILE = click.Path(dir_okay=False, path_type=Path)
MOST = 64  # tokens to propose

Columns = dict[str, Callable[[dict[str, Any]], str]]


class Lengths(click.ParamType):
    """Numbers of tokens to propose, or auto, with commas between."""

    name = "lengths"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int | str]:
        found: list[int | str] = []
        for word in value.split(","):
            number = int(word) if word.isascii() and word.isdigit() and len(word) < 4 else 0
            if word != "auto" and not 1 <= number <= MOST:
                self.fail(f"'{word}' is no length; give auto, or 1 to {MOST}, such as auto,4")
            found.append(number or word)
        return list(dict.fromkeys(found))


class Temperatures(click.ParamType):
    """Temperatures with commas between."""

    name = "temperatures"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[float]:
        try:
            found = [float(word) for word in value.split(",")]
        except ValueError:
            found = []
        if not found or not all(0 <= one < float("inf") for one in found):
            self.fail(f"'{value}' is no list of temperatures; give some from 0 on, such as 0,0.7")
        return list(dict.fromkeys(found))


OPTIONS = [
    click.option(
        "--draft",
        required=True,
        metavar="MODEL|ngram|self[:LAYERS]",
        help="What proposes tokens: a smaller model of the same vocabulary, the text so far, or "
        "the model itself without some layers.",
    ),
    click.option(
        "--num-speculative-tokens",
        "lengths",
        default="auto",
        show_default=True,
        metavar="K|auto,...",
        type=Lengths(),
        help="Tokens to propose at once; several with commas are measured in turn.",
    ),
    click.option(
        "--dataset",
        required=True,
        type=FILE,
        help="Prompts: Spec-Bench's file, or lines as `compress generate` takes them.",
    ),
    click.option(
        "--per-category",
        default=10,
        show_default=True,
        type=COUNT,
        help="Prompts of each of the dataset's categories; MT-bench's eight count as one.",
    ),
    click.option(
        "--max-tokens", default=128, show_default=True, type=click.IntRange(min=2),
        help="Most new tokens of an answer.",
    ),
    click.option(
        "--temperature", "temperatures", default="0", show_default=True, type=Temperatures(),
        help="Several with commas are measured one after another.",
    ),
    click.option(
        "--batch", default=1, show_default=True, type=COUNT, help="Prompts answered together."
    ),
    click.option(
        "--repeat", "repeats", default=1, show_default=True, type=COUNT,
        help="Answer everything so many times in each way.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        help="Give requests seeds, from this number on: texts then equal the plain run's.  "
        "[default: 0 for n-grams; none else, and a draft model proposes samples]",
    ),
    DTYPE,
    HEAD_BITS,
    KV_CACHE_DTYPE,
    click.option("--threads", type=COUNT, help="CPU threads.  [default: PyTorch's]"),
    click.option("--out", type=FILE, help="Write a .json file with every run."),
    JSON,
]  # fmt: skip


@click.command("speculative")
@click.argument("model")
@add_options(OPTIONS)
def speculative_command(
    model: str,
    draft: str,
    lengths: list[int | str],
    dataset: Path,
    per_category: int,
    max_tokens: int,
    temperatures: list[float],
    batch: int,
    repeats: int,
    seed: int | None,
    dtype: str,
    head_bits: str | None,
    kv_cache_dtype: str,
    threads: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure what speculation gains on a dataset, beside what it was expected to.

    Every prompt is answered with and without, in turn.  Answers that end in repeating themselves
    are counted and left out.  The expectation is the accepted length by the measured acceptance,
    over the measured cost of drafting and verifying.

    \b
    Examples:
      compress bench speculative smollm2-w4 --draft ngram --dataset spec_bench_question.jsonl
      compress bench speculative smollm2-w4 --draft small --num-speculative-tokens auto,4 \\
        --dataset spec_bench_question.jsonl --temperature 0,0.7 --out speculative.json
    """
    if out is not None and not out.parent.is_dir():
        raise click.UsageError(f"--out '{out}': there is no folder '{out.parent}'")
    with contextlib.redirect_stdout(sys.stderr):
        from compress.bench.speculative import (
            Plan,
            choices,
            measure_speculation,
            read_questions,
        )
        from compress.bench.subject import Subject

        questions = read_questions(dataset, per_category)
        plan = Plan(draft, lengths, temperatures, max_tokens, batch, seed, repeats)
        proposers = choices(model, plan)
        choice = ModelChoice(model, dtype, head_bits)
        subject = Subject(
            model, dtype, choice.lm_head_bits, threads, keep_head=True,
            kv_cache_dtype=kv_cache_dtype,
        )  # fmt: skip
        report = measure_speculation(subject, questions, plan, proposers)
        report = {"dataset": dataset.name} | report
    _write(report, out)
    del report["cases"]
    print_json(report) if as_json else print_speculative(report)


def _write(report: dict[str, Any], out: Path | None) -> None:
    from compress.core.files import write_text

    if out is None:
        return
    try:
        write_text(out, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write --out '{out}': {reason_of(error)}") from None


def print_speculative(report: dict[str, Any]) -> None:
    """Print what `measure_speculation` returned: tables for each temperature and length."""
    console = Console(highlight=False)
    head = f", head {report['head_bits']} bits" if report["head_bits"] else ""
    console.print(
        f"{report['model']}, {report['dtype']}{head}, {report['threads']} threads; draft "
        f"{report['draft']} ({report['proposer']}); {report['dataset']}: {report['prompts']}, up "
        f"to {report['max_tokens']} tokens, {report['batch']} at once",
        markup=False,
        soft_wrap=True,
    )
    rows = report["rows"]
    for temperature, length in dict.fromkeys((row["temperature"], row["length"]) for row in rows):
        here = [row for row in rows if (row["temperature"], row["length"]) == (temperature, length)]
        console.print(f"\n{length} tokens proposed, temperature {temperature:g}")
        console.print(_table("ms a token", TIMES, here, "speed_up"))
        if any("acceptance" in row for row in here):
            console.print(_table("proposed", PROPOSALS, here, "acceptance"))
        if any("cost" in row for row in here):
            console.print(_table("expected", EXPECTED, here, "cost"))
    differing = [row["differing"] for row in rows if row["category"] != "all"]
    if None in differing:
        console.print("texts: not compared, since a draft model's proposals are samples")
    if known := [count for count in differing if count is not None]:
        console.print(f"texts unlike those without speculation: {sum(known)}")


def _table(title: str, columns: Columns, rows: list[dict[str, Any]], key: str) -> Table:
    """A table of the rows; where `key` is missing only what counts prompts can be shown."""
    table = Table()
    table.add_column(title, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [cell(row) if key in row else "" for cell in columns.values()]
        table.add_row(escape(row["category"]), *cells)
    return table


def _interval(row: dict[str, Any]) -> str:
    low, high = row["speed_up_low"], row["speed_up_high"]
    return "" if low is None else f"{low:.2f}-{high:.2f}"


TIMES: Columns = {
    "n": lambda row: str(row["prompts"]),
    "loops": lambda row: str(row["looping"]),
    "plain": lambda row: f"{row['plain_ms_per_token']:.2f}",
    "with": lambda row: f"{row['ms_per_token']:.2f}",
    "speed-up": lambda row: f"{row['speed_up']:.2f}",
    "95%": _interval,
    "whole": lambda row: f"{row['whole_speed_up']:.2f}",
}
PROPOSALS: Columns = {
    "drafted": lambda row: f"{row['drafted']:,}",
    "accepted": lambda row: f"{row['accepted']:,}",
    "a": lambda row: "" if row["acceptance"] is None else f"{row['acceptance']:.2f}",
    "by place,\n%": lambda row: " ".join(f"{100 * part:.0f}" for part in row["accepted_at"][:3]),
    "tokens\na draft": lambda row: f"{row['tokens_per_draft']:.2f}",
    "tokens\na step": lambda row: f"{row['tokens_per_step']:.2f}",
}
EXPECTED: Columns = {
    "tokens\na step": lambda row: f"{row['expected_tokens_per_step']:.2f}",
    "cost": lambda row: f"{row['cost']:.2f}",
    "speed-up": lambda row: f"{row['expected_speed_up']:.2f}",
    "reached": lambda row: f"{row['of_expected']:.0%}",
    "by true\nlength": lambda row: f"{row['expected_speed_up_by_length']:.2f}",
    "reached\nof it": lambda row: f"{row['of_expected_by_length']:.0%}",
}
