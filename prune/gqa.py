"""Fewer KV heads as a stage: MHA or GQA to GQA with fewer, or to MQA.

    collect   moments of queries, keys and values; groups of heads, and how each becomes one
    decide    nothing: blocks are converted one by one
    apply     the new weights, and least squares for the output projection

Both walks run the original model.  The second runs the converted attention beside the original's on
the same hidden states, from which the output projection is solved for: it makes up for what merged
keys changed in the attention's weights as well (refit.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.core.stage import Block
from compress.prune.attention import AttentionWeights, Pairs, find_pairs, turned_channels
from compress.prune.beside import attended, attention_like, refit_output
from compress.prune.conversion_stage import ConversionConfig, Described, Original
from compress.prune.kv_heads import Merge, Merged, Moments, groups_of, merge
from compress.prune.parts import Parts
from compress.prune.shape import NAMES, Shape
from compress.prune.sums import Sums


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class GqaConfig(ConversionConfig):
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

    def plan(self, original: Original) -> "GqaStage":
        """The stage for a model; InputError where its heads do not come together so."""
        _check_heads(self.kv_heads, original.shape)
        turned = turned_channels(original.config, original.shape.head_dim)
        block = original.block()
        pairs = find_pairs(block, original.parts, original.shape.head_dim, turned, original.probe)
        return GqaStage(self, original, pairs)


def _check_heads(asked: int, shape: Shape) -> None:
    """Raise InputError unless the KV heads can come together in that many groups of one size."""
    possible = [n for n in range(1, shape.kv_heads) if shape.kv_heads % n == 0]
    if not possible:
        raise InputError(
            f"the model has {shape.kv_heads} KV heads of {shape.heads} heads; there are no fewer"
        )
    if asked not in possible:
        raise InputError(
            f"kv_heads = {asked} is not possible: the model has {shape.kv_heads}, which come "
            f"together in groups of one size; possible are {', '.join(map(str, possible))}"
        )
    if shape.head_dim % 2:
        raise InputError(f"heads have {shape.head_dim} dimensions, an odd number; not supported")


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


COLUMNS = {
    "groups": "merged",
    "keys_lost": "lost of keys",
    "values_lost": "of values",
    "merged_error": "error, merged",
    "error": "error, refitted",
}
LEGEND = (
    "Lost of the keys: the share of their energy, weighted by that of the queries; of the values: "
    "the same in what reaches the hidden states. Error: the mean squared change of the attention's "
    "output on the calibration text, over its mean square."
)


class GqaStage:
    """Converts a model, block by block, in the steps of conversion_stage.py.

    pairs  of a head's channels (attention.py); None where RoPE and norms let no keys be turned
    """

    needs_reference: bool = False
    counts_above: float | None = None
    trains_blocks: bool = False
    observes: bool = True
    carried: int = 0

    def __init__(self, config: GqaConfig, original: Original, pairs: Pairs | None) -> None:
        self.config = config
        self.raw, self.shape, self.parts = original.raw, original.shape, original.parts
        self.turns = pairs is not None
        self.pairs = pairs or Pairs.neighbours(self.shape.head_dim, original.device)
        self.stock: Sequence[nn.Module] = ()

    @property
    def compared(self) -> int:
        """Sequences that the refit looks at."""
        return self.config.refit_samples if self.config.refit else 0

    @property
    def workspace(self) -> int:
        """Bytes: six matrices [N H, N H] (three moments, a factor and products) in float64."""
        return 8 * 6 * (self.shape.head_dim * max(self.shape.heads, 2 * self.shape.kv_heads)) ** 2

    def describe(self) -> Described:
        """What changes."""
        before, after = self.shape.kv_heads, self.config.kv_heads
        values = 2 * self.shape.head_dim * self.shape.depth
        return Described(
            words=f"{after} KV head{'s' if after > 1 else ''}, merged by {self.config.merge}",
            changes={"KV heads": (before, after)},
            kv_values=(before * values, after * values),
            columns=COLUMNS,
            legend=LEGEND,
        )

    def config_json(self, plans: Sequence[Any] | None) -> dict[str, Any]:
        """The original's, with fewer KV heads."""
        return {**self.raw, NAMES["kv_heads"]: self.config.kv_heads}

    def observe(self, index: int, block: nn.Module) -> AbstractContextManager[list[Sums]]:
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
        tensors = self._converted(block, plans[index]).tensors(self.parts)
        converted = attention_like(self.stock[index], block, self.parts, tensors)
        return attended(block, self.parts, converted)

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
        name = f"{self.parts.linear('o_proj')}.weight"
        original = block.module.get_parameter(name).double()
        start = weights.o.transpose(0, 1).flatten(1)
        sums = block.observed[0].sums
        found, before, after = refit_output(original, start, sums, self.config.damping)
        heads = found.unflatten(1, (-1, self.shape.head_dim))
        weights.o = heads.transpose(0, 1).contiguous()
        return before, after

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
    k, v = merged_kv(weights.k, weights.v, pairs, groups, merged)
    q, o = fitted_qo(weights, pairs, groups, merged)
    return replace(weights, q=q, k=k, v=v, o=o)


def merged_kv(
    k: Tensor,
    v: Tensor,
    pairs: Pairs,
    groups: Sequence[Sequence[int]],
    merged: Sequence[Merged],
) -> tuple[Tensor, Tensor]:
    """Weights of one key and one value a group [groups, H, D + 1], of those of all heads."""
    keys, values = [], []
    for group, one in zip(groups, merged, strict=True):
        heads = torch.tensor(group, device=k.device)
        key_in, value_in = one.key_in.to(k.device), one.value_in.to(k.device)
        keys.append(pairs.to_real(torch.einsum("pj,jpx->px", key_in, pairs.to_complex(k[heads]))))
        values.append(torch.einsum("hjb,jbx->hx", value_in, v[heads]))
    return torch.stack(keys), torch.stack(values)


def fitted_qo(
    weights: AttentionWeights,
    pairs: Pairs,
    groups: Sequence[Sequence[int]],
    merged: Sequence[Merged],
) -> tuple[Tensor, Tensor]:
    """Queries [N, H, D + 1] and output projections [N, D, H] for merged keys and values."""
    device = weights.q.device
    queries = weights.q.unflatten(0, (len(weights.k), -1))  # [K, N / K, H, D + 1]
    outs = weights.o.unflatten(0, (len(weights.k), -1))  # [K, N / K, D, H]
    q, o = [], []
    for group, one in zip(groups, merged, strict=True):
        heads = torch.tensor(group, device=device)
        key_out, value_out = one.key_out.to(device), one.value_out.to(device)
        turned = pairs.to_complex(queries[heads]) * key_out.T.conj()[:, None, :, None]
        q.append(pairs.to_real(turned).flatten(0, 1))
        o.append(torch.einsum("jndb,jbh->jndh", outs[heads], value_out).flatten(0, 1))
    return torch.cat(q), torch.cat(o)


def _moments(sums: Mapping[str, Tensor], weights: AttentionWeights, pairs: Pairs) -> Moments:
    """The moments of merging from sums over tokens; on the CPU, where small decompositions run."""
    kv_heads, head_dim, _ = weights.k.shape
    means = {name: total / sums["tokens"] for name, total in sums.items()}
    centre = torch.outer(means["value"], means["value"])
    spread = means["values"] - centre
    share = share_of_spread(means, weights.q.shape[0] // kv_heads)
    values = (centre + share * spread).view(kv_heads, head_dim, kv_heads, head_dim)
    squares = means["queries"].view(kv_heads, -1, head_dim).sum(1)
    out = weights.o.unflatten(0, (kv_heads, -1))
    return Moments(
        keys=torch.view_as_complex(means["keys"]).cpu(),
        queries=(squares[:, pairs.real] + squares[:, pairs.imaginary]).T.cpu(),
        values=values.cpu(),
        metric=torch.einsum("jndb,jndc->jbc", out, out).cpu(),
    )


def share_of_spread(means: Mapping[str, Tensor], queries: int) -> Tensor:
    """How much of the values' variance averaging over a context leaves, of `queries` a KV head."""
    spread = means["values"].diagonal() - means["value"].square()
    left = (means["attended squares"] - means["attended"].square()).sum()
    return (left / (queries * spread.sum())).clamp(0, 1)


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
    seen, turned = Sums("attention"), Turned(head_dim, pairs)

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


class Turned:
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
