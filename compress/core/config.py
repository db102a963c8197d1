"""Building frozen configuration dataclasses from flags and YAML, with one-line errors."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from compress.core.errors import InputError, nearest

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return `cls(**values)`, checked.  `where` says what is being configured, for messages.

    Raises InputError for an unknown key (with the nearest valid one) or a bad value.
    """
    allowed = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in allowed:
            raise InputError(
                f"unknown key '{key}' for {where}; allowed: {', '.join(allowed)}"
                f"{nearest(key, allowed)}"
            )
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "function-after")
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}: {place or 'value'} = {first['input']!r}: {reason}") from None
