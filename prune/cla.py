"""Cross-layer attention as a stage: a run of layers uses the keys and values of its first one.

    collect   moments of each run; one key and value for all of its layers
    decide    hands to each layer what its run came to
    apply     new weights, and least squares for the output projections

Both walks run the original model, and on the second each layer's converted attention runs beside
the original's, with keys and values of the converted first layer.  What the first layer of a run
hands to the others, x or keys and values, goes behind its hidden states (cla_sums.py); what becomes
of keys and values is said in shared_kv.py.

Source: Brandon et al., arXiv 2405.12981 (they train such models from scratch, or on).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn

from compress.core.errors import InputError, shown
from compress.core.own_class import CROSS_LAYER
from compress.core.stage import Block
from compress.prune.attention import AttentionWeights, Pairs
from compress.prune.beside import attention_like, refit_output
from compress.prune.cla_sums import beside, moments
from compress.prune.conversion_stage import ConversionConfig, Described, Original
from compress.prune.gqa import fitted_qo
from compress.prune.kv_heads import Merged
from compress.prune.shared_kv import Run, add_layer, shared
from compress.prune.sums import Sums

NORMED = "keys are the first layer's as they are: norms on queries and keys let none be merged"
# `name`, and unless a layer is a run by itself what `shared` (shared_kv.py) says of it
Plan = dict[str, Any]
KEYS_AND_VALUES = ("k_proj", "v_proj", "k_norm")


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class ClaConfig(ConversionConfig):
    """Layers that share keys and values.

    share          neighbouring layers that use one layer's; the last run is shorter where this
                   does not divide the number of layers
    refit          solve for the output projections
    refit_samples  calibration sequences that the refit looks at, the first of those there are
    damping        share of the mean of a second moment's diagonal that is added to it
    """

    share: int = Field(ge=2)
    refit: bool = True
    refit_samples: int = Field(default=128, ge=1, le=1 << 20)
    damping: float = Field(default=0.01, gt=0, le=1)

    def plan(self, original: Original) -> "ClaStage":
        """The stage for a model; InputError where its layers cannot share."""
        depth, kind = original.shape.depth, original.config.model_type
        if self.share > depth:
            raise InputError(
                f"share = {self.share} is not possible: the model has {depth} layers; "
                f"give 2 to {depth}"
            )
        from compress.core.cross_layer import CLASSES

        if f"{kind}{CROSS_LAYER}" not in CLASSES:
            known = ", ".join(name.removesuffix(CROSS_LAYER) for name in CLASSES)
            raise InputError(
                f"'{original.ref}' is of type {shown(kind)}; layers that share keys and values are "
                f"for {known}"
            )
        kinds = getattr(original.config, "layer_types", None) or [None] * depth
        for first in range(0, depth, self.share):
            if len(set(kinds[first : first + self.share])) > 1:
                last = min(first + self.share, depth) - 1
                raise InputError(
                    f"layers {first} to {last} of '{original.ref}' would share keys and values, "
                    "and some have a window and some see the whole text; give a share whose runs "
                    "are of one kind"
                )
        return ClaStage(self, original)


@dataclass(frozen=True)
class SharedLayer:
    """What a report says of a layer's attention.

    reads         whose keys and values it uses: `its own`, or `layer 2`
    keys_lost     E ‖k - k'‖² / E ‖k‖² of its keys by the shared ones
    values_lost   the same of its values
    merged_error  E ‖y - y'‖² / E ‖y‖² of the attention's output, as merged
    error         the same after the refit
    """

    name: str
    reads: str
    keys_lost: float | None = None
    values_lost: float | None = None
    merged_error: float | None = None
    error: float | None = None
    note: str = ""


COLUMNS = {
    "reads": "keys and values",
    "keys_lost": "lost of keys",
    "values_lost": "of values",
    "merged_error": "error, merged",
    "error": "error, refitted",
}
LEGEND = (
    "Lost of keys and values: the share of the energy of a layer's own that the shared ones do not "
    "give. Error: the mean squared change of the attention's output on the calibration text, over "
    "its mean square."
)


class ClaStage:
    """Converts a model, run by run, in the steps of conversion_stage.py.

    run  what is carried from layer to layer of a run in the first walk
    """

    needs_reference: bool = False
    counts_above: float | None = None
    trains_blocks: bool = False
    observes: bool = True

    def __init__(self, config: ClaConfig, original: Original) -> None:
        self.config = config
        self.raw, self.shape, self.parts = original.raw, original.shape, original.parts
        self.kind = f"{original.config.model_type}{CROSS_LAYER}"
        half = torch.arange(self.shape.head_dim // 2)  # RoPE of these classes turns halves of heads
        self.pairs = Pairs(half, half + self.shape.head_dim // 2)
        self.run: Run | None = None
        self.stock: Sequence[nn.Module] = ()

    @property
    def compared(self) -> int:
        """Sequences that the refit looks at."""
        return self.config.refit_samples if self.config.refit else 0

    @property
    def carried(self) -> int:
        """Numbers a token behind hidden states: x and keys at most, then keys and values."""
        keys = self.shape.kv_heads * self.shape.head_dim
        return keys + max(self.shape.hidden, keys)

    @property
    def workspace(self) -> int:
        """Bytes: five matrices [D + 1, D + 1] and six of a run's values in float64."""
        width = max(self.shape.heads, self.config.share * self.shape.kv_heads)
        return 8 * (5 * (self.shape.hidden + 1) ** 2 + 6 * (width * self.shape.head_dim) ** 2)

    def describe(self) -> Described:
        """What changes."""
        depth, share = self.shape.depth, self.config.share
        owners = -(-depth // share)
        values = 2 * self.shape.kv_heads * self.shape.head_dim
        rest = f", the last run of {depth % share}" if depth % share else ""
        return Described(
            words=f"keys and values shared by {share} layers{rest}",
            changes={"layers with keys and values of their own": (depth, owners)},
            kv_values=(depth * values, owners * values),
            columns=COLUMNS,
            legend=LEGEND,
        )

    def config_json(self, plans: Sequence[Any] | None) -> dict[str, Any]:
        """The original's, in a class of compress's own (core/cross_layer.py)."""
        from compress.core.cross_layer import CLASSES

        own = {"model_type": self.kind, "architectures": [CLASSES[self.kind].__name__]}
        return {**self.raw, **own, "kv_share": self.config.share}

    def observe(self, index: int, block: nn.Module) -> AbstractContextManager[list[Sums]]:
        """Watch a block that runs for its moments."""
        ends = self._ends(index)
        return moments(block, self.parts, self.shape.hidden, self.pairs, *ends)

    def collect(self, block: Block) -> Plan:
        """Add a layer to its run; after the last one, what each layer of the run becomes."""
        first, last = self._ends(block.index)
        sums = block.observed[0].sums
        means = {name: (total / sums["tokens"]).cpu() for name, total in sums.items()}
        if first:
            self.run = Run(means["inputs"], means["means"], 1 - means["phasor"])
        assert self.run is not None
        weights = AttentionWeights.of(block.module, self.parts, self.shape.head_dim).cpu()
        add_layer(self.run, weights, means, self.pairs, self.config.damping)
        found: Plan = {"name": block.full_name(self.parts.attention)}
        if last and not first:
            found["run"] = shared(self.run, self.pairs)
        if last:
            self.run = None
        return found

    def decide(self, summaries: Sequence[Plan]) -> Sequence[Plan]:
        """To each layer what its run came to; a layer that is a run by itself stays as it is."""
        plans, share = [], self.config.share
        for first in range(0, len(summaries), share):
            run = summaries[first : first + share]
            parts = run[-1].get("run") or [{} for _ in run]
            plans += [{"name": one["name"]} | part for one, part in zip(run, parts, strict=True)]
        return plans

    def compare(
        self, plans: Sequence[Plan], index: int, block: nn.Module
    ) -> AbstractContextManager[list[Sums]]:
        """Run a block's converted attention beside its own, and sum over what both give."""
        tensors = self._tensors(block, plans[index])
        converted = attention_like(self.stock[index], block, self.parts, tensors)
        return beside(block, self.parts, converted, self.shape.hidden, *self._ends(index))

    @torch.no_grad()
    def apply(self, block: Block, plans: Sequence[Plan]) -> tuple[dict[str, Tensor], SharedLayer]:
        """The block's tensors by name within it, float32, and what is to be said of them."""
        plan, (first, _) = plans[block.index], self._ends(block.index)
        source = block.index - block.index % self.config.share
        reads = "its own" if first else f"layer {source}"
        report = SharedLayer(plan["name"], reads, plan.get("keys_lost"), plan.get("values_lost"))
        tensors = self._tensors(block.module, plan)
        if "group" not in plan:
            return block.module.state_dict(), report
        if block.observed:
            name = f"{self.parts.linear('o_proj')}.weight"
            original, start = block.module.get_parameter(name).double(), tensors[name].double()
            sums = block.observed[0].sums
            found, before, after = refit_output(original, start, sums, self.config.damping)
            tensors[name] = found.float()
            report = replace(report, merged_error=before, error=after)
        if "k_norm" in dict(block.module.get_submodule(self.parts.attention).named_children()):
            report = replace(report, note=NORMED)
        left = block.module.state_dict() | tensors
        if not first:
            own = tuple(f"{self.parts.attention}.{name}." for name in KEYS_AND_VALUES)
            left = {name: tensor for name, tensor in left.items() if not name.startswith(own)}
        return left, report

    def state(self) -> Any:
        """The run that is not at its end."""
        return None if self.run is None else vars(self.run)

    def restore(self, state: Any) -> None:
        """Take a run over."""
        self.run = None if state is None else Run(**state)

    def _ends(self, index: int) -> tuple[bool, bool]:
        """Whether a layer is the first of its run, and whether it is the last."""
        share = self.config.share
        return index % share == 0, index % share == share - 1 or index == self.shape.depth - 1

    def _tensors(self, block: nn.Module, plan: Plan) -> dict[str, Tensor]:
        """The attention's parameters by name in the block, float32, before the refit."""
        weights = AttentionWeights.of(block, self.parts, self.shape.head_dim)
        if "group" not in plan:
            return weights.tensors(self.parts)
        norms = {}
        if (length := plan["length"]) is not None:
            name = f"{self.parts.attention}.q_norm.weight"
            gain = block.get_parameter(name).detach()
            weights.q = weights.q * gain.double()[:, None]
            norms[name] = torch.full_like(gain, length)
        merged = [Merged(**one) for one in plan["merged"]]
        weights.q, weights.o = fitted_qo(weights, self.pairs, plan["group"], merged)
        if "k" in plan:
            weights.k, weights.v = (plan[name].to(weights.q.device) for name in ("k", "v"))
        return weights.tensors(self.parts) | norms
