"""`compress compare`: models beside the original that they were made from, in one table."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, cast

import click
from rich.console import Console
from rich.table import Table

from compress.cli.eval import distances_of
from compress.cli.output import print_json
from compress.core.device import DTYPES
from compress.core.progress import say
from compress.engines import ENGINES
from compress.evaluate import TextEvalConfig
from compress.recall import RecallConfig

COUNT = click.IntRange(min=1)


@click.command("compare")
@click.argument("models", nargs=-1, required=True)
@click.option("--against", required=True, metavar="ORIGINAL", help="What they were made from.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text file for perplexity and KL.",
)
@click.option("--seq-len", default=TextEvalConfig.seq_len, show_default=True)
@click.option("--windows", default=TextEvalConfig.windows, show_default=True)
@click.option("--tasks", help="lm-eval tasks, with commas between: arc_easy,piqa.")
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with task files of your own.",
)
@click.option("--limit", type=COUNT, help="Questions to ask of each task.  [default: all]")
@click.option("--recall", is_flag=True, help="Ask for numbers that stood some distance back.")
@click.option(
    "--distances", metavar="TOKENS,TOKENS,...",
    help="Of --recall.  [default: those of 128,512,2048,8192 that fit into the context]",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(ENGINES), default=TextEvalConfig.engine, show_default=True,
    help="What computes quality.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(DTYPES), default=TextEvalConfig.dtype, show_default=True,
    help="Precision in which quality is measured.",
)  # fmt: skip
@click.option(
    "--repeat", default=3, show_default=True, type=click.IntRange(min=0),
    help="Rounds in which all are timed in turn; 0 for none.",
)  # fmt: skip
@click.option("--prompt-tokens", default=512, show_default=True, type=COUNT)
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(min=2))
@click.option(
    "--batch", default=16, show_default=True, type=COUNT, help="Requests answered together."
)
@click.option(
    "--speed-dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True,
    help="Precision in which speed is measured.",
)  # fmt: skip
@click.option("--threads", type=COUNT, help="CPU threads when timed.  [default: PyTorch's]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option(
    "--out", default="comparison", show_default=True, type=click.Path(path_type=Path),
    help="Folder for table, plot and page; what it has of a run before is not measured again.",
)  # fmt: skip
@click.option("--restart", is_flag=True, help="Measure all again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def compare_command(
    models: tuple[str, ...],
    against: str,
    text: Path | None,
    seq_len: int,
    windows: int,
    tasks: str | None,
    include_path: Path | None,
    limit: int | None,
    recall: bool,
    distances: str | None,
    engine: str,
    dtype: str,
    repeat: int,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    speed_dtype: str,
    threads: int | None,
    seed: int,
    out: Path,
    restart: bool,
    as_json: bool,
) -> None:
    """Measure MODELS and ORIGINAL alike: size, cache, speed, perplexity, KL, tasks, recall.

    Each is a folder, a .gguf file, a Hugging Face id or an alias (smollm2); MODEL+int8 or MODEL+fp8
    is with keys and values in 8 bits, MODEL+head8 with the output layer, MODEL+head8+int8 with
    both.  Speed is measured in rounds, all models in turn in each.  A star marks those that no
    other beats in both size, or time a token, and KL.

    \b
    Examples:
      compress compare smollm2-w4 smollm2-w3 --against smollm2 --text wiki.txt
      compress compare w4 w4+head8+int8 --against smollm2 --text wiki.txt --seq-len 2048 --windows 8
      compress compare out/* --against smollm2 --tasks arc_easy,piqa --limit 200 --out table
      compress compare mla windows --against smollm2 --recall --distances 128,1024
    """
    if distances and not recall:
        raise click.UsageError("--distances is for --recall; give that too")
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result alone
        from compress.comparing.comparison import (
            Comparison,
            Measures,
            SpeedConfig,
            TaskConfig,
            entries_of,
        )
        from compress.comparing.page import write_all

        scored = asked = sought = timed = None
        if text is not None:
            scored = TextEvalConfig(
                text, seq_len=seq_len, windows=windows, dtype=dtype, engine=engine, seed=seed
            )
        if tasks:
            names = tuple(name.strip() for name in tasks.split(",") if name.strip())
            asked = TaskConfig(names, include_path, limit, seed, dtype, engine)
        if recall:
            sought = RecallConfig(distances_of(distances), dtype=dtype, engine=engine, seed=seed)
        if repeat:
            timed = SpeedConfig(
                prompt_tokens, new_tokens, batch, repeat, cast(Any, speed_dtype), threads
            )
        measures = Measures(scored, asked, sought, timed)
        comparison = Comparison(entries_of(models, against), measures, out, restart)
        comparison.check()
        comparison.measure()
        rows, facts = comparison.rows(), measures.words
        written = write_all(out, rows, facts)
        say(f"Wrote {', '.join(map(str, written))}")
    if as_json:
        print_json({"against": against, "rows": rows, "facts": facts})
    else:
        print_comparison(rows, facts)


def print_comparison(rows: list[dict[str, Any]], facts: list[str]) -> None:
    """Print the table on standard output, without intervals: a row for each model where that fits,
    else a column for each, as many beside each other as fit."""
    from compress.comparing.page import table_of

    headings, cells = table_of(rows, intervals=False)
    console = Console(highlight=False)
    columns = [list(column) for column in zip(headings, *cells, strict=True)]
    if _width(columns) <= console.width:
        console.print(_table(columns))
    else:
        shown = [headings]
        for line in cells:
            if len(shown) > 1 and _width([*shown, line]) > console.width:
                console.print(_table(shown))
                shown = [headings]
            shown.append(line)
        console.print(_table(shown))
    for fact in facts:
        console.print(fact)


def _width(columns: list[list[str]]) -> int:
    """Of a table, in characters, with the lines between columns."""
    return 1 + sum(3 + max(map(len, column)) for column in columns)


def _table(columns: list[list[str]]) -> Table:
    """A table of columns, each with its heading first."""
    table = Table()
    for number, (heading, *_) in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left")
    for line in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*line)
    return table
