"""Fewer KV heads as a stage: MHA or GQA to GQA with fewer, or to MQA.

    collect   moments of queries, keys and values; groups of heads, and how each becomes one
    decide    nothing: blocks are converted one by one
    apply     the new weights, and least squares for the output projection

Both walks run the original model.  The second runs the converted attention beside the original's on
the same hidden states, from which the output projection is solved for: it makes up for what merged
keys changed in the attention's weights as well (refit.py).
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn

from compress.core.stage import Block
from compress.prune.attention import AttentionWeights, Pairs
from compress.prune.kv_heads import Merge, Merged, Moments, groups_of, merge
from compress.prune.parts import Parts
from compress.prune.refit import solve_near
from compress.prune.shape import Shape
from compress.prune.sums import Sums

# A share of the output's energy: what sums in float32 cannot tell from nothing, and a refit would
# take for something.
ROUNDING = 1e-6


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class GqaConfig:
    """Fewer KV heads (prune/kv_heads.py).

    kv_heads       of each block; divides the number there is
    merge          `pca`, the best linear map, or `mean` of the heads as they are
    regroup        put heads together that merging loses little of, else neighbours
    refit          solve for the output projection
    refit_samples  calibration sequences that the refit looks at, the first of those there are
    damping        share of the mean of the second moment's diagonal that is added to it
    """

    kv_heads: int = Field(ge=1)
    merge: Merge = "pca"
    regroup: bool = True
    refit: bool = True
    refit_samples: int = Field(default=128, ge=1, le=1 << 20)
    damping: float = Field(default=0.01, gt=0, le=1)


@dataclass(frozen=True)
class ConvertedAttention:
    """What a report says of a block's attention.

    groups        KV heads that became one
    keys_lost     share of the keys' energy, weighted by the queries'
    values_lost   share of the values' energy, in what reaches the hidden states
    merged_error  E ‖y - y'‖² / E ‖y‖² of the attention's output, as merged
    error         the same after the refit
    note          what is to be said of it
    """

    name: str
    groups: list[list[int]]
    keys_lost: list[float]
    values_lost: list[float]
    merged_error: float | None = None
    error: float | None = None
    note: str = ""


class GqaStage:
    """Converts a model of `shape`, block by block, in the steps of compress.core.stage.

    parts  of its blocks
    pairs  of a head's channels, and `turns`, whether keys may be turned in them (attention.py)
    stock  blocks of the target's class without weights, to run what comes out
    """

    needs_reference: bool = False
    counts_above: float | None = None
    trains_blocks: bool = False
    workspace: ClassVar[int] = 6  # [N H, N H]: three moments, a factor and products

    def __init__(
        self,
        config: GqaConfig,
        shape: Shape,
        parts: Parts,
        pairs: Pairs,
        turns: bool,
        stock: Sequence[nn.Module],
    ) -> None:
        self.config = config
        self.shape = shape
        self.parts = parts
        self.pairs = pairs
        self.turns = turns
        self.stock = stock

    def observe(self, _index: int, block: nn.Module) -> AbstractContextManager[list[Sums]]:
        """Watch a block that runs for its moments."""
        return _projections(block, self.parts, self.shape.head_dim, self.pairs)

    def collect(self, block: Block) -> dict[str, Any]:
        """How the block's KV heads become fewer."""
        config, pairs = self.config, self.pairs
        keys: Merge = config.merge if self.turns else "mean"
        weights = AttentionWeights.of(block.module, self.parts, self.shape.head_dim)
        moments = _moments(block.observed[0].sums, weights, pairs)
        if config.regroup:
            groups = groups_of(moments, config.kv_heads, config.merge, keys)
        else:
            heads = torch.arange(self.shape.kv_heads)
            groups = heads.view(config.kv_heads, -1).tolist()
        return {
            "groups": groups,
            "merged": [vars(merge(moments, group, config.merge, keys)) for group in groups],
            "note": "" if self.turns else "keys are averaged: RoPE and norms allow no rotation",
        }

    def decide(self, summaries: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Nothing: the plan of a block is its own."""
        return summaries

    def compare(
        self, plans: Sequence[dict[str, Any]], index: int, block: nn.Module
    ) -> AbstractContextManager[list[Sums]]:
        """Run a block's converted attention beside its own, and sum over what both give."""
        weights = self._converted(block, plans[index])
        converted = copy.deepcopy(self.stock[index]).get_submodule(self.parts.attention)
        sample = block.get_parameter(f"{self.parts.linear('o_proj')}.weight")
        converted = converted.to_empty(device=sample.device).to(sample.dtype)
        own = block.get_submodule(self.parts.attention).state_dict()
        kept = {name: own[name] for name in converted.state_dict()}
        inside = f"{self.parts.attention}."
        changed = weights.tensors(self.parts).items()
        converted.load_state_dict(kept | {name.removeprefix(inside): t for name, t in changed})
        return _attended(block, self.parts, converted)

    @torch.no_grad()
    def apply(
        self, block: Block, plans: Sequence[dict[str, Any]]
    ) -> tuple[dict[str, Tensor], ConvertedAttention]:
        """The block's tensors by name within it, float32, and what is to be said of them."""
        plan = plans[block.index]
        weights = self._converted(block.module, plan)
        keys_lost, values_lost = zip(*(one["lost"] for one in plan["merged"]), strict=True)
        report = ConvertedAttention(
            block.full_name(self.parts.attention),
            plan["groups"],
            list(keys_lost),
            list(values_lost),
            note=plan["note"],
        )
        if block.observed:
            merged_error, error = self._refit(block, weights)
            report = replace(report, merged_error=merged_error, error=error)
        return block.module.state_dict() | weights.tensors(self.parts), report

    def _converted(self, block: nn.Module, plan: dict[str, Any]) -> AttentionWeights:
        weights = AttentionWeights.of(block, self.parts, self.shape.head_dim)
        merged = [Merged(**fields) for fields in plan["merged"]]
        return merged_weights(weights, self.pairs, plan["groups"], merged)

    def _refit(self, block: Block, weights: AttentionWeights) -> tuple[float, float]:
        """Solve for the output projection; returns the errors before and after."""
        sums = block.observed[0].sums
        name = f"{self.parts.linear('o_proj')}.weight"
        original = block.module.get_parameter(name).double()
        power = float(((original @ sums["own"]) * original).sum())
        cross, moment = original @ sums["beside"], sums["converted"]
        start = weights.o.transpose(0, 1).flatten(1)

        def error(weight: Tensor) -> float:
            lost = power - 2 * (weight * cross).sum() + (weight @ moment * weight).sum()
            return max(float(lost), 0.0) / power if power > 0 else 0.0

        found = start
        if error(start) > ROUNDING:
            found, _ = solve_near(start, cross, moment, self.config.damping)
        heads = found.unflatten(1, (-1, self.shape.head_dim))
        weights.o = heads.transpose(0, 1).contiguous()
        return error(start), error(found)

    def state(self) -> None:
        """Nothing is carried from block to block."""

    def restore(self, state: Any) -> None:
        """Nothing to take over."""


def merged_weights(
    weights: AttentionWeights,
    pairs: Pairs,
    groups: Sequence[Sequence[int]],
    merged: Sequence[Merged],
) -> AttentionWeights:
    """Attention with one KV head a group; the query heads come in the order of their KV heads."""
    device = weights.k.device
    queries = weights.q.unflatten(0, (len(weights.k), -1))  # [K, N / K, H, D + 1]
    outs = weights.o.unflatten(0, (len(weights.k), -1))  # [K, N / K, D, H]
    q, k, v, o = [], [], [], []
    for group, one in zip(groups, merged, strict=True):
        heads = torch.tensor(group, device=device)
        key_in, key_out = one.key_in.to(device), one.key_out.to(device)
        value_in, value_out = one.value_in.to(device), one.value_out.to(device)
        k.append(
            pairs.to_real(torch.einsum("pj,jpx->px", key_in, pairs.to_complex(weights.k[heads])))
        )
        v.append(torch.einsum("hjb,jbx->hx", value_in, weights.v[heads]))
        turned = pairs.to_complex(queries[heads]) * key_out.T.conj()[:, None, :, None]
        q.append(pairs.to_real(turned).flatten(0, 1))
        o.append(torch.einsum("jndb,jbh->jndh", outs[heads], value_out).flatten(0, 1))
    return replace(weights, q=torch.cat(q), k=torch.stack(k), v=torch.stack(v), o=torch.cat(o))


def _moments(sums: Mapping[str, Tensor], weights: AttentionWeights, pairs: Pairs) -> Moments:
    """The moments of merging from sums over tokens; on the CPU, where small decompositions run."""
    kv_heads, head_dim, _ = weights.k.shape
    means = {name: total / sums["tokens"] for name, total in sums.items()}
    centre = torch.outer(means["value"], means["value"])
    spread = means["values"] - centre
    queries = weights.q.shape[0] // kv_heads
    shares = (means["attended squares"] - means["attended"].square()).sum()
    shares = shares / (queries * spread.diagonal().sum())
    values = (centre + shares.clamp(0, 1) * spread).view(kv_heads, head_dim, kv_heads, head_dim)
    squares = means["queries"].view(kv_heads, -1, head_dim).sum(1)
    out = weights.o.unflatten(0, (kv_heads, -1))
    return Moments(
        keys=torch.view_as_complex(means["keys"]).cpu(),
        queries=(squares[:, pairs.real] + squares[:, pairs.imaginary]).T.cpu(),
        values=values.cpu(),
        metric=torch.einsum("jndb,jndc->jbc", out, out).cpu(),
    )


@contextmanager
def _projections(
    block: nn.Module, parts: Parts, head_dim: int, pairs: Pairs
) -> Iterator[list[Sums]]:
    """Sum over tokens what `_moments` asks for.

    queries [N H]          squares
    keys [P, K, K, 2]      products k[j] conj(k[l]) after RoPE, without a sequence's mean
    value, values          of values [K H], and their products [K H, K H]
    attended, attended squares   of what enters o [N H]
    """
    seen, turned = Sums("attention"), _Turned(head_dim, pairs)

    def before_attention(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        turned.angles = kwargs.get("position_embeddings")

    def after_q(_module: nn.Module, _args: Any, output: Tensor) -> None:
        rows = output.flatten(0, -2).float()
        seen.add("tokens", torch.tensor(len(rows), device=rows.device))
        seen.add("queries", rows.square().sum(0))

    def after_k(_module: nn.Module, _args: Any, output: Tensor) -> None:
        keys = turned(output.float())  # [B, S, K, P]
        keys = keys - keys.mean(1, keepdim=True)
        product = torch.einsum("bsjp,bslp->pjl", keys, keys.conj())
        seen.add("keys", torch.view_as_real(product))

    def after_v(_module: nn.Module, _args: Any, output: Tensor) -> None:
        rows = output.flatten(0, -2).float()
        seen.add("value", rows.sum(0))
        seen.add("values", rows.T @ rows)

    def before_o(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2).float()
        seen.add("attended", rows.sum(0))
        seen.add("attended squares", rows.square().sum(0))

    def linear(leaf: str) -> nn.Module:
        return block.get_submodule(parts.linear(leaf))

    attention = block.get_submodule(parts.attention)
    handles = [
        attention.register_forward_pre_hook(before_attention, with_kwargs=True),
        linear("q_proj").register_forward_hook(after_q),
        linear("k_proj").register_forward_hook(after_k),
        linear("v_proj").register_forward_hook(after_v),
        linear("o_proj").register_forward_pre_hook(before_o),
    ]
    try:
        yield [seen]
    finally:
        for handle in handles:
            handle.remove()


class _Turned:
    """Keys as complex numbers, turned by RoPE's angles where the attention is given these.

    angles  cosines and sines [B or 1, S, R], R channels of a head that are turned
    """

    def __init__(self, head_dim: int, pairs: Pairs) -> None:
        self.head_dim, self.pairs = head_dim, pairs
        self.angles: tuple[Tensor, Tensor] | None = None

    def __call__(self, keys: Tensor) -> Tensor:
        """[B, S, K H] as complex [B, S, K, P]"""
        heads = keys.unflatten(-1, (-1, self.head_dim, 1))
        found = self.pairs.to_complex(heads).squeeze(-1)
        if self.angles is None:
            return found
        cosine, sine = (angle.float() for angle in self.angles)
        width = cosine.shape[-1]
        places = self.pairs.real.clamp_max(width - 1)
        phase = torch.complex(cosine[..., places], sine[..., places])
        phase = torch.where(self.pairs.real < width, phase, 1)
        return found * phase[:, :, None]


@contextmanager
def _attended(block: nn.Module, parts: Parts, converted: nn.Module) -> Iterator[list[Sums]]:
    """Sum over tokens, of a what enters o, and b what enters the converted attention's o:

    own E a aᵀ, beside E a bᵀ, converted E b bᵀ, [N H, N H] each.
    """
    seen = Sums("attention")
    entered: list[Tensor] = []

    def before_output(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        entered.append(args[0].detach().flatten(0, -2).float())

    def after_attention(_module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        converted(*args, **kwargs)
        own, other = entered
        entered.clear()
        seen.add("tokens", torch.tensor(len(own), device=own.device))
        seen.add("own", own.T @ own)
        seen.add("beside", own.T @ other)
        seen.add("converted", other.T @ other)

    leaf = parts.linear("o_proj").removeprefix(f"{parts.attention}.")
    attention = block.get_submodule(parts.attention)
    handles = [
        attention.get_submodule(leaf).register_forward_pre_hook(before_output),
        converted.get_submodule(leaf).register_forward_pre_hook(before_output),
        attention.register_forward_hook(after_attention, with_kwargs=True),
    ]
    try:
        yield [seen]
    finally:
        for handle in handles:
            handle.remove()
