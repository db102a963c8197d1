"""One key and one value for a run of layers, from moments.

Shared keys and values are made of x, what enters the attention of a run's first layer.  The others
made theirs of what enters their own, x[j], so of these first comes what x foretells,

    W[j]' = argmin E ‖W[j] x[j] - W' x‖² + λ ‖W' - W[j]‖²          (refit.py)

and then the layers' heads are merged as heads of one layer are (kv_heads.py): a group has one head
of each layer, found by assignment.  A layer's queries and output projection take up what merging
asks of them, so the first layer pays for the compromise as well.  Since what x does not foretell is
uncorrelated with x, the two steps together are the best linear map of that rank (reduced-rank
regression: Izenman, Journal of Multivariate Analysis 5, 1975), as far as damping and the weights of
kv_heads.py go.

Under norms on queries and keys no key can be turned or mixed: keys z are then the first layer's as
they are, and where another layer's are nearest to  k ≈ b z,  b = E k conj(z) / E |z|²  by
frequency, its queries take conj(b), with the gain of their norm, into their projection.  What that
does to their length the norm takes away; its gain becomes one number, that of the mean length.

RoPE turns keys of all layers at a position by the same angle, so their products are those before
RoPE, but for the mean over a sequence, which a softmax does not see: of a frequency whose angles
have the mean phasor r, keys of mean m keep  |m|² (1 - |r|²)  of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from compress.prune.attention import AttentionWeights, Pairs
from compress.prune.gqa import merged_kv, share_of_spread
from compress.prune.kv_heads import Merged, Moments, merge
from compress.prune.refit import solve_near

# Of the mean metric of a run: what a head has at least, so that one of no effect can be merged.
LEAST_METRIC = 1e-12
TINY = torch.finfo(torch.float64).tiny


@dataclass
class Run:
    """What was found of a run of layers so far, float64 on the CPU; R are those of its layers.

    moment   E[x xᵀ] [D + 1, D + 1], with a 1 at the end of x
    means    E[m mᵀ] of the means m of x over a sequence
    turned   1 - |r|² of each frequency [P]
    k, v     weights of x, [R][K, H, D + 1]: the first layer's own, what x foretells of the others'
    cross    E[k xᵀ] and E[v xᵀ], [R][2 K H, D + 1], and E ‖k‖², E ‖v‖² in `power`, [R][2]
    queries  E of |q[i]|² by pair, times what a value of head i comes to, [R][P, K]
    metric   G of each KV head, [R][K, H, H]
    lengths  E of |q|² by pair, on average over the heads of a KV head, [R][P, K]
    shares   of the values' variance that attention leaves, [R]
    beside   under norms alone, for each layer but the first: E k conj(z) [P, K of z, K, 2], E |z|²
             and E |k|² [P, K], after RoPE and without a sequence's mean
    """

    moment: Tensor
    means: Tensor
    turned: Tensor
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)
    power: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    metric: list[Tensor] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)
    shares: list[Tensor] = field(default_factory=list)
    beside: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


def add_layer(
    run: Run, weights: AttentionWeights, means: Mapping[str, Tensor], pairs: Pairs, damping: float
) -> None:
    """Add a layer to a run; of its keys and values what the first layer's input foretells."""
    kv_heads, head_dim, _ = weights.k.shape
    own = torch.cat([weights.k, weights.v]).flatten(0, 1)  # [2 K H, D + 1]
    cross, foretold = own @ run.moment, own
    if run.k:
        cross = torch.cat([means["cross k"], means["cross v"]])
        columns = own.shape[1] - (not weights.biased["k_proj"])  # where there is no bias, for none
        moment = run.moment[:columns, :columns]
        found, _ = solve_near(own[:, :columns], cross[:, :columns], moment, damping)
        foretold = own.clone()
        foretold[:, :columns] = found
    k, v = foretold.unflatten(0, (2, kv_heads, head_dim))
    run.k.append(k)
    run.v.append(v)
    run.cross.append(cross)
    run.power.append(torch.stack([means["keys"].sum(), means["values"].trace()]))
    out = weights.o.unflatten(0, (kv_heads, -1))  # [K, N / K, D, H]
    spread = means["values"] - torch.outer(means["value"], means["value"])
    spread = spread.view(kv_heads, head_dim, kv_heads, head_dim).diagonal(dim1=0, dim2=2)
    counts = torch.einsum("jndb,bcj,jndc->jn", out, spread, out).clamp_min(0)
    squares = means["queries"].view(kv_heads, -1, head_dim)
    squares = squares[..., pairs.real] + squares[..., pairs.imaginary]
    run.queries.append((squares * counts[..., None]).sum(1).T)
    run.lengths.append(squares.mean(1).T)
    run.metric.append(torch.einsum("jndb,jndc->jbc", out, out))
    run.shares.append(share_of_spread(means, out.shape[1]))
    if "joint" in means:
        run.beside.append((means["joint"], means["first size"], means["own size"]))


def shared(run: Run, pairs: Pairs) -> list[dict[str, Any]]:
    """What each layer of a run becomes.

    group, merged  its KV heads in the order of the shared ones, and how these are merged
    length         under norms: the gain of its queries' norm, or None to leave that as it is
    k, v           of the first layer: the shared weights [K, H, D + 1]
    keys_lost, values_lost   as `SharedLayer` has them
    """
    layers, kv_heads = len(run.k), len(run.k[0])
    moments = moments_of(run, pairs)
    groups = _groups(run, moments)
    merged = [merge(moments, group, "pca", "pca") for group in groups]
    if run.beside:
        merged = [_first_keys(run, *pair) for pair in zip(groups, merged, strict=True)]
    k, v = merged_kv(torch.cat(run.k), torch.cat(run.v), pairs, groups, merged)
    found = []
    for place in range(layers):
        heads = torch.tensor([group[place] - place * kv_heads for group in groups])
        parts = [_of_layer(one, place) for one in merged]
        found.append(
            {
                "group": heads[:, None].tolist(),
                "merged": [vars(part) for part in parts],
                "length": _length(run, place, heads, parts) if run.beside and place else None,
                **_lost(run, place, heads, _given(k, v, parts, pairs)),
            }
        )
    return [found[0] | {"k": k, "v": v}, *found[1:]]


def moments_of(run: Run, pairs: Pairs) -> Moments:
    """The moments of all heads of a run, layer after layer, as x foretells them."""
    k, v = torch.cat(run.k), torch.cat(run.v)
    heads, head_dim, _ = k.shape
    keys = pairs.to_complex(k).transpose(0, 1)  # [P, R K, D + 1]
    spread, means = (
        (keys @ m.to(keys.dtype)) @ keys.mH for m in (run.moment - run.means, run.means)
    )
    flat = v.flatten(0, 1)
    mean = flat @ run.moment[:, -1]
    centre = torch.outer(mean, mean)
    left = torch.stack(run.shares).sqrt().repeat_interleave(len(flat) // len(run.shares))
    values = centre + (flat @ run.moment @ flat.T - centre) * torch.outer(left, left)
    metric = torch.cat(run.metric)
    floor = LEAST_METRIC * metric.diagonal(dim1=1, dim2=2).mean()
    return Moments(
        keys=spread + run.turned[:, None, None] * means,
        queries=torch.cat(run.queries, dim=1),
        values=values.view(heads, head_dim, heads, head_dim),
        metric=metric + floor * torch.eye(head_dim, dtype=metric.dtype),
    )


def _groups(run: Run, moments: Moments) -> list[list[int]]:
    """For each KV head of the first layer one of each other layer, so that merging loses little."""
    kv_heads = len(run.k[0])
    groups = [[head] for head in range(kv_heads)]
    for place in range(1, len(run.k)):
        others = range(place * kv_heads, (place + 1) * kv_heads)
        pairs = [[merge(moments, [a, b], "pca", "pca").lost for b in others] for (a, *_) in groups]
        lost = torch.tensor(pairs)  # [K of the first, K, 2]
        if run.beside:
            weight = run.queries[place][:, None]  # [P, 1, K]
            own = (weight[:, 0] * run.beside[place - 1][2]).sum(0)
            lost[..., 0] = (weight * _left(run, place)).sum(0) / own.clamp_min(TINY)
        for group, column in zip(groups, linear_sum_assignment(lost.sum(-1))[1], strict=True):
            group.append(others[column])
    return groups


def _left(run: Run, place: int) -> Tensor:
    """E |k - b z|² of a layer's keys by the first layer's, at best: [P, K of z, K]."""
    joint, first, own = run.beside[place - 1]
    return own[:, None] - joint.square().sum(-1) / first[:, :, None].clamp_min(TINY)


def _first_keys(run: Run, group: Sequence[int], merged: Merged) -> Merged:
    """The same with the first layer's key for all, and what others take it for."""
    key_in, key_out = torch.zeros_like(merged.key_in), torch.ones_like(merged.key_out)
    key_in[:, 0] = 1
    for place, (head, (joint, first, _)) in enumerate(zip(group[1:], run.beside, strict=True), 1):
        own = head - place * len(run.k[0])
        beside = torch.view_as_complex(joint[:, group[0], own].contiguous())
        key_out[:, place] = beside / first[:, group[0]].clamp_min(TINY)
    return replace(merged, key_in=key_in, key_out=key_out)


def _length(run: Run, place: int, heads: Tensor, parts: Sequence[Merged]) -> float:
    """The root of the mean square of conj(b) q over all query heads and channels."""
    squares = run.lengths[place]  # [P, K]
    factor = torch.stack([part.key_out[:, 0] for part in parts], dim=1).abs().square()
    return float((factor * squares[:, heads]).sum(0).mean() / (2 * len(squares))) ** 0.5


def _of_layer(merged: Merged, place: int) -> Merged:
    """What a group is to the layer that has this place in it."""
    one = slice(place, place + 1)
    return Merged(
        key_in=merged.key_in[:, one],
        key_out=merged.key_out[:, one],
        value_in=merged.value_in[:, one],
        value_out=merged.value_out[one],
        lost=merged.lost,
    )


def _given(k: Tensor, v: Tensor, parts: Sequence[Merged], pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Weights of what shared keys and values come to for a layer, [K, H, D + 1] each."""
    keys = [
        pairs.to_real(pairs.to_complex(one) * part.key_out)
        for one, part in zip(k, parts, strict=True)
    ]
    values = [part.value_out[0] @ one for one, part in zip(v, parts, strict=True)]
    return torch.stack(keys), torch.stack(values)


def _lost(run: Run, place: int, heads: Tensor, given: tuple[Tensor, Tensor]) -> dict[str, float]:
    """E ‖y - W' x‖² / E ‖y‖² of a layer's keys y, and of its values; W' by head as `heads` are.

    Of normed keys it is what `_left` says.
    """
    found = {}
    cross = run.cross[place].unflatten(0, (2, len(heads), -1))[:, heads]
    for name, own, power, guess in zip(
        ("keys_lost", "values_lost"), cross, run.power[place], given, strict=True
    ):
        error = power - 2 * (guess * own).sum() + ((guess @ run.moment) * guess).sum()
        if run.beside and name == "keys_lost":
            error = torch.zeros(())
            if place:
                error = _left(run, place)[:, range(len(heads)), heads].sum()
                power = run.beside[place - 1][2].sum()
        found[name] = max(float(error), 0.0) / float(power) if power > 0 else 0.0
    return found
