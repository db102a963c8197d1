"""Sizes of captured steps, and batches padded to them."""

import random

import numpy as np
import pytest
import torch

from compress.runtime.batch import Batch, Draws
from compress.runtime.captured import (
    MOST_TOKENS,
    PLAIN_SIZES,
    SETTINGS,
    Size,
    draws_at,
    padded,
    sizes_for,
)


def smallest(sizes: list[Size], counts: list[int]) -> Size | None:
    needed = Size(len(counts), sum(counts), max(counts))
    return min((size for size in sizes if all(np.array(size) >= needed)), default=None)


@pytest.mark.parametrize("most_sequences", [1, 5, 64, 300])
@pytest.mark.parametrize("lookahead", [0, 1, 4, 16, 64])
def test_every_step_of_decodes_has_a_size(most_sequences: int, lookahead: int) -> None:
    """One of as many sequences where there is such, and without a spare row for equal drafts."""
    sizes = sizes_for(most_sequences, lookahead)
    assert sizes == sorted(set(sizes))
    assert max(size.tokens for size in sizes) <= MOST_TOKENS
    generator = random.Random(lookahead)
    for sequences in range(1, min(most_sequences, PLAIN_SIZES[-2]) + 1):
        roomy = next(size for size in PLAIN_SIZES if size >= sequences)
        assert smallest(sizes, [1] * sequences) == (roomy, roomy, 1)
        counts = [1 + generator.randint(0, lookahead) for _ in range(sequences)]
        if sum(counts) <= MOST_TOKENS:
            size = smallest(sizes, counts)
            assert size is not None
            assert size.sequences == roomy
        rows = sequences * (1 + lookahead)
        if roomy == sequences and rows <= MOST_TOKENS:
            expected = (sequences, rows, 1 + lookahead)
            assert smallest(sizes, [1 + lookahead] * sequences) == expected


def batch_of(counts: list[int], blocks: int, groups: int = 1) -> Batch:
    starts = np.cumsum([0, *counts])
    total = int(starts[-1])
    return Batch(
        tokens=torch.arange(100, 100 + total),
        positions=torch.arange(200, 200 + total),
        slots=torch.arange(300, 300 + groups * total).view(groups, total),
        starts=torch.from_numpy(starts).int(),
        contexts=torch.tensor([20 + count for count in counts]).int(),
        block_tables=torch.arange(1, 1 + groups * len(counts) * blocks)
        .view(groups, -1, blocks)
        .int(),
        rows=torch.arange(total),
    )


@pytest.mark.parametrize("counts", [[1], [3], [1, 1, 3], [2, 3, 1, 1], [1, 1, 1, 1]])
@pytest.mark.parametrize("size", [Size(4, 8, 3), Size(8, 24, 3), Size(4, 12, 3)])
def test_padding_belongs_to_nobody(counts: list[int], size: Size) -> None:
    batch, total = batch_of(counts, 2, groups=3), sum(counts)
    numbers = np.linspace(0.1, 0.9, total)
    draws = Draws(np.arange(total), *(numbers.astype(np.float32) for _ in SETTINGS))
    places = draws_at(batch, draws)
    assert places is not None
    tokens, positions, slots, order, *settings, contexts, starts, tables = padded(
        batch, draws, places, size
    )
    for array, given in ((tokens, batch.tokens), (positions, batch.positions)):
        assert array[:total].tolist() == given.tolist()
    for group, given in zip(slots, batch.slots, strict=True):
        assert group.tolist() == [*given.tolist(), *[-1] * (size.tokens - total)]
    assert order[:total].tolist() == list(range(total))
    assert all(array[:total] == pytest.approx(numbers, rel=1e-6) for array in settings[:2])
    sequences = len(counts)
    assert contexts.tolist() == [*batch.contexts.tolist(), *[0] * (size.sequences - sequences)]
    assert starts[: sequences + 1].tolist() == batch.starts.tolist()
    new = np.diff(starts)
    assert 0 <= new.min() <= new.max() <= size.most_new
    assert starts[-1] <= size.tokens
    assert tables.shape == (2, 3, size.sequences)
    assert tables[:, :, :sequences].transpose(1, 2, 0).tolist() == batch.block_tables.tolist()
    for array in vars(batch).values():  # what is sent has the dtypes that kernels take
        assert array.dtype in (torch.int64, torch.int32)
    assert [array.dtype for array in settings] == [
        np.float64, np.float32, np.int32, np.float32, np.float32
    ]  # fmt: skip


def test_draws_of_one_row_take_no_captured_step() -> None:
    batch = batch_of([1, 2], 1)
    settings = [np.zeros(2, np.float32)] * len(SETTINGS)
    ahead = draws_at(batch, Draws(np.array([0, 2]), *settings))
    assert ahead is not None
    assert ahead.tolist() == [0, 2]
    assert draws_at(batch, Draws(np.array([2, 2]), *settings)) is None
    none = draws_at(batch, Draws(np.array([], np.int64), *[array[:0] for array in settings]))
    assert none is not None
    assert not len(none)
