"""`compress plan`: what a model would take and give on a device, from its config.json alone."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli.options import Size
from compress.cli.output import print_json
from compress.cli.runtime_options import JSON, add_options

if TYPE_CHECKING:
    from compress.planning.question import Question

CALIBRATED = "smollm2"
COUNT = click.IntRange(min=1)
FILE = click.Path(dir_okay=False, path_type=Path)
OPTIONS = [
    click.option(
        "--shape",
        help="A model that need not exist, instead of MODEL: hidden=4096,layers=32 and, if wanted, "
        "heads, kv-heads, head-dim, ffn, vocab, tied=yes, max-context, window, mla=512+64, "
        "kv-share.",
    ),
    click.option(
        "--device",
        help="h100, h200, a100, l4, 4090, cpu (this machine's), or a .yaml or .json file.  "
        "[default: h100; with --calibrate this machine]",
    ),
    click.option("--batch", default=1, show_default=True, type=COUNT, help="Sequences at once."),
    click.option(
        "--context", default=1024, show_default=True, type=COUNT, help="Tokens of each prompt."
    ),
    click.option(
        "--new-tokens",
        default=0,
        show_default=True,
        type=click.IntRange(min=0),
        help="Tokens of each answer: they add to the memory, and to the time of all of it.",
    ),
    click.option(
        "--weights",
        help="bf16, fp8, w8a8, int8, int4, int3, int2, with a group size int4-g64.  "
        "[default: as MODEL is stored if quantized, else bf16]",
    ),
    click.option(
        "--kv",
        help="Of keys and values: bf16, fp8, int8.  [default: as MODEL has scales for, else bf16]",
    ),
    click.option("--head", default="bf16", show_default=True, help="Of the output layer."),
    click.option(
        "--draft", help="Speculate with this model, or with any of this cost: 0.1 of a step."
    ),
    click.option("--draft-tokens", type=COUNT, help="Tokens drafted at a time.  [default: 4]"),
    click.option(
        "--acceptance",
        type=click.FloatRange(0, 1),
        help="Share of drafted tokens that are accepted, which nobody knows before measuring.  "
        "[default: 0.7]",
    ),
    click.option(
        "--tensor-parallel", default=1, show_default=True, type=COUNT, help="Devices that share it."
    ),
    click.option(
        "--sweep",
        "sweeps",
        multiple=True,
        metavar="KEY=VALUE,...",
        help="A table over batch, context, new-tokens, weights, kv, draft-tokens or "
        "tensor-parallel. Repeatable.",
    ),
    click.option("--plot", type=FILE, help="Write plots to this .png file (extra: plots)."),
    click.option("--html", type=FILE, help="Write a page with sliders to this file."),
    click.option("--fit", type=Size(), help="Rank recipes that fit in this memory: 24GB."),
    click.option("--min-context", type=COUNT, help="Tokens that must fit.  [default: --context]"),
    click.option(
        "--optimize",
        type=click.Choice(["throughput", "latency"]),
        help="What --fit ranks by.  [default: throughput]",
    ),
    click.option(
        "--max-loss",
        type=click.FloatRange(min=1),
        help="Perplexity over the original's that --fit puts up with.  [default: 1.1]",
    ),
    click.option("--top", type=COUNT, help="Recipes that --fit prints.  [default: 10]"),
    click.option(
        "--calibrate",
        is_flag=True,
        help="Measure this machine, and MODEL (smollm2 unless given) on it beside what was "
        "predicted.",
    ),
    click.option(
        "--save-device",
        type=FILE,
        help="With --calibrate: write what was measured to this .json file, for --device.",
    ),
    click.option("--threads", type=COUNT, help="With --calibrate: CPU threads."),
    JSON,
]


@click.command("plan")
@click.argument("model", required=False)
@add_options(OPTIONS)
def plan_command(
    model: str | None,
    fit: int | None,
    calibrate: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Say what MODEL would take and give on a device: memory, latency, throughput, and its limits.

    MODEL is a Hugging Face id, of which only config.json is fetched, a folder, a config.json, a
    .gguf file, the alias smollm2, or a model known by name such as llama-2-13b. Weights are not
    read, but by --calibrate.

    \b
    Examples:
      compress plan llama-2-13b --device h100 --batch 64 --sweep batch=1,64,256
      compress plan Qwen/Qwen3-8B --device l4 --weights int4 --context 8192 --new-tokens 512
      compress plan llama-2-70b --tensor-parallel 4 --weights fp8 --draft llama-2-7b
      compress plan --shape hidden=4096,layers=32,kv-heads=8 --device a100 --plot plan.png
      compress plan llama-2-7b --fit 24GB --min-context 8192 --optimize latency
      compress plan smollm2 --calibrate --save-device here.json
    """
    _check_flags(fit, calibrate, given)
    with contextlib.redirect_stdout(sys.stderr):
        from compress.planning.question import Question

        names = ("device", "batch", "context", "new_tokens", "weights", "kv", "head", "draft",
                 "draft_tokens", "acceptance", "tensor_parallel", "shape", "threads")  # fmt: skip
        if calibrate and model is None and given["shape"] is None:
            model = CALIBRATED
        question = Question(model=model, **{name: given[name] for name in names})
        if calibrate:
            report, show = _calibrate(question, given)
        elif fit is not None:
            report, show = _fit(question, fit, given)
        else:
            report, show = _plan(question, given)
    print_json(report) if as_json else show(report)


def _check_flags(fit: int | None, calibrate: bool, given: dict[str, Any]) -> None:
    """Refuse flags that would have no effect."""
    owners = {
        "--fit": (fit is not None, ("min_context", "optimize", "max_loss", "top")),
        "--calibrate": (calibrate, ("save_device", "threads")),
        "--draft": (given["draft"] is not None or fit is not None, ("draft_tokens", "acceptance")),
    }
    for owner, (is_there, flags) in owners.items():
        for flag in flags:
            if given[flag] is not None and not is_there:
                raise click.UsageError(f"--{flag.replace('_', '-')} goes with {owner}")
    if fit is not None and calibrate:
        raise click.UsageError("--fit and --calibrate are two questions; ask them one by one")
    if fit is not None or calibrate:
        for flag in ("sweeps", "plot", "html"):
            if given[flag]:
                which = "--fit" if fit is not None else "--calibrate"
                raise click.UsageError(f"--{flag.removesuffix('s')} does not go with {which}")
    if fit is not None and given["weights"]:
        raise click.UsageError("--weights does not go with --fit, which tries all of them")


def _plan(question: Question, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    from compress.planning import report as reports
    from compress.planning.inputs import sweep_of_text

    if not (question.draft or question.draft_tokens) and any(
        text.startswith("draft-tokens") for text in given["sweeps"]
    ):
        raise click.UsageError("--sweep draft-tokens=... needs --draft")
    sweeps = [sweep_of_text(text) for text in given["sweeps"]]
    _check_places(given)
    case = question.case
    report = reports.plan_report(case, question.stored_as, question.kv_as, question.notes)
    swept = {sweep.key: question.swept(sweep) for sweep in sweeps}
    report["sweeps"] = {key: reports.sweep_report(cases) for key, cases in swept.items()}
    _write_files(question, given, report)
    return report, _show_plan


def _check_places(given: dict[str, Any]) -> None:
    """Refuse files that could not be written, before any work."""
    for kind, ending in (("plot", ".png"), ("html", ".html")):
        path = given[kind]
        if path is not None and (path.suffix != ending or not path.absolute().parent.is_dir()):
            raise click.UsageError(
                f"--{kind} '{path}': give a file in a folder that exists, with the ending {ending}"
            )


def _write_files(question: Question, given: dict[str, Any], report: dict[str, Any]) -> None:
    """Write the plots and the page that are asked for, and note them in the report."""
    from compress.core.errors import InputError, reason_of

    case, draft = question.case, question.case.draft
    try:
        if given["plot"]:
            from compress.planning.plots import write_plots

            write_plots(given["plot"], case, f"{report['model']}, {question.stored_as} weights")
            report["plot"] = str(given["plot"])
        if given["html"]:
            from compress.planning.page import write_page

            start: dict[str, Any] = {"batch": question.batch, "context": question.context}
            start |= {"new_tokens": question.new_tokens, "devices": question.tensor_parallel}
            if draft is not None:
                start |= {"draft_length": draft.length, "acceptance": draft.acceptance}
                start["draft_cost"] = case.draft_cost
                if draft.shape is not None and draft.precision is not None:
                    start["draft_model"] = (draft.shape, draft.precision)
            write_page(given["html"], case.shape, case.precision, case.device, **start)
            report["html"] = str(given["html"])
    except OSError as error:
        raise InputError(f"cannot write '{error.filename}': {reason_of(error)}") from None


def _show_plan(report: dict[str, Any]) -> None:
    from compress.planning import tables

    tables.print_report(report)
    for key, rows in report["sweeps"].items():
        tables.print_sweep(key, rows)
    for kind in ("plot", "html"):
        if kind in report:
            click.echo(f"Wrote {report[kind]}")


def _fit(question: Question, memory: int, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    from compress.planning.fit import MOST_LOSS, TOP, fit_report
    from compress.planning.tables import print_fit

    device = replace(question.case.device, memory=memory)
    load = question.case.load
    if given["min_context"]:
        load = replace(load, context=given["min_context"], new_tokens=0)
    report = fit_report(
        question,
        device,
        load,
        given["optimize"] or "throughput",
        given["max_loss"] or MOST_LOSS,
        given["top"] or TOP,
    )
    return report, print_fit


def _calibrate(question: Question, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    from compress.planning.calibrate import calibrate
    from compress.planning.tables import print_calibration

    return calibrate(question, given["save_device"]), print_calibration
