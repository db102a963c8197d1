"""The first token that is proposed to a real model, drawn many times after the same words."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from compress.runtime.batch import Batch, Model
from compress.runtime.engine import Engine
from compress.runtime.sampler import DRAFT, draw_from
from compress.runtime.sampling_params import SamplingParams
from compress.runtime.sequence import Sequence
from compress.runtime.speculation.proposer import Draft
from compress.runtime.speculation.speculator import Speculator

from .proposers import Proposer, RandomLengths

TOGETHER = 64  # outputs of a request, in a batch
LIKELIEST = 30  # tokens that have cells of their own


class OneToken(Proposer):
    """Samples the first token after `first` from a distribution that it is given, float64 [V]."""

    most = 1

    def __init__(self, q: np.ndarray) -> None:
        self.q = q

    def outlook(self, sequence: Sequence, most: int) -> list[float]:
        return [1.0] if sequence.produced == 1 else []

    def draft(self, sequence: Sequence, most: int) -> Draft:
        uniform = sequence.sampling.uniform(sequence.produced, DRAFT + bytes([0]))
        return Draft([draw_from(self.q, uniform)], self.q[None])


class BeginsWith:
    """A grammar for outputs that begin with one token and go on as they like."""

    may_end = complete = False

    def __init__(self, first: int, vocab: int) -> None:
        self.allowed = np.zeros(vocab, bool)
        self.allowed[first] = True

    def copy(self) -> BeginsWith:
        return BeginsWith(int(self.allowed.argmax()), len(self.allowed))

    def accept(self, token: int) -> None:
        self.allowed = np.ones(len(self.allowed), bool)


def logits_after(model: Model, tokens: list[int]) -> np.ndarray:
    """float32 [V] after a text, whose cache is made and forgotten."""
    count, blocks = len(tokens), -(-len(tokens) // model.block_size)
    model.allocate(blocks)
    batch = Batch(
        tokens=torch.tensor(tokens),
        positions=torch.arange(count),
        slots=torch.arange(count)[None],
        starts=torch.tensor([0, count], dtype=torch.int32),
        contexts=torch.tensor([count], dtype=torch.int32),
        block_tables=torch.arange(blocks, dtype=torch.int32)[None, None],
        rows=torch.tensor([count - 1]),
    )
    return model.forward(batch)[0].float().cpu().numpy().copy()


def draw_second_tokens(
    model: Model,
    prompt: list[int],
    first: int,
    settings: dict[str, Any],
    q: np.ndarray,
    samples: int,
    seed: int,
) -> tuple[Counter, Speculator]:
    """How often each token came after `prompt` and `first`, and what was accepted for it."""
    speculator = Speculator(OneToken(q), RandomLengths(seed))
    blocks = 8 * TOGETHER
    engine = Engine(model, blocks, max_sequences=TOGETHER, seed=seed, speculator=speculator)
    params = SamplingParams(**settings, max_tokens=3, n=TOGETHER)
    counts: Counter = Counter()
    for number in range(-(-samples // TOGETHER)):
        request = engine.prepare(str(number), prompt, params)
        request.grammar = BeginsWith(first, model.vocab_size)  # type: ignore[assignment]
        engine.add(request)
        outputs: dict[int, list[int]] = {index: [] for index in range(TOGETHER)}
        while min(map(len, outputs.values())) < 2:
            for increment in engine.step():
                if increment.request_id == str(number):
                    assert increment.error is None, increment.error
                    outputs[increment.index] += increment.token_ids
        engine.abort(str(number))
        counts.update(output[1] for output in outputs.values())
    engine.step()
    assert engine.pool.in_use == 0
    return counts, speculator


def pooled(
    counts: Counter, p: np.ndarray, likeliest: int = LIKELIEST
) -> tuple[Counter, dict[int, float]]:
    """The same for the likeliest tokens alone, and -1 for all others."""
    kept = [int(token) for token in np.argsort(-p)[:likeliest] if p[token] > 0]
    if impossible := [token for token in counts if not p[token]]:
        raise AssertionError(f"tokens came that cannot: {impossible[:5]}")
    cells = {token: float(p[token]) for token in kept}
    rest = 1 - sum(cells.values())
    merged = Counter({token: counts[token] for token in kept})
    if rest > 1e-12:
        cells[-1], merged[-1] = rest, counts.total() - merged.total()
    return merged, cells
