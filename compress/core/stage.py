"""The contract between the pipeline and a compression method.

A stage sees one block at a time and works in three steps, since some decisions are global:

    collect(block) -> summary      what this block says about itself
    decide(summaries) -> plan      one plan from all blocks (a byte budget, channels to drop)
    apply(block, plan) -> outcome  change the block, and say what to write in its place

A method whose decisions are local (RTN, AWQ) sets `decides_globally = False`: both passes then
run in one walk, and collect and decide are not called.

A stage may also ask to train: block by block (`trains_blocks`), for which it finds in
`block.samples` what the block is given and what it should give, and all blocks together after the
walk (`trains_model`), which is the pipeline's work (compress/qat.py).

A run may be killed after any block, and another process goes on with the next.  So summaries, the
plan and `state()` consist of tensors, numbers, strings, and lists, tuples and dictionaries of
these, and what a block becomes depends on nothing but the block, the plan and the state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from compress.core.statistics import InputStatistics


class Batches(Protocol):
    """Tensors in order, some of them perhaps on the disk (compress.core.activations)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass(frozen=True)
class BlockSamples:
    """What a block is given for the calibration sequences, and what it should give.

    inputs   hidden states as the compressed blocks before it give them, [B, S, D] each on the CPU,
             in the dtype that forwards run in
    targets  what the original block gave on the original's hidden states, of the same shapes
    kwargs   for each batch the other arguments of the block
    """

    inputs: Batches
    targets: Batches
    kwargs: Sequence[Mapping[str, Any]]


@dataclass
class Block:
    """One decoder block, loaded.

    module  its float32 weights; a stage changes them in place to what the checkpoint will hold
    inputs  statistics per distinct input, empty when the stage asked for none
    probe   runs a module like this one on a calibration sample, [1, S, D]; None without statistics
    dtype   the dtype that the checkpoint stores floating-point tensors in
    samples what the block is trained on; None unless the stage trains blocks
    observed what was seen by what watched the block in place of `inputs`
    """

    index: int
    name: str
    module: nn.Module
    inputs: Sequence[InputStatistics]
    probe: Callable[[nn.Module], Tensor] | None
    dtype: Any
    samples: BlockSamples | None = None
    observed: Sequence[Any] = ()

    def full_name(self, name: str) -> str:
        """The name in the model of something in this block."""
        return f"{self.name}.{name}"


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear.

    weight_error  ‖dW‖² / ‖W‖²
    output_error  tr(dW H dWᵀ) / tr(W H Wᵀ), None without statistics; of the weight alone
    inputs        what the layer's inputs are rounded to (int8, fp8), None where they are not
    method        None when the layer was left as it was, for the reason in `note`
    """

    name: str
    method: str | None
    shape: tuple[int, int]
    bits: int | None = None
    group_size: int | None = None
    weight_error: float | None = None
    output_error: float | None = None
    note: str = ""
    inputs: str | None = None


@dataclass
class BlockOutcome:
    """What a stage made of a block.

    tensors   tensors to write, by name within the block
    replaces  parameters of the module that are not written, since `tensors` stands for them
    beside    tensors that other readers of the checkpoint do not know, by name within the block;
              they are written beside it (compress.core.shards.BESIDE).  None: the format has none
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    replaces: set[str] = field(default_factory=set)
    layers: list[LayerReport] = field(default_factory=list)
    beside: dict[str, Tensor] | None = None


class Stage(Protocol):
    """What the pipeline asks of a method (see the module's docstring)."""

    needs_statistics: bool
    needs_reference: bool  # cross moments with the inputs of the original model
    counts_above: float | None  # wants `share_above` of this bound in its statistics
    trains_blocks: bool  # wants `block.samples`
    trains_model: bool  # its blocks are a start, from which the whole model is trained
    decides_globally: ClassVar[bool]
    workspace: ClassVar[int]  # [K, K] float32 matrices at once, for the widest input: an estimate

    def collect(self, block: Block) -> Any: ...

    def decide(self, summaries: Sequence[Any]) -> Any: ...

    def apply(self, block: Block, plan: Any) -> BlockOutcome: ...

    def state(self) -> Any:
        """What the stage carries from the blocks so far to those to come; None for nothing."""
        ...

    def restore(self, state: Any) -> None:
        """Take over what `state` returned in another process, before the next block."""
        ...

    def checkpoint_config(self, unquantized: Sequence[str]) -> dict[str, Any]:
        """Entries for the output's config.json; `unquantized` are linears left in float."""
        ...
