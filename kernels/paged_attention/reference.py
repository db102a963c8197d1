"""Causal attention on a cache in blocks, in plain PyTorch, one sequence after another.

The cache is `k` and `v`, each [num_blocks, K, block_size, H] in the model's dtype (K heads of keys
and values, H dimensions of a head).  Token p of a sequence lies in block `block_table[p //
block_size]` at offset `p % block_size`.  A query at position p of head n sees the positions
j <= p, and with a window only j > p - window:

    out[n] = sum_j softmax_j(scale * q[n] · k[j, n // (N / K)]) v[j, n // (N / K)]

Scores, softmax and sums are in float32; the result is rounded once.  A cache in 8 bits (cache.py)
is never widened as a whole: with codes c and scales s of keys and values,

    out[n] = sum_j softmax_j(scale * sk[j] * q[n] · ck[j]) sv[j] cv[j]

Source: Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention, 2023,
arXiv:2309.06180; grouped queries, Ainslie et al., 2023, arXiv:2305.13245.
"""

import torch
from torch import Tensor

from compress.kernels.paged_attention.cache import Blocks, quantize, tensors_of


def write_kv(k_cache: Blocks, v_cache: Blocks, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Put keys and values [T, K, H] of new tokens in their places, in the cache's dtype.

    slots  int64 [T], block * block_size + offset
    """
    for cache, new in ((k_cache, k), (v_cache, v)):
        block_size = tensors_of(cache)[0].shape[2]
        blocks, offsets = slots // block_size, slots % block_size
        if isinstance(cache, Tensor):
            cache[blocks, :, offsets] = new.to(cache.dtype)
        else:
            codes, scales = quantize(new, cache.kind, cache.fixed)
            cache.codes[blocks, :, offsets] = codes
            cache.scales[blocks, :, offsets] = scales


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
    """Attention of new tokens, whose own keys and values are in the cache already.

    q             [T, N, H], queries, one sequence after another
    starts        int32 [S + 1], first token of each sequence in q; the last is T
    contexts      int32 [S], tokens of each sequence in the cache, new ones included
    block_tables  int32 [S, W], padded with any block
    window        tokens that a query sees, itself included; None for all

    Returns [T, N, H] in the dtype of q.
    """
    out = torch.empty_like(q)
    for row, context in enumerate(contexts.tolist()):
        first, last = int(starts[row]), int(starts[row + 1])
        keys, key_scales = gather(k_cache, block_tables[row], context)  # [K, context, H]
        values, value_scales = gather(v_cache, block_tables[row], context)
        queries = by_kv_head(q[first:last].float(), keys.shape[0])  # [K, N / K, t, H]
        scores = queries @ keys[:, None].transpose(-1, -2) * scale  # [K, N / K, t, context]
        if key_scales is not None:
            scores *= key_scales[:, None, None]
        seen = visible(last - first, context, window, q.device)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        if value_scales is not None:
            weights = weights * value_scales[:, None, None]
        heads = (weights @ values[:, None]).flatten(0, 1)  # [N, t, H]
        out[first:last] = heads.transpose(0, 1).to(q.dtype)
    return out


def gather(cache: Blocks, block_table: Tensor, context: int) -> tuple[Tensor, Tensor | None]:
    """Keys or values of one sequence, float32 [K, context, H], and the scales [K, context] that
    codes are to be multiplied with.
    """

    def rows(part: Tensor) -> Tensor:
        blocks = -(-context // part.shape[2])
        return part[block_table[:blocks]].transpose(0, 1).flatten(1, 2)[:, :context].float()

    if isinstance(cache, Tensor):
        return rows(cache), None
    return rows(cache.codes), rows(cache.scales)


def by_kv_head(q: Tensor, kv_heads: int) -> Tensor:
    """Queries [t, N, H] -> [K, N / K, t, H]: those that share a head of keys together."""
    return q.transpose(0, 1).unflatten(0, (kv_heads, -1))


def visible(count: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """bool [count, context]: what the last `count` of `context` positions see."""
    places = torch.arange(context, device=device)
    queries = places[context - count :, None]
    seen = places <= queries
    return seen if window is None else seen & (places > queries - window)
