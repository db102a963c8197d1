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
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn

from compress.core.processes import Processes
from compress.core.stage import Block
from compress.prune.attention import AttentionWeights, Pairs, find_pairs
from compress.prune.kv_heads import Merge, Merged, Moments, groups_of, merge
from compress.prune.parts import Parts
from compress.prune.refit import solve_near
from compress.prune.shape import Shape


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


@dataclass
class Sums:
    """Sums over tokens of what runs through a block's attention, float64, by name."""

    what: str = "attention"
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, found: Tensor) -> None:
        """Add to a sum."""
        found = found.detach().double()
        self.sums[name] = self.sums[name] + found if name in self.sums else found

    def pool(self, processes: Processes) -> None:
        """Take in what the other processes saw."""
        processes.add(*self.sums.values())

    def is_finite(self) -> bool:
        """Whether nothing was NaN or infinite."""
        return all(bool(torch.isfinite(found).all()) for found in self.sums.values())


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

    parts   of its blocks
    turned  channels of a head that RoPE may turn, see `find_pairs`
    stock   blocks of the target's class without weights, to run what comes out
    """

    needs_reference: bool = False
    trains_blocks: bool = False
    workspace: ClassVar[int] = 6  # [N H, N H]: three moments, a factor and products

    def __init__(
        self,
        config: GqaConfig,
        shape: Shape,
        parts: Parts,
        turned: Sequence[int],
        stock: Sequence[nn.Module],
    ) -> None:
        self.config = config
        self.shape = shape
        self.parts = parts
        self.turned = turned
        self.stock = stock

    def observe(self, _index: int, block: nn.Module) -> AbstractContextManager[list[Sums]]:
        """Watch a block that runs for its moments."""
        return _projections(block, self.parts)

    def collect(self, block: Block) -> dict[str, Any]:
        """How the block's KV heads become fewer."""
        assert block.probe is not None
        config, device = self.config, next(block.module.parameters()).device
        found = find_pairs(block.module, self.parts, self.shape.head_dim, self.turned, block.probe)
        pairs = found or Pairs.neighbours(self.shape.head_dim, device)
        keys: Merge = config.merge if found else "mean"
        weights = AttentionWeights.of(block.module, self.parts, self.shape.head_dim)
        moments = _moments(block.observed[0].sums, weights, pairs)
        if config.regroup:
            groups = groups_of(moments, config.kv_heads, config.merge, keys)
        else:
            heads = torch.arange(self.shape.kv_heads)
            groups = heads.view(config.kv_heads, -1).tolist()
        return {
            "pairs": {name: places.cpu() for name, places in vars(pairs).items()},
            "groups": groups,
            "merged": [vars(merge(moments, group, config.merge, keys)) for group in groups],
            "note": "" if found else "keys are averaged: RoPE and norms allow no rotation",
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
        device = weights.k.device
        pairs = Pairs(**{name: places.to(device) for name, places in plan["pairs"].items()})
        merged = [Merged(**fields) for fields in plan["merged"]]
        return merged_weights(weights, pairs, plan["groups"], merged)

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
    keys = (sums["k_proj"] / sums["tokens"]).view(kv_heads, head_dim, kv_heads, head_dim)
    values = (sums["v_proj"] / sums["tokens"]).view(kv_heads, head_dim, kv_heads, head_dim)
    real, imaginary = pairs.real, pairs.imaginary

    def of(first: Tensor, second: Tensor) -> Tensor:
        return keys[:, first, :, second]  # [P, K, K]: two lists of places come first

    moment = torch.complex(
        of(real, real) + of(imaginary, imaginary), of(imaginary, real) - of(real, imaginary)
    )
    squares = (sums["q_proj"] / sums["tokens"]).view(kv_heads, -1, head_dim).sum(1)
    out = weights.o.unflatten(0, (kv_heads, -1))
    return Moments(
        keys=moment.cpu(),
        queries=(squares[:, real] + squares[:, imaginary]).T.cpu(),
        values=values.cpu(),
        metric=torch.einsum("jndb,jndc->jbc", out, out).cpu(),
    )


@contextmanager
def _projections(block: nn.Module, parts: Parts) -> Iterator[list[Sums]]:
    """Sum over tokens: squares of what q gives [N H], moments of what k and v give [K H, K H]."""
    seen = Sums()

    def after(leaf: str):
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            rows = output.detach().flatten(0, -2).float()
            if leaf == "q_proj":
                seen.add("tokens", torch.tensor(len(rows), device=rows.device))
                seen.add(leaf, rows.square().sum(0))
            else:
                seen.add(leaf, rows.T @ rows)

        return hook

    leaves = ("q_proj", "k_proj", "v_proj")
    linears = {leaf: block.get_submodule(parts.linear(leaf)) for leaf in leaves}
    handles = [linear.register_forward_hook(after(leaf)) for leaf, linear in linears.items()]
    try:
        yield [seen]
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _attended(block: nn.Module, parts: Parts, converted: nn.Module) -> Iterator[list[Sums]]:
    """Sum over tokens, of a what enters o, and b what enters the converted attention's o:

    own E a aᵀ, beside E a bᵀ, converted E b bᵀ, [N H, N H] each.
    """
    seen = Sums()
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
