"""The exact distribution of three tokens, by enumeration and by other people's code.

The probability of (a, b, c) is p(a) p(b | a) p(c | a, b), each from the logits of that prefix after
transformers' processors.  Presence and frequency penalties, which transformers lacks, are written
out here as OpenAI's reference has them.  None of the runtime's own sampling is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

LENGTH = 3  # tokens of an outcome, unless it ends before
Outcome = tuple[int, ...]
Rule = Callable[[tuple[int, ...]], list[int]]  # from an output to the tokens that may follow


@dataclass(frozen=True)
class Case:
    """Settings under which tokens are drawn: SamplingParams' own, and a rule for a grammar."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rule: Rule | None = None


def joint(
    logits_of: Callable[[Outcome], np.ndarray], prompt: list[int], first: int, case: Case
) -> dict[Outcome, float]:
    """Probability of each outcome of three tokens, or fewer where a stop or the rule ends it.

    logits_of  float32 [V] after an output that begins with `first`, itself left out
    first      the output's first token, which is certain
    """
    outcomes: dict[Outcome, float] = {(): 1.0}
    stops = set(case.settings.get("stop_token_ids", ()))
    for _ in range(LENGTH):
        prefixes = [
            known
            for known in outcomes
            if not stops.intersection(known) and (not case.rule or case.rule((first, *known)))
        ]
        scores = torch.from_numpy(np.stack([logits_of(known) for known in prefixes]))
        inputs = torch.tensor([[*prompt, first, *known] for known in prefixes])
        rows = processed(inputs, scores, len(prompt), case).double().softmax(-1).numpy()
        for known, row in zip(prefixes, rows, strict=True):
            before = outcomes.pop(known)
            for token in np.flatnonzero(row):
                outcomes[*known, int(token)] = before * float(row[token])
    return outcomes


def processed(inputs: Any, scores: Tensor, prompt: int, case: Case) -> Tensor:
    """Logits, float32 [B, V], after outputs of equal length; `inputs` int64 hold the prompt too."""
    s = {key: value for key, value in case.settings.items() if key not in ("seed", "logprobs")}
    chain = LogitsProcessorList()
    if "repetition_penalty" in s:
        chain.append(RepetitionPenaltyLogitsProcessor(s.pop("repetition_penalty")))
    presence, frequency = s.pop("presence_penalty", 0), s.pop("frequency_penalty", 0)
    if presence or frequency:
        chain.append(lambda ids, row: row - _taken(ids[:, prompt:], row, presence, frequency))
    if "logit_bias" in s:
        bias: Any = [[[token], float(value)] for token, value in s.pop("logit_bias").items()]
        chain.append(SequenceBiasLogitsProcessor(bias))
    if (rule := case.rule) is not None:
        chain.append(
            PrefixConstrainedLogitsProcessor(lambda _, ids: rule(tuple(ids[prompt:].tolist())), 1)
        )
    stops, least = list(s.pop("stop_token_ids", ())), s.pop("min_tokens", 0)
    if stops and least:
        chain.append(MinNewTokensLengthLogitsProcessor(prompt, least, stops, device="cpu"))
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    for name, warper in warpers.items():
        if name in s:
            chain.append(warper(s.pop(name)))
    assert not s, f"nothing here computes {', '.join(s)}"
    return chain(inputs, scores)


def _taken(output: Tensor, scores: Tensor, presence: float, frequency: float) -> Tensor:
    """What the two penalties take from each logit."""
    counts = torch.zeros_like(scores).scatter_add_(1, output, torch.ones(output.shape))
    return presence * (counts > 0) + frequency * counts
