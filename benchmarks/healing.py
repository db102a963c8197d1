"""What training wins back, on a model in a folder or an alias, as a page of tables in Markdown.

    python benchmarks/healing.py WORK_FOLDER --model smollm2 --train c4.txt \\
        --text wikitext2_valid.txt --out FILE.md

Every run is a `compress quantize` or `compress distill` in a process of its own, by its command in
the page.  They train on one text and are scored on another, of another kind:

- QAT at each number of bits, beside the method that it starts from: passes over the calibration
  sequences block by block, and the rest of the tokens on the whole model;
- a student that is the model without some layers, trained by forward KL and by cross-entropy on
  equal tokens;
- the control: the model itself, trained by cross-entropy in the same way.  What that gains on the
  text is not healing, but the kind of text.

What has scores is not run again (benchmarks/scored.py).  `--only REGEX` picks runs by name; the
page is of all that have scores.
"""

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from layers_removed import remove
from scored import Scored, add_options

from compress.core.counts import parse_count

SEQ_LEN = 512
SAMPLES = 128  # to calibrate on, of which blocks hold an eighth out
EPOCHS = 2  # of blocks


@dataclass(frozen=True)
class Run:
    """A checkpoint to make: its name, the group of seeds that it is one of, and the command."""

    name: str
    group: str
    command: tuple[str, ...]


def main() -> None:
    options = parse()
    scores = options.scores or options.work / "scores"
    scored = Scored(options.model, options.text, options.windows, options.work, scores)
    student = options.work / "student"
    runs = list(runs_of(options, student))
    if not scored.has("student"):
        remove(options.model, student, options.removed)
        scored.score("student")
    for run in runs:
        if re.search(options.only, run.name) and not scored.has(run.name):
            if "distill" in run.command and not student.exists():
                remove(options.model, student, options.removed)
            scored.make(run.name, run.command)
    text = page(options, [run for run in runs if scored.has(run.name)], scored)
    (options.out or options.work / "healing.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, "healing.md")
    parser.add_argument("--removed", default="3-5,13-15", help="layers that the student lacks")
    parser.add_argument("--tokens", default="200k")
    parser.add_argument("--bits", type=int, nargs="*", default=[3, 4])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--group-size", default="64")
    return parser.parse_args()


def runs_of(options: argparse.Namespace, student: Path) -> Iterable[Run]:
    """All runs, in the order of the page."""
    grid = ("--group-size", options.group_size, "--calibration", options.train)
    grid += ("--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN))
    blocks = EPOCHS * (SAMPLES - SAMPLES // 8) * SEQ_LEN
    if (whole := parse_count(options.tokens) - blocks) <= 0:
        raise SystemExit(f"--tokens {options.tokens}: blocks take {blocks:,}; give more")
    split = f"block_epochs={EPOCHS},tokens={whole}"
    for bits in options.bits:
        quantize = ("quantize", options.model, "--bits", str(bits), *grid)
        for method in ("gptq", "awq+gptq"):
            yield Run(f"{method}-w{bits}", f"{method} W{bits}", (*quantize, "--method", method))
        for seed in options.seeds:
            more = ("--method", "qat", "--set", split, "--seed", str(seed))
            yield Run(f"qat-w{bits}-{seed}", f"QAT W{bits}", (*quantize, *more))
    losses = {"kl": "forward_kl=1", "ce": "forward_kl=0,cross_entropy=1"}
    for name, loss in losses.items():
        for seed in options.seeds:
            yield distilled(options, f"student-{name}-{seed}", str(student), loss, seed)
    for seed in options.seeds:
        yield distilled(options, f"control-ce-{seed}", options.model, losses["ce"], seed)


def distilled(options: argparse.Namespace, name: str, student: str, loss: str, seed: int) -> Run:
    """A run of `compress distill` against the model."""
    command = ("distill", "--teacher", options.model, "--student", student, "--loss", loss)
    command += ("--data", options.train, "--tokens", options.tokens, "--batch-size", "8")
    command += ("--seed", str(seed))
    return Run(name, name.rpartition("-")[0], command)


def page(options: argparse.Namespace, runs: list[Run], scored: Scored) -> str:
    """The record of runs that have scores."""
    scores = {name: scored.get(name) for name in ("student", *(run.name for run in runs))}
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(scores[run.name])
    trained, text = Path(options.train).name, Path(options.text).name
    lines = [
        "# What training wins back",
        "",
        f"{options.model}; trained on {options.tokens} tokens of {trained}, scored "
        f"on the first {options.windows} windows of 512 tokens of {text} in float32. KL is from "
        "the original, in nats a token; of several seeds the mean, and in brackets the least "
        "and the greatest.",
        "",
    ]
    original = next(iter(scores.values()))["perplexity_original"]
    for bits in options.bits:
        starts = [name for name in groups if name in (f"gptq W{bits}", f"awq+gptq W{bits}")]
        trained_group = f"QAT W{bits}"
        if not starts or trained_group not in groups:
            continue
        best = min(groups[name][0]["kl_mean"] for name in starts)
        lines += [
            f"## {bits} bits, groups of {options.group_size}",
            "",
            "| | perplexity | KL | of the KL that the best without training leaves, won back |",
            "|---|---|---|---|",
            f"| original | {original:.2f} | 0 | |",
            *(row(name, groups[name]) for name in starts),
            row(trained_group, groups[trained_group], best),
            "",
        ]
    if lost := [name for name in groups if name.startswith(("student", "control"))]:
        before = scores["student"]
        lines += [
            f"## Without layers {options.removed}",
            "",
            "| | perplexity | KL | won back |",
            "|---|---|---|---|",
            f"| original | {original:.2f} | 0 | |",
            row("student, not trained", [before]),
            *(
                row(NAMES[name], groups[name], None if "control" in name else before["kl_mean"])
                for name in lost
            ),
            "",
        ]
    if curves := [line for run in runs if (line := curve(run.name, scores[run.name]))]:
        lines += ["## Loss on held-out sequences, by tokens of the whole model"]
        lines += ["", *curves, ""]
    lines += ["## Commands", ""]
    lines += [f"    compress {named(options, run)} --out {run.name}" for run in runs]
    return "\n".join([*lines, ""])


def named(options: argparse.Namespace, run: Run) -> str:
    """A run's command, without the folders of the machine that it ran on."""
    names = {options.train: Path(options.train).name, str(options.work / "student"): "student"}
    return " ".join(names.get(word, word) for word in run.command)


NAMES = {
    "student-kl": "student, forward KL",
    "student-ce": "student, cross-entropy",
    "control-ce": "control: the original, cross-entropy",
}


def row(name: str, scores: list[dict[str, Any]], before: float | None = None) -> str:
    """A group of seeds; `before` is a KL of which the share that is gone is told."""
    divergences = [score["kl_mean"] for score in scores]
    cells = [name, several([score["perplexity"] for score in scores], ".2f")]
    cells.append(several(divergences, ".4f"))
    gone = "" if before is None else several([1 - kl / before for kl in divergences], ".1%")
    return f"| {' | '.join([*cells, gone])} |"


def curve(name: str, score: dict[str, Any]) -> str:
    """The held-out losses of a run, or nothing where none were taken."""
    points = (f"{row['tokens'] / 1000:.0f}k {row['loss']:.4f}" for row in score.get("held_out", []))
    return f"- {name}: {', '.join(points)}" if score.get("held_out") else ""


def several(values: list[float], form: str) -> str:
    """The mean, and the least and the greatest of more than one."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
