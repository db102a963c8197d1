"""From logits to tokens: penalties, temperature, top_k, top_p, min_p, one draw, log-probabilities.

A draw takes one uniform number, which is a hash of (seed, index of the output, tokens produced so
far), and inverts the distribution function with it.  So what a request draws depends neither on
the batch around it nor on its having been preempted, and no generator has a state to keep.  Every
operation works row by row, and rows that go through one call together differ in nothing but data.

Log-probabilities are the model's own: of the logits as they come, before penalties and temperature.
"""

from __future__ import annotations

import hashlib
import math
import struct
from array import array
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from compress.runtime.outputs import TokenLogprob
from compress.runtime.sampling_params import SamplingParams

CANDIDATES = 1024  # how many of the likeliest are sorted first where only top_p cuts


class SamplingState:
    """What draws the tokens of one sequence: settings, key, and counts where penalties want them.

    Everything is kept up token by token; nothing here takes longer as the context grows.
    """

    __slots__ = ("_counts", "_plain", "_seen", "index", "params", "produced", "seed", "stop_ids")

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        index: int,
        prompt: array[int],
        stop_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        self.params = params
        self.seed = seed
        self.index = index
        self.produced = 0
        self.stop_ids = torch.tensor(sorted(stop_ids)) if params.min_tokens else None
        self._counts: Tensor | None = None  # float32 [V], of the output
        self._seen: Tensor | None = None  # bool [V], in prompt or output
        if params.penalized:
            self._counts = torch.zeros(vocab_size)
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor(prompt)] = True
        self._plain = params.greedy and not params.penalized and params.logprobs is None

    @property
    def takes_argmax(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        return self._plain and self.produced >= self.params.min_tokens

    def record(self, token: int) -> None:
        """Count a token of the output."""
        self.produced += 1
        if self._counts is not None and self._seen is not None:
            self._counts[token] += 1
            self._seen[token] = True

    def adjust(self, row: Tensor) -> None:
        """Apply penalties and min_tokens to `row`, float32 [V], in place.

        Repetition as in CTRL (Keskar et al. 2019, section 4.1) with the sign rule of transformers;
        presence and frequency as in OpenAI's API.
        """
        if self._counts is not None and self._seen is not None:
            penalty = self.params.repetition_penalty
            penalized = torch.where(row > 0, row / penalty, row * penalty)
            row.copy_(torch.where(self._seen.to(row.device), penalized, row))
            counts = self._counts.to(row.device)
            row -= self.params.frequency_penalty * counts
            row -= self.params.presence_penalty * (counts > 0)
        if self.stop_ids is not None and self.produced < self.params.min_tokens:
            row[self.stop_ids] = -math.inf

    def uniform(self) -> float:
        """The number in [0, 1) that decides the next draw."""
        key = struct.pack("<QQQ", self.seed % 2**64, self.index, self.produced)
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53

    def cut(self, vocab_size: int) -> tuple[str, int]:
        """Which setting calls for sorted candidates, and how many of them are sorted at first."""
        if 0 < self.params.top_k < vocab_size:
            return "top_k", self.params.top_k
        if self.params.top_p < 1:
            return "top_p", min(CANDIDATES, vocab_size)
        return "none", vocab_size


def sample(
    logits: Tensor, states: Items[SamplingState]
) -> tuple[list[int], list[TokenLogprob | None]]:
    """Draw a token for each row of `logits`, float32 [R, V], and say how likely it was if asked."""
    none: list[TokenLogprob | None] = [None] * len(states)
    if all(state.takes_argmax for state in states):
        return logits.argmax(-1).tolist(), none
    adjusted = logits.clone()
    for row, state in zip(adjusted, states, strict=True):
        state.adjust(row)
    tokens: list[int] = adjusted.argmax(-1).tolist()
    groups: dict[tuple[str, int], list[int]] = {}
    for row, state in enumerate(states):
        if not state.params.greedy:
            groups.setdefault(state.cut(logits.shape[1]), []).append(row)
    for (cut, width), rows in groups.items():
        drawn = _draw(adjusted[rows], [states[row] for row in rows], cut, width)
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    asking = [row for row, state in enumerate(states) if state.params.logprobs is not None]
    if asking:
        chosen = [tokens[row] for row in asking]
        tops = [states[row].params.logprobs or 0 for row in asking]
        for row, entry in zip(asking, log_probabilities(logits[asking], chosen, tops), strict=True):
            none[row] = entry
    return tokens, none


def log_probabilities(
    logits: Tensor, tokens: list[int], tops: Items[int]
) -> list[TokenLogprob | None]:
    """How likely each row of `logits` [R, V] makes its token, and its `tops` likeliest."""
    logprobs = torch.log_softmax(logits, -1)
    most = min(max(tops), logits.shape[1])
    values, ids = (part.tolist() for part in logprobs.topk(most))
    own = logprobs[range(len(tokens)), tokens].tolist()
    return [
        TokenLogprob(token, own[row], tuple(zip(ids[row][:top], values[row][:top], strict=True)))
        for row, (token, top) in enumerate(zip(tokens, tops, strict=True))
    ]


def _draw(logits: Tensor, states: list[SamplingState], cut: str, width: int) -> list[int]:
    """Draw from each row of `logits` [R, V] as its state's temperature and filters say.

    `cut` and `width` are what `SamplingState.cut` gave, the same for all rows.
    """
    params = [state.params for state in states]
    temperature = _column([p.temperature for p in params], logits)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature  # the likeliest has 0
    ids, short = None, []
    if cut == "none":
        weights = scaled.double().exp()
    else:
        norm = scaled.logsumexp(-1, keepdim=True)
        scaled, ids = scaled.topk(width)  # [R, width], likeliest first
        weights = scaled.double().softmax(-1) if cut == "top_k" else (scaled - norm).double().exp()
        top_p = _column([p.top_p if p.top_p < 1 else math.inf for p in params], weights)
        held = weights.cumsum(-1)
        if cut == "top_p" and width < logits.shape[1]:
            short = (held[:, -1:] < top_p)[:, 0].nonzero()[:, 0].tolist()
        weights = weights * (held - weights < top_p)  # likelier tokens hold less than top_p
    least = _column([math.log(p.min_p) if p.min_p else -math.inf for p in params], scaled)
    cdf = (weights * (scaled >= least)).cumsum(-1)
    target = cdf[:, -1:] * _column([state.uniform() for state in states], cdf)
    places = torch.searchsorted(cdf, target, right=True)
    drawn = (places if ids is None else ids.gather(-1, places))[:, 0].tolist()
    if short:  # flat distributions: sort everything
        again = _draw(logits[short], [states[row] for row in short], cut, logits.shape[1])
        for row, token in zip(short, again, strict=True):
            drawn[row] = token
    return drawn


def _column(values: list[float], like: Tensor) -> Tensor:
    """`values` as a column [R, 1] in the dtype and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
