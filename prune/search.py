"""Which shapes meet a target, and which of these look best.

Worth a look is a shape of which no number can grow by a step without missing the target.  What it
loses is predicted from few measurements, each of one axis pruned alone by about a fifth:

    loss(shape) = loss(start) + sum over axes of (loss(axis alone) - loss(start)) (r / r_alone)^p

with r the share of an axis that goes and p = EXPONENT.  That axes add up is an assumption: the few
shapes that look best are made and measured before one is taken (compress/prune_search.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from compress.prune.shape import Shape

AXES = ("depth", "hidden", "ffn", "heads")
EXPONENT = 1.5  # between losses that grow with a share, and with its square
ALONE = 0.2  # of an axis goes when it is measured alone, about
LEAST = 0.5  # of each axis stays
ALIKE = 0.1  # shapes that differ by no more of any axis are not both made


def step_of(shape: Shape, axis: str) -> int:
    """By how much an axis changes at least: powers of two, as kernels like them, or whole heads."""
    if axis == "depth":
        return 1
    if axis == "heads":
        return shape.kv_heads if shape.queries > 1 else 1
    parts = {"hidden": 8, "ffn": 32}[axis]
    return 1 << max(0, (getattr(shape, axis) // parts).bit_length() - 1)


def numbers_of(shape: Shape, axis: str) -> list[int]:
    """What an axis may become, from most to least: its own number, then multiples of its step."""
    number, step = getattr(shape, axis), step_of(shape, axis)
    least = max(step, int(LEAST * number))
    return [number, *range((number - 1) // step * step, least - 1, -step)]


def with_number(shape: Shape, axis: str, number: int) -> Shape:
    """The shape with another number on an axis; KV heads go with heads where each has its own."""
    if axis == "heads" and shape.queries == 1:
        return replace(shape, heads=number, kv_heads=number)
    return replace(shape, **{axis: number})


def smallest(shape: Shape, axes: Iterable[str]) -> Shape:
    """The shape with the least of these axes that is looked at."""
    for axis in axes:
        shape = with_number(shape, axis, numbers_of(shape, axis)[-1])
    return shape


def alone(shape: Shape, axis: str) -> Shape | None:
    """The shape with about ALONE of one axis taken out; None where there is nothing to take out."""
    wanted = (1 - ALONE) * getattr(shape, axis)
    choices = numbers_of(shape, axis)[1:]
    nearest = min(choices, key=lambda number: abs(number - wanted), default=None)
    return None if nearest is None else with_number(shape, axis, nearest)


def candidates(shape: Shape, fits: Callable[[Shape], bool], axes: Sequence[str]) -> list[Shape]:
    """Shapes for which `fits`, of which no number can grow by a step.

    fits  holds for a shape with less of anything if it holds for the shape
    axes  that may change
    """
    *outer, last = axes
    found: list[Shape] = []
    for numbers in product(*(numbers_of(shape, axis) for axis in outer)):
        wide = shape
        for axis, number in zip(outer, numbers, strict=True):
            wide = with_number(wide, axis, number)
        narrower = (with_number(wide, last, number) for number in numbers_of(shape, last))
        widest = next((one for one in narrower if fits(one)), None)
        if widest is not None:
            found.append(widest)
    return [one for one in found if not any(_holds(other, one) for other in found)]


def _holds(large: Shape, small: Shape) -> bool:
    """Whether a shape has as much of everything as another, and more of something."""
    pairs = [(getattr(large, axis), getattr(small, axis)) for axis in AXES]
    return large != small and all(more >= less for more, less in pairs)


def predicted(
    shape: Shape, start: Shape, loss: float, losses: Mapping[str, tuple[Shape, float]]
) -> float:
    """What a shape loses (see the module's docstring), in the unit of the losses.

    loss    of the start
    losses  by axis, the shape with that axis alone pruned, and what it loses
    """
    total = loss
    for axis, (pruned, found) in losses.items():
        whole = getattr(start, axis)
        share = (whole - getattr(shape, axis)) / (whole - getattr(pruned, axis))
        total += (found - loss) * share**EXPONENT
    return total


def unalike(ranked: Iterable[Shape], start: Shape) -> Iterator[Shape]:
    """The shapes in order, without those that are much like an earlier one."""
    taken: list[Shape] = []
    for shape in ranked:
        if not any(_alike(shape, other, start) for other in taken):
            taken.append(shape)
            yield shape


def _alike(one: Shape, other: Shape, start: Shape) -> bool:
    differences = (
        abs(getattr(one, axis) - getattr(other, axis)) / getattr(start, axis) for axis in AXES
    )
    return max(differences) <= ALIKE


def fit_latency(
    measured: Sequence[tuple[Shape, int, float]],
) -> Callable[[Shape, int], float]:
    """Milliseconds a token of a shape and its parameters, as a depth + b parameters, a, b >= 0.

    A block has its launches and small steps whatever its width, and a parameter is read.

    measured  shapes, their parameters, and milliseconds
    """
    times = np.array([milliseconds for _, _, milliseconds in measured])
    columns = np.array([[shape.depth, count] for shape, count, _ in measured], dtype=np.float64)
    best, slopes = np.inf, np.zeros(2)
    for kept in ([0, 1], [1], [0]):
        found = np.linalg.lstsq(columns[:, kept], times, rcond=None)[0]
        error = float(np.square(columns[:, kept] @ found - times).sum())
        if (found >= 0).all() and error < best:
            best, slopes = error, np.zeros(2)
            slopes[kept] = found
    return lambda shape, count: float(slopes @ (shape.depth, count))
