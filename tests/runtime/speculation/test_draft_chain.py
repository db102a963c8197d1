"""Chained drafts against the same drafts made token by token, each waited for."""

from array import array

import pytest

from compress.runtime.batch import Batch, Draws
from compress.runtime.batch_builder import build_batch
from compress.runtime.engine import Engine
from compress.runtime.sampler import SamplingState, sample
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.speculation.draft_chain import draft_chain
from compress.runtime.speculation.draft_model import DraftModel
from compress.runtime.speculation.speculator import Speculator
from tests.runtime.fakes import BLOCK, VOCAB, FakeAsyncModel, FakeLaunched, FakeModel, logits_of
from tests.runtime.speculation.test_draft_model import Rough
from tests.runtime.speculation.test_engine import Always

PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=1.2, top_k=9, top_p=0.8, min_p=0.01, seed=4),
    SamplingParams(temperature=0.7, seed=5),
]
WANTED = [5, 1, 4, 2]


class Part:
    """A sequence of which some tokens are in the cache."""

    def __init__(self, tokens: list[int], first_block: int) -> None:
        self.tokens = array("q", tokens)
        self.tables = [array("i", range(first_block, first_block + 6))]
        self.computed, self.count = 0, len(tokens)

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.computed

    def more_rows(self) -> range:
        return range(0)


def parts() -> list[Part]:
    return [Part([place + 1] * (3 * place + 1), 6 * place) for place in range(4)]


def states() -> list[SamplingState]:
    found = [
        SamplingState(params, params.seed or 0, 0, array("q"), frozenset(), VOCAB)
        for params in PARAMS
    ]
    for place, state in enumerate(found):
        state.produced = 7 * place  # tokens of the output before
    return found


def one_by_one(model: FakeModel, part: Part, state: SamplingState, wanted: int) -> list[int]:
    for _ in range(wanted):
        logits = model.forward(build_batch([part], BLOCK))
        part.computed += part.count
        (token,), _ = sample(logits, [state])
        assert isinstance(token, int)
        state.record(token)
        part.tokens.append(token)
        part.count = 1
    return part.tokens.tolist()[-wanted:]


@pytest.fixture
def model() -> FakeAsyncModel:
    model = FakeAsyncModel()
    model.most_unfinished = max(WANTED)
    model.allocate(24)
    return model


def test_drafts_are_those_made_one_by_one(model: FakeAsyncModel) -> None:
    plain = FakeModel()
    plain.allocate(24)
    expected = [one_by_one(plain, *each) for each in zip(parts(), states(), WANTED, strict=True)]
    asked, before = parts(), [state.produced for state in states()]
    found = draft_chain(model, asked, given := states(), WANTED)
    assert found == expected
    assert model.unfinished == 0
    assert len(model.batches) == max(WANTED)
    assert [state.produced for state in given] == before
    for part, fresh, wanted in zip(asked, parts(), WANTED, strict=True):
        assert part.tokens == fresh.tokens
        assert part.computed == len(part.tokens) + wanted - 1


def test_who_is_not_complete_gets_no_draft(model: FakeAsyncModel) -> None:
    asked = parts()
    asked[2].count = 3
    found = draft_chain(model, asked, states(), WANTED)
    assert [len(draft) for draft in found] == [5, 1, 0, 2]
    assert (asked[2].computed, len(asked[2].tokens)) == (3, 7)
    assert sum(len(batch.contexts) for batch in model.batches[1:]) == 5  # four and one


def test_a_draft_ends_before_what_cannot_be_drawn(
    model: FakeAsyncModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tokens: list[int]):
        nan = len(tokens) == 3 and tokens[0] == 1  # after two drawn tokens of the first
        return logits_of(tokens) * (float("nan") if nan else 1)

    expected = draft_chain(model, parts(), states(), WANTED)
    monkeypatch.setattr("tests.runtime.fakes.logits_of", broken)
    found = draft_chain(model, parts(), states(), WANTED)
    assert found == [expected[0][:2], *expected[1:]]


class RoughAsync(FakeAsyncModel, Rough):
    """A draft model that draws itself: the same, once it has looked up the tokens to come."""

    most_unfinished = 3
    chained = 0  # launches that read what the one before draws

    def launch(self, batch: Batch, draws: Draws) -> FakeLaunched:
        self.chained += bool((batch.tokens < 0).any())
        return super().launch(batch, draws)


@pytest.mark.parametrize("nan_at", [None, 11])
@pytest.mark.parametrize("blocks", [200, 20])
def test_a_draft_model_on_a_device_proposes_what_one_on_the_host_does(
    blocks: int, nan_at: int | None
) -> None:
    """Through whole requests: some drafts end at stop tokens, and for NaN."""
    asked = [
        SamplingParams(max_tokens=30, temperature=0, stop_token_ids=tuple(range(0, VOCAB, 9))),
        SamplingParams(max_tokens=25, temperature=0.8, top_p=0.9, seed=3),
        SamplingParams(max_tokens=20, temperature=1, n=3),
    ]
    found = []
    for draft in (Rough(), RoughAsync()):
        draft.nan_at = nan_at
        target = FakeAsyncModel()
        speculator = Speculator(DraftModel(draft, target, 3, 16, 8, "a draft"), Always())
        engine = Engine(
            target, blocks, max_tokens_per_step=16, max_sequences=8, speculator=speculator
        )
        for number, params in enumerate(asked):
            engine.add_request(str(number), list(range(number, number + 11)), params)
        outputs: dict[tuple[str, int], list[int]] = {}
        while engine.has_work():
            for new in engine.step():
                outputs.setdefault((new.request_id, new.index), []).extend(new.token_ids)
            engine.check()
        counts = engine.statistics()
        assert counts.accepted_tokens > 0
        found.append((outputs, counts))
    assert found[0] == found[1]
    assert isinstance(draft, RoughAsync)
    assert draft.chained
    assert draft.unfinished == target.unfinished == 0
