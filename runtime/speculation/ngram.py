"""Prompt look-up: what followed the last time that the text ended as it does now.

    text      ... the blocks of the cache ... and then the blocks of | ?
    match         ^^^^^^^^^^^^^^                            longest; the most recent of these
    proposed                     the cache ... and then ...

The idea is prompt look-up decoding (Saxena 2023) and the copying part of LLMA (Yang et al. 2023,
arXiv:2304.04487).  Finding the match is that of LZ77 compressors: chains of the places where the
last one and the last two tokens occurred before, the most recent first.

A match that was right goes on by itself: the place moves by one and its length grows.  A copy that
comes to the end of the text goes on into what it has proposed, so text with a period continues.

**How likely a proposed token is right** is learned from all text that comes, proposed or not, since
a guess is accepted exactly when it is the token that came.  It depends on how long the match is
and on a second opinion: what followed the most recent *other* place that ends in the same two
tokens (or one).  On answers of a 135M model to 46 prompts of Spec-Bench, tokens after a match of
length 1 were right with 0.12, 0.33 and 0.59 where that differs, is missing and agrees; at length 4
with 0.40, 0.61 and 0.91.  A sequence's own luck shifts the odds of all its matches.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from compress.runtime.sequence import Sequence
from compress.runtime.speculation.proposer import Draft

ALONE, AGREES, DIFFERS = range(3)  # the second opinion
LONGEST = 32  # tokens that are compared
CANDIDATES = 64  # places that are compared
NOTHING = -1  # is no token, and no pair of them
UNLIKELY = 0.02  # an outlook ends where all of it is accepted less often than this

# Buckets of match lengths 1, 2, 3, 4, 5-6, 7-9, 10 and more; an index of this by length.
_BUCKETS = [0, 0, 1, 2, 3, 4, 4, 5, 5, 5] + [6] * (LONGEST - 9)
# Acceptance by bucket and second opinion that learning starts from, as measured (see above).
_PRIORS = (
    (0.30, 0.55, 0.12),
    (0.50, 0.85, 0.20),
    (0.60, 0.80, 0.20),
    (0.60, 0.85, 0.30),
    (0.80, 0.85, 0.45),
    (0.75, 0.85, 0.55),
    (0.88, 0.92, 0.75),
)
_PRIOR_WEIGHT = 16.0  # tokens
_KEPT = 0.995  # of what was learned, when a token more is
_LUCK_RATE = 0.1  # by how much of a surprise a sequence's log-odds move


class NgramProposer:
    """Proposes copies of the sequence's own text, up to `most` tokens at once."""

    bytes_per_block = 0

    def __init__(self, most: int = 16) -> None:
        self.most = most
        self._indices: dict[Sequence, _Index] = {}
        self._acceptance = Acceptance()

    @property
    def description(self) -> str:
        """One line for people."""
        return f"n-gram look-up in the sequence's own text, up to {self.most} tokens"

    def allocate(self, num_blocks: int) -> None:
        """There is no cache."""

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """There is no cache."""

    def outlook(self, sequence: Sequence, most: int) -> list[float]:
        """How likely each token of a copy is right, if those before it are."""
        index = self._index(sequence)
        return self._acceptance.along(index.contexts(most), index.luck)

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[Draft]:
        """Copy; no tokens where the last one never occurred before."""
        return [Draft(self._index(sequence).copy(most)) for sequence, most in asked]

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Nothing to do: learning is from the text, when it is next looked at."""

    def forget(self, sequence: Sequence) -> None:
        """Drop the index of a sequence; one that comes back is indexed again."""
        self._indices.pop(sequence, None)

    def seconds(self, counts: list[int]) -> float:
        """A copy takes no time that could be told from that of a step."""
        return 0.0

    def behind(self, sequence: Sequence) -> float:
        """An index of the prompt takes none, either."""
        return 0.0

    def _index(self, sequence: Sequence) -> _Index:
        index = self._indices.get(sequence)
        if index is None:
            index = self._indices[sequence] = _Index(sequence.tokens)
        elif index.end < len(sequence.tokens):
            index.extend(self._acceptance)
        return index


class Acceptance:
    """How often tokens were right, by the length of their match and the second opinion."""

    def __init__(self) -> None:
        priors = [prior for bucket in _PRIORS for prior in bucket]
        self._right = [prior * _PRIOR_WEIGHT for prior in priors]
        self._seen = [_PRIOR_WEIGHT] * len(priors)

    def along(self, contexts: Iterator[tuple[int, int]], luck: float) -> list[float]:
        """Probabilities in a row of contexts, up to where reaching so far is unlikely."""
        odds_factor, reach, result = math.exp(luck), 1.0, []
        for length, opinion in contexts:
            probability = self._probability(3 * _BUCKETS[length] + opinion, odds_factor)
            reach *= probability
            if reach < UNLIKELY:
                break
            result.append(probability)
        return result

    def learn(self, length: int, opinion: int, right: bool, luck: float) -> float:
        """Take note of one token; return the new luck of its sequence, in log-odds."""
        cell = 3 * _BUCKETS[length] + opinion
        surprise = right - self._probability(cell, math.exp(luck))
        self._right[cell] = self._right[cell] * _KEPT + right
        self._seen[cell] = self._seen[cell] * _KEPT + 1
        return luck + _LUCK_RATE * surprise

    def _probability(self, cell: int, odds_factor: float) -> float:
        right, seen = self._right[cell], self._seen[cell]
        favourable = (right + 0.01) * odds_factor  # the hundredth keeps odds from 0 and infinity
        return favourable / (favourable + seen - right + 0.01)


class _Index:
    """Where the tokens before any place in a text stood before.

    A place is the number of the token that comes next there.  The last one, `end`, is the one to
    guess at; those before it are indexed by the token before them, and by the two before them.
    """

    __slots__ = ("_earlier", "_heads", "_length", "_place", "_tokens", "end", "luck")

    def __init__(self, tokens: array[int]) -> None:
        self._tokens = tokens  # the sequence's own, which grows
        self.end = len(tokens)
        self.luck = 0.0  # how much better guesses fare here than elsewhere, in log-odds
        flat = np.array(tokens, np.int64)
        chains = (
            _chains(flat[:-1], 1, self.end),
            _chains(_pairs(flat[:-2], flat[1:-1]), 2, self.end),
        )
        self._heads = [heads for heads, _ in chains]  # the most recent place of each key
        self._earlier = [earlier for _, earlier in chains]  # of each place: the one before, or -1
        self._search()

    def extend(self, acceptance: Acceptance) -> None:
        """Index what has come since, and learn from it."""
        tokens = self._tokens
        while self.end < len(tokens):
            right = False
            if self._place >= 0:
                right = tokens[self._place] == tokens[self.end]
                opinion = self._opinion(self._place, self._length)
                self.luck = acceptance.learn(self._length, opinion, right, self.luck)
            self._add(self.end)
            self.end += 1
            if right:
                self._place += 1
                self._length = min(self._length + 1, LONGEST)
            else:
                self._search()

    def contexts(self, most: int) -> Iterator[tuple[int, int]]:
        """Of each token of a copy: the length of the match by then, and the second opinion."""
        if self._place < 0:
            return
        period = self.end - self._place
        for ahead in range(most):
            length = min(self._length + ahead, LONGEST)
            yield length, self._opinion(self._place + ahead % period, length)

    def copy(self, most: int) -> list[int]:
        """The tokens that followed the match, and those again where the text ends."""
        if self._place < 0:
            return []
        copied = self._tokens[self._place : self._place + most].tolist()
        return (copied * -(-most // len(copied)))[:most]

    def _add(self, place: int) -> None:
        """Index a place of which the next token is known."""
        tokens = self._tokens
        keys = (
            tokens[place - 1],
            _pairs(tokens[place - 2], tokens[place - 1]) if place > 1 else -1,
        )
        for key, heads, earlier in zip(keys, self._heads, self._earlier, strict=True):
            earlier.append(heads.get(key, -1))
            heads[key] = place

    def _opinion(self, place: int, length: int) -> int:
        """Whether what follows `place` follows the most recent other place like it, too."""
        tokens = self._tokens
        if length == 1 or place == 1:
            kind, key = 0, tokens[place - 1]
        else:
            kind, key = 1, _pairs(tokens[place - 2], tokens[place - 1])
        other = self._heads[kind].get(key, -1)
        if other == place:
            other = self._earlier[kind][place]
        if other < 0:
            return ALONE
        return AGREES if tokens[other] == tokens[place] else DIFFERS

    def _search(self) -> None:
        """Find the longest match that ends at `end`."""
        tokens, end = self._tokens, self.end
        self._place, self._length = self._heads[0].get(tokens[end - 1], -1), 1
        if self._place < 0 or end == 1:
            return
        earlier = self._earlier[1]
        place = self._heads[1].get(_pairs(tokens[end - 2], tokens[end - 1]), -1)
        length = 1
        for _ in range(CANDIDATES):
            if place < 0 or length == LONGEST:
                break
            # One that is longer than the best must be like it where the best differs.
            if place > length and tokens[place - 1 - length] == tokens[end - 1 - length]:
                same = 2
                most = min(place, LONGEST)
                while same < most and tokens[place - 1 - same] == tokens[end - 1 - same]:
                    same += 1
                if same > length:
                    length = same
                    self._place, self._length = place, same
            place = earlier[place]


def _pairs(first: Any, second: Any) -> Any:
    """One number of two tokens, which are below 2^31; of arrays, too."""
    return first << 32 | second


def _chains(keys: np.ndarray, size: int, end: int) -> tuple[dict[int, int], array[int]]:
    """The most recent place of each key, and of each place the one before with the same key.

    `keys` int64 [end - size] are of `size` tokens each, at places `size` to `end` - 1.
    """
    heads = dict(zip(keys.tolist(), range(size, end), strict=True))
    order = keys.argsort(kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    earlier = np.full(end, -1, np.int32)
    earlier[order[1:][same] + size] = order[:-1][same] + size
    return heads, array("i", earlier.tobytes())
