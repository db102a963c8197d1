"""Latent attention on a CPU by PyTorch: absorbed for few new tokens, un-absorbed for many.

reference.py has both forms and what they cost.  A sequence with t new tokens is attended
un-absorbed where t (2 R - P - v) > R (P + v): where what is saved on each position outweighs making
its keys and values.  Then `scaled_dot_product_attention` does it in the dtype of the queries; else
two products in float32 around a softmax.  Sequences go one by one.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.kernels.latent_attention.reference import rows
from compress.kernels.latent_attention.weights import UpProjections
from compress.kernels.paged_attention.cache import Blocks
from compress.kernels.paged_attention.reference import visible


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
    """See reference.py.  Scores of long runs are in the dtype of q where that is 16-bit."""
    out = q.new_empty(*q.shape[:2], up.values.shape[1])
    firsts = starts.tolist()
    for row, context in enumerate(contexts.tolist()):
        new = slice(firsts[row], firsts[row + 1])
        c, k = rows(latents, block_tables[row], context), rows(keys, block_tables[row], context)
        attend = _unabsorbed if expanding_pays(new.stop - new.start, up) else _absorbed
        out[new] = attend(q[new], c, k, up, scale)
    return out


def expanding_pays(new: int, up: UpProjections) -> bool:
    """Whether `new` tokens of a sequence are attended un-absorbed."""
    _, nope, rank = up.keys.shape
    made = nope + up.values.shape[1]
    return new * (2 * rank - made) > rank * made


def _absorbed(q: Tensor, c: Tensor, k: Tensor, up: UpProjections, scale: float) -> Tensor:
    """q [t, N, P + d], c [context, R], k [context, d] in float32 -> [t, N, v] in the dtype of q."""
    q = q.float().transpose(0, 1) * scale  # [N, t, P + d]
    nope, turned = q.split([up.keys.shape[1], k.shape[1]], dim=-1)
    scores = (nope @ up.keys.float()) @ c.T + turned @ k.T
    if q.shape[1] > 1:
        seen = visible(q.shape[1], len(c), None, q.device)
        scores = scores.masked_fill(~seen, float("-inf"))
    heads = (scores.softmax(dim=-1) @ c) @ up.values.float().transpose(1, 2)  # [N, t, v]
    return heads.transpose(0, 1)


def _unabsorbed(q: Tensor, c: Tensor, k: Tensor, up: UpProjections, scale: float) -> Tensor:
    """As `_absorbed`."""
    c, k = c.to(q.dtype), k.to(q.dtype)
    own = c @ up.keys.to(q.dtype).transpose(1, 2)  # [N, context, P]
    values = c @ up.values.to(q.dtype).transpose(1, 2)  # [N, context, v]
    heads = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        torch.cat([own, k.expand(len(own), -1, -1)], dim=-1)[None],
        values[None],
        attn_mask=visible(len(q), len(c), None, q.device),
        scale=scale,
    )
    return heads[0].transpose(0, 1)
