"""The weights of multi-head latent attention (DeepSeek's MLA), as the runtime computes with them.

    q = q_proj x,  or  q_b_proj norm(q_a_proj x)        heads of P dimensions, and d that are turned
    c, k = kv_a_proj_with_mqa x                         a latent of R numbers, a shared key of d
    K[n], V[n] = kv_b_proj norm(c)                      heads of P and of v dimensions

Rows are put in the order, and on the scale, that all ways of computing take:

- Where a checkpoint turns neighbouring dimensions (`rope_interleave`), its rows are sorted so that
  the i-th dimension is turned with the (d / 2 + i)-th: the same products in another order.
- Rows of latents are multiplied by a power of two that brings their largest weight to between 1
  and 2, and the epsilon of the norm behind them by its square, which changes no bit of what the
  norm gives in float32.  Conversions that switch this norm off have rows of some 2^-20 (ours do),
  of which float16 would make zeros.
- kv_b_proj is multiplied with queries and with sums, not with what it was quantized for, and in the
  first of these along its rows, where codes have no common scale.  So it is de-quantized here, to
  the values of its codes, and rounded once more to the activations' dtype, 2^-9 of a weight in
  bfloat16 where 4 bits left some 2^-4; inputs that a checkpoint would round before it are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.kernels.latent_attention import LatentShape, LatentWeights, UpProjections
from compress.kernels.lowbit_matmul import LinearWeight
from compress.runtime.stored import StoredModel


@dataclass(frozen=True)
class LatentLayer:
    """What a layer has beside the projection of its input, whose rows are q (or q_a), c and k.

    q_gain   float32 [q rank], of the norm on compressed queries; None where these are not
    q_eps    of that norm
    q_up     q_b_proj: a LinearWeight, or as a way of computing packs it; None with `q_gain`
    weights  what attention itself computes with
    apart    q_proj, or q_a_proj, where it has other bits than kv_a_proj_with_mqa and is not one
             linear with it, as `q_up`; None where it is
    """

    q_gain: Tensor | None
    q_eps: float
    q_up: Any
    weights: LatentWeights
    apart: Any = None


def latent_layer(
    stored: StoredModel, name: str, shape: LatentShape
) -> tuple[dict[str, LinearWeight], LatentLayer]:
    """The linears that read a layer's input, by name, and the rest of its attention, `name`."""
    module = stored.skeleton.get_submodule(name)
    interleaved = stored.skeleton.config.rope_interleave
    of_queries = _order(shape.heads, shape.nope_dim, shape.rope_dim, interleaved)
    compressed = module.q_lora_rank is not None
    first = "q_a_proj" if compressed else "q_proj"
    queries = stored.linear(f"{name}.{first}")
    q_gain, q_eps, q_up = None, 0.0, None
    if compressed:
        q_gain = stored.tensor(f"{name}.q_a_layernorm.weight", torch.float32)
        q_eps = module.q_a_layernorm.variance_epsilon
        q_up = stored.linear(f"{name}.q_b_proj").with_rows(of_queries)
    else:
        queries = queries.with_rows(of_queries)
    latents = stored.linear(f"{name}.kv_a_proj_with_mqa")
    factor = _factor(latents, shape.rank)
    latents = latents.with_rows(
        _order(1, shape.rank, shape.rope_dim, interleaved),
        torch.tensor([factor] * shape.rank + [1.0] * shape.rope_dim),
    )
    weights = LatentWeights(
        gain=stored.tensor(f"{name}.kv_a_layernorm.weight", torch.float32),
        eps=module.kv_a_layernorm.variance_epsilon * factor**2,
        up=_up(stored.linear(f"{name}.kv_b_proj"), shape),
    )
    layer = LatentLayer(q_gain, q_eps, q_up, weights)
    return {first: queries, "kv_a_proj_with_mqa": latents}, layer


def _order(heads: int, kept: int, turned: int, interleaved: bool) -> Tensor:
    """Rows of heads of `kept` dimensions and `turned` ones, so that halves are turned together."""
    head = list(range(kept + turned))
    if interleaved:
        head[kept:] = [*head[kept::2], *head[kept + 1 :: 2]]
    places = torch.arange(heads)[:, None] * (kept + turned) + torch.tensor(head)
    return places.flatten()


def _factor(latents: LinearWeight, rank: int) -> float:
    """The power of two that brings the largest weight of the latents' rows to between 1 and 2."""
    most = latents.with_rows(torch.arange(rank)).dequantize(torch.float32).abs().max().item()
    return 2.0 ** -math.floor(math.log2(most)) if 0 < most < math.inf else 1.0


def _up(linear: LinearWeight, shape: LatentShape) -> UpProjections:
    """kv_b_proj [N (P + v), R], in the dtype it is stored in, or float32 where it is quantized."""
    dtype = torch.float32 if linear.dense is None else linear.dense.dtype
    heads = linear.dequantize(dtype).view(shape.heads, -1, shape.rank)
    return UpProjections(*heads.split([shape.nope_dim, shape.value_dim], dim=1))
