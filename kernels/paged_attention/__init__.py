"""Attention on a paged cache of keys and values."""

from torch import Tensor

from compress.kernels.paged_attention import cpu, reference
from compress.kernels.paged_attention.cache import Blocks
from compress.kernels.paged_attention.reference import write_kv

__all__ = ["paged_attention", "write_kv"]


def paged_attention(
    q: Tensor,
    k_cache: Blocks,
    v_cache: Blocks,
    starts: Tensor,
    contexts: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See reference.py; computed by cpu.py on a CPU."""
    chosen = cpu if q.device.type == "cpu" else reference
    return chosen.paged_attention(
        q, k_cache, v_cache, starts, contexts, block_tables, scale, window
    )
