"""Outputs that start as NaN between margins that must stay as they are."""

import torch
from torch import Tensor

MARGIN = 64
SENTINEL = 7


class Guard:
    """Stands in for torch.empty and torch.empty_like; `check` looks at what was written beside."""

    def __init__(self) -> None:
        self._made: list[Tensor] = []

    def empty(self, *shape, dtype=torch.float32, device=None) -> Tensor:
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        whole = torch.full((shape.numel() + 2 * MARGIN,), SENTINEL, dtype=dtype, device=device)
        self._made.append(whole)
        inner = whole[MARGIN : len(whole) - MARGIN]
        return inner.fill_(float("nan")).view(shape)

    def empty_like(self, x: Tensor) -> Tensor:
        return self.empty(x.shape, dtype=x.dtype, device=x.device)

    def check(self) -> None:
        assert self._made
        for whole in self._made:
            assert (whole[:MARGIN] == SENTINEL).all()
            assert (whole[-MARGIN:] == SENTINEL).all()
