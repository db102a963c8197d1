"""An output file that is filled in any order, and gets its name once it is complete.

Until then there is, beside its final place:

    .NAME.progress/lock
    .NAME.progress/commits          what the run is of (compress.core.commits)
    .NAME.progress/answers.jsonl    {"index": ..., ...}, a line each, in the order they came
"""

import json
import os
import shutil
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compress.core.commits import IDENTITY, Commits
from compress.core.errors import InputError
from compress.core.files import replacing
from compress.core.progress import say

SECONDS_BETWEEN_SYNCS = 1.0  # what a power cut may take; a kill takes nothing


class AnswerFile:
    """The output and, until it is complete, the answers so far beside it."""

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out = out
        self.overwrite = overwrite
        self.progress = out.with_name(f".{out.name}.progress")
        self.commits = Commits(self.progress / "commits")
        self._answers = self.progress / "answers.jsonl"
        self.done: dict[int, int] = {}  # index -> where its answer begins in the file

    def check(self) -> None:
        """Raise InputError where the output cannot be written; creates nothing."""
        if self.out.is_dir():
            raise InputError(f"output '{self.out}' is a folder; give the name of a file")
        if self.out.exists() and not self.overwrite:
            raise InputError(f"output '{self.out}' exists; pass --overwrite, or give another name")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs off; they get an InputError, and so does this one if the disk is full."""
        lock = FileLock(self.progress / "lock")
        try:
            self.progress.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"output '{self.out}' is being written by another run; wait for it"
            ) from None
        except OSError as error:
            raise InputError(f"cannot write output '{self.out}': {error.strerror}") from None
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write output '{self.out}': {error.strerror}; answers so far are kept: "
                "mend that and run the same command again to go on"
            ) from error
        except KeyboardInterrupt:
            say("Answers so far are kept: run the same command again to go on from there")
            raise
        finally:
            lock.release()

    def begin(self, identity: dict[str, Any], restart: bool) -> None:
        """Find the answers there are; InputError where they are another run's."""
        if (self.commits.folder / IDENTITY).exists() and not restart:
            if difference := self.commits.difference(identity):
                raise InputError(
                    f"output '{self.out}' has an unfinished run with another {difference}; to drop "
                    f"it pass --restart or remove '{self.progress}', or give another name"
                )
        else:
            self._answers.unlink(missing_ok=True)
            self.commits.begin(identity)
        self._answers.touch()
        with self._answers.open("r+b") as file:  # the last line may have been cut off
            end = 0
            for raw in file:
                index = _index_of(raw)
                if index is None:
                    break
                self.done[index] = end
                end += len(raw)
            file.truncate(end)

    def keep(self, answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Write down each answer, and pass it on."""
        synced = time.monotonic()
        with self._answers.open("ab") as file:
            for record in answers:
                self.done[record["index"]] = file.tell()
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                file.flush()
                if time.monotonic() - synced > SECONDS_BETWEEN_SYNCS:
                    os.fsync(file.fileno())
                    synced = time.monotonic()
                yield record

    def finish(self) -> None:
        """Put the answers in order, under the output's name."""
        places = array("q", (self.done[index] for index in range(len(self.done))))
        whole = self.progress / "whole.jsonl"
        with (
            replacing(whole) as partial,
            self._answers.open("rb") as file,
            partial.open("wb") as ordered,
        ):
            for place in places:
                file.seek(place)
                ordered.write(file.readline())
            ordered.flush()
        whole.replace(self.out)
        shutil.rmtree(self.progress, ignore_errors=True)


def _index_of(raw: bytes) -> int | None:
    """The index of a kept answer; None for a line that was cut off."""
    try:
        return json.loads(raw)["index"] if raw.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None
