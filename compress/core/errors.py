"""Errors that are the user's to mend: one clear line, exit code 2."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

LONGEST_MESSAGE = 1000  # characters; allowed values and remedies need a few hundred
LONGEST_VALUE = 80


class InputError(ValueError):
    """Bad input.  The message names the value, what is allowed, and what to do, in one line.

    Names in it come from files of any origin: white space is collapsed, what does not print (line
    breaks, terminal codes, lone surrogates) is escaped, and too long a message loses its middle.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        if len(line) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            line = f"{line[:half]} ... {line[-half:]}"
        super().__init__(line)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say of what an InputError raised inside is: `what: message`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def shown(value: Any) -> str:
    """`repr(value)`, cut to LONGEST_VALUE characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python prints no integer of more than 4,300 digits
        text = f"(a {type(value).__name__} too large to print)"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest allowed name, or an empty string."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def reason_of(error: BaseException) -> str:
    """The first line of a library's error, or its type, for a one-line message.

    A first line that ends in a colon only says what the second is about: both are taken then.
    """
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
