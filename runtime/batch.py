"""What passes between the engine and a model: one step's flat batch, and what a model must do."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from compress.runtime.cache_layout import CacheLayout


@dataclass(frozen=True)
class Batch:
    """One step: T new tokens of S sequences, one sequence after another.

    All tensors are on the CPU and contiguous.  A token at position p of a sequence attends to
    positions 0..p of it, or to the last `window` of these, itself included.  Keys and values of
    the step's tokens are written before attention reads, layer by layer.  Each group of layers has
    its own blocks (compress.runtime.cache_layout).
    """

    tokens: Tensor  # int64 [T]; of an AsynchronousModel also -1 - i, draw i of the launch before
    positions: Tensor  # int64 [T], place of each token in its own sequence
    slots: Tensor  # int64 [groups, T], where keys and values go: block * block_size + offset
    starts: Tensor  # int32 [S + 1], first token of each sequence in the flat batch; the last is T
    contexts: Tensor  # int32 [S], tokens of each sequence in the cache after this step
    block_tables: Tensor  # int32 [groups, S, W], blocks of each sequence; 0 where there is none
    rows: Tensor  # int64 [R], flat indices of the tokens whose logits are wanted, ascending


@dataclass(frozen=True)
class Draws:
    """How a device draws one token from each of R rows of a step's logits (kernels/sampling)."""

    rows: np.ndarray  # int64 [R], which of the logits
    uniform: np.ndarray  # float64 [R], the number in [0, 1) that decides
    temperature: np.ndarray  # float32 [R], 0 takes the likeliest
    top_k: np.ndarray  # int32 [R], 0 for all
    top_p: np.ndarray  # float32 [R], 1 for all
    min_p: np.ndarray  # float32 [R], 0 for all

    @property
    def filtered(self) -> bool:
        """Whether any row has a filter."""
        return bool(((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)).any())


class Model(Protocol):
    """What the engine needs of a model."""

    vocab_size: int
    max_context: int  # positions the model was made for
    block_size: int  # tokens a block of the cache holds

    @property
    def layout(self) -> CacheLayout:
        """Which layers share a block table."""
        ...

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of one block, of the layers that it has places for."""
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


@runtime_checkable
class RoundingModel(Protocol):
    """A model whose linear layers may round their inputs (kernels/w8a8_matmul)."""

    @property
    def surplus_outliers(self) -> int:
        """Elements above a threshold that were rounded, since a token has room for only so many."""
        ...


class Launched(Protocol):
    """A step that a device is at work on."""

    def tokens(self) -> list[int]:
        """Wait for the drawn tokens; -1 where the logits held NaN."""
        ...


@runtime_checkable
class AsynchronousModel(Model, Protocol):
    """A model on a device with a queue: it draws tokens itself, and nobody waits for a step.

    Launches are carried out in order, so a launch may read what the one before it draws.
    """

    def capture(self, most_sequences: int, lookahead: int = 0) -> None:
        """Get ready for steps in which up to so many sequences decode; after `allocate`.

        Each has one token, or up to 1 + `lookahead` where drafts are verified.
        """
        ...

    def launch(self, batch: Batch, draws: Draws) -> Launched:
        """Queue a step and its draws, whatever is unfinished."""
        ...
