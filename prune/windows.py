"""Sliding windows as a stage: most layers see only the last W tokens, some still the whole text.

    collect   how much attention lies beyond W, and what the output loses without it
    decide    which layers stay global: by place, or those that lose most
    apply     nothing: weights stay as they are, config.json says who sees what

With a text of at most W tokens the model computes what it did.  What comes out is a stock class
with windows by layer.  Of a query at position i and its softmax p over the positions j <= i

    mass kept = sum of p[j] over j > i - W,     attention of the window = these p over mass kept

so one softmax gives both (prune/window_mass.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn

from compress.core.errors import InputError, shown
from compress.core.stage import Block
from compress.prune.conversion_stage import ConversionConfig, Described, Original
from compress.prune.sums import Sums
from compress.prune.window_mass import WORKSPACE, watched

GlobalBy = Literal["place", "mass", "error"]

Plan = dict[str, Any]  # `global`, and the fields of a `WindowedLayer` that were found

# Class by `model_type` that comes of each, where layers differ and where all have a window.
CLASSES: Mapping[str, tuple[str, str]] = {
    "llama": ("cwm", "mistral"),
    "mistral": ("cwm", "mistral"),
    "qwen2": ("qwen2", "qwen2"),
    "qwen3": ("qwen3", "qwen3"),
}
NAMES = {"cwm": "CwmForCausalLM", "mistral": "MistralForCausalLM"}
OF_THE_CLASS = ("architectures", "model_type", "transformers_version")
FULL, SLIDING = "full_attention", "sliding_attention"  # as transformers calls kinds of layers
CONTEXTS = (2048, 8192)  # of which the report gives the size of the cache


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class WindowsConfig(ConversionConfig):
    """Sliding windows.

    window        tokens that a query sees, itself included, in layers with a window
    global_every  one layer in so many sees the whole text; 0 for none
    global_by     which: `place`, the last of each so many; `mass`, those with the most attention
                  beyond the window; `error`, those whose output loses most without that
    """

    window: int = Field(ge=1)
    global_every: int = Field(default=4, ge=0)
    global_by: GlobalBy = "place"

    def plan(self, original: Original) -> "WindowsStage":
        """The stage for a model; InputError where its class or its text allows no such windows."""
        depth = original.shape.depth
        if self.global_every == 1 or self.global_every > depth:
            raise InputError(
                f"global_every = {self.global_every} is not possible: 1 would leave no layer to "
                f"convert, and the model has {depth}; possible are 0, for none, and 2 to {depth}"
            )
        context = original.config.max_position_embeddings
        if self.window >= context:
            raise InputError(
                f"window = {self.window} changes nothing: the model's context is {context} tokens; "
                "give less"
            )
        length = original.calibration_length
        if self.global_every and self.global_by != "place" and length <= self.window:
            raise InputError(
                f"global_by = {self.global_by} looks beyond the window, and calibration sequences "
                f"have {length} tokens, of which a window of {self.window} sees all; give "
                f"--seq-len {min(2 * self.window, context)}, or --global-by place"
            )
        return WindowsStage(self, original, _family(original, bool(self.global_every)))


@dataclass(frozen=True)
class WindowedLayer:
    """What a report says of a layer's attention.

    kind       `global`, or `window`
    mass_kept  share of the attention that lies inside the window, on average over heads and
               those queries that have tokens beyond it; of a global layer what it would be
    least_kept  the same of the head that keeps least
    error      E ‖y - y'‖² / E ‖y‖² of the attention's output without the rest, on these queries
    """

    name: str
    kind: str
    mass_kept: float | None = None
    least_kept: float | None = None
    error: float | None = None
    note: str = ""


COLUMNS = {
    "kind": "sees",
    "mass_kept": "attention inside the window",
    "least_kept": "of the least head",
    "error": "output error",
}


class WindowsStage:
    """Converts a model, in the steps of conversion_stage.py."""

    needs_reference: bool = False
    counts_above: float | None = None
    trains_blocks: bool = False
    compared: int = 0
    carried: int = 0
    workspace: int = WORKSPACE

    def __init__(
        self, config: WindowsConfig, original: Original, entries: Mapping[str, Any]
    ) -> None:
        self.config = config
        self.raw, self.shape, self.parts = original.raw, original.shape, original.parts
        self.context = original.config.max_position_embeddings
        self.observes = original.calibration_length > config.window
        self.entries = entries
        self.stock: Sequence[nn.Module] = ()

    @property
    def globals(self) -> int:
        """Layers that see the whole text."""
        every = self.config.global_every
        return self.shape.depth // every if every else 0

    def describe(self) -> Described:
        """What changes."""
        depth, window = self.shape.depth, self.config.window
        words = f"windows of {window} tokens in {depth - self.globals} of {depth} layers"
        contexts = [length for length in CONTEXTS if length <= self.context] or [self.context]
        whole = 2 * self.shape.kv_heads * self.shape.head_dim

        def values(layers: int, length: int) -> int:
            return round(whole * (layers + (depth - layers) * min(1, window / length)))

        shown = {
            f"KV cache of {length:,} tokens, numbers a token": (
                values(depth, length),
                values(self.globals, length),
            )
            for length in contexts
        }
        return Described(
            words=words,
            changes={"layers that see the whole text": (depth, self.globals)} | shown,
            kv_values=(values(depth, contexts[-1]), values(self.globals, contexts[-1])),
            columns=COLUMNS,
            legend=(
                f"KV cache a token: of a text of {contexts[-1]:,} tokens. Attention inside the "
                "window: on average over heads and those queries of the calibration text that "
                "have tokens beyond it; of a layer that sees all, what it would be. Output error: "
                "the mean squared change of the attention's output without the rest, over its "
                "mean square."
            ),
        )

    def config_json(self, plans: Sequence[Plan] | None) -> dict[str, Any]:
        """The original's, with the windows, in a class that has them; plans say who is global."""
        wide = self._by_place() if plans is None else [plan["global"] for plan in plans]
        entries: dict[str, Any] = {"sliding_window": self.config.window}
        if self.entries["model_type"] != "mistral":  # whose class has one window for all layers
            entries["layer_types"] = [FULL if is_global else SLIDING for is_global in wide]
        return {**self.raw, **self.entries, **entries}

    def observe(self, index: int, block: nn.Module) -> AbstractContextManager[list[Sums]]:
        """Watch a block that runs for what lies beyond the window."""
        return watched(block, self.parts, self.config.window)

    def collect(self, block: Block) -> dict[str, Any]:
        """What the block's attention would lose, and its name."""
        found: dict[str, Any] = {"name": block.full_name(self.parts.attention)}
        sums = block.observed[0].sums if block.observed else {}
        if "queries" in sums:
            kept = 1 - sums["beyond"] / sums["queries"]
            found |= {
                "mass_kept": float(kept.mean()),
                "least_kept": float(kept.min()),
                "error": float(sums["lost"] / sums["power"]) if sums["power"] > 0 else 0.0,
            }
        return found

    def decide(self, summaries: Sequence[dict[str, Any]]) -> Sequence[Plan]:
        """Which layers are global, beside what was found of each."""
        wide = self._wide(summaries)
        return [one | {"global": chosen} for one, chosen in zip(summaries, wide, strict=True)]

    def _wide(self, summaries: Sequence[dict[str, Any]]) -> list[bool]:
        by = self.config.global_by
        if not self.globals or by == "place":
            return self._by_place()
        if "error" not in summaries[0]:
            raise InputError(
                f"global_by = {by} looks beyond the window, and no calibration sequence is longer "
                f"than {self.config.window} tokens; give longer ones, or global_by = place"
            )
        lost = [one["error"] if by == "error" else -one["mass_kept"] for one in summaries]
        most = sorted(range(len(lost)), key=lambda layer: (-lost[layer], layer))[: self.globals]
        return [layer in most for layer in range(len(lost))]

    def compare(
        self, plans: Sequence[Plan], index: int, block: nn.Module
    ) -> AbstractContextManager[list[Sums]]:
        """Nothing runs beside it."""
        return _nothing()

    def apply(self, block: Block, plans: Sequence[Plan]) -> tuple[dict[str, Tensor], WindowedLayer]:
        """The block's tensors as they are, and what is to be said of them."""
        found = dict(plans[block.index])
        kind = "global" if found.pop("global") else "window"
        return block.module.state_dict(), WindowedLayer(kind=kind, **found)

    def _by_place(self) -> list[bool]:
        every, depth = self.config.global_every, self.shape.depth
        return [bool(every) and layer % every == every - 1 for layer in range(depth)]

    def state(self) -> None:
        """Nothing is carried from block to block."""

    def restore(self, state: Any) -> None:
        """Nothing to take over."""


def _family(original: Original, layers_differ: bool) -> dict[str, Any]:
    """What changes in config.json besides the windows: the class, where it has to.

    Raises InputError for a model that no class with windows computes, or that has windows.
    """
    from transformers import CONFIG_MAPPING

    config, ref = original.config, original.ref
    kind = config.model_type
    if SLIDING in (getattr(config, "layer_types", None) or ()) or (
        kind == "mistral" and config.sliding_window
    ):
        raise InputError(f"'{ref}' has windows of {config.sliding_window} tokens already")
    if kind not in CLASSES:
        raise InputError(
            f"'{ref}' is of type {shown(kind)}; windows by layer are for {', '.join(CLASSES)}"
        )
    target = CLASSES[kind][0 if layers_differ else 1]
    if target == kind:
        switches = {"use_sliding_window": True} if kind.startswith("qwen") else {}
        return {"model_type": kind, **switches}
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise InputError(
            f"'{ref}' has biases, and {NAMES[target]}, the class with windows that computes what "
            f"{kind} does, has none; not supported"
        )
    default, own = CONFIG_MAPPING[target]().to_dict(), config.to_dict()
    entries = {
        key: own[key]
        for key, value in default.items()
        if key in own and own[key] != value and key not in OF_THE_CLASS
    }
    return entries | {"model_type": target, "architectures": [NAMES[target]]}


@contextmanager
def _nothing() -> Iterator[list[Sums]]:
    yield []
