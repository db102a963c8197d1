"""Paged attention on a CPU: sequences with one new token in batches, longer runs one by one.

One query reads each key once, so it is bound by memory and by the calls' overhead.
`scaled_dot_product_attention` takes some 60 microseconds for one query in bfloat16; two products in
float32 around a softmax take less and round less.  Sequences that fill about as many blocks are
padded to one size; the number of sizes grows with the logarithm of the context alone.  For runs of
tokens (prefill) `scaled_dot_product_attention` is the fast way, in the dtype of the queries.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.kernels.paged_attention.reference import by_kv_head, visible


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    contexts: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See reference.py.  Scores of prefill are in the dtype of q where they are 16-bit."""
    out = torch.empty_like(q)
    single: dict[int, list[int]] = {}  # number of blocks, as a power of two -> sequences
    cache = (k_cache, v_cache)
    block_size = k_cache.shape[2]
    firsts = starts.tolist()
    for row, context in enumerate(contexts.tolist()):
        first, last = firsts[row], firsts[row + 1]
        if last - first == 1:
            seen = context if window is None else min(context, window)
            single.setdefault((seen // block_size).bit_length(), []).append(row)
        else:
            out[first:last] = _run(q[first:last], cache, block_tables[row], context, scale, window)
    for rows in single.values():
        if len(rows) == 1:
            (row,) = rows
            place = firsts[row]
            context = int(contexts[row])
            out[place] = _lone(q[place], cache, block_tables[row], context, scale, window)
            continue
        chosen = torch.tensor(rows)
        places = starts[chosen]
        out[places] = _singles(
            q[places], cache, block_tables[chosen], contexts[chosen], scale, window
        )
    return out


def _singles(
    q: Tensor,
    cache: tuple[Tensor, Tensor],
    block_tables: Tensor,
    contexts: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """One query [H] of N heads for each of S sequences: q [S, N, H] -> [S, N, H]."""
    _, kv_heads, block_size, head_dim = cache[0].shape
    begins = torch.zeros_like(contexts) if window is None else (contexts - window).clamp(min=0)
    first_blocks = begins // block_size
    width = int(((contexts - 1) // block_size - first_blocks).max()) + 1
    columns = first_blocks[:, None] + torch.arange(width)  # [S, width], blocks of a sequence
    tables = block_tables.gather(1, columns.clamp(max=block_tables.shape[1] - 1).long())

    def gathered(part: Tensor) -> Tensor:  # [S, K, width * block_size, H]
        return part[tables].float().transpose(1, 2).reshape(len(q), kv_heads, -1, head_dim)

    places = first_blocks[:, None] * block_size + torch.arange(width * block_size)
    hidden = (places >= contexts[:, None]) | (places < begins[:, None])  # [S, positions]
    queries = q.float().unflatten(1, (kv_heads, -1))  # [S, K, N / K, H]
    scores = (queries * scale) @ gathered(cache[0]).transpose(-1, -2)
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(dim=-1)
    # What lies beyond a context was never written: a NaN there would survive a weight of zero.
    values = gathered(cache[1]).masked_fill(hidden[:, None, :, None], 0)
    return (weights @ values).flatten(1, 2).to(q.dtype)


def _lone(
    q: Tensor,
    cache: tuple[Tensor, Tensor],
    block_table: Tensor,
    context: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """One query of one sequence, which needs no mask: q [N, H] -> [N, H]."""
    keys, values, length = _spanned(cache, block_table, context, window or context)
    begin = 0 if window is None else max(0, length - window)
    queries = (q.float() * scale).unflatten(0, (len(keys), -1))  # [K, N / K, H]
    weights = (queries @ keys[:, begin:].float().transpose(1, 2)).softmax(dim=-1)
    return (weights @ values[:, begin:].float()).flatten(0, 1).to(q.dtype)


def _run(
    q: Tensor,
    cache: tuple[Tensor, Tensor],
    block_table: Tensor,
    context: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of the last t tokens of one sequence: q [t, N, H] -> [t, N, H]."""
    reach = context if window is None else window + len(q) - 1
    keys, values, length = _spanned(cache, block_table, context, reach)
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    queries = by_kv_head(q, len(keys))  # [K, N / K, t, H]
    shape = (len(keys), queries.shape[1], -1, -1)
    attended = F.scaled_dot_product_attention(
        queries,
        keys[:, None].expand(shape),
        values[:, None].expand(shape),
        attn_mask=visible(len(q), length, window, q.device),
        scale=scale,
    )
    return attended.flatten(0, 1).transpose(0, 1)


def _spanned(
    cache: tuple[Tensor, Tensor], block_table: Tensor, context: int, reach: int
) -> tuple[Tensor, Tensor, int]:
    """Keys and values [K, length, H] of a sequence's last blocks, which hold its last `reach`
    positions, and the length: up to one block more than that.
    """
    block_size = cache[0].shape[2]
    first = max(0, context - reach) // block_size
    blocks = block_table[first : -(-context // block_size)]
    length = context - first * block_size
    keys, values = (part[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for part in cache)
    return keys, values, length
