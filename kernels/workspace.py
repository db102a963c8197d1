"""Memory that kernels share on one device: partial results, and counters of who has arrived."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Grows on demand and never moves what it gave out, since CUDA graphs keep addresses.

    One stream at a time may use it: whatever a launch puts here is read by that launch, or by the
    next one in the same stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._current: dict[torch.dtype, Tensor] = {}
        self._outgrown: list[Tensor] = []

    def floats(self, count: int) -> Tensor:
        """float32 [>= count], not filled."""
        return self._of(torch.float32, count)

    def counters(self, count: int) -> Tensor:
        """int32 [>= count], all zero; a kernel leaves them so."""
        return self._of(torch.int32, count)

    def scratch(self, count: int, dtype: torch.dtype) -> Tensor:
        """[>= count] of a 16-bit or other dtype, not filled."""
        return self._of(dtype, count)

    def _of(self, dtype: torch.dtype, count: int) -> Tensor:
        current = self._current.get(dtype)
        if current is None or current.numel() < count:
            if current is not None:
                self._outgrown.append(current)
            current = torch.zeros(count, dtype=dtype, device=self.device)
            self._current[dtype] = current
        return current
