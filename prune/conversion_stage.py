"""What a conversion of the attention is: settings, and the stage that they plan for a model.

    plan(original) -> stage         refuse what cannot be, before any work
    collect(block) -> summary       first walk: what a block says about itself
    decide(summaries) -> plans      one plan a block, from all blocks
    apply(block, plans) -> outcome  second walk: the block's new tensors, and what is said of them

Both walks run the original model; on the second the converted attention may run beside it on the
same hidden states.  compress/conversion.py knows no conversion by name: all that differs is here.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked
from torch import Tensor, nn

from compress.prune.parts import Parts
from compress.prune.shape import Shape
from compress.prune.sums import Sums


@dataclass(frozen=True)
class Original:
    """The model to convert.

    ref       its name, for messages
    raw       its config.json
    config    the same as transformers reads it
    shape     its numbers
    parts     of its blocks
    skeleton  the model without weights; what it computes, such as RoPE's frequencies, is there
    device    that blocks are on
    dtype     that the result is stored in
    block     loads its first block, in float32
    probe     runs a module like the first block on a sample, [1, S, D]
    calibration_length  tokens of a sequence to calibrate on
    """

    ref: str
    raw: Mapping[str, Any]
    config: Any
    shape: Shape
    parts: Parts
    skeleton: nn.Module
    device: torch.device
    dtype: torch.dtype
    block: Callable[[], nn.Module]
    probe: Callable[[nn.Module], Tensor]
    calibration_length: int


@dataclass(frozen=True)
class Described:
    """What a conversion does to a model, in words and numbers that need no calibration.

    words      what the attention becomes, for a title: `1 KV head`
    changes    by name, what was and what is
    kv_values  numbers that the KV cache holds for a token, all layers together: was, is
    columns    of a block's outcome, field by field, the heading of a table of all blocks
    legend     what the columns are, in a sentence or two
    """

    words: str
    changes: Mapping[str, tuple[int | str, int | str]]
    kv_values: tuple[int, int]
    columns: Mapping[str, str]
    legend: str


class Outcome(Protocol):
    """What a report says of a block: a dataclass with these fields and those in the columns.

    name  of the attention in the model
    note  what is to be said of it besides; may be empty
    """

    @property
    def name(self) -> str: ...

    @property
    def note(self) -> str: ...


class ConversionStage(Protocol):
    """A conversion of one model, as compress/conversion.py carries it out.

    observes   whether `collect` wants to have watched the blocks on calibration text
    compared   calibration sequences that run beside the converted attention in the second walk
    stock      blocks of the class that comes out, without weights; the preflight puts them here
    carried    numbers a token that go from block to block behind its hidden states
    workspace  bytes that a block's sums and decompositions take
    """

    needs_reference: bool
    counts_above: float | None
    trains_blocks: bool
    stock: Sequence[nn.Module]

    @property
    def observes(self) -> bool: ...

    @property
    def compared(self) -> int: ...

    @property
    def carried(self) -> int: ...

    @property
    def workspace(self) -> int: ...

    def describe(self) -> Described: ...

    def config_json(self, plans: Sequence[Any] | None) -> dict[str, Any]:
        """The whole config.json; without plans one of the same class and shapes."""
        ...

    def observe(self, index: int, block: nn.Module) -> AbstractContextManager[list[Sums]]: ...

    def collect(self, block: Any) -> Any: ...

    def decide(self, summaries: Sequence[Any]) -> Sequence[Any]: ...

    def compare(
        self, plans: Sequence[Any], index: int, block: nn.Module
    ) -> AbstractContextManager[list[Sums]]: ...

    def apply(self, block: Any, plans: Sequence[Any]) -> tuple[dict[str, Tensor], Outcome]: ...

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class ConversionConfig:
    """The settings of a conversion; a line in compress/prune/conversions.py names each class."""

    def plan(self, original: Original) -> ConversionStage:
        """The stage for a model; InputError where that cannot be converted so."""
        raise NotImplementedError
