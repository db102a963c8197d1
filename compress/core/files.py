"""Writing files that are either whole or not there, on a disk that may fill up or lose power."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a place to write to; what is there at the end takes the name `path`, in one step.

    It is on the disk before it gets the name.  On an exception nothing stays of it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 (see `replacing`); what UTF-8 cannot hold becomes `?`."""
    with replacing(path) as partial:
        partial.write_bytes(text.encode("utf-8", "replace"))
