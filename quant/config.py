"""What the methods of quantization share: grids, and which linears differ or are left alone."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.core.config import build
from compress.core.errors import InputError, nearest

LEAST_GROUP = 16  # columns; smaller groups come of halving only when they were asked for


def _channel_is_none(value: object) -> object:
    return None if value in ("channel", -1, "-1") else value


def _valid_pattern(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Bits = Literal[2, 3, 4, 8]
GroupSize = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_channel_is_none)]
FormatName = Literal["compressed-tensors", "gptq", "awq"]
Pattern = Annotated[str, AfterValidator(_valid_pattern)]
InputKind = Literal["int8", "fp8"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Grid:
    """The integer grid of one linear: bits, columns that share a scale (None: all), zero point."""

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = True


@dataclass(frozen=True)
class DefaultChoices:
    """What a target of bits chooses from where nothing narrower is asked for."""

    bits: tuple[Bits, ...] = (2, 3, 4, 8)
    group_sizes: tuple[int, ...] = (32, 64, 128)


CHOICES = DefaultChoices()


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RoundedGrid(Grid):
    """The grid of a linear whose inputs are rounded too: 8 bits, symmetric, one scale a row.

    inputs             what inputs are rounded to, each token by itself; with fp8 (float8_e4m3fn)
                       the weights are floats of that kind too, not integers
    outlier_threshold  inputs of this size and above are not rounded (LLM.int8); None: all are
    """

    bits: Literal[8] = 8
    group_size: None = None
    symmetric: Literal[True] = True
    inputs: InputKind = "int8"
    outlier_threshold: float | None = None


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QuantizationConfig:
    """The settings that all methods share.

    format  how the checkpoint is packed: a name in compress.quant.formats.FORMATS
    ignore  linears to leave in float, by pattern: a name, the end of a name (`down_proj`), or
            `re:REGEX`
    """

    format: str = "compressed-tensors"
    ignore: tuple[Pattern, ...] = ()

    def grids(self, widths: Mapping[str, int]) -> tuple[dict[str, Grid], list[str]]:
        """The grid of every linear that is to be quantized, by full name, and remarks.

        widths maps the full name of each linear in the blocks to its input width.  Raises
        InputError for a pattern that names no linear.
        """
        raise NotImplementedError

    def stage(self, grids: Mapping[str, Grid]) -> Any:
        """The stage (compress.core.stage.Stage) that puts linears, by full name, on `grids`."""
        raise NotImplementedError


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WeightOnlyConfig(QuantizationConfig, Grid):
    """The settings that all weight-only methods share.

    bits        bits a weight
    group_size  input columns that share a scale; None (in recipes `channel`) for one scale a row
    symmetric   no zero point
    format      how the checkpoint is packed: compressed-tensors, gptq or awq
    overrides   pattern -> bits, group_size or symmetric of the linears that it names; of several
                that name a linear the last counts
    target_bits in place of bits and group_size: each linear gets those that lose least in so many
                bits a weight on average, scales and zero points included (choices.py)
    choose_bits, choose_group_sizes  what a target chooses from; None for CHOICES
    """

    format: FormatName = "compressed-tensors"
    overrides: Mapping[Pattern, Mapping[str, Any]] = Field(default_factory=dict)
    target_bits: Annotated[float, Field(gt=0, lt=64)] | None = None
    choose_bits: Annotated[tuple[Bits, ...], Field(min_length=1)] | None = None
    choose_group_sizes: Annotated[tuple[GroupSize, ...], Field(min_length=1)] | None = None

    def grids(self, widths: Mapping[str, int]) -> tuple[dict[str, Grid], list[str]]:
        """As QuantizationConfig, with group sizes that divide the widths (`settle_grids`)."""
        return settle_grids(self, widths)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RoundedConfig(QuantizationConfig):
    """The settings of methods that round inputs too: weights have 8 bits and one scale a row."""

    bits: Literal[8] = 8

    def grid(self) -> RoundedGrid:
        """The one grid of all linears."""
        raise NotImplementedError

    def grids(self, widths: Mapping[str, int]) -> tuple[dict[str, Grid], list[str]]:
        """As QuantizationConfig: the same grid for all."""
        check_patterns(self.ignore, widths)
        return dict.fromkeys(_not_ignored(self.ignore, widths), self.grid()), []


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern (see QuantizationConfig) names the linear with this full name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern)


def settle_grids(
    config: WeightOnlyConfig, widths: Mapping[str, int]
) -> tuple[dict[str, Grid], list[str]]:
    """Give every linear that is to be quantized its grid, with a group size that divides its width.

    widths maps the full name of each linear in the blocks to its input width.  Returns the grids
    by name, without ignored linears, and remarks on group sizes that had to change: to the
    largest halving that divides all widths (kernels want powers of two), where that keeps at least
    LEAST_GROUP columns, else for each width to its largest divisor.

    Raises InputError for a pattern that names no linear, or a bad override.
    """
    check_patterns((*config.ignore, *config.overrides), widths)
    for pattern, change in config.overrides.items():
        build(Grid, change, f"override for {pattern}")
    base = {name: getattr(config, name) for name in ("bits", "group_size", "symmetric")}
    asked: dict[str, Grid] = {}
    for name in _not_ignored(config.ignore, widths):
        chosen = dict(base)
        for pattern, change in config.overrides.items():
            if matches(name, pattern):
                chosen |= change
        asked[name] = build(Grid, chosen, f"override for {name}")
    remarks = []
    settled: dict[tuple[int, int], int] = {}
    for size in sorted({grid.group_size for grid in asked.values() if grid.group_size}):
        with_size = sorted({widths[n] for n, grid in asked.items() if grid.group_size == size})
        fitting = [_fitting(size, width, with_size) for width in with_size]
        settled |= {(size, width): fit for width, fit in zip(with_size, fitting, strict=True)}
        if any(fit != size for fit in fitting):
            uses = ", ".join(f"{f} for width {w}" for f, w in zip(fitting, with_size, strict=True))
            remarks.append(f"Group size {size} does not divide all widths: using {uses}")
    for name, grid in asked.items():
        if grid.group_size:
            asked[name] = replace(grid, group_size=settled[grid.group_size, widths[name]])
    return asked, remarks


def _fitting(size: int, width: int, widths: Iterable[int]) -> int:
    halved = size
    while halved and any(other % halved for other in widths):
        halved = halved // 2 if halved % 2 == 0 else 0
    if halved >= min(size, LEAST_GROUP):
        return halved
    return next(divisor for divisor in range(min(size, width), 0, -1) if width % divisor == 0)


def check_patterns(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise InputError for a pattern that names none of the linears with these full names."""
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise InputError(_names_nothing(pattern, names))


def _not_ignored(ignore: Collection[str], names: Iterable[str]) -> list[str]:
    return [name for name in names if not any(matches(name, pattern) for pattern in ignore)]


def _names_nothing(pattern: str, names: Iterable[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in names})
    return (
        f"'{pattern}' names no linear layer of this model; "
        f"their names end in {', '.join(ends)}{nearest(pattern, ends)}"
    )
