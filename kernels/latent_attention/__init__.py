"""Attention on a paged cache of latents (multi-head latent attention)."""

from torch import Tensor

from compress.kernels.latent_attention import cpu, reference
from compress.kernels.latent_attention.weights import LatentShape, LatentWeights, UpProjections
from compress.kernels.paged_attention.cache import Blocks

__all__ = ["LatentShape", "LatentWeights", "UpProjections", "latent_attention"]


def latent_attention(
    q: Tensor,
    keys: Blocks,
    latents: Blocks,
    up: UpProjections,
    starts: Tensor,
    contexts: Tensor,
    block_tables: Tensor,
    scale: float,
) -> Tensor:
    """See reference.py; computed by cpu.py on a CPU."""
    chosen = cpu if q.device.type == "cpu" else reference
    return chosen.latent_attention(q, keys, latents, up, starts, contexts, block_tables, scale)
