"""What a user asked, from the flags of `compress plan`, made into cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from compress.core.errors import InputError, shown
from compress.core.source import gguf_file
from compress.devices import find_device
from compress.planning.case import Case, Draft, Load
from compress.planning.inputs import Sweep, shape_of_text, stored_kv, stored_weights
from compress.roofline import Device, ModelShape, Precision, precision
from compress.shapes import find_config, shape_of

DEFAULT_DEVICE = "h100"
DRAFT_TOKENS, ACCEPTANCE = 4, 0.7


@dataclass(frozen=True)
class Question:
    """The flags.  What is built of them raises InputError, each where it is wrong."""

    model: str | None
    shape: str | None = None
    device: str | None = None
    batch: int = 1
    context: int = 1024
    new_tokens: int = 0
    weights: str | None = None
    kv: str | None = None
    head: str = "bf16"
    draft: str | None = None
    draft_tokens: int | None = None
    acceptance: float | None = None
    tensor_parallel: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise InputError("give a MODEL, or a model that need not exist as --shape; one of them")

    @cached_property
    def _config(self) -> Mapping[str, Any] | None:
        return find_config(self.model) if self.model is not None else None

    @cached_property
    def model_shape(self) -> ModelShape:
        return self._shape_and_notes[0]

    @cached_property
    def notes(self) -> list[str]:
        """What was taken for granted."""
        return self._shape_and_notes[1]

    @cached_property
    def _shape_and_notes(self) -> tuple[ModelShape, list[str]]:
        if self._config is not None and self.model is not None:
            shape = shape_of(self._config, self.model)
            unread = self.weights is None and gguf_file(self.model) is not None
            return shape, ["the bits of a .gguf file are not read; say --weights"] if unread else []
        assert self.shape is not None
        shape, derived = shape_of_text(self.shape)
        return shape, [f"taken for granted: {', '.join(derived)}"] if derived else []

    @cached_property
    def stored_as(self) -> str:
        """Name of the weights' precision: the flag, what a quantized checkpoint has, or bf16."""
        if self.weights is not None:
            return self.weights
        return (stored_weights(self._config) if self._config else None) or "bf16"

    @cached_property
    def kv_as(self) -> str:
        """The same of keys and values: the flag, what a checkpoint has scales for, or bf16."""
        if self.kv is not None:
            return self.kv
        return (stored_kv(self._config) if self._config else None) or "bf16"

    @property
    def is_quantized(self) -> bool:
        """Whether the model that was given is a quantized checkpoint."""
        return bool(self._config and self._config.get("quantization_config"))

    @cached_property
    def precision(self) -> Precision:
        return precision(self.stored_as, self.kv_as, head=self.head)

    @cached_property
    def plan_device(self) -> Device:
        return find_device(self.device or DEFAULT_DEVICE)

    @cached_property
    def proposal(self) -> Draft | None:
        """The draft, of a model or of a cost."""
        if self.draft is None:
            return None
        length = DRAFT_TOKENS if self.draft_tokens is None else self.draft_tokens
        acceptance = ACCEPTANCE if self.acceptance is None else self.acceptance
        try:
            cost = float(self.draft)
        except ValueError:
            config = find_config(self.draft)
            shape, stored = shape_of(config, self.draft), stored_weights(config) or "bf16"
            return Draft(length, acceptance, shape=shape, precision=precision(stored, self.kv_as))
        if not 0 <= cost < 1000:
            raise InputError(
                f"--draft {shown(self.draft)}: a draft's cost is a share of the model's step, "
                "such as 0.1"
            )
        return Draft(length, acceptance, cost=cost)

    @cached_property
    def load(self) -> Load:
        return Load(self.batch, self.context, self.new_tokens, self.tensor_parallel)

    @cached_property
    def case(self) -> Case:
        """What was asked about."""
        return Case(self.model_shape, self.precision, self.plan_device, self.load, self.proposal)

    def swept(self, sweep: Sweep) -> dict[Any, Case]:
        """A case for each value."""
        key = sweep.key.replace("-", "_")
        return {value: replace(self, **{key: value}).case for value in sweep.values}
