"""The allocation of options to groups, against trying all of them."""

from itertools import product

import numpy as np
import pytest

from compress.quant.allocation import Option, allocate, frontier, totals


def drawn(seed: int, groups: int = 5, options: int = 4) -> list[list[Option]]:
    """Groups whose options lose less the larger they are, mostly: some are dominated."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(groups):
        sizes = generator.integers(1, 40, options) * int(generator.choice([16, 48, 1000]))
        losses = generator.lognormal(-8, 2, options) / sizes
        found.append([Option(int(b), float(x)) for b, x in zip(sizes, losses, strict=True)])
    return found


def best_by_trying(groups, budget):
    every = (totals(groups, chosen) for chosen in product(*(range(len(g)) for g in groups)))
    return min(loss for size, loss in every if size <= budget)


@pytest.mark.parametrize("seed", range(30))
def test_no_allocation_in_the_budget_loses_less(seed):
    groups = drawn(seed)
    least = sum(min(o.bytes for o in options) for options in groups)
    most = sum(max(o.bytes for o in options) for options in groups)
    for share in (0.0, 0.1, 0.35, 0.7, 1.0):
        budget = least + int(share * (most - least))
        found = allocate(groups, budget)
        assert (found.bytes, found.loss) == totals(groups, found.chosen)
        assert found.bytes <= budget
        # the solver stops at a relative gap of 1e-6
        assert found.loss <= best_by_trying(groups, budget) * (1 + 2e-6)
        assert 0 <= found.gap <= 2e-6
        assert type(found.gap) is float  # it is committed, and NumPy's are not read again


def test_losses_far_below_the_solver_s_tolerances_are_told_apart():
    """Divergences at 8 bits are about 1e-8 nats; HiGHS takes 1e-6 for nothing."""
    groups = [[Option(1, 3e-9), Option(2, 1e-9)], [Option(1, 2e-9), Option(2, 1.5e-9)]]
    assert allocate(groups, 3).chosen == (1, 0)


def test_sizes_of_a_large_model_are_not_rounded():
    """The budget is kept to the byte where numbers are in the billions."""
    size = (1 << 31) + 1
    groups = [[Option(size, 2.0), Option(size + 7, 1.0)] for _ in range(3)]
    assert allocate(groups, 3 * size + 14).bytes == 3 * size + 14
    assert allocate(groups, 3 * size + 13).bytes == 3 * size + 7


def test_a_budget_below_the_smallest_is_refused():
    with pytest.raises(ValueError, match="no allocation fits into 1 bytes"):
        allocate([[Option(2, 1.0)], [Option(3, 0.5)]], 1)


def test_groups_without_a_choice_and_without_a_loss():
    groups = [[Option(5, 0.0)], [Option(2, 0.0), Option(1, 0.0)]]
    found = allocate(groups, 7)
    assert found.loss == 0
    assert found.gap == 0


@pytest.mark.parametrize("seed", range(10))
def test_nothing_lies_below_the_frontier(seed):
    """By all allocations there are; points of the frontier are allocations too."""
    groups = drawn(seed)
    points = frontier(groups)
    sizes, losses = (np.array(column) for column in zip(*points, strict=True))
    assert (np.diff(sizes) > 0).all()
    slopes = np.diff(losses) / np.diff(sizes)
    assert (slopes < 0).all()
    assert (np.diff(slopes) >= -1e-12).all()
    every = [totals(groups, chosen) for chosen in product(*(range(len(g)) for g in groups))]
    taken, lost = np.array(every).T
    inside = (taken >= sizes[0]) & (taken <= sizes[-1])
    floor = np.interp(taken[inside], sizes, losses)
    assert (lost[inside] >= floor * (1 - 1e-9) - 1e-15).all()
    for point in points:
        assert any(size == point[0] and loss == pytest.approx(point[1]) for size, loss in every)
