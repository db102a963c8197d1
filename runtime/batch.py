"""What passes between the engine and a model: one step's flat batch, and what a model must do."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step: T new tokens of S sequences, one sequence after another.

    All tensors are on the CPU and contiguous.  A token at position p of a sequence attends to
    positions 0..p of it, or to the last `window` of these, itself included.  Keys and values of
    the step's tokens are written before attention reads, layer by layer.
    """

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], place of each token in its own sequence
    slots: Tensor  # int64 [T], where its keys and values go: block * block_size + offset
    starts: Tensor  # int32 [S + 1], first token of each sequence in the flat batch; the last is T
    contexts: Tensor  # int32 [S], tokens of each sequence in the cache after this step
    block_tables: Tensor  # int32 [S, W], blocks of each sequence, padded with 0
    rows: Tensor  # int64 [R], flat indices of the tokens whose logits are wanted, ascending


class Model(Protocol):
    """What the engine needs of a model."""

    vocab_size: int
    max_context: int  # positions the model was made for
    block_size: int  # tokens a block of the cache holds

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of one block, all layers."""
        ...

    def allocate(self, num_blocks: int) -> None:
        """Make the cache."""
        ...

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy each (source, target) in turn; called before the step's forward."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of `batch.rows`, float32 [R, V]."""
        ...
