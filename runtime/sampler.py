"""From logits to tokens: penalties, bias, grammar, temperature, filters, a draw, log-probabilities.

A draw takes one uniform number, which is a hash of (seed, index of the output, tokens produced so
far), and inverts the distribution function with it.  So what a request draws depends neither on
the batch around it nor on its having been preempted, and no generator has a state to keep.

Each filter is a least logit, so none needs the tokens in order, only the values: numpy sorts
49,152 of them in 0.1 ms, where torch takes 3.  Tokens that tie with the last one kept stay too.

Log-probabilities are the model's own: of the logits as they come, before any setting.
"""

from __future__ import annotations

import copy
import hashlib
import math
import struct
from array import array
from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
from torch import Tensor

from compress.runtime.batch import Draws
from compress.runtime.grammar import Matcher
from compress.runtime.outputs import TokenLogprob
from compress.runtime.sampling_params import SamplingParams

MOST_TOP_K = 2**31 - 1  # that a device is told; more tokens than any vocabulary has
HOTTEST = 3e38  # and of temperatures, which are float32 there
NAN = "the model's logits hold NaN"
INFINITE = "the model's logits hold infinity"
# What else than a plain draw a uniform number is for.  The place in the draft is put behind DRAFT:
# a token that was not reached is drafted again, and may not be by the same number.
DRAFT, ACCEPT, RESIDUAL = b"draft", b"accept", b"residual"
NEAR = -8.0  # below this a token has less than 1/2,900 of the likeliest's probability


Proposal = tuple[int, np.ndarray]  # a token, and the distribution it was drawn from, float64 [V]


class SamplingState:
    """What draws the tokens of one sequence: settings, key, counts for penalties, and a matcher.

    Everything is kept up token by token; nothing here takes longer as the context grows.
    """

    __slots__ = (
        "_bias",
        "_counts",
        "_matcher",
        "_seen",
        "index",
        "params",
        "produced",
        "seed",
        "stop_ids",
    )

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        index: int,
        prompt: array[int],
        stop_ids: frozenset[int],
        vocab_size: int,
        matcher: Matcher | None = None,
    ) -> None:
        self.params = params
        self.seed = seed
        self.index = index
        self.produced = 0
        self.stop_ids = list(stop_ids)
        self._matcher = matcher  # this sequence's own
        self._bias: tuple[np.ndarray, np.ndarray] | None = None  # int64 and float32 [biased]
        if params.logit_bias:
            tokens, values = zip(*params.logit_bias.items(), strict=True)
            self._bias = np.array(tokens), np.array(values, np.float32)
        self._counts: np.ndarray | None = None  # float32 [V], of the output
        self._seen: np.ndarray | None = None  # bool [V], in prompt or output
        if params.penalized:
            self._counts = np.zeros(vocab_size, np.float32)
            self._seen = np.zeros(vocab_size, bool)
            self._seen[prompt] = True

    def fork(self) -> SamplingState:
        """A state at the same place, which goes on by itself and notes no log-probabilities.

        Cheap where there are neither penalties nor a grammar.
        """
        other = copy.copy(self)
        if self._counts is not None and self._seen is not None:
            other._counts, other._seen = self._counts.copy(), self._seen.copy()
        if self._matcher is not None:
            other._matcher = self._matcher.copy()
        if self.params.logprobs is not None:
            other.params = replace(self.params, logprobs=None)
        return other

    @property
    def takes_argmax(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        return self.params.greedy and not self.on_host

    def record(self, token: int) -> None:
        """Count a token of the output.  GrammarError when the grammar cannot go on from it."""
        self.produced += 1
        if self._counts is not None and self._seen is not None:
            self._counts[token] += 1
            self._seen[token] = True
        if self._matcher is not None and token not in self.stop_ids:
            self._matcher.accept(token)

    @property
    def complete(self) -> bool:
        """Whether a grammar lets nothing follow."""
        return self._matcher is not None and self._matcher.complete

    def adjusted(self, row: np.ndarray) -> np.ndarray:
        """Return `row`, float32 [V], after penalties, bias, grammar and min_tokens.

        Repetition as in CTRL (Keskar et al. 2019, section 4.1) with the sign rule of transformers;
        presence and frequency as in OpenAI's API.
        """
        params = self.params
        if self._counts is not None and self._seen is not None:
            penalty = params.repetition_penalty
            penalized = np.where(row > 0, row / penalty, row * penalty)
            row = np.where(self._seen, penalized, row)
            row -= params.frequency_penalty * self._counts
            row -= params.presence_penalty * (self._counts > 0)
        if self._bias is not None:
            tokens, values = self._bias
            row = row.copy()
            row[tokens] += values
        if self._matcher is not None:
            allowed = self._matcher.allowed
            if self._matcher.may_end:
                allowed = allowed.copy()
                allowed[self.stop_ids] = True
            row = np.where(allowed, row, np.float32(-np.inf))
        if self.produced < params.min_tokens and self.stop_ids:
            row = row.copy()
            row[self.stop_ids] = -np.inf
        return row

    @property
    def on_host(self) -> bool:
        """Whether more is asked for than devices do: all but temperature and filters."""
        params = self.params
        return (
            self._counts is not None
            or self._bias is not None
            or self._matcher is not None
            or params.logprobs is not None
            or (self.produced < params.min_tokens and bool(self.stop_ids))
        )

    def uniform(self, produced: int, purpose: bytes = b"") -> float:
        """The number in [0, 1) that decides the draw after `produced` tokens.

        Those for different purposes are independent.
        """
        key = struct.pack("<QQQ", self.seed % 2**64, self.index, produced)
        digest = hashlib.blake2b(key, digest_size=8, person=purpose).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample(
    logits: Tensor, states: Items[SamplingState]
) -> tuple[list[int | Exception], list[TokenLogprob | None]]:
    """Draw a token for each row of `logits`, float32 [R, V], and say how likely it was if asked.

    A row that cannot be drawn from, as one with NaN, gives the exception in the token's place.
    """
    if all(state.takes_argmax for state in states):
        return likeliest(logits), [None] * len(states)
    tokens: list[int | Exception] = []
    logprobs: list[TokenLogprob | None] = []
    for row, state in zip(logits.cpu().numpy(), states, strict=True):
        token, logprob = sample_row(row, state)
        tokens.append(token)
        logprobs.append(logprob)
    return tokens, logprobs


def sample_row(
    row: np.ndarray, state: SamplingState, proposal: Proposal | None = None
) -> tuple[int | Exception, TokenLogprob | None]:
    """Draw a token from `row`, float32 [V], and say how likely it was if asked.

    With a proposal that was drawn from a distribution of its own, see `draw_or_accept`.
    """
    try:
        return _sample_row(row, state, proposal)
    except Exception as error:  # this sequence's; the others go on
        return error, None


def _sample_row(
    row: np.ndarray, state: SamplingState, proposal: Proposal | None
) -> tuple[int, TokenLogprob | None]:
    if math.isnan(row[row.argmax()]):  # which a grammar may hide
        raise ArithmeticError(NAN)
    params, adjusted = state.params, state.adjusted(row)
    if params.greedy:
        token = draw(adjusted, params, 0)
    elif proposal is None:
        token = draw(adjusted, params, state.uniform(state.produced))
    else:
        accept, residual = (state.uniform(state.produced, use) for use in (ACCEPT, RESIDUAL))
        token = draw_or_accept(probabilities(adjusted, params), *proposal, accept, residual)
    if params.logprobs is None:
        return token, None
    return token, log_probability(row, token, params.logprobs)


def draws_of(rows: Items[int], states: Items[tuple[SamplingState, int]]) -> Draws:
    """Arrays for a device: from `rows` of the logits, for each (state, tokens produced so far)."""
    settings = np.empty((len(states), 5))
    for row, (state, produced) in zip(settings, states, strict=True):
        p = state.params
        row[:] = (
            (0, 0, 0, 1, 0)
            if p.greedy
            else (state.uniform(produced), p.temperature, max(0, p.top_k), p.top_p, p.min_p)
        )
    uniform, temperature, top_k, top_p, min_p = settings.T
    return Draws(
        rows=np.array(rows, np.int64),
        uniform=uniform,
        temperature=temperature.clip(max=HOTTEST).astype(np.float32),
        top_k=top_k.clip(max=MOST_TOP_K).astype(np.int32),
        top_p=top_p.astype(np.float32),
        min_p=min_p.astype(np.float32),
    )


def log_probability(row: np.ndarray, token: int, top: int) -> TokenLogprob:
    """How likely a row of logits, float32 [V], makes `token`, and its `top` likeliest tokens.

    ArithmeticError for a row with NaN, or whose maximum is infinite.
    """
    highest = row.max()
    if not math.isfinite(highest):
        raise ArithmeticError(NAN if math.isnan(highest) else INFINITE)
    norm = highest + math.log(np.exp(row - highest).sum(dtype=np.float64))
    top = min(top, len(row))
    ids = np.argpartition(row, len(row) - top)[len(row) - top :] if top else np.empty(0, np.int64)
    ids = ids[np.lexsort((ids, -row[ids]))]  # likeliest first; of equals the smaller id
    pairs = zip(ids.tolist(), (row[ids] - norm).tolist(), strict=True)
    return TokenLogprob(token, float(row[token] - norm), tuple(pairs))


def likeliest(logits: Tensor) -> list[int | Exception]:
    """The likeliest token of each row of `logits`, float32 [R, V], or what is wrong with it."""
    if logits.device.type == "cpu":
        rows = logits.numpy()  # its argmax takes a tenth of torch's time
        tokens = rows.argmax(-1)  # the first NaN, if there is one
        highest = rows[np.arange(len(rows)), tokens]
    else:
        highest, tokens = (tensor.cpu().numpy() for tensor in logits.max(-1))
    if not np.isnan(highest).any():
        return tokens.tolist()
    return [
        ArithmeticError(NAN) if math.isnan(value) else int(token)
        for token, value in zip(tokens, highest, strict=True)
    ]


def draw(row: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """Draw from `row`, float32 [V], as temperature and filters say and as `uniform` decides.

    ArithmeticError for a row with NaN, or whose maximum is infinite; temperature 0 takes infinity.
    """
    top = _top(row)
    if params.greedy:
        return top
    return draw_from(_weights(row, top, params), uniform)


def draw_from(weights: np.ndarray, uniform: float) -> int:
    """Draw from a distribution by the inverse of its distribution function.

    weights  [V], which need not sum to 1
    uniform  in [0, 1)
    """
    cdf = weights.cumsum(dtype=np.float64)
    return int(cdf.searchsorted(uniform * cdf[-1], side="right"))


def probabilities(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution, float64 [V], that `draw` draws from where it is not greedy."""
    weights = _weights(row, _top(row), params).astype(np.float64)
    return weights / weights.sum()


def draw_or_accept(
    p: np.ndarray, proposed: int, q: np.ndarray, accept: float, residual: float
) -> int:
    """A draw from p that is `proposed`, a draw from q, as often as can be.

    p, q              float64 [V], each of sum 1
    accept, residual  in [0, 1), independent of each other and of what `proposed` was drawn by

    Accepted with probability min(1, p / q); otherwise drawn from max(p - q, 0), normalised.  What
    comes has the distribution p (Leviathan et al. 2023, arXiv:2211.17192, appendix A.1).
    """
    if accept * q[proposed] < p[proposed]:
        return proposed
    rest = np.maximum(p - q, 0)
    if not rest.any():  # p and q are equal but for rounding
        rest = p
    return draw_from(rest, residual)


def _top(row: np.ndarray) -> int:
    """The likeliest token, which must have a probability."""
    top = int(row.argmax())
    if math.isnan(row[top]):
        raise ArithmeticError(NAN)
    if row[top] == -math.inf:
        raise ArithmeticError("no token that is allowed has a probability above 0")
    return top


def _weights(row: np.ndarray, top: int, params: SamplingParams) -> np.ndarray:
    """Probabilities times some number, float32 [V]; `top` is the likeliest token."""
    if row[top] == math.inf:
        raise ArithmeticError(INFINITE)
    scaled = (row - row[top]) / np.float32(params.temperature)  # the likeliest has 0
    weights = np.exp(scaled)
    if (least := _least(scaled, weights, params)) > -math.inf:
        weights[scaled < least] = 0
    return weights


def _least(scaled: np.ndarray, weights: np.ndarray, params: SamplingParams) -> float:
    """The least logit that top_k, then top_p, then min_p keep.

    `scaled` [V] is at most 0, and `weights` [V] are its exponentials.
    """
    least = -math.inf
    if 0 < params.top_k < len(scaled):
        place = len(scaled) - params.top_k
        least = float(np.partition(scaled, place)[place])
    if params.top_p < 1:
        held = float(weights[scaled >= least].sum(dtype=np.float64))
        least = _least_of_nucleus(scaled, least, params.top_p * held)
    if params.min_p:
        least = max(least, math.log(params.min_p))
    return least


def _least_of_nucleus(scaled: np.ndarray, least: float, mass: float) -> float:
    """The least of the fewest logits, none below `least`, whose exponentials sum to `mass`.

    What is far below the likeliest is sorted only where the rest does not hold enough.
    """
    for floor in (max(least, NEAR), least):
        ordered = np.negative(scaled[scaled >= floor])
        ordered.sort()  # likeliest first
        held = np.exp(-ordered).cumsum(dtype=np.float64)
        if held[-1] >= mass:
            return -float(ordered[held.searchsorted(mass)])
    return least  # by rounding all of them fall short
