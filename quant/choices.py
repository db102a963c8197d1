"""Which grids each linear may get, where a target of bits a weight leaves the choice open.

Linears that loaders make one of (q, k and v; gate and up) form a group, and a group gets one
choice of bits and group size: vLLM and SGLang want one scheme for all parts.  `ignore` and
`overrides` hold for every choice, so a linear may be fixed while those beside it are not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from compress.core.errors import InputError
from compress.quant.config import CHOICES, Grid, WeightOnlyConfig, settle_grids
from compress.quant.formats import FORMATS
from compress.quant.formats.gptq import FUSED

Grids = Mapping[str, Grid]
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Group:
    """Linears, by full name, that get one choice together.

    options  of each choice the linears' grids
    bytes    that the linears take with each, as packed
    """

    linears: tuple[str, ...]
    options: tuple[Grids, ...]
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class Choices:
    """What there is to choose from.

    target_bits  bits a weight that may be used, scales and zero points included
    parameters   weights of all groups
    uniform      choices that all groups can have: the option of each group, by number
    """

    groups: tuple[Group, ...]
    target_bits: float
    parameters: int
    uniform: tuple[tuple[int, ...], ...]

    @property
    def budget(self) -> int:
        """Bytes that all linears may take together."""
        return int(self.target_bits * self.parameters / 8)

    @property
    def by_linear(self) -> dict[str, list[Grid]]:
        """Of each linear the grids of its group's options, in their order."""
        return {
            name: [option[name] for option in group.options]
            for group in self.groups
            for name in group.linears
        }

    def grids(self, chosen: Sequence[int]) -> dict[str, Grid]:
        """The grid of each linear, for these options of the groups by number."""
        pairs = zip(self.groups, chosen, strict=True)
        return {name: grid for group, n in pairs for name, grid in group.options[n].items()}


def choices_of(
    config: WeightOnlyConfig,
    shapes: Shapes,
    packed_bytes: Callable[[Grid, tuple[int, int]], int],
) -> Choices:
    """The choices that the settings and the format leave, for linears of these shapes (out, in).

    packed_bytes  of a linear on a grid

    Raises InputError where the format holds none of them, or not side by side, and for a target
    that is out of reach, with the range that there is.
    """
    assert config.target_bits is not None
    widths = {name: shape[1] for name, shape in shapes.items()}
    sizes = config.choose_group_sizes or CHOICES.group_sizes
    pairs = product(config.choose_bits or CHOICES.bits, sizes)
    asked = [replace(config, bits=bits, group_size=size) for bits, size in pairs]
    every = [settle_grids(one, widths)[0] for one in asked]
    groups, places = [], []
    for names in _fused(every[0]):
        of_group = [{name: grids[name] for name in names} for grids in every]
        options, numbers = _options(of_group, config, shapes)
        taken = [sum(packed_bytes(grid, shapes[n]) for n, grid in o.items()) for o in options]
        groups.append(Group(names, tuple(options), tuple(taken)))
        places.append(numbers)
    if not groups:
        raise InputError(f"target_bits {config.target_bits:g}: no linear is left to quantize")
    everywhere = dict.fromkeys(numbers for numbers in zip(*places, strict=True))
    uniform = tuple(numbers for numbers in everywhere if None not in numbers)
    parameters = sum(shapes[n][0] * shapes[n][1] for group in groups for n in group.linears)
    choices = Choices(tuple(groups), config.target_bits, parameters, uniform)
    _check(choices, config, shapes)
    return choices


def _fused(names: Grids) -> Iterator[tuple[str, ...]]:
    """The names in groups, in the order of their first."""
    together = {part: parts for parts in FUSED.values() for part in parts}
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        groups.setdefault((owner, together.get(leaf, (leaf,))), []).append(name)
    return map(tuple, groups.values())


def _options(
    every: Sequence[Grids], config: WeightOnlyConfig, shapes: Shapes
) -> tuple[list[Grids], list[int | None]]:
    """The distinct choices that the format can hold, and for each choice its number among them."""
    format, options = FORMATS[config.format], []
    numbers: list[int | None] = []
    reason = None
    for grids in every:
        if refused := format.refusal(grids, shapes):
            reason = reason or refused
            numbers.append(None)
            continue
        if grids not in options:
            options.append(grids)
        numbers.append(options.index(grids))
    if not options:
        raise InputError(f"format {config.format} cannot hold {reason}")
    return options, numbers


def _check(choices: Choices, config: WeightOnlyConfig, shapes: Shapes) -> None:
    """Raise InputError where choices cannot stand side by side, or none meets the target."""
    mixture = [number % len(group.options) for number, group in enumerate(choices.groups)]
    if reason := FORMATS[config.format].refusal(choices.grids(mixture), shapes):
        raise InputError(
            f"target_bits mixes grids, and format {config.format} cannot hold {reason}"
        )
    bits = 8 / choices.parameters
    least = bits * sum(min(group.bytes) for group in choices.groups)
    most = bits * sum(max(group.bytes) for group in choices.groups)
    if not least <= choices.target_bits <= most:
        raise InputError(
            f"target_bits {choices.target_bits:g} is out of reach: the choices take {least:.3f} to "
            f"{most:.3f} bits a weight, scales included; give a target in between, or choose_bits "
            "and choose_group_sizes that reach it"
        )
