"""Building frozen configuration dataclasses from flags and YAML, with one-line errors."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from compress.core.errors import InputError, nearest, shown

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return `cls(**values)`, checked.  `where` says what is being configured, for messages.

    Raises InputError for an unknown key (with the nearest valid one), a bad value, or text that
    no file could hold.
    """
    check_keys(values, [f.name for f in fields(cls)], where)  # type: ignore[arg-type]
    for key, value in values.items():
        if isinstance(value, str | os.PathLike):
            _check_text(key, os.fspath(value), where)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "function-after")
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise InputError(f"{where}: {place} is not given, and has no default") from None
        raise InputError(
            f"{where}: {place or 'value'} = {shown(first['input'])}: {reason}"
        ) from None


def check_keys(values: Mapping[Any, Any], allowed: Sequence[str], where: str) -> None:
    """Raise InputError for the first key that is not allowed, with the nearest that is."""
    for key in values:
        if key not in allowed:
            hint = nearest(key, allowed) if isinstance(key, str) else "; keys are words"
            raise InputError(
                f"unknown key {shown(key)} for {where}; allowed: {', '.join(allowed)}{hint}"
            )


def _check_text(key: str, text: str, where: str) -> None:
    """Refuse text that cannot be a file's name or stand in one: the report repeats all of it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: {key} = {shown(text)} is not valid Unicode text") from None
    if "\0" in text:
        raise InputError(f"{where}: {key} = {shown(text)} holds a NUL character; take it out")
