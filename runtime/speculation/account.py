"""What speculation has gained, and so what it may lose.

**The account** holds seconds gained against plain steps, up to a few steps' worth, and an allowance
of 0.7% of every step.  When it is overdrawn, nothing is proposed until the allowance has settled
it.  So what is lost is bounded by the allowance, whatever misleads the estimates.

**Loans** are for what a proposer does once for a sequence, before its first draft.  Gains pay one
back; the rest is charged when the sequence ends or the account is overdrawn, as far as all gains so
far do not cover it.  No more is lent than these and LENT.
"""

from __future__ import annotations

from compress.runtime.sequence import Sequence

# In times of plain steps.
ALLOWANCE = 0.007  # that each step adds
START, MOST, LEAST = 4.0, 6.0, -64.0
SOUND = 3.0  # for any to be lent: the first drafts may be refused
LENT = 24.0  # at most, above what was gained so far
ENOUGH = 0.5  # to go on after it was overdrawn


class Account:
    """Seconds gained against plain steps, the allowance, and what is lent."""

    def __init__(self) -> None:
        self._seconds: float | None = None  # until the first step
        self._balance = 0.0  # without bounds, and as if all that is lent were lost
        self._owed: dict[Sequence, float] = {}
        self.overdrawn = False

    def has(self, seconds: float) -> bool:
        """Whether so much may be lost."""
        return self._seconds is not None and self._seconds >= seconds

    def lends(self, seconds: float, plain: float) -> bool:
        """Whether so much may be lent."""
        sound = self._seconds is None or self._seconds >= SOUND * plain
        return sound and self._balance - seconds >= -LENT * plain

    def lend(self, sequence: Sequence, seconds: float) -> None:
        """For a sequence, until gains have paid it back or it is due.

        What it owes already is part of it: a long prompt is read in several steps.
        """
        more = seconds - self.owed(sequence)
        if more > 0:
            self._balance -= more
            self._owed[sequence] = seconds

    def owed(self, sequence: Sequence) -> float:
        """What is lent for a sequence."""
        return self._owed.get(sequence, 0.0)

    def settle(self, sequences: list[Sequence]) -> None:
        """What was lent for others than these is due."""
        if self._owed:
            present = set(sequences)
            gone = [sequence for sequence in self._owed if sequence not in present]
            self._claim(sum([self._owed.pop(sequence) for sequence in gone]))

    def add(self, gain: float, plain: float) -> None:
        """Take note of a step; a plain one takes `plain` seconds."""
        self._balance += gain + ALLOWANCE * plain
        if self._seconds is None:
            self._seconds = START * plain
        for sequence in list(self._owed) if gain > 0 else []:
            paid = min(gain, self._owed[sequence])
            gain -= paid
            self._owed[sequence] -= paid
            if not self._owed[sequence]:
                del self._owed[sequence]
        self._charge(-gain - ALLOWANCE * plain)
        if self._seconds < 0:
            self._claim(sum(self._owed.values()))
            self._owed.clear()
        self._seconds = max(LEAST * plain, min(MOST * plain, self._seconds))
        self.overdrawn = self._seconds < (ENOUGH * plain if self.overdrawn else 0.0)

    def _claim(self, owed: float) -> None:
        """Charge what is due, as far as all that was gained so far does not cover it."""
        self._charge(min(owed, max(0.0, -self._balance)))

    def _charge(self, seconds: float) -> None:
        if self._seconds is not None:
            self._seconds -= seconds
