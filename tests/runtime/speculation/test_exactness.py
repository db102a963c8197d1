"""The distribution of what speculation draws, against the exact one, enumerated.

The full size, with 12 tokens, every setting alone and 100,000 samples each, is
benchmarks/speculative_exactness.py.
"""

from array import array
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.exactness.cases import some
from benchmarks.exactness.chi_square import compare
from benchmarks.exactness.distribution import Case, joint, processed
from benchmarks.exactness.proposers import Draws, FixedGuesses, Peeking, draft_model
from benchmarks.exactness.real_model import draw_second_tokens, logits_after, pooled
from benchmarks.exactness.sampling import draw_outcomes
from benchmarks.exactness.tiny_model import FIRST, PROMPT, TinyModel
from benchmarks.exactness.wrong import RULES, wrong
from compress.core.source import resolve_model
from compress.runtime.loading import load_decoder
from compress.runtime.sampler import ACCEPT, DRAFT, RESIDUAL, SamplingState, draw_or_accept
from compress.runtime.sampling_params import SamplingParams

VOCAB = 6
SAMPLES = 2000  # enough to reject each wrong rule by far


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", some(VOCAB), ids=lambda case: case.name)
def test_outcomes_have_the_exact_distribution(case, seed):
    model = TinyModel(VOCAB, seed)
    exact = joint(model.logits_of, PROMPT, FIRST, case)
    assert sum(exact.values()) == pytest.approx(1)
    samples = draw_outcomes(model, Draws(model, seed, samples=True), case, SAMPLES, seed)
    assert not compare(samples, exact).rejected


@pytest.mark.parametrize("case", some(VOCAB), ids=lambda case: case.name)
def test_guesses_have_no_part_in_what_is_drawn(case):
    model = TinyModel(VOCAB, 3)
    guesses = draw_outcomes(model, FixedGuesses(model, 3), case, SAMPLES, 3)
    assert not compare(guesses, joint(model.logits_of, PROMPT, FIRST, case)).rejected
    others = draw_outcomes(model, Draws(model, 3, samples=False), case, 300, 3)
    assert others == draw_outcomes(model, FixedGuesses(model, 3), case, 300, 3)


@pytest.mark.parametrize("case", some(VOCAB), ids=lambda case: case.name)
def test_a_draft_model_changes_no_distribution(case):
    model = TinyModel(VOCAB, 4)
    counts = draw_outcomes(model, draft_model(model, 4), case, SAMPLES, 4)
    assert not compare(counts, joint(model.logits_of, PROMPT, FIRST, case)).rejected


def test_lengths_may_depend_on_all_that_is_past():
    """Drafts that nobody looked at included: a sample is drawn by a new number each time."""
    model = TinyModel(VOCAB, 2)
    counts = draw_outcomes(model, Peeking(model, 2, samples=True), Case("plain"), SAMPLES, 2)
    assert not compare(counts, joint(model.logits_of, PROMPT, FIRST, Case("plain"))).rejected


@pytest.mark.parametrize("rule", RULES)
def test_wrong_rules_are_rejected(rule):
    with wrong(rule, VOCAB, seed=2) as (model, proposer):
        exact = joint(model.logits_of, PROMPT, FIRST, Case("plain"))
        counts = draw_outcomes(model, proposer, Case("plain"), SAMPLES, seed=3)
    assert compare(counts, exact).rejected


def test_an_outcome_that_cannot_be_rejects_at_once():
    assert compare(Counter({(1,): 10**6, (2,): 1}), {(1,): 1.0}).rejected


def test_acceptance_and_residual_by_integration():
    """Over an even grid of both numbers, to within a step of it; q lacks some of p, p some of q."""
    source, steps = np.random.default_rng(0), 500
    grid = (np.arange(steps) + 0.5) / steps
    p, q = source.dirichlet(np.full(7, 0.7), 2)
    p[:2], q[1:4] = 0, 0
    p, q = p / p.sum(), q / q.sum()
    residual = np.maximum(p - q, 0) / np.maximum(p - q, 0).sum()
    for proposed in np.flatnonzero(q):
        drawn = np.array([draw_or_accept(p, proposed, q, number, 0.5) for number in grid])
        accepted = min(1, p[proposed] / q[proposed])
        assert abs((drawn == proposed).mean() - accepted) <= 1 / steps
        if accepted < 1:
            drawn = np.array([draw_or_accept(p, proposed, q, 1 - 1e-9, number) for number in grid])
            shares = np.bincount(drawn, minlength=7) / steps
            assert np.abs(shares - residual).max() <= 1 / steps


def test_equal_distributions_always_accept():
    p = np.random.default_rng(0).dirichlet(np.ones(50))
    assert all(draw_or_accept(p, token, p, 1 - 2**-53, 0.5) == token for token in range(50))


def test_numbers_for_different_purposes_are_independent():
    """Each even on [0, 1), each pair even on the square: 64 cells, p above 1e-4."""
    purposes = [b"", DRAFT, ACCEPT, RESIDUAL]
    numbers = np.array(
        [
            [state.uniform(produced, use) for use in purposes]
            for state in map(state_of, range(50))
            for produced in range(200)
        ]
    )
    cells = (numbers * 8).astype(int)
    even = {(a, b): 1 / 64 for a in range(8) for b in range(8)}
    for one in range(4):
        for other in range(4):
            pairs = zip(cells[:-1, one], cells[1 if one == other else 0 :, other], strict=False)
            assert not compare(Counter(pairs), even).rejected


def state_of(seed):
    return SamplingState(SamplingParams(), seed, 0, array("q", [1]), frozenset(), VOCAB)


@pytest.mark.real_model
def test_the_first_token_of_a_real_model():
    """30 likeliest tokens and the rest; what proposes is less sure than the model, and noisy."""
    model = load_decoder(resolve_model("smollm2"), torch.device("cpu"), "bfloat16")
    prompt = [5965, 20334, 3161, 314, 260]  # "My favourite animal is the"
    scores = torch.from_numpy(logits_after(model, prompt))
    first = int(scores.argmax())
    scores = torch.from_numpy(logits_after(model, [*prompt, first]))
    settings = {"temperature": 1.2, "top_p": 0.95, "repetition_penalty": 1.1}
    inputs = torch.tensor([[*prompt, first]])
    p = processed(inputs, scores[None], len(prompt), Case("real", settings))
    p = p[0].double().softmax(-1).numpy()
    noise = torch.randn(len(scores), generator=torch.Generator().manual_seed(0))
    q = (0.8 * scores + noise).double().softmax(-1).numpy()
    counts, speculator = draw_second_tokens(model, prompt, first, settings, q, 640, seed=2)
    assert 0.1 < speculator.accepted / speculator.drafted < 0.9
    assert not compare(*pooled(counts, p)).rejected
    assert compare(*pooled(counts, q)).rejected
