"""Runs that are killed, in processes of their own; used by test_resume.py.

    python killing.py VALUES OUT every|random

VALUES is a recipe as JSON.  Prints one JSON object: how many runs were killed, and the sums of the
files that came out of a run left alone, and of each that was killed and started again.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compress import walk
from compress.chain import run_chain
from compress.chain_recipe import build_chain
from compress.conversion import run_conversion
from compress.pipeline import run_recipe
from compress.pruning import run_pruning
from compress.recipe import build_conversion, build_pruning, build_recipe

# A forked process cannot use the threads that its parent has started.
torch.set_num_threads(1)
WITH_TIMES = ("run.json", "report.html", "losses.jsonl", "losses-2.jsonl", "loss-2.png")
walk.TOKENS_PER_BATCH = 256  # several batches of little text


def carry_out(values: dict[str, Any], out: Path, **how: Any) -> None:
    """Quantize, prune, convert, or carry out several stages."""
    values = values | {"out": str(out)}
    if len(values["stages"]) > 1:
        run_chain(build_chain(values), **how)
    elif values["stages"][0]["method"] == "prune":
        run_pruning(build_pruning(values), **how)
    elif values["stages"][0]["method"] == "convert":
        run_conversion(build_conversion(values), **how)
    else:
        run_recipe(build_recipe(values), **how)


def run(values: dict[str, Any], out: Path, before: Callable[[], None] = lambda: None) -> int:
    """Carry out a recipe in a forked process; returns its id."""
    if pid := os.fork():
        return pid
    try:
        before()
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
            carry_out(values, out, activation_memory=60_000)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def killed(pid: int) -> bool:
    """Wait for a process; whether it was killed.  Any other end but a good one is an error."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    if os.waitstatus_to_exitcode(status):
        sys.exit("a run failed by itself")
    return False


def sums(out: Path) -> dict[str, str]:
    """The hash of every file of an output but those with times."""
    paths = sorted(p for p in out.rglob("*") if p.is_file() and p.name not in WITH_TIMES)
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def die_at_step(number: int) -> Callable[[], None]:
    """Kill this process instead of the `number`th of all changes of names on the disk."""

    def prepare() -> None:
        left = number

        def counted(act: Callable) -> Callable:
            def instead(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return act(*arguments, **named)

            return instead

        for owner, name in ((Path, "replace"), (Path, "rename"), (shutil, "rmtree")):
            setattr(owner, name, counted(getattr(owner, name)))

    return prepare


def every(values: dict[str, Any], out: Path, whole: dict[str, str]) -> int:
    """Kill a run before each change of a name, and go on from there; returns how many there are."""
    count = 0
    while True:
        count += 1
        if not killed(run(values, out, die_at_step(count))):
            return count - 1
        if not out.exists() and killed(run(values, out)):
            sys.exit("a run that was to be left alone was killed")
        check(out, whole, f"killed before step {count}")


def at_random(values: dict[str, Any], out: Path, whole: dict[str, str], seconds: float) -> int:
    """Kill runs at 20 random moments, going on each time; returns how many were killed."""
    generator = random.Random(0)
    count = 0
    while count < 20:
        pid = run(values, out)
        time.sleep(generator.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        count += killed(pid)
        if out.exists():
            check(out, whole, f"killed {count} times")
    if not out.exists():
        killed(run(values, out))
        check(out, whole, f"killed {count} times")
    return count


def check(out: Path, whole: dict[str, str], how: str) -> None:
    """The output must be that of a run left alone, and the only thing there."""
    found = sums(out)
    if found != whole:
        changed = [name for name in whole | found if whole.get(name) != found.get(name)]
        sys.exit(f"{how}: {', '.join(changed)} came out differently")
    shutil.rmtree(out)
    # killed between naming the output and clearing up: the next run on it does that
    for kind in ("progress", "stages"):
        shutil.rmtree(out.with_name(f".{out.name}.{kind}"), ignore_errors=True)
    if left := [path.name for path in out.parent.iterdir()]:
        sys.exit(f"{how}: {', '.join(left)} stayed behind")


def main() -> None:
    values, out, mode = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    carry_out(values, out)  # here, so that no other has to import
    shutil.rmtree(out)
    started = time.monotonic()
    killed(run(values, out))
    seconds = time.monotonic() - started
    whole = sums(out)
    shutil.rmtree(out)
    count = every(values, out, whole) if mode == "every" else at_random(values, out, whole, seconds)
    print(json.dumps({"killed": count, "files": sorted(whole)}))


if __name__ == "__main__":
    main()
