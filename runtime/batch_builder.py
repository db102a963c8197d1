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
    blocks: array[int]  # the block table, with room for this step
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
    blocks: array[int]
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
    flat = np.empty((3, total), np.int64)  # tokens, positions, slots
    tokens, positions, slots = flat
    spans = np.empty(2 * len(step) + 1, np.int32)
    starts, contexts = spans[: len(step) + 1], spans[len(step) + 1 :]
    tables = np.zeros((len(step), max(len(s.blocks) for s in step)), np.int32)
    rows: list[int] = []
    begin = 0
    for place, sequence in enumerate(step):
        computed, count, blocks = sequence.computed, sequence.count, sequence.blocks
        end = begin + count
        tables[place, : len(blocks)] = blocks
        starts[place] = begin
        contexts[place] = computed + count
        if count == 1:
            tokens[begin] = sequence.tokens[computed]
            positions[begin] = computed
            slots[begin] = blocks[computed // block_size] * block_size + computed % block_size
        else:
            tokens[begin:end] = sequence.tokens[computed : computed + count]
            span = np.arange(computed, computed + count)
            positions[begin:end] = span
            first = tables[place].astype(np.int64)
            slots[begin:end] = first[span // block_size] * block_size + span % block_size
        rows += [begin + position - computed for position in sequence.more_rows()]
        if count == sequence.remaining:
            rows.append(end - 1)
        begin = end
    starts[-1] = total
    packed = torch.from_numpy(flat)
    lengths = torch.from_numpy(spans)
    return Batch(
        tokens=packed[0],
        positions=packed[1],
        slots=packed[2],
        starts=lengths[: len(step) + 1],
        contexts=lengths[len(step) + 1 :],
        block_tables=torch.from_numpy(tables),
        rows=torch.from_numpy(np.array(rows, np.int64)),
    )
