"""A recipe of several stages, killed once in each of them, and its report as a page.

    python benchmarks/full_stack.py WORK_FOLDER [--recipe recipes/full-stack.yaml] --out FILE.md

The run is killed (SIGKILL, with all that it started) some seconds after each stage says that it
begins, those of the draft and the timing at the end included, and started again with the same
command until it ends by itself.  The page says what each stage took and gave back, as the report
in the output folder has it, and all times with the kills in them.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer
from typing import Any

import yaml
from runtime_cpu import processor

HERE = Path(__file__).parent
# What `compress run` says when a stage begins: those of the recipe, of its draft, and the timing.
BEGINS = re.compile(r"^(Stage \d+ of \d+: \S+|Timing)(?!.*done before)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipe", type=Path, default=HERE.parent / "recipes" / "full-stack.yaml")
    parser.add_argument("--after", type=float, default=25.0, help="seconds at most, to a kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--scores", type=Path, help="[default: WORK_FOLDER]")
    parser.add_argument("--only", default="", help="^none$ makes the page from its scores alone")
    parser.add_argument("--out", type=Path, help="[default: full-stack.md in WORK_FOLDER]")
    options = parser.parse_args()
    kept = (options.scores or options.work) / f"{options.recipe.stem}.json"
    if re.search(options.only, options.recipe.stem):
        asked = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
        if missing := [part for part in ("speed", "draft") if not asked.get(part)]:
            raise SystemExit(f"{options.recipe} has no {' and no '.join(missing)} to tell of")
        options.work.mkdir(parents=True, exist_ok=True)
        found = run(options.recipe, options.work, options.after, random.Random(options.seed))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    text = page(json.loads(kept.read_text(encoding="utf-8")), options.recipe.name)
    (options.out or options.work / f"{options.recipe.stem}.md").write_text(text, encoding="utf-8")
    print(text)


def run(recipe: Path, work: Path, most: float, chance: random.Random) -> dict[str, Any]:
    """Run to the end, through one kill in each stage, at most `most` seconds from its start."""
    out = work / recipe.stem
    command = [sys.executable, "-m", "compress", "run", str(recipe), "--out", str(out), "--json"]
    begun, kills = time.time(), list[dict[str, Any]]()
    with (work / f"{recipe.stem}.log").open("a", encoding="utf-8") as log:
        status, known = -signal.SIGKILL, -1
        while status == -signal.SIGKILL and len(kills) > known:  # else somebody else killed it
            known = len(kills)
            status = attempt(command, log, begun, kills, most, chance)
    if status:
        raise SystemExit(f"'{' '.join(command)}' ended with {status}; {log.name} says why")
    report = json.loads((out / "compress.json").read_text(encoding="utf-8"))
    times = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return {
        "recipe": settings_in(recipe.read_text(encoding="utf-8")),
        "seconds": round(time.time() - begun),
        "kills": kills,
        "processor": processor(),
        "cpus": os.cpu_count(),
        "eval": report["eval"],
        "sizes": {key: report["sizes"][f"original_{key}"] for key in ("parameters", "bytes")},
        "stages": [{key: stage[key] for key in STAGE} for stage in report["stages"]],
        "draft": report["draft"],
        "times": {key: times[key] for key in ("stage_seconds", "draft_seconds", "speed")},
    }


def settings_in(recipe: str) -> str:
    """A recipe file's text without its comments."""
    return "".join(line + "\n" for line in recipe.splitlines() if not line.startswith("#"))


STAGE = ("method", "parameters", "bytes", "perplexity", "kl_mean", "kl_added", "top1_agreement")


def attempt(
    command: list[str],
    log: Any,
    begun: float,
    kills: list[dict[str, Any]],
    most: float,
    chance: random.Random,
) -> int:
    """Run until it ends, or is killed in the first stage that it was not killed in yet."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    timer: Timer | None = None
    assert process.stderr is not None
    for line in process.stderr:
        log.write(line)
        log.flush()
        stage = BEGINS.match(line.rsplit("\r", 1)[-1])
        if stage is None:
            continue
        if timer is not None:  # the stage before was done sooner
            timer.cancel()
        if any(kill["stage"] == stage[1] for kill in kills):
            continue
        after = chance.uniform(0.4 * most, most)
        kill = {"stage": stage[1], "after_s": round(after, 1)}

        def strike(kill: dict[str, Any] = kill) -> None:
            kills.append(kill | {"at_s": round(time.time() - begun)})
            os.killpg(process.pid, signal.SIGKILL)

        timer = Timer(after, strike)
        timer.start()
    if timer is not None:
        timer.cancel()
    return process.wait()


def page(found: dict[str, Any], recipe: str) -> str:
    """What each stage took and gave back."""
    evaluation, sizes, speed = found["eval"], found["sizes"], found["times"]["speed"]["rows"]
    heads = ["after", "parameters", "size, MB", "read a step, MB", "KV, bytes a token"]
    heads += ["ms a token", f"tokens/s, batch {batch_of(found)}", "perplexity", "KL", "added here"]
    heads += ["same top token", "made in, min"]
    rows = [heads]
    start = {"perplexity": evaluation["perplexity_original"], **sizes, "method": "original"}
    times = [None, *found["times"]["stage_seconds"]]
    for stage, timed, seconds in zip([start, *found["stages"]], speed, times, strict=True):
        cells = [stage["method"], f"{stage['parameters']:,}", f"{stage['bytes'] / 1e6:,.1f}"]
        cells += [f"{timed['weight_bytes'] / 1e6:,.1f}", f"{timed['kv_bytes_per_token']:,.0f}"]
        cells += [f"{1e3 * timed['seconds_per_token']:.2f}", f"{timed['tokens_per_s']:,.0f}"]
        cells += [f"{stage['perplexity']:.2f}"]
        if seconds is not None:
            cells += [f"{stage['kl_mean']:.4f}", f"{stage['kl_added']:+.4f}"]
            cells += [f"{stage['top1_agreement']:.1%}", f"{seconds / 60:.0f}"]
        rows.append(cells + [""] * (len(heads) - len(cells)))
    lines = [f"# {recipe}, killed once in each stage", ""]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(3, "|---" * len(heads) + "|")
    draft = found["draft"]
    told = ", ".join(f"{kill['stage']} after {kill['after_s']} s" for kill in found["kills"])
    windows = f"{evaluation['windows']} windows of {evaluation['seq_len']} tokens"
    lines += [
        "",
        f"Perplexity and KL on {windows} that the original wrote, float32. "
        f"{found['times']['speed']['how']}",
        "",
        f"The draft: {draft['parameters']:,} parameters, {draft['bytes'] / 1e6:,.1f} MB, made in "
        f"{found['times']['draft_seconds'] / 60:.0f} min; its first choice is the result's for "
        f"{draft['top1_agreement']:.1%} of tokens.",
        "",
        f"{found['seconds'] / 60:.0f} minutes in all on {found['processor']}, "
        f"{found['cpus']} cores, with the {len(found['kills'])} kills (SIGKILL) and starting "
        f"again: {told}.",
        "",
        f"`compress run recipes/{recipe}`, which was",
        "",
        "```yaml",
        found["recipe"] + "```",
        "",
    ]
    return "\n".join(lines)


def batch_of(found: dict[str, Any]) -> str:
    """Of the throughput, from the words on how it was timed."""
    (batch,) = re.findall(r"and (\d+) together", found["times"]["speed"]["how"])
    return batch


if __name__ == "__main__":
    main()
