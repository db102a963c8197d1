"""Multi-head latent attention as a stage: MHA, MQA or GQA to the class of DeepSeek-V3, dense.

    collect   moments of queries, keys and values; components of the keys, and what each loses
    decide    which components keep RoPE, one list of frequencies for all layers
    apply     the new weights, and least squares for the output projection (beside.py)

The mathematics is in latent.py, the tensors of the class in mla_weights.py.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn

from compress.core.stage import Block
from compress.prune.attention import AttentionWeights, Pairs
from compress.prune.beside import attended, attention_like, refit_output
from compress.prune.conversion_stage import ConversionConfig, Described, Original
from compress.prune.latent import (
    Concentrated,
    LatentMoments,
    concentrate,
    fewer_queries,
    latent,
    shared_pairs,
    unturned,
    weight_moments,
)
from compress.prune.mla_preflight import check, check_class
from compress.prune.mla_sums import latent_moments, projections
from compress.prune.mla_weights import Converted, Rope, Sizes, config_json, is_biased, tensors
from compress.prune.sums import Sums


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class MlaConfig(ConversionConfig):
    """Multi-head latent attention (prune/latent.py).

    kv_rank        numbers of the latent, kept for each token
    rope_dim       channels of the key with RoPE, which all heads share, kept for each token; even
    q_rank         numbers that queries are made from; None: queries as they are
    basis          principal components of what `activations` are in calibration, or a plain
                   singular value decomposition of the `weights`
    refit          solve for the output projection
    refit_samples  calibration sequences that the refit looks at, the first of those there are
    damping        share of the mean of the second moment's diagonal that is added to it
    """

    kv_rank: int = Field(ge=1)
    rope_dim: int = Field(ge=2)
    q_rank: int | None = Field(default=None, ge=1)
    basis: Literal["activations", "weights"] = "activations"
    refit: bool = True
    refit_samples: int = Field(default=128, ge=1, le=1 << 20)
    damping: float = Field(default=0.01, gt=0, le=1)

    def plan(self, original: Original) -> "MlaStage":
        """The stage for a model; InputError where it has no such form."""
        pairs, rope = check(self.sizes(original), original)
        check_class(original, lambda tiny: MlaStage(lossless(tiny, rope), tiny, pairs, rope))
        return MlaStage(self, original, pairs, rope)

    def sizes(self, original: Original) -> Sizes:
        """Of the attention that comes out."""
        return Sizes(self.kv_rank, self.rope_dim, self.q_rank, original.shape.head_dim)


def lossless(original: Original, rope: Rope) -> MlaConfig:
    """The settings with which a model is converted without loss, and keeps as much."""
    shape = original.shape
    turned = 2 * len(rope.frequencies) * shape.kv_heads
    return MlaConfig(
        kv_rank=2 * shape.kv_heads * shape.head_dim - turned,
        rope_dim=turned,
        q_rank=shape.heads * shape.head_dim if is_biased(original) else None,
        basis="weights",
        refit=False,
    )


COLUMNS = {
    "rope_kept": "rotation kept",
    "keys_lost": "lost of keys",
    "values_lost": "of values",
    "plain_error": "error, before the refit",
    "error": "refitted",
}
FAR = 2048  # tokens, over which calibration sequences tell what distance needs
LEGEND = (
    "Rotation kept: of what the logits would lose without RoPE, the share of the components that "
    "keep it. Lost: what the latent does not hold of the other keys and of the values, as a share "
    "of their energy in the attention's output. Error: the mean squared change of that output on "
    "the calibration text, over its mean square."
)


@dataclass(frozen=True)
class LatentAttention:
    """What a report says of a block's attention (LEGEND).

    pairs  for each pair of a head's channels that RoPE turns, the components that keep it
    """

    name: str
    rope_kept: float
    keys_lost: float
    values_lost: float
    pairs: list[int]
    plain_error: float | None = None
    error: float | None = None
    note: str = ""


class MlaStage:
    """Converts a model, block by block, in the steps of conversion_stage.py.

    pairs  of a head's channels that RoPE turns together
    """

    needs_reference: bool = False
    counts_above: float | None = None
    trains_blocks: bool = False
    carried: int = 0

    def __init__(self, config: MlaConfig, original: Original, pairs: Pairs, rope: Rope) -> None:
        self.config, self.original = config, original
        self.shape, self.parts = original.shape, original.parts
        self.pairs, self.rope, self.biased = pairs, rope, is_biased(original)
        self.sizes = config.sizes(original)
        self.stock: Sequence[nn.Module] = ()

    @property
    def observes(self) -> bool:
        """Whether moments come from calibration text."""
        return self.config.basis == "activations"

    @property
    def compared(self) -> int:
        """Sequences that the refit looks at."""
        return self.config.refit_samples if self.config.refit else 0

    @property
    def workspace(self) -> int:
        """Bytes: the joint moments of all blocks, which wait until frequencies are chosen, and
        eight matrices as wide as they, or as queries."""
        shape = self.shape
        joint = 2 * shape.kv_heads * shape.head_dim
        return 8 * (shape.depth * joint**2 + 8 * max(joint, shape.heads * shape.head_dim) ** 2)

    def describe(self) -> Described:
        """What changes."""
        config, shape = self.config, self.shape
        before = 2 * shape.kv_heads * shape.head_dim * shape.depth
        after = (config.kv_rank + config.rope_dim) * shape.depth
        queries = "" if config.q_rank is None else f", queries of rank {config.q_rank}"
        return Described(
            words=f"MLA of rank {config.kv_rank} and {config.rope_dim} RoPE channels{queries}",
            changes={
                "attention": (
                    f"{shape.kv_heads} KV heads of {shape.head_dim}",
                    f"latents of {config.kv_rank} and keys of {config.rope_dim}",
                )
            },
            kv_values=(before, after),
            columns=COLUMNS,
            legend=LEGEND + self._how_far(),
        )

    def _how_far(self) -> str:
        """A sentence where the calibration text is shorter than what the model may read.

        A rotation that is slow over the text's distances is cheap to leave out, and is missed
        beyond them (benchmarks/LOG.md).
        """
        seen = self.original.calibration_length
        enough = min(FAR, self.original.config.max_position_embeddings)
        if not self.observes or seen >= enough:
            return ""
        return (
            f" Distances of up to {seen:,} tokens were looked at: what lies further back may be "
            f"lost, which compress eval --recall shows; a seq_len of {enough} looks further."
        )

    def config_json(self, plans: Sequence[Any] | None) -> dict[str, Any]:
        """Of the class of DeepSeek-V3, with the frequencies that are kept."""
        kept = [0] * (self.config.rope_dim // 2)
        if plans is not None:
            kept = _slots(plans[0]["kept"])
        return config_json(self.original, self.sizes, [self.rope.frequencies[p] for p in kept])

    def observe(self, index: int, block: nn.Module) -> AbstractContextManager[list[Sums]]:
        """Watch a block that runs for its moments."""
        wide = self.config.q_rank is not None
        return projections(block, self.parts, self.shape.head_dim, self.pairs, self.rope, wide)

    def collect(self, block: Block) -> dict[str, Any]:
        """The moments, and the components of the keys."""
        weights = self._weights(block.module)
        if self.observes:
            sums = {name: total.cpu() for name, total in block.observed[0].sums.items()}
            moments = latent_moments(sums, weights, self.rope.scale)
        else:
            moments = weight_moments(weights, self.pairs.cpu())
        return {"moments": vars(moments), "found": vars(concentrate(moments))}

    def decide(self, summaries: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Which components keep RoPE."""
        lost = [summary["found"]["lost"] for summary in summaries]
        count, turned = self.config.rope_dim // 2, len(self.rope.frequencies)
        kept = shared_pairs(lost, count, turned)
        return [{**summary, "kept": kept} for summary in summaries]

    def compare(
        self, plans: Sequence[dict[str, Any]], index: int, block: nn.Module
    ) -> AbstractContextManager[list[Sums]]:
        """Run a block's converted attention beside its own, and sum over what both give."""
        made, _ = self._converted(block, plans[index])
        converted = attention_like(self.stock[index], block, self.parts, made)
        places = self.pairs.real[_slots(plans[index]["kept"])]

        def adapt(kwargs: dict[str, Any]) -> dict[str, Any]:
            angles = (
                angle[..., places] / self.rope.stretch for angle in kwargs["position_embeddings"]
            )
            both = tuple(torch.cat([angle, angle], -1) for angle in angles)
            return {**kwargs, "position_embeddings": both}

        return attended(block, self.parts, converted, adapt)

    @torch.no_grad()
    def apply(
        self, block: Block, plans: Sequence[dict[str, Any]]
    ) -> tuple[dict[str, Tensor], LatentAttention]:
        """The block's tensors by name within it, float32, and what is to be said of them."""
        plan = plans[block.index]
        made, (keys_lost, values_lost) = self._converted(block.module, plan)
        lost, kept = plan["found"]["lost"], torch.tensor(plan["kept"])
        mask = torch.arange(lost.shape[1])[None] < kept[:, None]
        report = LatentAttention(
            block.full_name(self.parts.attention),
            float((lost * mask).sum() / lost.sum().clamp_min(1e-300)),
            keys_lost,
            values_lost,
            plan["kept"],
        )
        if block.observed:
            name = f"{self.parts.linear('o_proj')}.weight"
            original = block.module.get_parameter(name).double()
            start = made[name].to(original)
            sums = block.observed[0].sums
            found, before, after = refit_output(original, start, sums, self.config.damping)
            made[name] = found.float()
            report = replace(report, plain_error=before, error=after)
        inside = f"{self.parts.attention}."
        kept_as_is = {
            n: t for n, t in block.module.state_dict().items() if not n.startswith(inside)
        }
        return kept_as_is | made, report

    def _weights(self, block: nn.Module) -> AttentionWeights:
        """On the CPU, where moments and decompositions are."""
        return AttentionWeights.of(block, self.parts, self.shape.head_dim).cpu()

    def _converted(
        self, block: nn.Module, plan: dict[str, Any]
    ) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """The attention's tensors, and the shares of keys and values that are lost."""
        moments, found = LatentMoments(**plan["moments"]), Concentrated(**plan["found"])
        rest = unturned(found, plan["kept"])
        made = latent(moments, rest, self.pairs.cpu(), self.config.kv_rank)
        kept = plan["kept"]
        slots = torch.tensor(_slots(kept))
        numbers = torch.cat([torch.arange(count) for count in kept])
        scale = self.rope.scale * (self.shape.head_dim + self.config.rope_dim) ** 0.5
        rank = self.config.q_rank
        converted = Converted(
            self.pairs.cpu(),
            slots,
            found.key_in[slots, numbers],
            found.key_out[slots, numbers],
            moments.constant,
            made,
            None if rank is None else fewer_queries(moments, rank),
            scale,
        )
        return tensors(self._weights(block), converted, self.parts, self.biased), made.lost

    def state(self) -> None:
        """Nothing is carried from block to block."""

    def restore(self, state: Any) -> None:
        """Nothing to take over."""


def _slots(kept: Sequence[int]) -> list[int]:
    """The pairs of the channels that keep RoPE, in their order in the class."""
    return [pair for pair, count in enumerate(kept) for _ in range(count)]
