"""Distillation with the teacher beside the student, and with its likeliest tokens from the disk.

    python benchmarks/teacher_cache.py WORK_FOLDER --student STUDENT_FOLDER --train c4.txt \\
        --text wikitext2_valid.txt --out FILE.md

The same `compress distill` three times: the teacher runs at every step; it runs once and leaves its
likeliest tokens in a cache; and that cache is there already, as for a second student or other
settings.  Each in a process of its own, with the time that it took and what came of it.  What has
scores is not run again (benchmarks/scored.py).
"""

import argparse
import json
import re
import time
from pathlib import Path

from runtime_cpu import processor
from scored import Scored, add_options, compress

NAMES = {"live": "teacher beside it", "first": "cache, made", "again": "cache, found"}


def main() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, "teacher_cache.md")
    parser.add_argument("--student", required=True, help="a folder")
    parser.add_argument("--tokens", default="50k")
    parser.add_argument("--topk", default="64")
    options = parser.parse_args()
    scores = options.scores or options.work / "scores"
    scored = Scored(options.model, options.text, options.windows, options.work, scores)
    cache = ("--topk", options.topk, "--cache", str(options.work / "teacher"))
    for name in NAMES:
        if re.search(options.only, name) and not scored.has(name):
            command = ("distill", "--teacher", options.model, "--student", options.student)
            command += ("--data", options.train, "--tokens", options.tokens, "--batch-size", "8")
            command += () if name == "live" else cache
            began = time.monotonic()
            compress(*command, "--out", str(options.work / name))
            seconds = time.monotonic() - began
            scored.score(name)
            run = json.loads((options.work / name / "run.json").read_text(encoding="utf-8"))
            times = {"seconds": seconds, "training_seconds": run["seconds"]}
            scored.put(name, scored.get(name) | times)
    text = page(options, scored)
    (options.out or options.work / "teacher_cache.md").write_text(text, encoding="utf-8")
    print(text)


def page(options: argparse.Namespace, scored: Scored) -> str:
    """The record of runs that have scores."""
    lines = [
        "# A teacher beside its student, and from the disk",
        "",
        f"{options.model} teaches {Path(options.student).name}, {processor()}; {options.tokens} "
        f"tokens of {Path(options.train).name}, the {options.topk} likeliest tokens; scored on the "
        f"first {options.windows} windows of 512 tokens of {Path(options.text).name} in float32.",
        "",
        "Seconds are of the whole command, and of them in the loop.",
        "",
        "| | seconds | in the loop | perplexity | KL | loss on held-out sequences, by tokens |",
        "|---|---|---|---|---|---|",
    ]
    for name, words in NAMES.items():
        if scored.has(name):
            score = scored.get(name)
            curve = ", ".join(
                f"{row['tokens'] / 1000:.0f}k {row['loss']:.4f}" for row in score["held_out"]
            )
            cells = f"{score['seconds']:.0f} | {score['training_seconds']:.0f} | "
            cells += f"{score['perplexity']:.2f} | {score['kl_mean']:.4f} | {curve}"
            lines.append(f"| {words} | {cells} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
