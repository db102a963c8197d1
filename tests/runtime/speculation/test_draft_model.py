"""A draft model's own cache, what it proposes, and that outputs stay those of the plain run."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.runtime.batch import Batch
from compress.runtime.engine import Engine
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.speculation.draft_model import DraftModel
from compress.runtime.speculation.proposer import Draft
from compress.runtime.speculation.speculator import Speculator
from compress.runtime.speculation.step_cost import StepCost
from tests.runtime.fakes import BLOCK, VOCAB, FakeAsyncModel, FakeModel
from tests.runtime.speculation.test_engine import Always

K = 3


class Rough(FakeModel):
    """A draft model: the target's logits, but where a hash of the prefix says otherwise.

    As every FakeModel it looks at all that it reads, so a token of its cache that is not the
    sequence's is found out.
    """

    wrong = 4  # every so many-th row is another's
    nan_at: int | None = None  # a token after which logits are NaN

    def forward(self, batch: Batch) -> torch.Tensor:
        logits = super().forward(batch)
        for place, row in enumerate(batch.rows.tolist()):
            if int(batch.tokens[row]) * 7 % self.wrong == 0:
                logits[place] = logits[place].roll(1)
            if int(batch.tokens[row]) == self.nan_at:
                logits[place, 5] = torch.nan
        return logits


class RoughAsync(Rough, FakeAsyncModel):
    """The same on a device."""


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> dict:
    for number, (prompt, settings) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(number), prompt, settings)
    outputs: dict = {}
    while engine.has_work():
        for new in engine.step():
            outputs.setdefault((new.request_id, new.index), []).extend(new.token_ids)
        engine.check()
    return outputs


def with_draft(draft: FakeModel, blocks: int = 200, k: int = K, **settings) -> Engine:
    target = settings.pop("target", None) or FakeModel()
    most = settings.setdefault("max_tokens_per_step", 16)
    settings.setdefault("max_sequences", 8)
    proposer = DraftModel(draft, target, k, most, settings["max_sequences"], "a fake")
    return Engine(target, blocks, speculator=Speculator(proposer, Always()), **settings)


def plain(blocks: int = 200) -> Engine:
    return Engine(FakeModel(), blocks, max_tokens_per_step=16, max_sequences=8)


PROMPTS = [list(range(number, number + 11)) for number in range(5)]
PARAMS = [
    SamplingParams(max_tokens=30, temperature=0),
    SamplingParams(max_tokens=17, temperature=0.8, top_p=0.9, seed=3),
    SamplingParams(max_tokens=20, temperature=1, n=3, seed=4, repetition_penalty=1.3, logprobs=2),
    SamplingParams(max_tokens=25, temperature=0, stop_token_ids=(3, 5, 8), min_tokens=12),
    SamplingParams(max_tokens=12, temperature=0.5, min_p=0.1, seed=9, logit_bias={4: 5.0}),
]


@pytest.mark.parametrize("blocks", [200, 20])
@pytest.mark.parametrize(
    "kinds", [(Rough, FakeModel), (Rough, FakeAsyncModel), (RoughAsync, FakeAsyncModel)]
)
def test_outputs_are_those_of_the_plain_run(kinds, blocks):
    expected = run(plain(), PROMPTS, PARAMS)
    draft, target = (kind() for kind in kinds)
    draft.most_unfinished = K
    engine = with_draft(draft, blocks, target=target)
    assert run(engine, PROMPTS, PARAMS) == expected
    counts = engine.statistics()
    assert 0 < counts.accepted_tokens < counts.drafted_tokens
    assert (counts.preemptions > 0) == (blocks == 20)
    assert engine.pool.in_use == 0
    assert not engine._speculator.proposer._contexts


def test_the_same_model_is_never_wrong():
    engine = with_draft(FakeModel())
    assert run(engine, PROMPTS, PARAMS) == run(plain(), PROMPTS, PARAMS)
    counts = engine.statistics()
    # guesses draw with the target's own numbers, and with its penalties and filters
    assert counts.accepted_tokens > 0.9 * counts.drafted_tokens  # less what stops cut off


def test_each_token_is_computed_once():
    draft = FakeModel()
    engine = with_draft(draft, max_tokens_per_step=64)
    greedy = SamplingParams(max_tokens=41, temperature=0)
    run(engine, PROMPTS[:1], [greedy])
    computed = sum(len(batch.tokens) for batch in draft.batches)
    # rounds of K proposed tokens and one more; the last of either is never read
    assert engine.statistics().drafts == 40 // (K + 1)
    assert computed == len(PROMPTS[0]) + 41 - 2


def test_samples_of_a_prompt_and_later_requests_find_it_computed():
    draft = FakeModel()
    engine = with_draft(draft, max_tokens_per_step=64)
    prompt = list(range(8 * BLOCK + 2))
    params = SamplingParams(max_tokens=12, n=4, seed=1)
    run(engine, [prompt], [params])
    first = sum(len(batch.tokens) for batch in draft.batches)
    assert first < len(prompt) + 4 * (2 + 12 + K)  # the prompt once, then drafts
    run(engine, [prompt], [replace(params, n=1)])
    assert sum(len(batch.tokens) for batch in draft.batches) - first < BLOCK + 12 + K


class Asking(Always):
    """Notes, of each sequence that decodes, how many tokens the proposer says it is behind."""

    def __init__(self, proposer, quiet):
        self.proposer, self.quiet, self.behind = proposer, quiet, []

    def plan(self, sequences, others, outlooks):
        self.behind.append([round(self.proposer.behind(one) / TOKEN) for one in sequences])
        counts = super().plan(sequences, others, outlooks)
        return [0] * len(counts) if len(self.behind) <= self.quiet else counts


TOKEN = 1e-3  # seconds that a batch takes for each


def asking(draft: FakeModel, quiet: int) -> tuple[Engine, Asking]:
    engine = with_draft(draft, max_tokens_per_step=512)
    speculator = engine._speculator
    speculator.proposer._cost = StepCost({size: TOKEN * size for size in (1, 64, 512)})
    speculator.lengths = Asking(speculator.proposer, quiet)
    return engine, speculator.lengths


@pytest.mark.parametrize("length", [11, 150])
def test_how_far_it_is_behind(length):
    """The prompt and tokens that came since, until it has drafted; then what was accepted last."""
    engine, lengths = asking(FakeModel(), quiet=4)
    prompt = [token % VOCAB for token in range(length)]
    run(engine, [prompt], [SamplingParams(max_tokens=20, temperature=0)])
    assert [one for (one,) in lengths.behind[:5]] == [length + place for place in range(5)]
    # all K are accepted: the last of them, which was not read, and the model's own behind it
    assert {one for (one,) in lengths.behind[5:]} == {1}


def test_who_shares_a_computed_prompt_is_hardly_behind():
    engine, lengths = asking(FakeModel(), quiet=0)
    prompt = [token % VOCAB for token in range(4 * BLOCK + 1)]
    params = SamplingParams(max_tokens=3 * K, temperature=0)
    run(engine, [prompt], [params])
    lengths.behind.clear()
    run(engine, [prompt], [params])
    assert lengths.behind[0] == [1]


def test_a_prompt_is_computed_in_parts_and_holds_up_nobody():
    draft = FakeModel()
    engine = with_draft(draft, max_tokens_per_step=16)
    greedy = SamplingParams(max_tokens=30, temperature=0)
    expected = run(plain(), [list(range(90)), [1, 2]], [greedy] * 2)
    assert run(engine, [list(range(90)), [1, 2]], [greedy] * 2) == expected
    assert max(len(batch.tokens) for batch in draft.batches) == 16
    assert engine.statistics().accepted_tokens > 20


def drafts_of(params: SamplingParams, target: FakeModel | None = None) -> list[Draft]:
    """All that a draft model proposes for one request."""
    engine = with_draft(FakeModel(), target=target)
    proposer, made = engine._speculator.proposer, []
    propose = proposer.propose

    def noting(asked):
        made.extend(drafts := propose(asked))
        return drafts

    proposer.propose = noting
    run(engine, PROMPTS[:1], [params])
    return [draft for draft in made if draft.tokens]


def test_samples_come_with_what_they_were_drawn_from():
    for draft in drafts_of(SamplingParams(max_tokens=50, temperature=0.7, top_k=5)):
        assert draft.probabilities is not None
        assert draft.probabilities.shape == (len(draft.tokens), VOCAB)
        assert np.allclose(draft.probabilities.sum(1), 1, atol=1e-12)
        assert ((draft.probabilities > 0).sum(1) == 5).all()
        places = range(len(draft.tokens))
        assert (draft.probabilities[places, draft.tokens] > 0).all()


def test_a_seed_or_a_device_that_draws_asks_for_guesses():
    params = SamplingParams(max_tokens=50, temperature=0.7)
    for settings, target in ((replace(params, seed=1), None), (params, FakeAsyncModel())):
        assert all(draft.probabilities is None for draft in drafts_of(settings, target))
    by_host = replace(params, logprobs=1)
    drafts = drafts_of(by_host, FakeAsyncModel())
    assert drafts
    assert all(draft.probabilities is not None for draft in drafts)


def test_drafts_end_where_nothing_follows():
    params = SamplingParams(
        max_tokens=50, temperature=0, logit_bias={7: 50}, stop_token_ids=(7,), min_tokens=3
    )
    (draft,) = drafts_of(params)
    assert len(draft.tokens) == 3  # of which the first two make up min_tokens with the prompt's
    assert draft.tokens[-1] == 7
    assert 7 not in draft.tokens[:-1]
    (draft,) = drafts_of(replace(params, min_tokens=2))
    assert len(draft.tokens) == 2


def test_nan_gives_no_proposal_and_no_second_try():
    expected = run(plain(), PROMPTS, PARAMS)
    draft = Rough()
    draft.nan_at = expected["0", 0][0]
    engine = with_draft(draft)
    assert run(engine, PROMPTS[:1], PARAMS[:1]) == {("0", 0): expected["0", 0]}
    assert engine.statistics().drafts == 0
    assert len(draft.batches) == 1
    assert not engine._speculator.proposer._contents
    assert run(engine, PROMPTS, PARAMS) == expected
    assert engine.statistics().accepted_tokens > 0  # of the others


@pytest.mark.parametrize("size", [VOCAB - 20, VOCAB + 20])
def test_a_vocabulary_that_is_padded_otherwise(size):
    class Padded(FakeModel):
        def forward(self, batch):
            logits = super().forward(batch)
            if size < VOCAB:
                return logits[:, :size].contiguous()
            return torch.nn.functional.pad(logits, (0, size - VOCAB), value=99.0)

    draft = Padded()
    draft.vocab_size = size
    prompts = [*PROMPTS, [VOCAB - 1, 3]]  # the last holds a token that the draft model may lack
    params = [*PARAMS, SamplingParams(max_tokens=9, temperature=0.9)]
    engine = with_draft(draft)
    got = run(engine, prompts, params)
    for key, tokens in run(plain(), PROMPTS, PARAMS).items():
        assert got[key] == tokens
    assert engine.statistics().accepted_tokens > 0
    assert max(int(batch.tokens.max()) for batch in draft.batches) < min(size, VOCAB)


def test_a_shorter_context_ends_drafts():
    engine = with_draft(FakeModel(max_context=20))
    params = SamplingParams(max_tokens=60, temperature=0)
    assert run(engine, PROMPTS[:1], [params]) == run(plain(), PROMPTS[:1], [params])
    counts = engine.statistics()
    # tokens 12 to 20 are read, so that 13 to 21 can be drafted
    assert 0 < counts.accepted_tokens <= 9


def test_random_requests_on_a_small_pool():
    generator = random.Random(5)
    for _ in range(10):
        shared = [generator.randrange(VOCAB) for _ in range(20)]
        prompts, params = [], []
        for _ in range(8):
            tail = [generator.randrange(VOCAB) for _ in range(generator.randrange(1, 15))]
            prompts.append(shared[: generator.randrange(21)] + tail)
            params.append(
                SamplingParams(
                    max_tokens=generator.randrange(1, 25),
                    temperature=generator.choice([0, 0.7]),
                    seed=generator.randrange(100),
                    n=generator.randrange(1, 4),
                    frequency_penalty=generator.choice([0, 0.4]),
                )
            )
        engine = with_draft(Rough(), blocks=40, k=generator.randrange(1, 7))
        assert run(engine, prompts, params) == run(plain(), prompts, params)
        assert engine.pool.in_use == 0
