"""The stages of a check, and the process that runs them one after another.

A stage is a function of a Place; what it returns is kept as JSON.  Stages run in a child process,
so that one that breaks the device, hangs or is killed costs itself only: the parent notes that, and
starts a child for those after it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu.place import ROOT, Place, environment

Data = dict[str, Any]
GRACE = 20  # seconds that a child may take to end once it has nothing more to do


class Skip(Exception):  # noqa: N818 - not an error
    """A stage cannot run here, for the reason given."""


@dataclass(frozen=True)
class Stage:
    """A name, what it does, and the seconds after which it is stopped."""

    name: str
    run: Callable[[Place], Data]
    limit: int = 150


@dataclass
class Outcome:
    """What is kept of a stage: `data["problems"]` are lines, and none of them may be there."""

    name: str
    status: str  # passed, failed, skipped
    seconds: float = 0.0
    reason: str = ""
    data: Data = field(default_factory=dict)

    @property
    def settled(self) -> bool:
        """Whether it need not run again; what was skipped is tried again, at no cost."""
        return self.status == "passed"


def read(folder: Path, name: str) -> Outcome | None:
    """What is kept of a stage, if it is."""
    try:
        return Outcome(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write(folder: Path, outcome: Outcome) -> None:
    """Keep it; at any moment the file is whole."""
    partial = folder / f"{outcome.name}.{os.getpid()}"
    partial.write_text(json.dumps(asdict(outcome), indent=1), encoding="utf-8")
    partial.replace(folder / f"{outcome.name}.json")


def carry_out(stage: Stage, place: Place) -> Outcome:
    """Run one stage here and now."""
    started = time.perf_counter()
    try:
        data = stage.run(place)
        problems = data.get("problems", [])
        status, reason = ("failed", problems[0]) if problems else ("passed", "")
    except Skip as skip:
        data, status, reason = {}, "skipped", str(skip)
    except Exception as error:
        traceback.print_exc()
        large = type(error).__name__ == "OutOfMemoryError"  # torch's; not imported here
        status = "skipped" if large else "failed"
        data, reason = {}, f"{type(error).__name__}: {error}"
    seconds = round(time.perf_counter() - started, 2)
    return Outcome(stage.name, status, seconds, reason[:500], data)


def run_here(stages: Sequence[Stage], place: Place, folder: Path) -> None:
    """The child: run stages until one fails, for that may have broken the device's context."""
    for stage in stages:
        outcome = carry_out(stage, place)
        write(folder, outcome)
        if outcome.status == "failed":
            return


def run_in_children(
    stages: Sequence[Stage], place: Place, folder: Path, script: Path, deadline: float,
    say: Callable[[str], None],
) -> list[Stage]:  # fmt: skip
    """Run stages in child processes, each called as `script --child NAMES ...`.

    Returns those that `deadline` (of time.monotonic) left no time for.
    """
    left = list(stages)
    while left and time.monotonic() < deadline:
        names = [stage.name for stage in left]
        for name in names:
            (folder / f"{name}.json").unlink(missing_ok=True)
        command = [sys.executable, str(script), "--child", ",".join(names), "--work", str(folder)]
        if place.stand_in:
            command += ["--stand-in", "interpreter"]
        left = _watch(command, left, place, folder, deadline, say)
    return left


def _watch(
    command: list[str], left: list[Stage], place: Place, folder: Path, deadline: float,
    say: Callable[[str], None],
) -> list[Stage]:  # fmt: skip
    """Wait for a child; returns the stages that it has not come to."""
    with (folder / "log").open("a", encoding="utf-8") as log:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment(place.stand_in), stdout=log, stderr=log
        )
        try:
            while left:
                outcome = _wait_for(left[0], child, folder, deadline)
                if outcome is None:
                    child.kill()
                    break
                left = left[1:]
                say(_line(outcome, left))
                if outcome.status == "failed":
                    break
            child.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            child.kill()
            child.wait()
    return left


def _wait_for(
    stage: Stage, child: subprocess.Popen[bytes], folder: Path, deadline: float
) -> Outcome | None:
    """What a child makes of a stage; it is ended where that is nothing in the stage's time.

    None when the deadline comes first.
    """
    started = time.monotonic()
    while child.poll() is None and not read(folder, stage.name):
        if time.monotonic() > deadline:
            return None
        if time.monotonic() - started > stage.limit:
            child.kill()
            child.wait()
        time.sleep(0.05)
    outcome = read(folder, stage.name)
    if outcome is None:
        seconds = round(time.monotonic() - started, 2)
        over = seconds > stage.limit
        reason = f"stopped after {stage.limit} s" if over else f"exit status {child.returncode}"
        outcome = Outcome(stage.name, "failed", seconds, f"{reason}; see {folder / 'log'}")
        write(folder, outcome)
    return outcome


def _line(outcome: Outcome, left: Sequence[Stage]) -> str:
    reason = f": {outcome.reason}" if outcome.reason else ""
    most = sum(stage.limit for stage in left) / 60
    more = f"  ({len(left)} stages left, at most {most:.0f} min)" if left else ""
    return f"{outcome.name:<18} {outcome.status:<8} {outcome.seconds:6.1f} s{reason}{more}"
