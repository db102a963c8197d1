"""Paged attention on a CPU: sequences with one new token in batches, longer runs one by one.

One query reads each key once, so it is bound by memory and by the calls' overhead.
`scaled_dot_product_attention` takes some 60 microseconds for one query in bfloat16; two products in
float32 around a softmax take less and round less.  Sequences that fill about as many blocks are
padded to one size; the number of sizes grows with the logarithm of the context alone.  For runs of
tokens (prefill) `scaled_dot_product_attention` is the fast way, in the dtype of the queries; for it
the codes of a cache in 8 bits are multiplied with their scales, a sequence at a time.  Everywhere
else scales go into scores and weights.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.kernels.paged_attention.cache import Blocks, tensors_of
from compress.kernels.paged_attention.reference import by_kv_head, visible

Cache = tuple[Blocks, Blocks]


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
    """See reference.py.  Scores of prefill are in the dtype of q where they are 16-bit."""
    out = torch.empty_like(q)
    single: dict[int, list[int]] = {}  # number of blocks, as a power of two -> sequences
    cache = (k_cache, v_cache)
    block_size = tensors_of(k_cache)[0].shape[2]
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
    cache: Cache,
    block_tables: Tensor,
    contexts: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """One query [H] of N heads for each of S sequences: q [S, N, H] -> [S, N, H]."""
    _, kv_heads, block_size, _ = tensors_of(cache[0])[0].shape
    begins = torch.zeros_like(contexts) if window is None else (contexts - window).clamp(min=0)
    first_blocks = begins // block_size
    width = int(((contexts - 1) // block_size - first_blocks).max()) + 1
    columns = first_blocks[:, None] + torch.arange(width)  # [S, width], blocks of a sequence
    tables = block_tables.gather(1, columns.clamp(max=block_tables.shape[1] - 1).long())

    def gathered(part: Tensor) -> Tensor:  # [S, K, width * block_size, H], scales without H
        return part[tables].float().transpose(1, 2).flatten(2, 3)

    keys, *key_scales = map(gathered, tensors_of(cache[0]))
    values, *value_scales = map(gathered, tensors_of(cache[1]))
    places = first_blocks[:, None] * block_size + torch.arange(width * block_size)
    hidden = (places >= contexts[:, None]) | (places < begins[:, None])  # [S, positions]
    queries = q.float().unflatten(1, (kv_heads, -1))  # [S, K, N / K, H]
    scores = (queries * scale) @ keys.transpose(-1, -2)
    for scales in key_scales:
        scores *= scales[:, :, None]
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(dim=-1)
    # What lies beyond a context was never written: a NaN there would survive a weight of zero.
    for scales in value_scales:
        weights *= scales.masked_fill(hidden[:, None], 0)[:, :, None]
    values = values.masked_fill(hidden[:, None, :, None], 0)
    return (weights @ values).flatten(1, 2).to(q.dtype)


def _lone(
    q: Tensor,
    cache: Cache,
    block_table: Tensor,
    context: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """One query of one sequence, which needs no mask: q [N, H] -> [N, H]."""
    (keys, *key_scales), (values, *value_scales), length = _spanned(
        cache, block_table, context, window or context
    )
    begin = 0 if window is None else max(0, length - window)
    queries = (q.float() * scale).unflatten(0, (len(keys), -1))  # [K, N / K, H]
    scores = queries @ keys[:, begin:].float().transpose(1, 2)  # [K, N / K, positions]
    for scales in key_scales:
        scores *= scales[:, None, begin:]
    weights = scores.softmax(dim=-1)
    for scales in value_scales:
        weights *= scales[:, None, begin:]
    return (weights @ values[:, begin:].float()).flatten(0, 1).to(q.dtype)


def _run(
    q: Tensor,
    cache: Cache,
    block_table: Tensor,
    context: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of the last t tokens of one sequence: q [t, N, H] -> [t, N, H]."""
    reach = context if window is None else window + len(q) - 1
    *parts, length = _spanned(cache, block_table, context, reach)
    keys, values = (
        part[0].to(q.dtype)
        if len(part) == 1
        else (part[0].float() * part[1][..., None]).to(q.dtype)
        for part in parts
    )
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
    cache: Cache, block_table: Tensor, context: int, reach: int
) -> tuple[list[Tensor], list[Tensor], int]:
    """Keys and values [K, length, H] of a sequence's last blocks, which hold its last `reach`
    positions, each with its scales [K, length] if it is codes; and the length, up to one block
    more than `reach`.
    """
    block_size = tensors_of(cache[0])[0].shape[2]
    first = max(0, context - reach) // block_size
    blocks = block_table[first : -(-context // block_size)]
    length = context - first * block_size
    keys, values = (
        [part[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for part in tensors_of(blocks_of)]
        for blocks_of in cache
    )
    return keys, values, length
