"""Wrong rules of acceptance, each of which somebody has written once: a test must see them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

from compress.runtime import sampler
from compress.runtime.batch import Batch
from compress.runtime.sampler import draw_from

from .proposers import AtTemperatureOne, Draws, DrawsAgain, DrawsByAccept, DropsUnlikely
from .tiny_model import TinyModel

Accept = Callable[[np.ndarray, int, np.ndarray, float, float], int]


class StaleBonus(TinyModel):
    """As if what follows the last accepted token were drawn from the row before its own."""

    def forward(self, batch: Batch) -> Tensor:
        logits = super().forward(batch)
        places = batch.starts.numpy().searchsorted(batch.rows.numpy(), side="right")
        for row in range(len(places) - 1, 0, -1):
            last = row == len(places) - 1 or places[row] != places[row + 1]
            if last and places[row] == places[row - 1]:
                logits[row] = logits[row - 1]
        return logits


def _always(p: np.ndarray, proposed: int, q: np.ndarray, accept: float, residual: float) -> int:
    return proposed


def _by_p(p: np.ndarray, proposed: int, q: np.ndarray, accept: float, residual: float) -> int:
    return proposed if accept < p[proposed] else draw_from(np.maximum(p - q, 0), residual)


def _by_the_inverse(
    p: np.ndarray, proposed: int, q: np.ndarray, accept: float, residual: float
) -> int:
    accepted = accept * p[proposed] < q[proposed]
    return proposed if accepted and p[proposed] else draw_from(np.maximum(p - q, 0), residual)


def _not_subtracted(
    p: np.ndarray, proposed: int, q: np.ndarray, accept: float, residual: float
) -> int:
    return proposed if accept * q[proposed] < p[proposed] else draw_from(p, residual)


def _residual_of_q(
    p: np.ndarray, proposed: int, q: np.ndarray, accept: float, residual: float
) -> int:
    return proposed if accept * q[proposed] < p[proposed] else draw_from(q, residual)


RULES: dict[str, dict[str, Any]] = {
    "accept always": {"draw_or_accept": _always},
    "accept with p(d)": {"draw_or_accept": _by_p},
    "accept with q(d) / p(d)": {"draw_or_accept": _by_the_inverse},
    "residual from p, not p - q": {"draw_or_accept": _not_subtracted},
    "residual from q": {"draw_or_accept": _residual_of_q},
    "residual by the number that rejected": {"RESIDUAL": sampler.ACCEPT},
    "accept by the number that drafted": {},
    "q before the draft's temperature": {},
    "numbers that drafted draft again": {},
    "drafts end before an unlikely token": {},
    "next token from the row before": {},
}
PROPOSERS = {
    "accept by the number that drafted": DrawsByAccept,
    "q before the draft's temperature": AtTemperatureOne,
    "numbers that drafted draft again": DrawsAgain,
    "drafts end before an unlikely token": DropsUnlikely,
}


@contextmanager
def wrong(rule: str, vocab: int, seed: int) -> Iterator[tuple[TinyModel, Draws]]:
    """The model and a proposer of samples, under a wrong rule."""
    model = (StaleBonus if rule == "next token from the row before" else TinyModel)(vocab, seed)
    proposer = PROPOSERS.get(rule, Draws)(model, seed, samples=True)
    with patch.dict(vars(sampler), RULES[rule]):
        yield model, proposer
