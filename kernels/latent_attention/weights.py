"""What multi-head latent attention has beside its linear layers: sizes, a norm, up-projections.

Letters: N query heads, P dimensions of a head's query that have no position, d those that are
turned, v dimensions of a head's value, R the rank of the latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentShape:
    """The sizes of a model's latent attention; the same in all layers.

    scale  what scores are multiplied with before the softmax
    """

    heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rank: int
    scale: float

    @property
    def query_dim(self) -> int:
        """Dimensions of a head of queries: first those without a position."""
        return self.nope_dim + self.rope_dim

    @property
    def cached_dim(self) -> int:
        """Numbers that a token leaves in the cache of a layer."""
        return self.rank + self.rope_dim


@dataclass(frozen=True)
class UpProjections:
    """What makes keys and values of latents, head by head.

    keys    [N, P, R]: a head's key without position is `keys[n] @ latent`
    values  [N, v, R]: its value is `values[n] @ latent`
    """

    keys: Tensor
    values: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> UpProjections:
        """In the dtype of the activations, rounded once."""
        return UpProjections(
            *(part.to(device, dtype).contiguous() for part in (self.keys, self.values))
        )

    @property
    def bytes(self) -> int:
        """What a step reads of them."""
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class LatentWeights:
    """A layer's latent attention, without the linear layers.

    gain  float32 [R], of the RMSNorm on latents
    eps   of that norm
    up    as a way of computing lays out UpProjections
    """

    gain: Tensor
    eps: float
    up: Any
