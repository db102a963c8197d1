"""Documents of a text file or a data set, for calibration and for training.

`what` is what the text is for, as messages name it: calibration, training.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.core.errors import InputError, reason_of, shown
from compress.core.progress import say
from compress.core.source import ModelSource

SUFFIXES = (".txt", ".jsonl", ".parquet")
PIECE_BYTES = 1 << 20


def check_file(source: str, what: str, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Refuse a missing or unreadable file before anything long is done; other names may be ids."""
    path = Path(source)
    if is_file(path, what):
        if path.suffix not in suffixes:
            raise InputError(
                f"{what} file '{path}' ends in '{path.suffix}'; allowed: {', '.join(suffixes)}"
            )
    elif path.suffix in suffixes:
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{what} file '{path}' {kind}; check the path")


def is_file(path: Path, what: str) -> bool:
    """Whether a source is a file; InputError when that cannot be told."""
    try:
        return path.is_file()
    except OSError as error:  # too long a name, no permission
        raise InputError(
            f"{what} source {shown(str(path))} cannot be looked up: {reason_of(error)}"
        ) from None


def read_file(path: Path, what: str, most: int | None = None) -> Iterator[str]:
    """The documents of a file.  Each line of a .jsonl file and each row of a .parquet file holds
    one as its `text`; a .txt file is one document.

    With `most` no more bytes than that are read of a .txt or .jsonl file.  Without, a .txt file
    comes in pieces of about PIECE_BYTES that end where a line does.

    Raises InputError when the file cannot be read or is not what its name says.
    """
    try:
        if path.suffix == ".txt":
            yield from _pieces(path) if most is None else (_head(path, most),)
        elif path.suffix == ".jsonl":
            # Not splitlines, which also parts at U+2028 and others that JSON allows in text.
            lines = _lines(path) if most is None else _head(path, most, True).split("\n")
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = _json_of(line, path, number, what)
                    yield _text_of(row, f"{path}, line {number}", what)
        else:
            for row in _rows_of_parquet(path, what):
                yield _text_of(row, str(path), what)
    except UnicodeDecodeError:
        raise InputError(f"{what} file '{path}' is not UTF-8 text; convert it first") from None
    except OSError as error:
        raise InputError(f"cannot read {what} file '{path}': {error}") from None


def stream_dataset(ref: str, what: str) -> Iterator[str]:
    """The texts of a data set, ID, ID:CONFIG or ID:CONFIG:SPLIT, as they come.

    Raises InputError when it cannot be loaded or has no field `text`.
    """
    from datasets import load_dataset

    name, _, rest = ref.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            yield _text_of(row, f"set '{ref}'", what)
    except InputError:
        raise
    except Exception as error:  # datasets and the hub raise many types
        raise InputError(
            f"{what} source '{ref}' is no file, and loading it as a data set failed: "
            f"{reason_of(error)}; give a .txt, .jsonl or .parquet file, a data set id, or 'self'"
        ) from None


def encode(tokenizer: Any, text: str, source: ModelSource, what: str) -> list[int]:
    """Token ids of a text, without special tokens; InputError when the tokenizer fails."""
    try:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    except Exception as error:  # a broken tokenizer.json can fail anywhere inside tokenizers
        raise InputError(
            f"the tokenizer of '{source.ref}' cannot encode the {what} text: "
            f"{reason_of(error)}; download the model again"
        ) from None


def _pieces(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        while data := file.read(PIECE_BYTES):
            yield (data + file.readline()).decode("utf-8")


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:  # of bytes, lines end with a line feed alone
        for line in file:
            yield line.decode("utf-8")


def _head(path: Path, most: int, whole_lines: bool = False) -> str:
    """The first bytes of a UTF-8 file, less a last line or character that is cut off."""
    with path.open("rb") as file:
        data = file.read(most)
    cut = len(data) == most
    if cut:
        say(f"Reading the first {most >> 20} MiB of {path}")
    if cut and whole_lines:
        data = data[: data.rfind(b"\n") + 1]
    return codecs.getincrementaldecoder("utf-8")().decode(data, final=not cut)


def _rows_of_parquet(path: Path, what: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(
            f"cannot read {what} file '{path}': {reason_of(error)}; write it again"
        ) from None


def _json_of(line: str, path: Path, number: int, what: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"cannot read {what} file '{path}', line {number}: {reason_of(error)}; each line "
            "is a JSON object with a 'text'"
        ) from None


def _text_of(row: Any, where: str, what: str) -> str:
    """The text of a row; InputError when there is none, or it cannot be encoded."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        try:
            row["text"].encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                f"{what} data {where} holds half a character (a lone surrogate); correct it"
            ) from None
        return row["text"]
    found = shown(list(row)) if isinstance(row, dict) else type(row).__name__
    raise InputError(f"{what} data {where} has no text field 'text' (found: {found})")
