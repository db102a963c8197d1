"""Filters against transformers', draws against the filtered distribution, log-probabilities."""

import math
from array import array

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from compress.runtime.sampler import SamplingState, sample
from compress.runtime.sampling_params import SamplingParams

VOCAB = 3000
PROMPT = array("q", [5, 6, 7, 5, 2999])

FILTERS = [
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": VOCAB + 5},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.8, "min_p": 0.05},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7, "top_k": 30},
    {"logit_bias": {5: 100}},
    {
        "repetition_penalty": 1.4,
        "logit_bias": {5: 3, 6: -100, 40: 2.5},
        "temperature": 0.6,
        "top_k": 9,
    },
]


def state_of(params, seed=0, index=0, stop=frozenset(), vocab=VOCAB):
    return SamplingState(params, seed, index, PROMPT, stop, vocab)


def logits_like(spread, seed=0, vocab=VOCAB):
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def reference(logits, settings):
    """The distribution that transformers' own processors leave, float64 [V]."""
    ids, scores = torch.tensor([PROMPT.tolist()]), logits[None].clone()
    makers = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "logit_bias": lambda bias: SequenceBiasLogitsProcessor(
            {(token,): float(value) for token, value in bias.items()}
        ),
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    for name, maker in makers.items():
        if name in settings:
            scores = maker(settings[name])(ids, scores)
    return scores[0].double().softmax(-1).numpy()


def draws(logits, settings, count):
    """`count` draws, each of its own position, in a few large batches."""
    states = []
    for position in range(count):
        state = state_of(SamplingParams(**settings), seed=11)
        state.produced = position
        states.append(state)
    return sample(logits.expand(count, -1), states)[0]


@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_only_what_transformers_keeps_is_drawn(settings, spread):
    logits = logits_like(spread)
    kept = reference(logits, settings) > 0
    drawn = draws(logits, settings, 300)
    assert kept[drawn].all()
    if kept.sum() < 6:  # all of them come, in as many draws
        assert kept.sum() - len(set(drawn)) <= 1


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_frequencies_follow_the_filtered_distribution(settings):
    """Chi-square over cells of at least 5 expected draws; a true sampler fails 1 in 10,000."""
    vocab = VOCAB
    logits = logits_like(4.0, seed=2)
    probabilities = reference(logits, settings)
    count = 4000
    counts = np.bincount(draws(logits, settings, count), minlength=vocab)
    order = np.argsort(-probabilities)
    large = order[probabilities[order] * count >= 5]
    rest = np.setdiff1d(order, large)
    expected = np.append(probabilities[large], probabilities[rest].sum()) * count
    observed = np.append(counts[large], counts[rest].sum())
    cells = expected > 1e-9
    assert observed[~cells].sum() == 0
    statistic = ((observed - expected)[cells] ** 2 / expected[cells]).sum()
    freedom = cells.sum() - 1
    if freedom:  # Wilson and Hilferty's approximation, 3.72 standard deviations
        term = 2 / (9 * freedom)
        assert statistic < freedom * (1 - term + 3.72 * math.sqrt(term)) ** 3


def test_a_nucleus_may_reach_far_below_the_likeliest():
    logits = torch.full((VOCAB,), -9.0)
    logits[0] = 0  # holds 73 %
    settings = {"top_p": 0.95}
    kept = reference(logits + logits_like(1e-3), settings) > 0
    assert 1000 < kept.sum() < VOCAB
    drawn = draws(logits + logits_like(1e-3), settings, 400)
    assert kept[drawn].all()
    assert len(set(drawn)) > 50


def test_presence_and_frequency_are_taken_from_output_tokens_only():
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    state = state_of(params)
    for token in (1, 1, 2):
        state.record(token)
    row = np.zeros(VOCAB, np.float32)
    changed = state.adjusted(row)
    assert changed[[1, 2]].tolist() == [-1.0, -0.75]
    assert np.count_nonzero(changed) == 2
    assert not row.any(), "the logits are the model's"


def test_a_draw_depends_on_seed_index_and_place_alone():
    logits = torch.stack([logits_like(2.0, seed) for seed in range(16)])
    kinds = [{}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0}, {"logprobs": 3}]
    states = [state_of(SamplingParams(**kinds[n % 6]), seed=n) for n in range(16)]
    together, _ = sample(logits, states)
    alone = [sample(logits[n : n + 1], states[n : n + 1])[0][0] for n in range(16)]
    assert together == alone
    first = state_of(SamplingParams(), seed=1).uniform(0)
    others = [
        state_of(SamplingParams(), seed=2).uniform(0),
        state_of(SamplingParams(), seed=1, index=1).uniform(0),
        state_of(SamplingParams(), seed=1).uniform(1),
        state_of(SamplingParams(), seed=-1).uniform(0),
    ]
    assert len({first, *others}) == 5
    assert all(0 <= number < 1 for number in [first, *others])


@pytest.mark.parametrize("temperature", [0, 0.5])
def test_logprobs_are_of_the_model_before_any_setting(temperature):
    logits = logits_like(3.0)
    params = SamplingParams(
        temperature=temperature, top_k=3, repetition_penalty=1.5, logprobs=4, seed=1
    )
    tokens, logprobs = sample(logits[None], [state_of(params)])
    expected = logits.double().log_softmax(-1)
    (entry,) = logprobs
    assert entry.token_id == tokens[0]
    assert entry.logprob == pytest.approx(expected[tokens[0]].item(), abs=1e-5)
    values, ids = expected.topk(4)
    assert [token for token, _ in entry.top] == ids.tolist()
    assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_of_none_or_all():
    logits = logits_like(3.0, vocab=7)
    for top, count in ((0, 0), (50, 7)):
        params = SamplingParams(temperature=0, logprobs=top)
        _, (entry,) = sample(logits[None], [SamplingState(params, 0, 0, array("q"), set(), 7)])
        assert len(entry.top) == count


def test_no_stop_token_before_min_tokens():
    params = SamplingParams(temperature=0, min_tokens=2)
    logits = torch.zeros(1, VOCAB)
    logits[0, 4], logits[0, 9] = 5, 3
    state = state_of(params, stop=frozenset([4]))
    drawn = []
    for _ in range(3):
        tokens, _ = sample(logits, [state])
        drawn += tokens
        state.record(tokens[0])
    assert drawn == [9, 9, 4]


def test_a_grammar_hides_no_nan():
    """A row with NaN is wrong in all places, whatever is allowed."""

    class Allows:
        allowed, may_end = np.arange(VOCAB) < 10, False

    state = SamplingState(SamplingParams(), 0, 0, PROMPT, frozenset(), VOCAB, Allows())
    logits = logits_like(1.0)
    (token,), _ = sample(logits[None], [state])
    assert token < 10
    logits[17] = math.nan
    (token,), _ = sample(logits[None], [state])
    assert isinstance(token, ArithmeticError)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"temperature": 0, "logprobs": 1}])
def test_nan_is_no_token(settings):
    logits = logits_like(1.0)
    logits[17] = math.nan
    rows = torch.stack([logits_like(1.0), logits, logits_like(1.0, seed=2)])
    states = [state_of(SamplingParams(**settings)) for _ in rows]
    tokens, logprobs = sample(rows, states)
    assert isinstance(tokens[1], ArithmeticError)
    assert "NaN" in str(tokens[1])
    assert logprobs[1] is None
    for row in (0, 2):  # those beside it are as if alone
        alone = sample(rows[row : row + 1], states[row : row + 1])
        assert (tokens[row], logprobs[row]) == (alone[0][0], alone[1][0])
