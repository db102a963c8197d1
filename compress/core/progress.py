"""Progress with time left, on standard error, so that standard output stays for results."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

# Of several processes (`accelerate launch`) only the first speaks.
IS_FIRST = os.environ.get("RANK", "0") == "0"
console = Console(stderr=True, highlight=False, quiet=not IS_FIRST)


def say(message: str) -> None:
    """Print one line for the reader on standard error."""
    console.print(message, markup=False, soft_wrap=True)


def track(
    items: Iterable[T],
    description: str | Callable[[], str],
    total: int | None = None,
    done: int = 0,
) -> Iterator[T]:
    """Yield from `items` under a progress bar with elapsed time and time left.

    `done` of the `total` were dealt with before, and are not among `items`.  A `description` that
    changes on the way is a function, asked after each item.

    On a terminal the bar redraws in place; elsewhere (logs, CI) one line is printed at each
    tenth of the way, since redrawn bars make logs unreadable.
    """
    if total is None:
        total = done + len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    describe = description if callable(description) else lambda: description
    if not sys.stderr.isatty():
        yield from _track_in_log(items, describe, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(describe(), total=total, completed=done)
        for item in items:
            yield item
            progress.update(task, advance=1, description=describe())


def _track_in_log(
    items: Iterable[T], describe: Callable[[], str], total: int | None, done: int
) -> Iterator[T]:
    started = time.monotonic()
    said = done * 10 // total if total else 0
    for count, item in enumerate(items, start=done + 1):
        yield item
        if not total:
            continue
        tenth = count * 10 // total
        if tenth > said:
            said = tenth
            elapsed = time.monotonic() - started
            left = elapsed / (count - done) * (total - count)
            say(f"{describe()} {count}/{total}, {elapsed:.0f} s elapsed, {left:.0f} s left")


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars that libraries draw over a second or two of work of their own.

    Their log messages still appear: handlers keep the standard error they were made with.
    """
    with redirect_stderr(io.StringIO()):
        yield
