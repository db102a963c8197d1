"""Merging KV heads: one key and one value for a group of heads that had one each.

A query head i of KV head j has the logits  Re sum_f conj(q[i, f]) k[j, f],  where two channels that
RoPE turns by one frequency f are a complex number.  RoPE multiplies q and k by the same phase, so
any complex factor may go from k[j, f] to q[i, f] without a change: a rotation and a scale.

One merged key z[f] = sum_j a[j, f] k[j, f] stands in for all, k[j, f] ≈ b[j, f] z[f], and queries
take conj(b).  With queries of independent phases the squared error of the logits is least where z
is the first principal component of the keys weighted by w[j, f] = E sum_{i of j} |q[i, f]|².  A
softmax does not see what is added to all logits of a query, so the keys are looked at after RoPE,
and without their mean over a sequence: that takes off what is constant in slow pairs alone.

Values are merged alike, but a head's output projection takes any matrix: v[j] ≈ E[j] z with z of H
numbers, in the metric of what reaches the hidden states,  G[j] = sum_{i of j} Wo[i]ᵀ Wo[i].  What
is looked at is their mean, and their spread as far as averaging over a context leaves it.

Aligning heads by rotations and averaging them (Jin et al., "Align Attention Heads Before Merging
Them", arXiv 2412.20677) is one such map of K H channels to H; this one is the best of them all.
`mean` is the average of the heads as they are (Ainslie et al., "GQA", arXiv 2305.13245, section
2.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Merge = Literal["pca", "mean"]
LEAST_SHARE = 1e-6  # of the mean: floor of weights and metrics, which are divided by


@dataclass(frozen=True)
class Moments:
    """What merging asks of a block; P channel pairs of a head, K KV heads, H head dim.

    keys     complex128 [P, K, K], E k[j, p] conj(k[l, p])
    queries  float64 [P, K], E sum of |q[i, p]|² over the query heads i of a KV head
    values   float64 [K, H, K, H], E v vᵀ
    metric   float64 [K, H, H], G
    """

    keys: Tensor
    queries: Tensor
    values: Tensor
    metric: Tensor


@dataclass(frozen=True)
class Merged:
    """How the heads of one group become one.

    key_in     complex128 [P, g], a: the merged key of the group's g keys
    key_out    complex128 [P, g], b
    value_in   float64 [H, g, H]: the merged value of the group's values
    value_out  float64 [g, H, H], E
    lost       shares of the energy of keys, and of values, that is lost
    """

    key_in: Tensor
    key_out: Tensor
    value_in: Tensor
    value_out: Tensor
    lost: tuple[float, float]


def merge(moments: Moments, group: Sequence[int], how: Merge, keys: Merge) -> Merged:
    """Merge the KV heads of a group: values by `how`, keys by `keys`."""
    heads = torch.tensor(group)
    key_in, key_out, key_lost = _keys(moments, heads, keys)
    value_in, value_out, value_lost = _values(moments, heads, how)
    return Merged(key_in, key_out, value_in, value_out, (key_lost, value_lost))


def _keys(moments: Moments, heads: Tensor, how: Merge) -> tuple[Tensor, Tensor, float]:
    moment = moments.keys[:, heads][:, :, heads]
    weight = _floored(moments.queries[:, heads])
    if how == "mean":
        key_in = torch.full(weight.shape, 1 / len(heads), dtype=torch.complex128)
        key_out = torch.ones_like(key_in)
    else:
        root = weight.sqrt()
        weighted = root[:, :, None] * moment * root[:, None, :]
        first = torch.linalg.eigh(weighted).eigenvectors[:, :, -1]  # [P, g]
        key_in, key_out = first.conj() * root, first / root
        scale = _size(key_in, moment).sqrt()  # the merged key is as large as the largest part
        size = moment.diagonal(dim1=1, dim2=2).real.mean(1).sqrt()
        scale = torch.where((scale > 0) & (size > 0), size / scale, 1.0)[:, None]
        key_in, key_out = key_in * scale, key_out / scale
    # E |k_j - b_j z|² = C_jj - 2 Re(conj(b_j) E k_j conj(z)) + |b_j|² E |z|²
    beside = torch.einsum("pjl,pl->pj", moment, key_in.conj())
    own = moment.diagonal(dim1=1, dim2=2).real
    size = _size(key_in, moment)[:, None]
    error = own - 2 * (key_out.conj() * beside).real + key_out.abs().square() * size
    return key_in, key_out, _share((weight * error).sum(), (weight * own).sum())


def _size(key_in: Tensor, moment: Tensor) -> Tensor:
    """E |z|², [P]"""
    return torch.einsum("pj,pjl,pl->p", key_in, moment, key_in.conj()).real


def _values(moments: Moments, heads: Tensor, how: Merge) -> tuple[Tensor, Tensor, float]:
    count, dim = len(heads), moments.values.shape[1]
    moment = moments.values[heads][:, :, heads]
    flat = moment.reshape(count * dim, count * dim)
    metric = moments.metric[heads]
    if how == "mean":
        eye = torch.eye(dim, dtype=torch.float64)
        value_in = (eye / count)[:, None, :].expand(dim, count, dim)
        value_out = eye.expand(count, dim, dim)
    else:
        values, vectors = torch.linalg.eigh(metric)
        floor = LEAST_SHARE * values.clamp_min(0).mean(-1, keepdim=True)
        root = values.clamp_min(floor.clamp_min(torch.finfo(values.dtype).tiny)).sqrt()
        into = (vectors * root[:, None, :]).mT  # [g, H, H], of which intoᵀ into = G
        back = vectors / root[:, None, :]
        weighted = torch.einsum("jab,jblc,lmc->jalm", into, moment, into)
        weighted = weighted.reshape(count * dim, count * dim)
        first = torch.linalg.eigh(weighted).eigenvectors[:, -dim:].view(count, dim, dim)
        value_in = torch.einsum("jah,jab->hjb", first, into)
        value_out = torch.einsum("jba,jah->jbh", back, first)
    # what is lost of v_j in its metric: v_j - E_j z
    rest = torch.eye(count * dim, dtype=torch.float64).view(count, dim, count * dim)
    rest = rest - torch.einsum("jbh,hx->jbx", value_out, value_in.reshape(dim, -1))
    lost = torch.einsum("jab,jax,xy,jby->", metric, rest, flat, rest)
    power = torch.einsum("jab,jajb->", metric, moment)
    return value_in, value_out, _share(lost, power)


def _floored(weight: Tensor) -> Tensor:
    """Weights that can be divided by, [P, g]; where there are none, equal ones."""
    mean = weight.mean(1, keepdim=True)
    return torch.where(mean > 0, weight.clamp_min(LEAST_SHARE * mean), 1.0)


def _share(lost: Tensor, power: Tensor) -> float:
    return max(float(lost), 0.0) / float(power) if power > 0 else 0.0


def groups_of(moments: Moments, count: int, how: Merge, keys: Merge) -> list[list[int]]:
    """Put the KV heads into `count` groups of equal size, so that merging loses little.

    The cost of a group is the sum over its pairs of what merging the two would lose of keys and of
    values.  Starting from groups of neighbours, heads change places as long as that helps; heads
    are in ascending order inside a group, and groups by their first.
    """
    heads = moments.keys.shape[1]
    size = heads // count
    cost = torch.zeros(heads, heads, dtype=torch.float64)
    if 1 < size < heads:
        for one in range(heads):
            for other in range(one):
                lost = sum(merge(moments, [other, one], how, keys).lost)
                cost[one, other] = cost[other, one] = lost
    groups = [list(range(size * number, size * (number + 1))) for number in range(count)]
    while (swap := _best_swap(cost, groups)) is not None:
        (first, one), (second, other) = swap
        groups[first][one], groups[second][other] = groups[second][other], groups[first][one]
    return sorted(sorted(group) for group in groups)


def _best_swap(
    cost: Tensor, groups: Sequence[Sequence[int]]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The two places whose heads should change; None where no change helps."""
    best, least = None, -1e-12  # rounding of the sums
    for second in range(len(groups)):
        for first in range(second):
            a, b = torch.tensor(groups[first]), torch.tensor(groups[second])
            to_a, to_b = cost[:, a].sum(1), cost[:, b].sum(1)
            # head x leaves a and joins b, y the other way; cost[x, y] counts in neither
            change = (to_b[a] - to_a[a])[:, None] + (to_a[b] - to_b[b])[None] - 2 * cost[a][:, b]
            if float(change.min()) < least:
                least = float(change.min())
                place = int(change.argmin())
                best = ((first, place // len(b)), (second, place % len(b)))
    return best
