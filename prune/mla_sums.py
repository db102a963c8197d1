"""What MLA's conversion asks of a block that runs: sums over tokens, and the moments from them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.prune.attention import AttentionWeights, Pairs
from compress.prune.latent import LatentMoments
from compress.prune.mla_weights import Rope
from compress.prune.parts import Parts
from compress.prune.sums import Sums

LOOKING = 64  # queries of a sequence whose attention is looked at


def latent_moments(
    sums: Mapping[str, Tensor], weights: AttentionWeights, scale: float
) -> LatentMoments:
    """The moments from sums over tokens, both on the CPU, where small decompositions run."""
    kv_heads, head_dim, _ = weights.k.shape
    heads, width = len(weights.q), kv_heads * head_dim
    tokens = sums["tokens"]
    means = {name: total / tokens for name, total in sums.items()}
    joint, value = means["joint"], means["value"]
    joint[width:, width:] -= torch.outer(value, value)
    out = torch.einsum("ndb,ndc->nbc", weights.o, weights.o)
    cov = joint[width:, width:].view(kv_heads, head_dim, kv_heads, head_dim)
    cov = torch.einsum("jbjc->jbc", cov).repeat_interleave(heads // kv_heads, 0)
    shares = (means["attended squares"] - means["attended"].square()).sum()
    shares = (shares / cov.diagonal(dim1=1, dim2=2).sum()).clamp(0, 1)
    joint = shares * joint
    joint[width:, width:] += torch.outer(value, value)
    constant, loss = _without_rotation(sums["turning"] / sums["looked"])
    return LatentMoments(
        keys=torch.view_as_complex(means["keys"]),
        loss=loss * scale**2,
        constant=constant,
        joint=joint,
        queries=means["queries"] * scale**2,
        spread=torch.einsum("nbc,nbc->n", out, cov),
        metric=out.view(kv_heads, -1, head_dim, head_dim).sum(1),
        all_queries=means["all queries"] * scale**2 if "all queries" in means else None,
    )


def _without_rotation(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The best constant factor in place of a rotation, complex [N, P], and what it loses.

    covariance  of A, B and C (latent.py), [N, P, 3, 3]
    """
    own, beside = covariance[..., 1:, 1:], covariance[..., 1:, 0]
    mean = own.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-300)
    own = own + 1e-9 * mean * torch.eye(2, dtype=own.dtype, device=own.device)
    best = torch.linalg.solve(own, beside)
    loss = covariance[..., 0, 0] - (best * beside).sum(-1)
    return torch.complex(best[..., 0], -best[..., 1]), loss.clamp_min(0)


@contextmanager
def projections(
    block: nn.Module, parts: Parts, head_dim: int, pairs: Pairs, rope: Rope, all_queries: bool
) -> Iterator[list[Sums]]:
    """Sum over tokens what `latent_moments` asks for.

    all_queries  whether products of queries of different heads are wanted
    """
    seen = Sums("attention")
    angles: list[tuple[Tensor, Tensor]] = []
    held: dict[str, Tensor] = {}

    def before_attention(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        angles[:] = [kwargs["position_embeddings"]]

    def hold(leaf: str):
        def after(_module: nn.Module, _args: Any, output: Tensor) -> None:
            held[leaf] = output.float().unflatten(-1, (-1, head_dim))  # [B, S, heads, H]

        return after

    def before_o(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2).float()
        seen.add("attended", rows.sum(0))
        seen.add("attended squares", rows.square().sum(0))
        phase = phases(angles[0], pairs, rope.stretch)
        if all_queries:
            rows = held["q_proj"].flatten(0, 1).flatten(1)
            seen.add("all queries", rows.T @ rows)
        _add(seen, held["q_proj"], held["k_proj"], held["v_proj"], pairs, phase, rope.scale)

    def linear(leaf: str) -> nn.Module:
        return block.get_submodule(parts.linear(leaf))

    attention = block.get_submodule(parts.attention)
    handles = [
        attention.register_forward_pre_hook(before_attention, with_kwargs=True),
        *(
            linear(leaf).register_forward_hook(hold(leaf))
            for leaf in ("q_proj", "k_proj", "v_proj")
        ),
        linear("o_proj").register_forward_pre_hook(before_o),
    ]
    try:
        yield [seen]
    finally:
        for handle in handles:
            handle.remove()


def phases(angles: tuple[Tensor, Tensor], pairs: Pairs, stretch: float) -> Tensor:
    """e^{iθ t} of each pair from a class's cosines and sines, complex64 [B or 1, S, P]."""
    cosine, sine = (angle.float() / stretch for angle in angles)
    width = cosine.shape[-1]
    places = pairs.real.clamp_max(width - 1)
    phase = torch.complex(cosine[..., places], sine[..., places])
    return torch.where(pairs.real < width, phase, 1)


def _add(
    seen: Sums, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, phase: Tensor, scale: float
) -> None:
    """Add what is wanted of a batch; q [B, S, N, H], k and v [B, S, K, H], phase [B, S, P]."""
    seen.add("tokens", torch.tensor(q.shape[0] * q.shape[1], device=q.device))
    seen.add("queries", torch.einsum("bsna,bsnc->nac", q, q))
    values = v.flatten(0, 1).flatten(1)
    seen.add("value", values.sum(0))
    centred = (k - k.mean(1, keepdim=True)).flatten(0, 1).flatten(1)
    joint = torch.cat([centred, values], 1)
    seen.add("joint", joint.T @ joint)

    queries, keys = _as_pairs(q, pairs), _as_pairs(k, pairs)
    turned = keys * phase[:, :, None]
    moved = turned - turned.mean(1, keepdim=True)
    product = torch.einsum("bsjp,bslp->pjl", moved, moved.conj())
    seen.add("keys", torch.view_as_real(product))
    at = torch.linspace(0, q.shape[1] - 1, min(LOOKING, q.shape[1]), device=q.device).long()
    turning = [
        _turning(one[at], (one * angle[:, None])[at], key, other, at, scale)
        for one, angle, key, other in zip(
            queries, phase.expand(len(q), -1, -1), keys, turned, strict=True
        )
    ]
    seen.add("turning", torch.stack(turning).sum(0))
    seen.add("looked", torch.tensor(len(q) * len(at), device=q.device))


def _as_pairs(heads: Tensor, pairs: Pairs) -> Tensor:
    return torch.complex(heads[..., pairs.real], heads[..., pairs.imaginary])


def _turning(
    q: Tensor, turned_q: Tensor, k: Tensor, turned_k: Tensor, at: Tensor, scale: float
) -> Tensor:
    """Of one sequence the covariances of A, B and C (latent.py) under the attention's
    probabilities, summed over queries: [N, P, 3, 3].

    q, turned_q  complex [T, N, P], before and after RoPE, at the places `at`
    k, turned_k  complex [S, K, P]
    """
    queries, heads, pairs = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    later = torch.arange(len(k), device=k.device)[None] > at[:, None]  # [T, S]
    found = []
    for head in range(kv_heads):
        own = slice(head * group, (head + 1) * group)
        logits = torch.einsum("tnp,sp->nts", turned_q[:, own].conj(), turned_k[:, head]).real
        weight = (logits * scale).masked_fill(later, -torch.inf).softmax(-1)  # [g, T, S]
        x = torch.stack(
            [turned_k[:, head].real, turned_k[:, head].imag, k[:, head].real, k[:, head].imag], -1
        )  # [S, P, 4]
        both = torch.cat([x, torch.einsum("spa,spb->spab", x, x).flatten(-2)], -1)
        mean = (weight @ both.flatten(1)).view(group, queries, pairs, 20)
        first, second = mean[..., :4], mean[..., 4:].unflatten(-1, (4, 4))
        spread = second - first[..., :, None] * first[..., None, :]  # [g, T, P, 4, 4]
        onto = _maps(turned_q[:, own].transpose(0, 1), q[:, own].transpose(0, 1))
        found.append((onto @ spread @ onto.mT).sum(1))
    return torch.cat(found)


def _maps(a: Tensor, b: Tensor) -> Tensor:
    """A, B and C from a key after and before RoPE, as four real numbers: [g, T, P, 3, 4].

    a, b  queries after and before RoPE, complex [g, T, P]
    """
    none = torch.zeros_like(a.real)
    rows = (
        torch.stack([a.real, a.imag, none, none], -1),
        torch.stack([none, none, b.real, b.imag], -1),
        torch.stack([none, none, -b.imag, b.real], -1),
    )
    return torch.stack(rows, -2)
