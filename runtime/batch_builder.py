"""The tensors of one step from the sequences in it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from compress.runtime.batch import Batch


class Part(Protocol):
    """A sequence of which the next `count` tokens are in the step."""

    tokens: Any  # array or NumPy array of int64
    tables: list[array[int]]  # a block table for each group of layers, with room for this step
    computed: int  # tokens that are in the cache before the step
    count: int

    @property
    def remaining(self) -> int:
        """Known tokens that are not in the cache."""
        ...

    def more_rows(self) -> range:
        """Positions in this step whose logits are wanted besides that of the last token."""
        ...


@dataclass
class Stretch:
    """A `Part` of whose `count` tokens, the last that are known, all logits are wanted."""

    tokens: array[int]  # int64, from the sequence's first
    tables: list[array[int]]
    computed: int
    count: int

    @property
    def remaining(self) -> int:
        """Known tokens that are not in the cache."""
        return self.count

    def more_rows(self) -> range:
        """Positions of all but the last."""
        return range(self.computed, self.computed + self.count - 1)


def build_batch(step: Items[Part], block_size: int) -> Batch:
    """Lay out the `count` next tokens of each sequence, one sequence after another.

    Logits are wanted of the last known token of each sequence, and of what `more_rows` names.
    """
    total = sum(sequence.count for sequence in step)
    groups = len(step[0].tables)
    flat = np.empty((2 + groups, total), np.int64)  # tokens, positions, slots
    tokens, positions, slots = flat[0], flat[1], flat[2:]
    spans = np.empty(2 * len(step) + 1, np.int32)
    starts, contexts = spans[: len(step) + 1], spans[len(step) + 1 :]
    width = max(len(sequence.tables[0]) for sequence in step)
    tables = np.zeros((groups, len(step), width), np.int32)
    rows: list[int] = []
    begin = 0
    for place, sequence in enumerate(step):
        computed, count = sequence.computed, sequence.count
        end = begin + count
        starts[place] = begin
        contexts[place] = computed + count
        if count == 1:
            tokens[begin] = sequence.tokens[computed]
            positions[begin] = computed
        else:
            tokens[begin:end] = sequence.tokens[computed : computed + count]
            positions[begin:end] = np.arange(computed, computed + count)
        for group, blocks in enumerate(sequence.tables):
            table = tables[group, place, : len(blocks)]
            table[:] = blocks
            _place(slots[group, begin:end], table, computed, block_size)
        rows += [begin + position - computed for position in sequence.more_rows()]
        if count == sequence.remaining:
            rows.append(end - 1)
        begin = end
    starts[-1] = total
    np.maximum(tables, 0, out=tables)
    packed = torch.from_numpy(flat)
    lengths = torch.from_numpy(spans)
    return Batch(
        tokens=packed[0],
        positions=packed[1],
        slots=packed[2:],
        starts=lengths[: len(step) + 1],
        contexts=lengths[len(step) + 1 :],
        block_tables=torch.from_numpy(tables),
        rows=torch.from_numpy(np.array(rows, np.int64)),
    )


def _place(slots: np.ndarray, table: np.ndarray, first: int, block_size: int) -> None:
    """Fill in where the tokens from number `first` on go, int64 [count], by a block table."""
    if len(slots) == 1:
        slots[0] = int(table[first // block_size]) * block_size + first % block_size
    else:
        span = np.arange(first, first + len(slots))
        slots[:] = table[span // block_size].astype(np.int64) * block_size + span % block_size
