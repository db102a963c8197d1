"""What pruning loses on each axis and by each score, and what training then wins back, in Markdown.

    python benchmarks/pruning.py WORK_FOLDER --model smollm2 --train c4.txt \\
        --text wikitext2_valid.txt --out FILE.md

Every run is a `compress prune` or `compress distill` in a process of its own, by its command in the
page; speeds are of `compress bench latency`.  What has scores is not run again
(benchmarks/scored.py).  `--only REGEX` picks runs by name; the page is of all that have scores.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime_cpu import processor
from scored import Scored, add_options, compress

from compress.core.source import resolve_model

# what is kept of SmolLM2-135M: depth 30, ffn 1536, hidden 576, heads 9
AXES: dict[str, tuple[str, ...]] = {
    "depth 24": ("--depth", "24"),
    "ffn 1152": ("--ffn", "1152"),
    "hidden 512": ("--hidden", "512"),
    "heads 6": ("--heads", "6"),
}
AXES["all four"] = tuple(word for asked in AXES.values() for word in asked)
METHODS = {
    "default": (),
    "removal": ("--depth-score", "removal"),
    "default, not refitted": ("--no-refit",),
    "Minitron": ("--score", "activation", "--no-refit"),
    "magnitude": ("--score", "magnitude", "--depth-score", "magnitude", "--no-refit"),
    "random": ("--score", "random", "--depth-score", "random", "--no-refit"),
}
# which there are for blocks alone, and for the other axes
OF_BLOCKS = ("default", "removal", "magnitude", "random")
OF_UNITS = tuple(method for method in METHODS if method != "removal")
LOSSES = {"forward KL": "forward_kl=1", "cross-entropy": "forward_kl=0,cross_entropy=1"}
# what is trained: the losses on every axis, and the one loss on what others keep
HEALED = [(axis, "default", loss) for axis in AXES for loss in LOSSES]
HEALED += [("all four", method, "forward KL") for method in ("Minitron", "magnitude", "random")]
SPEED = ("--dtype", "bfloat16", "--prompt-tokens", "512", "--new-tokens", "128", "--json")


def main() -> None:
    options = parse()
    scores = options.scores or options.work / "scores"
    scored = Scored(options.model, options.text, options.windows, options.work, scores)
    for name, command in runs_of(options):
        if re.search(options.only, name) and not scored.has(name):
            scored.make(name, command)
    for axis, method, loss in HEALED:
        name = healed_name(axis, method, loss)
        if re.search(options.only, name) and not scored.has(name):
            pruned = options.work / name_of(axis, method)
            if not pruned.exists():
                compress(*pruning(options, axis, method), "--out", str(pruned))
            scored.make(name, healing(options, str(pruned), loss))
    for name in speeds_of():
        if re.search(options.only, f"speed {name}") and not scored.has(f"speed-{name}"):
            folder = options.work / name
            if name == "original":  # its dense weights: the runtime reads a .gguf file as it is
                folder = resolve_model(options.model).folder
            found = json.loads(compress("bench", "latency", str(folder), *SPEED))
            told = {"model": name, "processor": processor()}
            scored.put(f"speed-{name}", found | told)
    text = page(options, scored)
    (options.out or options.work / "pruning.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, "pruning.md")
    parser.add_argument("--samples", default="64")
    parser.add_argument("--tokens", default="100k", help="to train on")
    return parser.parse_args()


def name_of(axis: str, method: str) -> str:
    return f"{axis} {method}".replace(",", "").replace(" ", "-").lower()


def runs_of(options: argparse.Namespace) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Name and command of every checkpoint, in the order of the page."""
    for axis in AXES:
        for method in OF_BLOCKS if axis.startswith("depth") else OF_UNITS:
            yield name_of(axis, method), pruning(options, axis, method)


def pruning(options: argparse.Namespace, axis: str, method: str) -> tuple[str, ...]:
    """The command that prunes."""
    data = ("--calibration", options.train, "--samples", options.samples)
    return ("prune", options.model, *AXES[axis], *METHODS[method], *data)


def healed_name(axis: str, method: str, loss: str) -> str:
    return f"{name_of(axis, method)}-healed-{loss}".replace(" ", "-").lower()


def healing(options: argparse.Namespace, student: str, loss: str) -> tuple[str, ...]:
    """The command that trains what was pruned."""
    data = ("--data", options.train, "--tokens", options.tokens, "--batch-size", "8")
    data += ("--loss", LOSSES[loss])
    return ("distill", "--teacher", options.model, "--student", student, *data)


def speeds_of() -> list[str]:
    """The checkpoints whose speed is measured."""
    return ["original", *(name_of(axis, "default") for axis in AXES)]


def page(options: argparse.Namespace, scored: Scored) -> str:
    """The record of runs that have scores."""
    found = {name: scored.get(name) for name, _ in runs_of(options) if scored.has(name)}
    lines = [
        "# What pruning loses, and what training wins back",
        "",
        f"{options.model}; calibrated on {options.samples} sequences of 512 tokens "
        f"of {Path(options.train).name}, scored on the first {options.windows} windows of 512 "
        f"tokens of {Path(options.text).name} in float32. KL is from the original, in nats a "
        "token. Minitron is its activation scores without a refit; of blocks it is the default.",
        "",
    ]
    if found:
        original = next(iter(found.values()))["perplexity_original"]
        lines += ["| | parameters | perplexity | KL |", "|---|---|---|---|"]
        lines.append(f"| original | | {original:.2f} | 0 |")
        for axis in AXES:
            for method in METHODS:
                if score := found.get(name_of(axis, method)):
                    lines.append(row(f"{axis}, {method}", score))
        lines.append("")
    lines += healed_lines(options, scored, found)
    speeds = {
        name: scored.get(f"speed-{name}") for name in speeds_of() if scored.has(f"speed-{name}")
    }
    if "original" in speeds:
        lines += speed_lines(speeds)
    lines += ["## Commands", ""]
    for name, command in runs_of(options):
        if name in found:
            lines.append(command_line(options, command, name))
    for axis, method, loss in HEALED:
        if scored.has(name := healed_name(axis, method, loss)):
            lines.append(command_line(options, healing(options, name_of(axis, method), loss), name))
    return "\n".join([*lines, ""])


def command_line(options: argparse.Namespace, command: tuple[str, ...], name: str) -> str:
    words = (Path(word).name if word == options.train else word for word in command)
    return f"    compress {' '.join(words)} --out {name}"


def healed_lines(
    options: argparse.Namespace, scored: Scored, before: dict[str, dict[str, Any]]
) -> list[str]:
    """A table of what was trained, before and after."""
    rows = []
    for axis, method, loss in HEALED:
        name, pruned = healed_name(axis, method, loss), name_of(axis, method)
        if scored.has(name) and pruned in before:
            was, now = before[pruned], scored.get(name)
            cells = (f"{score['perplexity']:.2f} | {score['kl_mean']:.4f}" for score in (was, now))
            gone = 1 - now["kl_mean"] / was["kl_mean"]
            rows.append(f"| {axis}, {method}, {loss} | {' | '.join(cells)} | {gone:.1%} |")
    if not rows:
        return []
    return [
        f"## After training on {options.tokens} tokens of {Path(options.train).name}",
        "",
        "| | perplexity before | KL before | perplexity | KL | of the KL won back |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def row(name: str, score: dict[str, Any]) -> str:
    perplexity, divergence = score["perplexity"], score["kl_mean"]
    shown = f"{perplexity:.2f}" if perplexity < 1e5 else f"{perplexity:.1e}"
    return f"| {name} | {score['parameters']:,} | {shown} | {divergence:.4f} |"


def speed_lines(speeds: dict[str, dict[str, Any]]) -> list[str]:
    """A table of tokens per second, and as a ratio to the original's."""
    where = ", ".join(sorted({found["processor"] for found in speeds.values()}))
    lines = [f"## Speed, batch 1, bfloat16, 512 tokens and 128 new ones, {where}", ""]
    lines += ["| | decoding, tokens/s | ratio | first token, ms |", "|---|---|---|---|"]
    base = speeds["original"]["decode_tokens_per_s"]
    for name, found in speeds.items():
        rate = found["decode_tokens_per_s"]
        first = found["time_to_first_token_s"] * 1000
        lines.append(f"| {name} | {rate:.0f} | {rate / base:.2f} | {first:.0f} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
