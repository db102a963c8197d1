"""What speculation gains on a CPU, by kind of text, as a page of tables in Markdown.

    python benchmarks/speculative.py WORK_FOLDER --w4 smollm2-w4 --dense smollm2 \\
        --draft smollm2-draft --dataset spec_bench_question.jsonl

Each case is a `compress bench speculative` in a process of its own: drafts of every kind on a model
in 4 bits, one prompt at a time; n-grams and the model in 4 bits on the dense one; and many prompts
at once, where `auto` must see that nothing is to be gained.  WORK_FOLDER keeps the JSON of each;
what is there is not measured again.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from runtime_cpu import processor

TEMPERATURES = "0,0.7"
REPEATS = "4"  # of groups of prompts, which are few
MOST_SHOWN = 9  # tokens of a pass


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    reports = {name: measured(options, name, flags) for name, flags in cases(options).items()}
    text = page(options, reports)
    (options.out or options.work / "speculative.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--w4", required=True, help="a checkpoint in 4 bits")
    parser.add_argument("--dense", required=True, help="the same model, not quantized")
    parser.add_argument("--draft", required=True, help="a smaller model of the same vocabulary")
    parser.add_argument("--dataset", required=True, help="Spec-Bench's questions")
    parser.add_argument("--per-category", type=int, default=20)
    parser.add_argument("--fixed", default="4", help="tokens to propose, beside auto")
    parser.add_argument("--batch", default="8", help="prompts at once in the cases of many")
    parser.add_argument("--repeat", default="2", help="of n-grams, one prompt at a time")
    parser.add_argument("--max-tokens", default="128")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--out", type=Path, help="[default: speculative.md in WORK_FOLDER]")
    return parser.parse_args()


def cases(options: argparse.Namespace) -> dict[str, list[str]]:
    """Title of each case, and its flags."""
    w4 = [options.w4, "--head-bits", "8"]
    most = str(options.per_category)
    fewer, few = (str(max(1, options.per_category * share // 5)) for share in (3, 2))
    again = ["--repeat", options.repeat]
    at = ["--temperature", TEMPERATURES]
    both = ["--num-speculative-tokens", f"auto,{options.fixed}", *at]
    many = ["--batch", options.batch, "--repeat", REPEATS]
    return {
        "W4, n-grams": [*w4, "--draft", "ngram", *both, *again, "--per-category", most],
        "W4, self": [*w4, "--draft", "self", *both, "--per-category", fewer],
        "W4, a smaller model": [*w4, "--draft", options.draft, *both, "--per-category", fewer],
        "bfloat16, n-grams": [
            options.dense, "--draft", "ngram", *at, *again, "--per-category", fewer,
        ],
        "bfloat16, its W4": [
            options.dense, "--draft", options.w4, *both, "--per-category", few,
        ],
        f"W4, n-grams, {options.batch} prompts at once": [
            *w4, "--draft", "ngram", *many, "--per-category", most,
        ],
        f"W4, a smaller model, {options.batch} prompts at once": [
            *w4, "--draft", options.draft, *many, "--per-category", most,
        ],
    }  # fmt: skip


def measured(options: argparse.Namespace, name: str, flags: list[str]) -> dict[str, Any]:
    """The report of a case, kept in the work folder with the flags that it was given."""
    flags = [*flags, "--dataset", options.dataset, "--dtype", "bfloat16"]
    flags += ["--threads", options.threads, "--max-tokens", options.max_tokens]
    runs = runs_of(options, name)
    kept = runs.with_name(runs.name.replace(".runs", ""))
    if kept.exists():
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["flags"] == flags:
            return before["report"]
    print(f"{name}: compress bench speculative {' '.join(flags)}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "compress", "bench", "speculative", *flags]
    done = subprocess.run(
        [*command, "--json", "--out", str(runs)], check=True, stdout=subprocess.PIPE, text=True
    )
    report = json.loads(done.stdout)
    kept.write_text(json.dumps({"flags": flags, "report": report}, indent=1), encoding="utf-8")
    return report


def page(options: argparse.Namespace, reports: dict[str, dict[str, Any]]) -> str:
    """The record."""
    lines = [
        "# Speculative decoding on a CPU",
        "",
        f"{processor()}, {options.threads} threads, PyTorch "
        f"{version('torch')}; Spec-Bench's first turns through the chat template, answers of up to "
        f"{options.max_tokens} tokens. Each prompt is answered with and without speculation in "
        "turn, and some cases several times; speed-up is of decoding, after the first token, with "
        "95% of a bootstrap over answers. Answers that end in repeating themselves (loops) are "
        "counted and left out. Of prompts that are answered at once, steps count as long as all of "
        "them decode, as on a server with a queue.",
        "",
        "a: acceptance; tokens: of a step, in the mean; cost: of a step with its drafting, in "
        "plain steps; expected: (1 - a^(k+1)) / (1 - a) over the cost; reached: measured over "
        "expected, and in brackets over what the true length calls for.",
        "",
    ]
    for name, report in reports.items():
        lines += case_lines(name, report)
        runs = runs_of(options, name)
        if "at once" not in name and runs.exists():
            lines += [passes_line(runs), ""]
    return "\n".join(lines)


def passes_line(runs: Path) -> str:
    """How long forward passes of one sequence take alone, by their tokens."""
    times: dict[int, list[float]] = defaultdict(list)
    for case in json.loads(runs.read_text(encoding="utf-8"))["cases"]:
        for size, found in case["forward_ms"].items():
            times[int(size)] += found
    medians = (f"{size}: {median(times[size]):.2f}" for size in sorted(times) if size <= MOST_SHOWN)
    return f"Forward passes alone, median ms by tokens: {', '.join(medians)}."


def runs_of(options: argparse.Namespace, name: str) -> Path:
    """The file of a case's single runs."""
    return options.work / f"{name.replace(', ', '--').replace(' ', '-')}.runs.json"


def case_lines(name: str, report: dict[str, Any]) -> list[str]:
    """A table for each temperature and number of tokens."""
    lines = [f"## {name}", "", f"{report['proposer']}.", ""]
    rows = report["rows"]
    for temperature, length in dict.fromkeys((row["temperature"], row["length"]) for row in rows):
        here = [row for row in rows if (row["temperature"], row["length"]) == (temperature, length)]
        lines += [
            f"Temperature {temperature:g}, {length} tokens proposed{differing(here)}:",
            "",
            "| | n | loops | plain, ms | ms | speed-up | a | tokens | cost | expected | reached |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *map(row_line, here),
            "",
        ]
        if report["batch"] > 1:
            whole = (f"{row['category']} {row['whole_speed_up']:.2f}" for row in here)
            lines += [f"From the first prompt to the last answer's end: {', '.join(whole)}.", ""]
    return lines


def differing(rows: list[dict[str, Any]]) -> str:
    """What is known of the texts with and without."""
    found = [row["differing"] for row in rows if row["category"] != "all"]
    return " (texts of their own)" if None in found else f" ({sum(found)} texts differ)"


def row_line(row: dict[str, Any]) -> str:
    """A category in a table."""
    cells = [row["category"], row["prompts"], row["looping"]]
    if row["prompts"]:
        interval = ""
        if row["speed_up_low"] is not None:
            interval = f" ({row['speed_up_low']:.2f} to {row['speed_up_high']:.2f})"
        acceptance = row["acceptance"]
        cells += [
            f"{row['plain_ms_per_token']:.2f}",
            f"{row['ms_per_token']:.2f}",
            f"**{row['speed_up']:.2f}**{interval}",
            "" if acceptance is None else f"{acceptance:.2f}",
            f"{row['tokens_per_step']:.2f}",
        ]
    if "cost" in row:
        cells += [
            f"{row['cost']:.2f}",
            f"{row['expected_speed_up']:.2f}",
            f"{row['of_expected']:.0%} ({row['of_expected_by_length']:.0%})",
        ]
    cells += [""] * (11 - len(cells))
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
