"""`compress eval`: perplexity, distance from the original model, tasks, and recall."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from compress.cli.options import given
from compress.cli.output import print_json
from compress.cli.runtime_options import HEAD_BITS, KV_CACHE_DTYPE, add_options, bits_of
from compress.core.device import DTYPES, ServedAs, told_of
from compress.core.errors import InputError, reason_of, shown
from compress.core.progress import say
from compress.engines import ENGINES
from compress.evaluate import TextEvalConfig, evaluate_text
from compress.recall import RecallConfig, check_recall, evaluate_recall
from compress.tasks import DEFAULT_BATCH_SIZE, check_tasks, evaluate_tasks


@click.command("eval")
@click.argument("model")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text file for perplexity.",
)
@click.option(
    "--seq-len", default=TextEvalConfig.seq_len, show_default=True, help="Tokens of one window."
)
@click.option(
    "--windows",
    default=TextEvalConfig.windows,
    show_default=True,
    help="Windows to score, from the start of the text.",
)
@click.option("--against", metavar="ORIGINAL", help="The model it was made from: compare the two.")
@click.option("--tasks", help="lm-eval tasks, with commas between: arc_easy,piqa.")
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with task files of your own.",
)
@click.option("--limit", type=int, help="Questions to ask of each task.  [default: all]")
@click.option(
    "--batch-size",
    default=DEFAULT_BATCH_SIZE,
    show_default=True,
    help="Batch size of the tasks with transformers.",
)
@click.option("--recall", is_flag=True, help="Ask for numbers that stood some distance back.")
@click.option(
    "--distances",
    help="Of these numbers, in tokens, with commas between.  [default: 128,512,2048,8192, as far "
    "as the model's context goes]",
)
@click.option(
    "--trials",
    type=int,
    help=f"Questions of each kind at each distance.  [default: {RecallConfig.trials}]",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default=TextEvalConfig.engine,
    show_default=True,
    help="What computes; auto is the runtime where it serves both models, else transformers.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=TextEvalConfig.dtype,
    show_default=True,
    help="Precision of weights and activations.",
)
@add_options([HEAD_BITS, KV_CACHE_DTYPE])
@click.option(
    "--seed",
    default=TextEvalConfig.seed,
    show_default=True,
    help="For the intervals, and for tasks that draw examples.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def eval_command(
    model: str,
    text: Path | None,
    seq_len: int,
    windows: int,
    against: str | None,
    tasks: str | None,
    include_path: Path | None,
    limit: int | None,
    batch_size: int,
    recall: bool,
    distances: str | None,
    trials: int | None,
    engine: str,
    dtype: str,
    head_bits: str | None,
    kv_cache_dtype: str,
    seed: int,
    as_json: bool,
) -> None:
    """Measure MODEL: perplexity, what it lost against ORIGINAL, accuracy on tasks, recall.

    MODEL and ORIGINAL are each a folder, a .gguf file, a Hugging Face id or an alias (smollm2).
    Give one or more of --text, --tasks, --recall.  Intervals are 95 %, of a text by bootstrap over
    windows.
    --kv-cache-dtype and --head-bits are for MODEL, so that against itself they show what 8 bits
    cost.

    In an output folder of compress, what was measured is kept in quality.json and report.html.

    \b
    Examples:
      compress eval smollm2 --text wiki.txt
      compress eval out/smollm2-awq --against smollm2 --text wiki.txt --json
      compress eval out/smollm2-awq --tasks arc_easy,piqa --limit 200
      compress eval smollm2 --tasks piqa_local --include-path benchmarks/tasks
      compress eval smollm2 --against smollm2 --text wiki.txt --seq-len 2048 --kv-cache-dtype int8
      compress eval out/smollm2-awq --against smollm2 --text wiki.txt --head-bits 8
      compress eval out/smollm2-windows --recall --distances 128,512,2048
    """
    if text is None and not tasks and not recall:
        raise click.UsageError("nothing to measure; give --text FILE, --tasks NAMES or --recall")
    if not recall and (distances is not None or trials is not None):
        raise click.UsageError("--distances and --trials are for --recall; give that too")
    if text is None and against is not None:
        raise click.UsageError("--against compares two models on a text; give --text FILE too")
    config, served = None, ServedAs(kv_cache_dtype, bits_of(head_bits))
    if text is not None:
        config = TextEvalConfig(
            text, seq_len=seq_len, windows=windows, dtype=dtype, engine=engine, seed=seed,
            served=served,
        )  # fmt: skip
    asked = None
    if recall:
        asked = RecallConfig(
            distances_of(distances), **given(trials=trials), dtype=dtype, engine=engine, seed=seed,
            served=served,
        )  # fmt: skip
    from compress.core.source import resolve_model

    result: dict[str, Any] = {"model": model, "dtype": dtype, "seed": seed}
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result alone
        source = resolve_model(model)
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        if config is not None and asked is not None:  # else they are the first to be measured
            check_recall(source, asked)
        if tasks and (config is not None or asked is not None):
            check_tasks(names, include_path, limit)
        if config is not None:
            original = None if against is None else resolve_model(against)
            result |= {"against": against, "text": str(text)}
            result |= evaluate_text(source, config, original)
            engine = result["engine"]  # for the tasks too, if there are any
        if asked is not None:
            result |= evaluate_recall(source, asked)
        if tasks:
            result |= evaluate_tasks(
                source, names, include_path, limit, batch_size, seed, dtype, engine, served
            )
    if as_json:
        print_json(result)
    else:
        if "perplexity" in result:
            print_eval_table(result)
        if "tasks" in result:
            print_tasks_table(result)
        if "recall" in result:
            print_recall_table(result)
    keep_in_folder(source.folder, result)


def distances_of(text: str | None) -> tuple[int, ...]:
    """Distances as a user writes them; InputError for what is no number."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"distances {shown(text)}; give numbers, such as 128,512,2048") from None


def keep_in_folder(folder: Path, result: dict[str, Any]) -> None:
    """Add a result to the report of an output folder; a hub cache is not ours to write into."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from compress.report import record_quality

    in_hub_cache = folder.resolve().is_relative_to(Path(HF_HUB_CACHE).expanduser().resolve())
    if in_hub_cache or not (folder / "report.html").is_file():
        return
    try:
        record_quality(folder, result)
    except (OSError, InputError) as error:
        say(f"The report of {folder} was not updated: {reason_of(error)}")
    else:
        say(f"Updated {folder / 'quality.json'} and {folder / 'report.html'}")


def print_eval_table(result: dict[str, Any]) -> None:
    """Print what `evaluate_text` returned as a table on standard output."""
    labels = {
        "perplexity": "perplexity",
        "perplexity_original": "perplexity of the original",
        "perplexity_ratio": "perplexity ratio",
        "kl_mean": "KL from the original, mean (nats)",
        "kl_p99": "KL from the original, 99th percentile",
        "top1_agreement": "same most likely token",
    }
    sizes = f"{result['windows']} windows of {result['seq_len']} tokens, {result['dtype']}"
    sizes += told_of(result)
    table = Table("", title=sizes, title_justify="left")
    for column in ("value", "95 % interval"):
        table.add_column(column, justify="right")
    for key, label in labels.items():
        if key in result:
            bounds = [f"{bound:.5g}" for bound in result.get(f"{key}_interval", [])]
            table.add_row(label, f"{result[key]:.5g}", " to ".join(bounds))
    Console(highlight=False).print(table)


def print_recall_table(result: dict[str, Any]) -> None:
    """Print what `evaluate_recall` returned as a table on standard output."""
    title = f"Recall, {result['trials']} trials each, {result['dtype']}{told_of(result)}"
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    for column in ("tokens back", "found", "95 % interval", "surprise (nats)", "95 % interval"):
        table.add_column(column, justify="right")
    for task, rows in result["recall"].items():
        for row in rows:
            found = " to ".join(f"{bound:.0%}" for bound in row["found_interval"])
            surprise = " to ".join(f"{bound:.2f}" for bound in row["surprise_interval"])
            told = (f"{row['found']:.0%}", found, f"{row['surprise']:.2f}", surprise)
            table.add_row(task, f"{row['distance']:,}", *told)
    Console(highlight=False).print(table)


def print_tasks_table(result: dict[str, Any]) -> None:
    """Print what `evaluate_tasks` returned as a table on standard output."""
    limit = result["limit"]
    table = Table(caption=None if limit is None else f"the first {limit} questions of each task")
    for column in ("task", "metric"):
        table.add_column(column)
    for column in ("value", "standard error", "questions"):
        table.add_column(column, justify="right")
    for task, metrics in result["tasks"].items():
        for name, value in metrics.items():
            if name == "samples" or "_stderr" in name or value is None:
                continue
            metric, comma, filter_name = name.partition(",")
            error = metrics.get(f"{metric}_stderr{comma}{filter_name}")
            shown = "" if error is None else f"{error:.4f}"
            table.add_row(task, name, f"{value:.4f}", shown, str(metrics["samples"] or ""))
    Console(highlight=False).print(table)
