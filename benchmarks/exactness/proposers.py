"""Proposers for the tiny model that are neither right nor quite wrong, and random lengths."""

from __future__ import annotations

import numpy as np

from compress.runtime.sampler import DRAFT, draw_from
from compress.runtime.sequence import Sequence
from compress.runtime.speculation.proposer import Draft

from .distribution import LENGTH, Outcome
from .tiny_model import BEGIN, TinyModel, tables


class Proposer:
    """What those here have in common: no cache, nothing learned."""

    most, bytes_per_block, description = LENGTH, 0, "tiny"

    def __init__(self, model: TinyModel, seed: int) -> None:
        noise = tables(model.vocab_size, seed + 1000)
        mixed = [0.7 * ours + 0.5 * own for ours, own in zip(model.tables, noise, strict=True)]
        self.logits = mixed  # of the draft: float32 [V] * tokens + [V]

    def allocate(self, num_blocks: int) -> None: ...

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None: ...

    def outlook(self, sequence: Sequence, most: int) -> list[float]:
        return [0.5] * most

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[Draft]:
        return [self.draft(sequence, most) for sequence, most in asked]

    def draft(self, sequence: Sequence, most: int) -> Draft:
        raise NotImplementedError

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None: ...

    def forget(self, sequence: Sequence) -> None: ...

    def seconds(self, counts: list[int]) -> float:
        return 0.0


class FixedGuesses(Proposer):
    """Guesses without chance: the draft's likeliest token."""

    def draft(self, sequence: Sequence, most: int) -> Draft:
        known, guesses = known_of(sequence), ()
        for _ in range(most):
            guesses += (int(self.logits[len(known + guesses)][known + guesses].argmax()),)
        return Draft(list(guesses))


class Draws(Proposer):
    """Draws from the draft's own distribution, without its unlikely tokens.

    samples  says what it drew from; otherwise these are guesses, with the number that decides
    """

    def __init__(self, model: TinyModel, seed: int, samples: bool) -> None:
        super().__init__(model, seed)
        self.samples = samples
        self.q = [distribution(logits, 0.5) for logits in self.logits]

    def draft(self, sequence: Sequence, most: int) -> Draft:
        known, guesses = known_of(sequence), ()
        purpose = DRAFT if self.samples else b""
        for place in range(most):
            uniform = sequence.sampling.uniform(sequence.produced + place, purpose)
            guesses += (draw_from(self.q[len(known + guesses)][known + guesses], uniform),)
        if not self.samples:
            return Draft(list(guesses))
        return Draft(list(guesses), np.stack([self.told(known + guesses[:i]) for i in range(most)]))

    def told(self, known: Outcome) -> np.ndarray:
        """What it says that it drew from after an output, float64 [V]."""
        return self.q[len(known)][known]


class AtTemperatureOne(Draws):
    """Says the wrong thing: its distribution before its temperature."""

    def told(self, known: Outcome) -> np.ndarray:
        return distribution(self.logits[len(known)][known], 1.0)


def distribution(logits: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [..., V]: no token with less than 1/20 of the likeliest's probability."""
    scaled = (logits - logits.max(-1, keepdims=True)) / temperature
    weights = np.exp(scaled.astype(np.float64))
    weights[weights < 0.05] = 0
    return weights / weights.sum(-1, keepdims=True)


def known_of(sequence: Sequence) -> Outcome:
    """An output's tokens after the first."""
    return tuple(sequence.tokens[BEGIN:])


class RandomLengths:
    """As many tokens as a die of its own says, none included."""

    idle = False

    def __init__(self, seed: int) -> None:
        self._source = np.random.default_rng(seed)

    def plan(
        self, sequences: list[Sequence], others: int, outlooks: list[list[float]]
    ) -> list[int]:
        return [int(self._source.integers(len(outlook) + 1)) for outlook in outlooks]

    def observe(self, tokens: int, sequences: int, seconds: float, drafting: float) -> None: ...
