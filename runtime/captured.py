"""Steps of fixed size, which CUDA graphs hold: what sizes there are, and how a batch is padded.

A step has room for some sequences and some tokens.  Tokens lie as in a flat `Batch`, each sequence
with its own number of them, so that a step in which some sequences verify drafts and others do not
takes one graph, and only the end is padding.  The logits of all tokens are computed, and a token is
drawn from each; `order` puts those that are wanted where the next launch looks for them.

Padding has slot -1, and sequences that are padding context 0: neither reads or writes the cache.
Padding tokens that no sequence has are attended by nobody; what is computed of them is not looked
at, and a token's row depends on no other row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from compress.runtime.batch import Batch, Draws
from compress.runtime.device_queue import Graph

SETTINGS = ("uniform", "temperature", "top_k", "top_p", "min_p")  # of `Draws`, but for the rows
# Sequences of steps in which each has one token; those between two of them compute padding.
PLAIN_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# More are launched one by one: their products take longer than a launch from the host.
MOST_TOKENS = PLAIN_SIZES[-1]


class Size(NamedTuple):
    """What a captured step has room for; the smallest that has room is taken."""

    sequences: int
    tokens: int
    most_new: int  # tokens of one sequence


@dataclass(frozen=True)
class CapturedStep:
    """A captured step and the buffer, uint8, that it reads."""

    size: Size
    inputs: Tensor
    graph: Graph


def sizes_for(most_sequences: int, lookahead: int) -> list[Size]:
    """Steps of up to `most_sequences` of one token each, or up to 1 + `lookahead`; ascending.

    The latter have as many tokens as make 1 + `lookahead` for each sequence, or 1 + a half of that,
    and so on, so that a step wastes no row where all drafts are of one of these lengths.
    """
    most = next((size for size in PLAIN_SIZES if size >= most_sequences), MOST_TOKENS)
    counts = [size for size in PLAIN_SIZES if size <= most]
    drafted = [lookahead >> halvings for halvings in range(lookahead.bit_length())]
    found = {Size(count, count, 1) for count in counts}
    for count in counts:
        for new in drafted:
            tokens = min(count * (1 + new), MOST_TOKENS)
            if tokens > count:
                found.add(Size(count, tokens, min(1 + lookahead, tokens)))
    return sorted(found)


def draws_at(batch: Batch, draws: Draws) -> np.ndarray | None:
    """Which token of the step each draw comes after, or None where two come after the same."""
    places = batch.rows.numpy()[draws.rows]
    return places if (np.diff(places) > 0).all() else None


def padding(size: Size, blocks: int, groups: int) -> list[np.ndarray]:
    """The inputs of a step in which nobody takes part, in the order of its buffer.

    Tokens, positions, slots, order, the settings of `Draws`, contexts, starts, and last the block
    tables, as [blocks, groups, sequences]: a copy ends with the blocks in use.
    """
    sequences, tokens, most_new = size
    return [
        np.zeros(tokens, np.int64),
        np.zeros(tokens, np.int64),
        np.full((groups, tokens), -1, np.int64),
        np.zeros(tokens, np.int64),
        np.zeros(tokens, np.float64),
        np.zeros(tokens, np.float32),
        np.zeros(tokens, np.int32),
        np.ones(tokens, np.float32),
        np.zeros(tokens, np.float32),
        np.zeros(sequences, np.int32),
        np.minimum(most_new * np.arange(sequences + 1), tokens).astype(np.int32),
        np.zeros((blocks, groups, sequences), np.int32),
    ]


def padded(batch: Batch, draws: Draws, places: np.ndarray, size: Size) -> list[np.ndarray]:
    """The inputs of a step, with padding up to `size`; `places` are those of `draws_at`."""
    groups, sequences, blocks = batch.block_tables.shape
    count = len(batch.tokens)
    arrays = padding(size, blocks, groups)
    tokens, positions, slots, order, *settings, contexts, starts, tables = arrays
    tokens[:count] = batch.tokens.numpy()
    positions[:count] = batch.positions.numpy()
    slots[:, :count] = batch.slots.numpy()
    order[: len(places)] = places
    for array, name in zip(settings, SETTINGS, strict=True):
        array[places] = getattr(draws, name)
    contexts[:sequences] = batch.contexts.numpy()
    after = starts[: len(starts) - sequences] + count  # padding sequences share what is left
    np.minimum(after, size.tokens, out=starts[sequences:])
    starts[: sequences + 1] = batch.starts.numpy()
    tables[:, :, :sequences] = batch.block_tables.numpy().transpose(2, 0, 1)
    return arrays
