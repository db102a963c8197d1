"""What every weight-only method shares: its grid, and which linears it leaves alone."""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.core.errors import InputError


def _channel_is_none(value: object) -> object:
    return None if value in ("channel", -1, "-1") else value


GroupSize = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_channel_is_none)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WeightOnlyConfig:
    """The integer grid of a weight-only method.

    bits        bits a weight
    group_size  input columns that share a scale; None (in recipes `channel`) for one scale a row
    symmetric   no zero point
    ignore      linears to leave in float: a name, the end of a name (`down_proj`), or `re:REGEX`
    """

    bits: Literal[4, 8] = 4
    group_size: GroupSize = 128
    symmetric: bool = True
    ignore: tuple[str, ...] = ()

    def stage(self) -> Any:
        """The stage (compress.core.stage.Stage) that carries this configuration out."""
        raise NotImplementedError


def is_ignored(name: str, patterns: Iterable[str]) -> bool:
    """Whether a linear's full name is named by one of `patterns` (see WeightOnlyConfig)."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return True
        elif name == pattern or name.endswith("." + pattern):
            return True
    return False


def fitting_group_size(group_size: int | None, widths: Iterable[int]) -> int | None:
    """Halve `group_size` until it divides every width, so that one size serves the whole model.

    Kernels want powers of two (64 rather than 96 for a width of 576).  Raises InputError when no
    halving fits.
    """
    if group_size is None:
        return None
    widths = sorted(set(widths))
    fitting = group_size
    while any(width % fitting for width in widths):
        if fitting % 2:
            raise InputError(
                f"group size {group_size} and its halves do not divide all linear widths of this "
                f"model ({', '.join(map(str, widths))}); choose one that does, or 'channel'"
            )
        fitting //= 2
    return fitting
