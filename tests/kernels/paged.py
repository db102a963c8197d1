"""Batches on a paged cache, and attention in float64 to judge by."""

import torch
from torch.nn import functional as F

from compress.kernels.paged_attention import write_kv
from compress.kernels.paged_attention.cache import QuantizedBlocks, quantize

BLOCK = 16


def make(sequences, heads, kv_heads, head_dim, dtype, seed=0, codes=None):
    """Sequences of (tokens before, new tokens): a batch on a cache that is NaN where not written.

    Returns the arguments of paged_attention, up to block_tables, and the contiguous (k, v) of each:
    with `codes`, what these stand for.  The sizes of rows then differ a thousandfold.
    """
    generator = torch.Generator().manual_seed(seed)
    contexts = [before + new for before, new in sequences]
    counts = [-(-context // BLOCK) for context in contexts]
    free = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    k_cache = torch.full((len(free), kv_heads, BLOCK, head_dim), float("nan"), dtype=dtype)
    v_cache = k_cache.clone()
    if codes:
        k_cache, v_cache = (
            QuantizedBlocks(
                codes,
                torch.randint(0, 126, k_cache.shape, dtype=torch.uint8).view(codes.dtype),
                torch.full(k_cache.shape[:3], float("nan")),
            )
            for _ in range(2)
        )
    tables = torch.zeros(len(sequences), max(counts) + 1, dtype=torch.int32)
    contiguous = []
    for row, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        k, v = torch.randn(2, context, kv_heads, head_dim, generator=generator).to(dtype)
        places = torch.arange(context)
        slots = tables[row, places // BLOCK].long() * BLOCK + places % BLOCK
        if codes:
            size = 10 ** (-3 * torch.rand(2, context, kv_heads, 1, generator=generator))
            k, v = (x.float() * by for x, by in zip((k, v), size, strict=True))
        write_kv(k_cache, v_cache, k, v, slots)
        if codes:
            k, v = (
                held.double() * scales.double()[..., None]
                for held, scales in (quantize(x, codes) for x in (k, v))
            )
        contiguous.append((k, v))
    new = torch.tensor([0] + [new for _, new in sequences])
    starts = new.cumsum(0).to(torch.int32)
    q = torch.randn(int(starts[-1]), heads, head_dim, generator=generator).to(dtype)
    batch = (q, k_cache, v_cache, starts, torch.tensor(contexts, dtype=torch.int32), tables)
    return batch, contiguous


def plain(q, k, v, scale, window):
    """One sequence in float64: q [t, N, H], k and v [context, K, H]."""
    context, times = len(k), q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(times, dim=1) for x in (k, v))
    positions = torch.arange(context)
    distance = positions[context - len(q) :, None] - positions
    seen = (distance >= 0) & (distance < (window or context))
    arguments = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(*arguments, attn_mask=seen, scale=scale).transpose(0, 1)
