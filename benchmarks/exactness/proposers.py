"""Proposers for the tiny model that are neither right nor quite wrong, and random lengths."""

from __future__ import annotations

import numpy as np

from compress.runtime.sampler import ACCEPT, DRAFT, draw_from
from compress.runtime.sequence import Sequence
from compress.runtime.speculation.draft_model import DraftModel
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

    def behind(self, sequence: Sequence) -> float:
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
        for place in range(most):
            purpose = self.purpose(place) if self.samples else b""
            uniform = sequence.sampling.uniform(sequence.produced + place, purpose)
            guesses += (draw_from(self.q[len(known + guesses)][known + guesses], uniform),)
        if not self.samples:
            return Draft(list(guesses))
        return Draft(list(guesses), np.stack([self.told(known + guesses[:i]) for i in range(most)]))

    def purpose(self, place: int) -> bytes:
        """Of the number that draws a sample: a new one each time that a token is drafted."""
        return DRAFT + bytes([place])

    def told(self, known: Outcome) -> np.ndarray:
        """What it says that it drew from after an output, float64 [V]."""
        return self.q[len(known)][known]


class Peeking(Draws):
    """Proposes nothing where its last draft, which was not accepted so far, held an even token.

    A rule for lengths may look at all that is past.  That this was never looked at by the model
    must not matter.
    """

    def __init__(self, model: TinyModel, seed: int, samples: bool) -> None:
        super().__init__(model, seed, samples)
        self.q = [np.full_like(q, 1 / model.vocab_size) for q in self.q]  # the same everywhere
        self.last: dict[Sequence, tuple[int, list[int]]] = {}

    def outlook(self, sequence: Sequence, most: int) -> list[float]:
        begin, tokens = self.last.get(sequence, (0, []))
        place = len(known_of(sequence)) - begin
        even = 0 < place < len(tokens) and tokens[place] % 2 == 0
        return [] if even else [1.0] * most

    def draft(self, sequence: Sequence, most: int) -> Draft:
        draft = super().draft(sequence, most)
        self.last[sequence] = len(known_of(sequence)), draft.tokens
        return draft

    def forget(self, sequence: Sequence) -> None:
        self.last.pop(sequence, None)


class DrawsAgain(Peeking):
    """The same, with a number that has drafted a token of the same position before."""

    def purpose(self, place: int) -> bytes:
        return DRAFT


class DropsUnlikely(Draws):
    """Its drafts end before a token of which it is not sure, as for guesses would be right."""

    def draft(self, sequence: Sequence, most: int) -> Draft:
        draft = super().draft(sequence, most)
        assert draft.probabilities is not None
        likely = [
            q[token] > 0.4 for token, q in zip(draft.tokens, draft.probabilities, strict=True)
        ]
        kept = [*likely, False].index(False)
        return Draft(draft.tokens[:kept], draft.probabilities[:kept])


class DrawsByAccept(Draws):
    """With the number that will accept."""

    def purpose(self, place: int) -> bytes:
        return ACCEPT


class AtTemperatureOne(Draws):
    """Says the wrong thing: its distribution before its temperature."""

    def purpose(self, place: int) -> bytes:
        """Of the number that draws a sample: a new one each time that a token is drafted."""
        return DRAFT + bytes([place])

    def told(self, known: Outcome) -> np.ndarray:
        return distribution(self.logits[len(known)][known], 1.0)


def draft_model(model: TinyModel, seed: int) -> DraftModel:
    """What users get, of another tiny model: it samples where a request has no seed."""
    draft = TinyModel(model.vocab_size, seed)
    draft.use(Proposer(model, seed).logits)
    return DraftModel(draft, model, LENGTH, 512, 64, "tiny")


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
    """What is sure to be accepted; otherwise all half of the time, or what a die says, even none.

    The die is its own: nothing that is drawn has a part in it.
    """

    idle = False

    def __init__(self, seed: int) -> None:
        self._source = np.random.default_rng(seed)

    def plan(
        self, sequences: list[Sequence], others: int, outlooks: list[list[float]]
    ) -> list[int]:
        most = np.array([len(outlook) for outlook in outlooks])
        sure = np.array([bool(outlook) and outlook[0] == 1 for outlook in outlooks])
        dice = self._source.integers(2 * (most + 1))
        return np.where(sure, most, np.minimum(dice, most)).tolist()

    def observe(
        self, tokens: int, sequences: int, seconds: float, drafting: float, asking: float
    ) -> None: ...
