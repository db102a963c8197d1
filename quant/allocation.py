"""Which grid each group of linears gets, so that the least is lost in a number of bytes.

Groups are to be put on one of their options each, an option being worth so many bytes and costing
so much of the model's quality.  With x_go = 1 for the option o that group g gets,

    least Σ_go loss_go x_go    for    Σ_o x_go = 1 for each g,    Σ_go bytes_go x_go ≤ budget,

the multiple-choice knapsack problem, solved exactly as an integer program by HiGHS (scipy).  Its
relaxation, x between 0 and 1, is solved by going down the lower convex hulls of all groups in the
order of what a byte saves (Sinha and Zoltners, 1979): that gives the whole frontier of size against
loss, and a bound under what any allocation can reach.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

GAP = 1e-6  # relative, at which the search for something better ends


@dataclass(frozen=True)
class Option:
    """What a group of linears takes and loses if it gets this option."""

    bytes: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """Options by number, one for each group.

    bytes, loss  of all groups together
    gap          (loss - bound) / loss, with the bound that was proven to lie below every other
    """

    chosen: tuple[int, ...]
    bytes: int
    loss: float
    gap: float


def allocate(groups: Sequence[Sequence[Option]], budget: int) -> Allocation:
    """The allocation of least loss in `budget` bytes.

    Raises ValueError where the smallest options take more.
    """
    kept = [_undominated(options) for options in groups]
    least = [options[found[0]].bytes for options, found in zip(groups, kept, strict=True)]
    if sum(least) > budget:
        raise ValueError(f"no allocation fits into {budget} bytes")
    more = [groups[g][o].bytes - least[g] for g, found in enumerate(kept) for o in found]
    losses = np.array([groups[g][o].loss for g, found in enumerate(kept) for o in found])
    # HiGHS has absolute tolerances of about 1e-6: losses are brought to a size far above that, and
    # bytes above the least are counted in their largest common unit, which keeps numbers small.
    scale = 1e6 / (float(losses.max()) or 1.0)
    owner = np.repeat(np.arange(len(kept)), [len(found) for found in kept])
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    unit = math.gcd(*more) or 1
    solved = milp(
        losses * scale,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.array(more)[None] // unit, ub=(budget - sum(least)) // unit),
        ],
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP},
    )
    assert solved.x is not None, solved.message
    numbers = [o for found in kept for o in found]
    chosen = tuple(numbers[i] for i in np.flatnonzero(solved.x > 0.5).tolist())
    taken, lost = totals(groups, chosen)
    assert len(chosen) == len(groups)
    assert taken <= budget
    bound = float(solved.mip_dual_bound) / scale
    return Allocation(chosen, taken, lost, max(0.0, (lost - bound) / lost) if lost > 0 else 0.0)


def totals(groups: Sequence[Sequence[Option]], chosen: Sequence[int]) -> tuple[int, float]:
    """Bytes and loss of all groups together."""
    taken = [options[number] for options, number in zip(groups, chosen, strict=True)]
    return sum(option.bytes for option in taken), sum(option.loss for option in taken)


def frontier(groups: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    """Bytes and loss of allocations from the smallest to the one of least loss, ascending in bytes.

    No allocation lies below the line through them.
    """
    steps = []
    taken = lost = 0.0
    for options in groups:
        hull = _lower_hull(options)
        taken, lost = taken + hull[0].bytes, lost + hull[0].loss
        steps += [(b.bytes - a.bytes, a.loss - b.loss) for a, b in pairwise(hull)]
    points = [(int(taken), lost)]
    for more, less in sorted(steps, key=lambda step: -step[1] / step[0]):
        points.append((points[-1][0] + more, points[-1][1] - less))
    return points


def _undominated(options: Sequence[Option]) -> list[int]:
    """Numbers of the options than which no smaller one loses less, ascending in bytes."""
    order = sorted(range(len(options)), key=lambda o: (options[o].bytes, options[o].loss))
    kept: list[int] = []
    for number in order:
        if not kept or options[number].loss < options[kept[-1]].loss:
            kept.append(number)
    return kept


def _lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull from the smallest to the one of least loss."""
    hull: list[Option] = []
    for option in (options[number] for number in _undominated(options)):
        while len(hull) > 1 and _is_above(hull[-1], hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _is_above(middle: Option, left: Option, right: Option) -> bool:
    """Whether an option lies on or above the line between one on each side of it."""
    rise = (left.loss - middle.loss) * (right.bytes - left.bytes)
    return rise <= (left.loss - right.loss) * (middle.bytes - left.bytes)
