"""The engine with proposals: outputs stay those of the plain run, and no block is lost."""

from dataclasses import replace

import pytest

from compress.runtime.engine import Engine
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.sequence import Sequence
from compress.runtime.speculation.proposer import Draft
from compress.runtime.speculation.speculator import Speculator
from tests.runtime.fakes import VOCAB, FakeAsyncModel, FakeModel


class Always:
    """As many tokens as there are proposals for."""

    idle = False

    def plan(self, sequences, others, outlooks):
        return [len(outlook) for outlook in outlooks]

    def observe(self, tokens, sequences, seconds, drafting, asking):
        assert seconds > 0 <= drafting


class Oracle:
    """Knows what comes, and says something else at every `wrong`-th place of a sequence."""

    most = 5
    bytes_per_block = 0
    description = "an oracle"

    def __init__(self, answers: dict[tuple[int, ...], list[int]], wrong: int) -> None:
        self.answers, self.wrong = answers, wrong
        self.seen: list[tuple[int, int]] = []

    def allocate(self, num_blocks: int) -> None:
        pass

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        pass

    def outlook(self, sequence: Sequence, most: int) -> list[float]:
        return [0.5] * most

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[Draft]:
        return [Draft(self._next(sequence, count)) for sequence, count in asked]

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        self.seen.append((drafted, accepted))

    def forget(self, sequence: Sequence) -> None:
        pass

    def seconds(self, counts: list[int]) -> float:
        return 0.0

    def behind(self, sequence: Sequence) -> float:
        return 0.0

    def _next(self, sequence: Sequence, count: int) -> list[int]:
        answer = self.answers[tuple(sequence.request.prompt), sequence.index]
        tokens = answer[sequence.produced : sequence.produced + count]
        return [
            (token + 1) % VOCAB if (sequence.produced + place) % self.wrong == 0 else token
            for place, token in enumerate(tokens)
        ]


PARAMS = [
    SamplingParams(max_tokens=30, temperature=0),
    SamplingParams(max_tokens=17, temperature=0.8, top_p=0.9, seed=3),
    SamplingParams(max_tokens=9, temperature=1, n=3, seed=4, repetition_penalty=1.3, logprobs=2),
]


def run(model: FakeModel, blocks: int, speculator: Speculator | None) -> dict:
    engine = Engine(model, blocks, max_tokens_per_step=16, max_sequences=8, speculator=speculator)
    for number, params in enumerate(PARAMS):
        engine.add_request(str(number), list(range(number, number + 11)), params)
    outputs: dict = {}
    while engine.has_work():
        for new in engine.step():
            tokens, logprobs = outputs.setdefault((new.request_id, new.index), ([], []))
            tokens += new.token_ids
            logprobs += new.logprobs or []
        engine.check()
    assert engine.pool.in_use == 0
    outputs["statistics"] = engine.statistics()
    return outputs


@pytest.mark.parametrize("wrong", [1, 3, 1000])
@pytest.mark.parametrize("blocks", [200, 17])
@pytest.mark.parametrize("kind", [FakeModel, FakeAsyncModel])
def test_outputs_are_those_of_the_plain_run(kind: type, blocks: int, wrong: int) -> None:
    plain = run(kind(), blocks, None)
    answers = {
        (tuple(range(number, number + 11)), index): plain[str(number), index][0]
        for number, params in enumerate(PARAMS)
        for index in range(params.n)
    }
    oracle = Oracle(answers, wrong)
    model = kind()
    outputs = run(model, blocks, Speculator(oracle, Always()))
    counts, before = outputs.pop("statistics"), plain.pop("statistics")
    assert outputs == plain
    assert counts.drafted_tokens >= counts.accepted_tokens == sum(counts.accepted_at)
    assert counts.generated_tokens == before.generated_tokens
    if blocks == 200:
        assert counts.drafts > 0
    if wrong == 1:
        assert counts.accepted_tokens == 0
    if wrong == 1000 and blocks == 200:
        assert counts.steps < before.steps / 2
        assert counts.accepted_tokens > 0.9 * counts.drafted_tokens


def engine_with_oracle(blocks: int, answers: dict, most: int = 5, **settings: int) -> Engine:
    oracle = Oracle(answers, 1000)
    oracle.most = most
    return Engine(FakeModel(1000), blocks, speculator=Speculator(oracle, Always()), **settings)


def test_prompts_get_half_of_a_step_at_least() -> None:
    params = SamplingParams(max_tokens=200, temperature=0)
    answers = {((number,), 0): [1] * 200 for number in range(4)}
    engine = engine_with_oracle(400, answers, max_tokens_per_step=20, max_sequences=8)
    for number in range(4):
        engine.add_request(str(number), [number], params)
    engine.step()
    engine.step()
    assert engine.model.batches[-1].tokens.numel() == 20  # 4 decodes, and all else proposals
    engine.add_request("long", list(range(90)) * 5, replace(params, max_tokens=1))
    steps = 0
    while "long" in engine.requests:
        engine.step()
        steps += 1
        assert engine.model.batches[-1].tokens.numel() <= 20
    assert steps == -(-450 // 8)  # 16 are left of 20, and half of these are the prompt's


def test_proposals_take_no_block_that_somebody_needs() -> None:
    params = SamplingParams(max_tokens=8, temperature=0)
    answers = {((7,), 0): [1] * 8}
    # 8 tokens fill two blocks of 4, the last is never read: there is no third to propose into
    engine = engine_with_oracle(2, answers, most=20, max_sequences=2)
    engine.add_request("a", [7], params)
    while engine.has_work():
        engine.step()
        engine.check()
    assert engine.statistics().preemptions == 0
    assert engine.pool.in_use == 0


def test_room_that_was_not_used_is_free_after_the_step() -> None:
    answers = {((7,), 0): [VOCAB - 1] * 100}
    engine = engine_with_oracle(50, answers, most=20, max_sequences=2)
    engine.add_request("a", [7], SamplingParams(max_tokens=100, temperature=0))
    for _ in range(20):
        engine.step()
        (sequence,) = engine.requests["a"].sequences
        assert sequence.length == -(-sequence.computed // engine.model.block_size)
        assert len(sequence.tokens) == sequence.computed + 1


def test_a_model_that_breaks_over_proposals_leaves_a_usable_engine() -> None:
    answers = {((7,), 0): [5] * 100}
    engine = engine_with_oracle(50, answers, max_sequences=2)
    engine.add_request("a", [7], SamplingParams(max_tokens=100, temperature=0))
    engine.step()
    engine.model.fail_on = 5
    with pytest.raises(RuntimeError, match="broke"):
        engine.step()
    engine.reset()
    engine.check()
    assert engine.pool.in_use == 0
