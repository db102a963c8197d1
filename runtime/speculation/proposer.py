"""What passes between the engine and whatever guesses a sequence's next tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from compress.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed next tokens of a sequence, of one of two kinds.

    **Guesses** (`probabilities` is None).  The model draws as it would without them, and a guess
    counts where it is what was drawn.  So the output is the same token for token, whatever was
    guessed.  For a guess made without chance this is rejection sampling: d is accepted with
    probability p(d), and otherwise the draw is from p without d.  A proposer may know the number
    that decides the draw (`SamplingState.uniform`) and put it to its own distribution.

    **Samples**, each drawn from a distribution q by a number that has drawn nothing before, so that
    how much is proposed may depend on all that is past; and proposed whatever it is.  Accepted with
    probability min(1, p(d) / q(d)), and otherwise replaced by a draw from max(p - q, 0), normalised
    (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).  The output has
    the distribution of one without proposals, but which one is drawn depends on what was proposed.
    """

    tokens: list[int]
    probabilities: np.ndarray | None = None  # q, float64 [tokens, V], each row sums to 1


class Proposer(Protocol):
    """Proposes tokens for sequences that decode; `compress.runtime.engine` asks."""

    most: int  # tokens that it can propose at once

    @property
    def bytes_per_block(self) -> int:
        """Of its own cache, whose blocks have the numbers of the model's; 0 without one."""
        ...

    @property
    def description(self) -> str:
        """One line for people."""
        ...

    def allocate(self, num_blocks: int) -> None:
        """Make its cache, after the model's."""
        ...

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy each (source, target) in turn, as the model does, before `propose`."""
        ...

    def outlook(self, sequence: Sequence, most: int) -> list[float]:
        """How likely each token that it would propose is accepted, if those before it are.

        At most `most` tokens; [] proposes nothing.  Takes microseconds, since all sequences that
        decode are asked in each step.
        """
        ...

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[Draft]:
        """At most so many tokens for each sequence; blocks for their positions are there."""
        ...

    def verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Learn how a draft fared; the sequence ends in what was accepted and one token more.

        Not called for a sequence that has ended.
        """
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has left the cache; it may come back."""
        ...

    def seconds(self, counts: list[int]) -> float:
        """Estimated time to propose so many tokens for so many sequences that it has caught up."""
        ...

    def behind(self, sequence: Sequence) -> float:
        """Estimated time to catch up with one that it has an outlook for; 0 if there is none.

        Takes microseconds, too.
        """
        ...
