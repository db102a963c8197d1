"""An exponential moving average of what is trained.

    average <- average + (1 - d_s) (weights - average),   d_s = min(decay, (1 + s) / (10 + s))

after step s = 0, 1, ...; the smaller decay of the first steps lets the start be forgotten (as in
TensorFlow's ExponentialMovingAverage with num_updates).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """Of parameters that are trained; it begins as a copy of them.  Sharded ones stay sharded."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters: list[Any] = list(parameters)
        self.decay = decay
        self.averages: list[Tensor] = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after an optimizer step, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self.averages, self.parameters, 0)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their averages."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages in the place of the weights, for a while."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
