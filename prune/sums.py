"""Sums over tokens of what runs through a block, by name: what a walk keeps where it observes."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.core.processes import Processes


@dataclass
class Sums:
    """Sums in float64; `what` names their place where they are not finite."""

    what: str
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, found: Tensor) -> None:
        """Add to a sum."""
        found = found.detach().double()
        self.sums[name] = self.sums[name] + found if name in self.sums else found

    def pool(self, processes: Processes) -> None:
        """Take in what the other processes saw."""
        processes.add(*self.sums.values())

    def is_finite(self) -> bool:
        """Whether nothing was NaN or infinite."""
        return all(bool(torch.isfinite(found).all()) for found in self.sums.values())
