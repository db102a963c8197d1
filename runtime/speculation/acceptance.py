"""How likely a draft's tokens are accepted: learned from those that were, place by place.

Of all sequences together, for each place in a draft: accepted / tried, where older drafts count
less and less, and few drafts little against the place before.  A sequence of its own that fares
better or worse than that by some factor keeps the factor.
"""

from __future__ import annotations

PRIOR = 0.6  # of the first token, before anything is known
PRIOR_WEIGHT = 8.0  # tokens that a prior counts for
MEMORY = 400.0  # tokens tried at one place that count, about
OWN_WEIGHT = 6.0  # tokens that the common rate counts for against a sequence's own
OWN_MEMORY = 40.0  # tokens of a sequence that count, about
LEAST, MOST = 0.01, 0.99  # estimates are never sure


class Record:
    """One sequence's tokens: how many were accepted, and how many were expected to be."""

    __slots__ = ("accepted", "expected")

    def __init__(self) -> None:
        self.accepted = self.expected = 0.0

    @property
    def factor(self) -> float:
        """How much better than the common rate the sequence fares."""
        return (self.accepted + OWN_WEIGHT) / (self.expected + OWN_WEIGHT)


class Acceptance:
    """Rates of the tokens of drafts, up to `most` in each."""

    def __init__(self, most: int) -> None:
        self._tried = [0.0] * most
        self._accepted = [0.0] * most
        self._rates = [PRIOR] * most

    def rates(self, record: Record, most: int) -> list[float]:
        """Of each token of the sequence's next draft: how likely it is taken, after the others."""
        factor = record.factor
        return [min(MOST, max(LEAST, rate * factor)) for rate in self._rates[:most]]

    def learn(self, record: Record, drafted: int, accepted: int) -> None:
        """Take note of a draft: after the first token that is not accepted, none was tried."""
        keep, keep_own = 1 - 1 / MEMORY, 1 - 1 / OWN_MEMORY
        for place in range(min(drafted, accepted + 1)):
            taken = place < accepted
            record.expected = record.expected * keep_own + self._rates[place]
            record.accepted = record.accepted * keep_own + taken
            self._tried[place] = self._tried[place] * keep + 1
            self._accepted[place] = self._accepted[place] * keep + taken
        before = PRIOR
        for place, (tried, taken) in enumerate(zip(self._tried, self._accepted, strict=True)):
            before = (taken + PRIOR_WEIGHT * before) / (tried + PRIOR_WEIGHT)
            self._rates[place] = before
