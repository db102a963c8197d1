"""Scores of given sequences: batches that a fake model checks, and numbers against transformers."""

import numpy as np
import pytest
import torch

from compress.core.source import ModelSource
from compress.loading import load_model
from compress.runtime import scoring
from compress.runtime.loading import load_decoder
from compress.runtime.scoring import Span, logits, score
from tests.runtime.fakes import VOCAB, FakeModel, logits_of


def random_spans(count: int, longest: int, seed: int = 0) -> list[Span]:
    """Of lengths from 2 on; many begin as another one does."""
    generator = np.random.default_rng(seed)
    spans: list[Span] = []
    for _ in range(count):
        tokens = generator.integers(0, VOCAB, generator.integers(2, longest + 1))
        if spans and generator.random() < 0.7:
            other = spans[generator.integers(len(spans))].tokens
            same = min(generator.integers(1, longest), len(tokens), len(other))
            tokens[:same] = other[:same]
        spans.append(Span(tokens, int(generator.integers(1, len(tokens)))))
    return spans


@pytest.mark.parametrize("most_tokens", [1, 5, 16, 512])
@pytest.mark.parametrize("most_rows", [1, 7, 1000])
def test_every_token_is_read_in_its_place(most_tokens, most_rows, monkeypatch):
    """The fake model fails on any wrong read; its logits depend on the whole prefix."""
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 4 * VOCAB * most_rows)
    model, spans = FakeModel(), random_spans(40, 60)
    found: list[list[torch.Tensor]] = [[] for _ in spans]
    for piece in logits(model, spans, most_tokens):
        assert piece.first == spans[piece.index].first + sum(map(len, found[piece.index]))
        found[piece.index].append(piece.logits)
    for span, parts in zip(spans, found, strict=True):
        places = range(span.first, len(span.tokens))
        expected = [logits_of(span.tokens[:place].tolist()) for place in places]
        assert torch.equal(torch.cat(parts), torch.stack(expected))
    assert max(len(batch.tokens) for batch in model.batches) <= most_tokens
    assert max(len(batch.rows) for batch in model.batches) <= most_rows
    assert max(len(batch.contexts) for batch in model.batches) <= scoring.MOST_SEQUENCES


def test_scores_are_of_the_spans_asked_for():
    spans = random_spans(30, 40, seed=1)
    scored = dict(score(FakeModel(), spans, 64))
    assert sorted(scored) == list(range(30))
    for index, span in enumerate(spans):
        rows = torch.stack(
            [logits_of(span.tokens[:n].tolist()) for n in range(1, len(span.tokens))]
        )
        targets = torch.from_numpy(span.tokens[1:])
        log_p = rows.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        wanted = slice(span.first - 1, None)
        # float32 sums over 97 terms, of numbers below 20
        np.testing.assert_allclose(scored[index].log_probabilities, log_p[wanted], atol=1e-5)
        np.testing.assert_array_equal(
            scored[index].likeliest, (rows.argmax(1) == targets)[wanted].numpy()
        )


def test_what_the_model_puts_first_is_the_likeliest():
    tokens = [5]
    while len(tokens) < 20:
        tokens.append(int(logits_of(tokens).argmax()))
    ((_, scores),) = score(FakeModel(), [Span(np.array(tokens), 1)])
    assert scores.likeliest.all()


def test_answers_of_a_question_cost_one_question():
    """Given question by question or not, all four answers go into the batch of their question."""
    generator = np.random.default_rng(2)
    spans = []
    for _ in range(5):
        question = generator.integers(0, VOCAB, 41)
        for _ in range(4):
            tokens = np.concatenate([question, generator.integers(0, VOCAB, 3)])
            spans.append(Span(tokens, 41))
    model = FakeModel()
    assert len(list(score(model, spans[::2] + spans[1::2]))) == 20
    assert len(model.batches) == 1
    # 43 tokens are read once, and three times those after the last whole block of the question
    assert len(model.batches[0].tokens) == 5 * (43 + 3 * (43 - 40))


def test_blocks_go_back():
    """A cache with room for the longest sequence and one batch does for any number of them."""
    model = FakeModel()
    spans = [Span(span.tokens, 1) for span in random_spans(300, 90, seed=3)]
    assert sum(len(piece.logits) for piece in logits(model, spans, 32)) == sum(
        len(span.tokens) - 1 for span in spans
    )
    assert len(model.cache) == -(-max(len(s.tokens) for s in spans) // 4) + 8 + 64


def test_no_spans():
    assert list(score(FakeModel(), [])) == []


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_scores_equal_transformers(family, model_folder):
    """Alone and in company, in batches smaller than a sequence too.

    Logits of the tiny models reach 20; float32 sums in another order leave some 1e-5 of that in a
    log-probability.
    """
    folder = model_folder(family)
    spans = [Span(span.tokens % 120, span.first) for span in random_spans(25, 100, seed=4)]
    model = load_model(folder, "float32", torch.device("cpu"))
    device = torch.device("cpu")
    for most_tokens in (48, 512):
        decoder = load_decoder(
            ModelSource(str(folder), folder), device, "float32", most_tokens=most_tokens
        )
        scored = dict(score(decoder, spans, most_tokens))
        for index, span in enumerate(spans):
            with torch.no_grad():
                rows = model(torch.from_numpy(span.tokens)[None]).logits[0, span.first - 1 : -1]
            targets = torch.from_numpy(span.tokens[span.first :])
            log_p = rows.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            np.testing.assert_allclose(scored[index].log_probabilities, log_p, atol=2e-4)
            np.testing.assert_array_equal(
                scored[index].likeliest, (rows.argmax(1) == targets).numpy()
            )
