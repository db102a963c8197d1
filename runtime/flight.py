"""A step on its way: what it computes, who gets tokens of it, and how these are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from compress.runtime.batch import Launched
from compress.runtime.outputs import TokenLogprob
from compress.runtime.sampler import NAN, Proposal, likeliest, sample, sample_row
from compress.runtime.sequence import Sequence
from compress.runtime.speculation.proposer import Draft

Drawn = tuple[int | Exception, TokenLogprob | None]


@dataclass(frozen=True, slots=True)
class Draw:
    """What a step draws for a sequence: a token from each of `count` rows of the logits.

    More than one where tokens were proposed: one for each of them, and one after the last.
    """

    sequence: Sequence
    row: int  # the first of them
    number: int  # of the first of these draws, in the step
    count: int = 1

    @property
    def rows(self) -> range:
        return range(self.row, self.row + self.count)


@dataclass
class Flight:
    """A step that the model has been given, and what will come of it.

    draws     who gets tokens, in the order of the rows
    began     when, on time.perf_counter's clock
    tokens    how many are computed
    decodes   whether no prompt is among them
    prompts   whose prompt's log-probabilities are wanted, from which row on, for which positions
    forks     (first, sibling): who shares the cache of whom once this step has been
    charge    seconds to find out how many tokens to propose, and to propose them
    launched  the tokens to come; None where the host draws
    logits    float32 [rows, V]; None where the device draws
    """

    step: list[Sequence]
    draws: list[Draw] = field(default_factory=list)
    prompts: list[tuple[Sequence, int, range]] = field(default_factory=list)
    forks: list[tuple[Sequence, Sequence]] = field(default_factory=list)
    began: float = 0.0
    tokens: int = 0
    decodes: bool = True
    charge: tuple[float, float] = (0.0, 0.0)
    launched: Launched | None = None
    logits: Tensor | None = None


def drawn(flight: Flight, draws: list[Draw], tokens: list[int] | None) -> list[Drawn]:
    """A token for each of the `draws`, which have one row each, or what went wrong with it.

    `tokens` are all of the step's, where the device drew them.
    """
    if tokens is not None:
        return [_from_device(tokens[draw.number]) for draw in draws]
    if not draws:
        return []
    logits, rows = flight.logits, [draw.row for draw in draws]
    assert logits is not None
    if rows != list(range(len(logits))):
        logits = logits[rows]
    return list(zip(*sample(logits, [draw.sequence.sampling for draw in draws]), strict=True))


def drawn_one_by_one(
    flight: Flight, draw: Draw, draft: Draft, tokens: list[int] | None
) -> Iterator[Drawn]:
    """Tokens from the rows of one sequence, each drawn when the ones before it have been taken."""
    state = draw.sequence.sampling
    if tokens is not None:
        yield from map(_from_device, tokens[draw.number : draw.number + draw.count])
        return
    assert flight.logits is not None
    logits = flight.logits[draw.row : draw.row + draw.count]
    if state.takes_argmax:
        yield from ((token, None) for token in likeliest(logits))
        return
    proposals: list[Proposal | None] = [None] * draw.count
    if draft.probabilities is not None:
        proposals[:-1] = zip(draft.tokens, draft.probabilities, strict=True)
    for row, proposal in zip(logits.cpu().numpy(), proposals, strict=True):
        yield sample_row(row, state, proposal)


def _from_device(token: int) -> Drawn:
    return (token if token >= 0 else ArithmeticError(NAN)), None
