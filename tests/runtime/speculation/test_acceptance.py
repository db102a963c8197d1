"""Rates of acceptance: learned place by place, of all sequences and of each, and forgotten."""

import random

import pytest

from compress.runtime.speculation.acceptance import LEAST, MOST, PRIOR, Acceptance, Record


def feed(acceptance: Acceptance, record: Record, rates: list[float], drafts: int, seed=0) -> None:
    """Drafts whose tokens are accepted with `rates`, each if those before it were."""
    generator = random.Random(seed)
    for _ in range(drafts):
        accepted = 0
        while accepted < len(rates) and generator.random() < rates[accepted]:
            accepted += 1
        acceptance.learn(record, len(rates), accepted)


def test_nothing_is_known_at_first():
    assert Acceptance(4).rates(Record(), 3) == [PRIOR] * 3
    assert Acceptance(4).rates(Record(), 0) == []


def test_rates_are_found_place_by_place():
    acceptance, rates = Acceptance(6), [0.9, 0.6, 0.3]
    for number in range(100):  # many sequences, none with a luck of its own
        feed(acceptance, Record(), rates, 20, seed=number)
    found = acceptance.rates(Record(), 6)
    # 400 tries of each count, a standard error of 0.025 at most; four of them
    assert found[:3] == pytest.approx(rates, abs=0.1)
    assert found[3:] == [found[2]] * 3  # never tried


def test_what_changes_is_forgotten():
    acceptance = Acceptance(1)
    for rate in (0.9, 0.1):
        for number in range(50):
            feed(acceptance, Record(), [rate], 40, seed=number)
        assert acceptance.rates(Record(), 1)[0] == pytest.approx(rate, abs=0.06)


def test_a_sequence_of_its_own_kind():
    acceptance = Acceptance(2)
    lucky, unlucky = Record(), Record()
    for number in range(40):
        feed(acceptance, lucky, [0.95, 0.95], 3, seed=number)
        feed(acceptance, unlucky, [0.2, 0.2], 3, seed=number)
    common = acceptance.rates(Record(), 1)[0]
    assert acceptance.rates(unlucky, 1)[0] < common - 0.15
    assert acceptance.rates(lucky, 1)[0] > common + 0.15


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_estimates_are_never_sure(rate):
    acceptance, record = Acceptance(3), Record()
    feed(acceptance, record, [rate] * 3, 2000)
    assert all(LEAST <= estimate <= MOST for estimate in acceptance.rates(record, 3))
    assert abs(acceptance.rates(record, 1)[0] - rate) < 0.03
