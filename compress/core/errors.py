"""Errors that are the user's to mend: one clear line, exit code 2."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input.  The message names the value, what is allowed, and what to do, in one line."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest allowed name, or an empty string."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def reason_of(error: Exception) -> str:
    """The first line of a library's error, or its type, for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
