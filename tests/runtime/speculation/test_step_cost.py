"""Steps that are measured when a model is loaded."""

import pytest

from compress.runtime.speculation import step_cost
from tests.runtime.fakes import FakeAsyncModel, FakeModel


@pytest.mark.parametrize("kind", [FakeModel, FakeAsyncModel])
def test_steps_are_of_one_sequence_and_on_a_device_of_many(kind: type, monkeypatch) -> None:
    """Which the captured steps of a device have room for; the fake looks at every read."""
    monkeypatch.setattr(step_cost, "SECONDS", 0.1)
    model = kind()
    model.allocate(30)  # 120 tokens
    measured = step_cost.measure_steps(model, 30, 64)
    assert min(measured.values()) > 0
    assert 1 in measured
    assert max(measured) <= 60
    filled, *steps = model.batches
    assert (len(filled.contexts), len(filled.tokens)) == (1, 60)
    for batch in steps:
        count = len(batch.tokens)
        assert len(batch.contexts) == (count if kind is FakeAsyncModel else 1)
        assert batch.positions.tolist() == list(range(60, 60 + count))
        assert len(batch.rows) == count
