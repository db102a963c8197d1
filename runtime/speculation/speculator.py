"""The engine's part in speculation: who is asked for how many tokens, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from typing import Protocol

from compress.runtime.flight import Flight
from compress.runtime.sequence import Sequence
from compress.runtime.speculation.proposer import Proposer


class Lengths(Protocol):
    """Decides how many tokens to propose."""

    @property
    def idle(self) -> bool:
        """Whether it is known beforehand that the next step is better off without proposals."""
        ...

    def plan(
        self, sequences: list[Sequence], others: int, outlooks: list[list[float]]
    ) -> list[int]:
        """Tokens to propose for each sequence that decodes, at most as many as its outlook has.

        `others` are tokens of prompts that will be in the step besides, about.
        """
        ...

    def observe(
        self, tokens: int, sequences: int, seconds: float, drafting: float, asking: float
    ) -> None:
        """Take note of a step of decodes alone: its tokens, and its time without these two.

        drafting  time to make the proposals
        asking    time to find out how many there should be, 0 when nobody was asked
        """
        ...


class Speculator:
    """A proposer, what decides its lengths, and counts since the start."""

    def __init__(self, proposer: Proposer, lengths: Lengths) -> None:
        self.proposer = proposer
        self.lengths = lengths
        self.drafts = 0
        self.drafted = 0
        self.accepted = 0
        self.accepted_at: list[int] = []  # of how many drafts this token was accepted
        self._drafting = self._asking = 0.0

    def plan(self, sequences: list[Sequence], others: int) -> list[int]:
        """Tokens to propose for each; never more than the request may still get, less one.

        None for the last token of a prompt, from whose row all n sequences begin.
        """
        began = time.perf_counter()
        most, outlooks = self.proposer.most, []
        for sequence in sequences:
            room = sequence.request.limit - sequence.produced - 1
            room = 0 if sequence.stands_for_all else room
            outlooks.append(self.proposer.outlook(sequence, min(room, most)) if room > 0 else [])
        counts = self.lengths.plan(sequences, others, outlooks)
        self._asking = time.perf_counter() - began
        return counts

    def propose(self, step: Items[Sequence]) -> None:
        """Put proposals behind the tokens of the step's sequences that have `lookahead`."""
        asked = [(sequence, sequence.lookahead) for sequence in step if sequence.lookahead]
        if not asked:
            return
        began = time.perf_counter()
        for (sequence, most), draft in zip(asked, self.proposer.propose(asked), strict=True):
            assert len(draft.tokens) <= most
            if draft.tokens:
                sequence.draft = draft
                sequence.tokens.extend(draft.tokens)
                sequence.count = 1 + len(draft.tokens)
        self._drafting = time.perf_counter() - began

    def taken(self) -> tuple[float, float]:
        """Seconds of `plan` and of `propose` since this was last asked."""
        found = self._asking, self._drafting
        self._asking = self._drafting = 0.0
        return found

    def observe(self, flight: Flight, seconds: float, waited: bool) -> None:
        """Take note of how long a step of decodes alone took, all included.

        waited  its drafts were made while the step before computed, and are not in `seconds`
        """
        asking, drafting = flight.charge
        if not waited:
            seconds -= asking + drafting
        self.lengths.observe(flight.tokens, len(flight.step), seconds, drafting, asking)

    def count(self, drafted: int, accepted: int) -> None:
        """Take note of what became of a draft."""
        self.drafts += 1
        self.drafted += drafted
        self.accepted += accepted
        missing = accepted - len(self.accepted_at)
        self.accepted_at += [0] * missing
        for place in range(accepted):
            self.accepted_at[place] += 1
