"""Multi-head latent attention on a cache in blocks, in plain PyTorch, un-absorbed.

A token leaves two rows in the cache of a layer: its latent c of R numbers, normed, and one key k of
d numbers, turned by its position, which all heads share.  Keys and values of head n are made of
them by the up-projections U[n] [P, R] and V[n] [v, R]:

    s[n, j] = scale * (q[n, :P] · U[n] c[j] + q[n, P:] · k[j])
    out[n]  = sum_j softmax_j(s[n, j]) V[n] c[j]                         over the positions j <= p

The same numbers come of the latents themselves, with U[n] moved to the query and V[n] behind the
sum ("absorbed"), which is what the other implementations do where few tokens are new:

    s[n, j] = scale * (U[n]ᵀ q[n, :P] · c[j] + q[n, P:] · k[j]),   out[n] = V[n] sum_j w[n, j] c[j]

Of a token and a head, and a position that it sees, that takes 2 R + d products instead of
P + d + v, but no keys and values have to be made, R (P + v) products for a position and a head.

The cache is a pair of blocks as in paged_attention, each with one head: keys [blocks, 1, 16, d] and
latents [blocks, 1, 16, R], in the model's dtype or in 8 bits.  Scores and sums are in float32; the
result is rounded once.

Source: DeepSeek-AI, DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1 and appendix C.
"""

import torch
from torch import Tensor

from compress.kernels.latent_attention.weights import UpProjections
from compress.kernels.paged_attention.cache import Blocks
from compress.kernels.paged_attention.reference import gather, visible


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
    """Attention of new tokens, whose own latents and keys are in the cache already.

    q             [T, N, P + d], queries, the last d dimensions turned
    starts        int32 [S + 1], first token of each sequence in q; the last is T
    contexts      int32 [S], tokens of each sequence in the cache, new ones included
    block_tables  int32 [S, W], padded with any block

    Returns [T, N, v] in the dtype of q.
    """
    out = q.new_empty(*q.shape[:2], up.values.shape[1])
    for row, context in enumerate(contexts.tolist()):
        new = slice(int(starts[row]), int(starts[row + 1]))
        c, k = rows(latents, block_tables[row], context), rows(keys, block_tables[row], context)
        own = torch.einsum("npr,jr->njp", up.keys.float(), c)
        shared = k.expand(len(own), -1, -1)
        scores = torch.einsum("tnh,njh->ntj", q[new].float(), torch.cat([own, shared], dim=-1))
        seen = visible(new.stop - new.start, context, None, q.device)
        weights = (scores * scale).masked_fill(~seen, float("-inf")).softmax(dim=-1)
        values = torch.einsum("nvr,jr->njv", up.values.float(), c)
        out[new] = torch.einsum("ntj,njv->tnv", weights, values).to(q.dtype)
    return out


def rows(cache: Blocks, block_table: Tensor, context: int) -> Tensor:
    """What a sequence has in one part of the cache: float32 [context, R or d]."""
    numbers, scales = gather(cache, block_table, context)
    return (numbers if scales is None else numbers * scales[..., None])[0]
