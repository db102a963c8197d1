"""Mixed precision against one grid for all, and against chance, in Markdown.

    python benchmarks/mixed.py WORK_FOLDER --model smollm2 --train c4.txt \\
        --text wikitext2_valid.txt --out results/mixed.md

The target is 4.75 bits a weight, scales included.  Beside the allocation stand every uniform grid
of the same choices that is not larger, and RANDOM allocations of the same size: each group of
linears draws a choice, and groups are redrawn until the budget is just met.  All are rounded by
GPTQ with the same calibration; scales are bfloat16.  Every run is a `compress quantize` in a
process of its own; what has scores is not run again (benchmarks/scored.py), and a run that was
broken off goes on in the same WORK_FOLDER.  `--only REGEX` picks runs by name; the page is of all
that have scores.
"""

import argparse
import json
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scored import Scored, add_options, compress

RANDOM = 20
SLACK = 0.002  # share of the budget that an allocation by chance may leave
Group = dict[str, Any]  # of an allocation, as compress.json holds it


def main() -> None:
    options = parse()
    scores = options.scores or options.work / "scores"
    scored = Scored(options.model, options.text, options.windows, options.work, scores)
    allocation = allocated(options, scores)
    for name, command in runs_of(options, allocation):
        if re.search(options.only, name) and not scored.has(name):
            scored.make(name, command)
    text = page(options, scored, allocation)
    (options.out or options.work / "mixed.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, "mixed.md")
    parser.add_argument("--samples", default="64")
    parser.add_argument("--target-bits", default="4.75")
    return parser.parse_args()


def quantizing(options: argparse.Namespace) -> tuple[str, ...]:
    """The command that quantizes, but for its grids."""
    data = ("--calibration", options.train, "--samples", options.samples)
    return ("quantize", options.model, "--method", "gptq", "--dtype", "bfloat16", *data)


def allocated(options: argparse.Namespace, scores: Path) -> dict[str, Any]:
    """The allocation, found once and kept beside the scores."""
    kept = scores / f"allocation-{options.target_bits}.json"
    if not kept.exists():
        command = (*quantizing(options), "--target-bits", options.target_bits, "--only-allocate")
        out = str(options.work / f"mixed-{options.target_bits}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(compress(*command, "--out", out, "--json"), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))["allocation"]


def runs_of(
    options: argparse.Namespace, allocation: dict[str, Any]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and command of every checkpoint, in the order of the page."""
    command = quantizing(options)
    yield f"mixed-{options.target_bits}", (*command, "--target-bits", options.target_bits)
    for point in reversed(allocation["uniform"]):
        if point["bits"] <= allocation["target_bits"]:
            yield f"all-{point['choice']}", (*command, *grid_of(point["choice"]))
    for seed in range(RANDOM):
        overrides = overriding(allocation["groups"], drawn(allocation, seed))
        yield f"random-{options.target_bits}-{seed}", (*command, *overrides)


def grid_of(choice: str) -> tuple[str, ...]:
    """The options for a choice in words, `4g64`."""
    bits, _, size = choice.partition("g")
    return ("--bits", bits, "--group-size", size)


def drawn(allocation: dict[str, Any], seed: int) -> list[int]:
    """An allocation by chance that fills the budget to SLACK: the option of each group.

    Choices are drawn from those with 3 bits or more, each as likely; then single groups are drawn
    anew, and kept where that brings the sum nearer to the budget from either side.
    """
    generator = random.Random(seed)
    budget, groups = allocation["budget_bytes"], allocation["groups"]
    able = [
        [n for n, option in enumerate(group["options"]) if option["choice"][0] != "2"]
        for group in groups
    ]
    chosen = [generator.choice(numbers) for numbers in able]

    def left() -> int:
        return budget - sum(size_of(*pair) for pair in zip(groups, chosen, strict=True))

    while not 0 <= (before := left()) <= SLACK * budget:
        place = generator.randrange(len(groups))
        old, chosen[place] = chosen[place], generator.choice(able[place])
        if abs(left() - SLACK / 2 * budget) > abs(before - SLACK / 2 * budget):
            chosen[place] = old
    return chosen


def size_of(group: Group, number: int) -> int:
    return group["options"][number]["bytes"]


def overriding(groups: Sequence[Group], chosen: Sequence[int]) -> tuple[str, ...]:
    """The options that put each linear on a grid of its own."""
    words: list[str] = []
    for group, number in zip(groups, chosen, strict=True):
        bits, _, size = group["options"][number]["choice"].partition("g")
        for name in group["linears"]:
            words += ["--set", f"{name}:bits={bits},group_size={size}"]
    return tuple(words)


def page(options: argparse.Namespace, scored: Scored, allocation: dict[str, Any]) -> str:
    """The record of runs that have scores."""
    names = [name for name, _ in runs_of(options, allocation) if scored.has(name)]
    by_chance = sorted(
        (name for name in names if name.startswith("random")),
        key=lambda name: scored.get(name)["kl_mean"],
    )
    lines = [
        "# Mixed precision",
        "",
        f"{options.model}; GPTQ calibrated on {options.samples} sequences of 512 "
        f"tokens of {Path(options.train).name}, scored on the first {options.windows} windows of "
        f"512 tokens of {Path(options.text).name} in float32. KL is from the original, in nats a "
        "token; 4g32 is 4 bits with groups of 32; scales are bfloat16 and count as bits. An "
        "allocation by chance has 3 bits or more in each group of linears, and fills the budget of "
        f"{options.target_bits} bits.",
        "",
        "| | bits a weight | KL predicted | KL | perplexity |",
        "|---|---|---|---|---|",
    ]
    for name in (n for n in names if not n.startswith("random")):
        lines.append(row(name, scored, *foretold(name, allocation)))
    for label, place in (("best", 0), ("median", len(by_chance) // 2), ("worst", -1)):
        if by_chance:
            name = by_chance[place]
            lines.append(
                row(f"{label} by chance, {name}", scored, *foretold(name, allocation), name)
            )
    if by_chance and names[0].startswith("mixed"):
        found = [scored.get(name)["kl_mean"] for name in by_chance]
        mixed = scored.get(names[0])["kl_mean"]
        lines += [
            "",
            f"Of {len(found)} by chance the mean KL is {statistics.mean(found):.4f}; the "
            f"allocation's {mixed:.4f} is below {sum(mixed < kl for kl in found)} of them.",
        ]
    return "\n".join([*lines, ""])


def foretold(name: str, allocation: dict[str, Any]) -> tuple[float, float]:
    """Bits a weight and predicted KL of a run."""
    if name.startswith("mixed"):
        return allocation["bits"], allocation["predicted_kl"]
    if name.startswith("all"):
        choice = name.removeprefix("all-")
        (point,) = (p for p in allocation["uniform"] if p["choice"] == choice)
        return point["bits"], point["predicted_kl"]
    groups, chosen = allocation["groups"], drawn(allocation, int(name.rpartition("-")[2]))
    options = [group["options"][n] for group, n in zip(groups, chosen, strict=True)]
    taken = sum(option["bytes"] for option in options)
    loss = sum(option["predicted_kl"] for option in options)
    return 8 * taken / allocation["parameters"], loss


def row(label: str, scored: Scored, bits: float, loss: float, name: str | None = None) -> str:
    scores = scored.get(name or label)
    measured = f"{scores['kl_mean']:.4f} | {scores['perplexity']:.2f}"
    return f"| {label} | {bits:.3f} | {loss:.4f} | {measured} |"


if __name__ == "__main__":
    main()
