"""Multi-head latent attention in place of attention with K heads of keys and values (MLA).

A query head i of KV head j has the logits  Re sum_p conj(q[i, p]) k[j, p] e^{iθ_p Δ}:  two channels
that RoPE turns by one angle are a complex number, p counts these pairs, and Δ is the distance.
MLA keeps two things of a token: one key of d channels that all heads share and RoPE turns, and a
latent of R numbers, which RoPE does not touch, from which every head's other keys and its values
are made:

    logits  = Re sum_{(p, c) kept} conj(q[i, p]) b[c, j, p] z[c, p] e^{iθ_p Δ}
              + Re sum_p conj(q[i, p]) g[i, p] n[j, p],        n = B_k y,  v = B_v y

Where the rotation goes.  For each pair p the K keys k[j, p] become as many components
z[c, p] = sum_j a[c, j, p] k[j, p], by the eigenvectors of their complex covariance.  A factor on a
whole pair commutes with RoPE, so that d = K H and R = K H lose nothing.  (TransMLA, Meng et al.,
arXiv 2502.07864, turns a model's heads so that the first one takes most of it.)  Here the keys
are weighted by what is lost without rotation, so an eigenvalue is the loss of leaving its component
in place, and the d / 2 components with the largest ones are kept.  All layers share one list of
frequencies, which any may be in several times: so the losses are summed over layers.

What is lost without rotation.  A softmax with logits e + δ in place of e changes, to second order,
by half the variance of δ under its own probabilities.  The component's logits after RoPE, A, and
those without, B + iC, have a 3 x 3 covariance; the constant factor g with the least
Var(A - Re g (B + iC)) is a small least squares problem, and its rest is the loss.

The latent.  What is left of the keys, n, and v are linear in x = (k, v); y are the first R
principal components of both together, in the metric of what they do to the output: for values
G[j] = sum_{i of j} Wo[i]ᵀ Wo[i], for keys the second moment of the queries as they meet n, times
the spread of the values that the attention mixes, tr(G Cov v), and BALANCE.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.prune.attention import AttentionWeights, Pairs

# An error of a key counts less than if the values that its weight moves were any two: attention
# that is sharp, or that looks at like values, forgives it.  SmolLM2 to 128 + 32 numbers without
# refit, KL: 3.69 with 4, 2.41 with 1, 1.68 with 1/4, 1.71 with 1/16, 1.72 with 1/64.  What the
# attention forgives measured head by head (squares of its weights, distances of values) was not
# better: 1.91 with the best of three factors.
BALANCE = 1 / 8
# Of the mean: floor of weights and metrics, which are divided by, and what is added to moments,
# which are sums of float32 products: below this their order is noise.
LEAST_SHARE = 1e-6


@dataclass(frozen=True)
class LatentMoments:
    """What a conversion asks of a block; P pairs, K KV heads, N query heads, H head dim.

    keys      complex128 [P, K, K], E k[j, p] conj(k[l, p])
    loss      float64 [N, P], of the logits where pair p is not turned
    constant  complex128 [N, P], g
    joint     float64 [2 K H, 2 K H], E x xᵀ of the keys before RoPE, then the values
    queries   float64 [N, H, H], E q qᵀ before RoPE, in units of logits
    spread    float64 [N], mean square of what a head's values put out, without its mean
    metric    float64 [K, H, H], G
    all_queries  float64 [N H, N H], E q qᵀ; None where queries stay as they are
    """

    keys: Tensor
    loss: Tensor
    constant: Tensor
    joint: Tensor
    queries: Tensor
    spread: Tensor
    metric: Tensor
    all_queries: Tensor | None = None


@dataclass(frozen=True)
class Concentrated:
    """The components of each pair of channels, by what they lose without rotation, most first.

    lost     float64 [P, K]
    key_in   complex128 [P, K, K], a, of component and head
    key_out  complex128 [P, K, K], b, of component and head
    """

    lost: Tensor
    key_in: Tensor
    key_out: Tensor


@dataclass(frozen=True)
class Latent:
    """A token's latent from its keys and values, and back.

    of_x    float64 [R, 2 K H], y = of_x x
    keys    float64 [K, H, R], B_k
    values  float64 [K, H, R], B_v
    lost    shares of the energy of keys without rotation, and of values, in their metrics
    """

    of_x: Tensor
    keys: Tensor
    values: Tensor
    lost: tuple[float, float]


def weight_moments(weights: AttentionWeights, pairs: Pairs) -> LatentMoments:
    """Moments as if all inputs were independent and all outputs counted the same: of a plain
    singular value decomposition of the weights."""
    keys = pairs.to_complex(weights.k[..., :-1])
    moment = torch.einsum("jpx,lpx->pjl", keys, keys.conj())
    stacked = torch.cat([weights.k.flatten(0, 1), weights.v.flatten(0, 1)])[:, :-1]
    queries = weights.q[..., :-1].flatten(0, 1)
    heads, head_dim, _ = weights.q.shape
    eye = torch.eye(head_dim, dtype=torch.float64)
    group = heads // len(weights.k)
    own = moment.diagonal(dim1=1, dim2=2).real.T  # [K, P]
    return LatentMoments(
        keys=moment,
        loss=(own / group).repeat_interleave(group, 0),
        constant=torch.ones(heads, len(moment), dtype=torch.complex128),
        joint=(stacked @ stacked.T),
        queries=(eye / group).expand(heads, head_dim, head_dim),
        spread=torch.ones(heads, dtype=torch.float64),
        metric=eye.expand(len(weights.k), head_dim, head_dim),
        all_queries=(queries @ queries.T),
    )


def concentrate(moments: LatentMoments) -> Concentrated:
    """The components of each pair."""
    pairs, kv_heads, _ = moments.keys.shape
    own = moments.keys.diagonal(dim1=1, dim2=2).real  # [P, K]
    loss = (moments.spread[:, None] * moments.loss).view(kv_heads, -1, pairs).sum(1).T
    weight = _floored(loss / own.clamp_min(torch.finfo(own.dtype).tiny))
    root = weight.sqrt()
    lost, vectors = torch.linalg.eigh(root[:, :, None] * moments.keys * root[:, None, :])
    lost, vectors = lost.flip(-1).clamp_min(0), vectors.flip(-1).mT  # [P, c, j]
    key_in, key_out = vectors.conj() * root[:, None], vectors / root[:, None]
    size = torch.einsum("pcj,pjl,pcl->pc", key_in, moments.keys, key_in.conj()).real
    scale = own.mean(1, keepdim=True) / size  # a component is as large as a key
    scale = torch.where((size > 0) & (scale > 0), scale, 1.0).sqrt()[..., None]
    return Concentrated(lost, key_in * scale, key_out / scale)


def _floored(weight: Tensor) -> Tensor:
    """Weights that can be divided by, [P, K]; where there are none, equal ones."""
    mean = weight.mean(1, keepdim=True)
    return torch.where(mean > 0, weight.clamp_min(LEAST_SHARE * mean), 1.0)


def shared_pairs(lost: Sequence[Tensor], count: int, turned: int) -> list[int]:
    """How many components of each pair keep RoPE, in every layer: those whose loss, summed over
    layers, is largest.

    lost    of each layer, [P, K]
    count   of components in all
    turned  pairs that RoPE turns, the first ones
    """
    total = torch.stack([one / one.sum().clamp_min(1e-300) for one in lost]).sum(0)
    pairs, kv_heads = total.shape
    total[turned:] = -1
    picked = total.flatten().argsort(descending=True, stable=True)[:count] // kv_heads
    return torch.bincount(picked, minlength=pairs).tolist()


def unturned(found: Concentrated, kept: Sequence[int]) -> Tensor:
    """What of the keys is not kept with RoPE, as a map of a pair's K keys: complex128 [P, K, K]."""
    pairs, kv_heads, _ = found.key_in.shape
    is_kept = torch.arange(kv_heads)[None] < torch.tensor(kept)[:, None]  # [P, c]
    taken = torch.einsum(
        "pcj,pc,pcl->pjl", found.key_out, is_kept.to(torch.complex128), found.key_in
    )
    return torch.eye(kv_heads, dtype=torch.complex128).expand(pairs, -1, -1) - taken


def latent(moments: LatentMoments, rest: Tensor, pairs: Pairs, rank: int) -> Latent:
    """The latent of `rank` numbers; `rest` is what `unturned` gives."""
    kv_heads, head_dim, _ = moments.metric.shape
    width = kv_heads * head_dim
    parts = (slice(0, width), slice(width, None))
    onto = torch.eye(2 * width, dtype=torch.float64)
    keys = pairs.to_complex(torch.eye(width, dtype=torch.float64).view(kv_heads, head_dim, width))
    turned = pairs.to_real(torch.einsum("pjl,lpx->jpx", rest, keys))
    onto[:width, :width] = turned.reshape(width, width)  # x -> (n, v)
    metrics = torch.cat([BALANCE * _key_metric(moments, pairs), moments.metric])
    into, back = _roots(metrics)
    into, back = torch.block_diag(*into), torch.block_diag(*back)
    joint = torch.block_diag(*(_ridge(moments.joint[at, at]) for at in parts)) + moments.joint
    target = onto @ joint @ onto.T
    weighted = into @ target @ into.T
    power = weighted.trace()
    first = torch.linalg.eigh(weighted).eigenvectors[:, -rank:].flip(-1)
    of_x, out = _sized(first.T @ into @ onto, back @ first, moments.joint)
    lost = weighted - first @ (first.T @ weighted)
    shares = [_share(lost[at, at].trace(), weighted[at, at].trace(), power) for at in parts]
    heads = out.view(2, kv_heads, head_dim, rank)
    return Latent(of_x, heads[0], heads[1], (shares[0], shares[1]))


def fewer_queries(moments: LatentMoments, rank: int) -> tuple[Tensor, Tensor]:
    """All heads' queries as `rank` numbers, [r, N H], and back, [N H, r].

    Principal components in the metric of the keys that a head's queries meet, times the spread of
    the values that they mix.
    """
    assert moments.all_queries is not None
    kv_heads, head_dim, _ = moments.metric.shape
    heads = len(moments.spread)
    keys = moments.joint[: kv_heads * head_dim, : kv_heads * head_dim]
    keys = keys.view(kv_heads, head_dim, kv_heads, head_dim)
    metric = torch.einsum("jajb->jab", keys).repeat_interleave(heads // kv_heads, 0)
    into, back = _roots(moments.spread[:, None, None] * metric)
    into, back = torch.block_diag(*into), torch.block_diag(*back)
    moment = moments.all_queries + _ridge(moments.all_queries)
    weighted = into @ moment @ into.T
    first = torch.linalg.eigh(weighted).eigenvectors[:, -rank:].flip(-1)
    return _sized(first.T @ into, back @ first, moments.all_queries)


def _ridge(moment: Tensor) -> Tensor:
    return LEAST_SHARE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def _share(lost: Tensor, whole: Tensor, power: Tensor) -> float:
    """What is lost of a part; nothing where the part is rounding beside the power of all."""
    return max(float(lost / whole), 0.0) if whole > 1e-12 * power else 0.0


def _sized(onto: Tensor, back: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """A map and its inverse, so that what it gives has a mean square of 1."""
    size = torch.einsum("rx,xy,ry->", onto, moment, onto) / len(onto)
    scale = size.sqrt() if size > 0 else torch.ones_like(size)
    return onto / scale, back * scale


def _key_metric(moments: LatentMoments, pairs: Pairs) -> Tensor:
    """Per KV head, what an error of n does to the output, [K, H, H]."""
    kv_heads, head_dim, _ = moments.metric.shape
    eye = pairs.to_complex(torch.eye(head_dim, dtype=torch.float64))
    meet = pairs.to_real(eye * moments.constant.conj()[..., None])  # [N, H, H]
    by_head = moments.spread[:, None, None] * (meet @ moments.queries @ meet.mT)
    return by_head.view(kv_heads, -1, head_dim, head_dim).sum(1)


def _roots(metrics: Tensor) -> tuple[Tensor, Tensor]:
    """F with FᵀF the metric, and its inverse, for each; with a floor under the eigenvalues."""
    values, vectors = torch.linalg.eigh(metrics)
    floor = LEAST_SHARE * values.clamp_min(0).mean(-1, keepdim=True)
    root = values.clamp_min(floor.clamp_min(1e-30)).sqrt()
    return (vectors * root[:, None, :]).mT, vectors / root[:, None, :]
