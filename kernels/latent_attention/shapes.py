"""Programs of triton.py: how many heads share one, and their shapes, by rows, rank and device.

All heads share the cache, so a program takes as many as fit beside each other: a latent that was
read once serves them all.  Rows are heads times new tokens.  What bounds them are the sums, a
latent for each row: 64 rows of rank 256, or 32 of 512, are 64 registers a thread in 8 warps; twice
that spills on every generation.  So prefill has no taller programs either.

A block of positions is at most 16,384 numbers of latents: of rank 512 it has 32 positions, 36 KiB
with their keys in 16 bits, and two stages of it beside the queries fit on every device.

These are the choices of arithmetic and of the compiler's register counts.
"""

import torch

from compress.kernels.paged_attention.plan import MIN_SPLIT
from compress.kernels.paged_attention.shapes import Shape, padded

MOST_ROWS = 64
"""Rows of a program at most."""

MOST_SUMS = 64 * 256
"""Numbers that a program sums up at most, but for ranks above 1,024: it has 16 rows at least."""


def most_rows(rank: int) -> int:
    """Rows of a program at most, and heads, for latents of so many numbers."""
    return min(MOST_ROWS, max(16, MOST_SUMS // padded(rank)))


def head_blocks(heads: int, rank: int) -> int:
    """Programs that the heads of a token are shared out to: the fewest that have room for them."""
    counts = range(1, heads + 1)
    return next(n for n in counts if heads % n == 0 and heads // n <= most_rows(rank))


def choose(
    rows: int, group: int, rank: int, dtype: torch.dtype, capability: int, coded: bool = False
) -> Shape:
    """Shape for sequences with up to `rows` rows in the step, `group` heads of a token together.

    dtype       of queries
    capability  80, 90 or 100, see paged_attention's `capability_of`
    coded       whether the cache is in 8 bits
    """
    wide = padded(rank)
    block_m = max(padded(group), min(padded(rows), most_rows(rank)))
    if dtype == torch.float32:
        return _shape(block_m, 16, 8 if block_m > 16 else 4, 2, wide)
    block_n = min(64, max(16, 16384 // wide))
    return _shape(block_m, block_n, 8 if block_m * wide > 4096 else 4, 2, wide)


def _shape(block_m: int, block_n: int, num_warps: int, num_stages: int, wide: int) -> Shape:
    merge_rows = 16 if block_m > 32 and wide <= 128 else 4
    return Shape(
        block_m=block_m,
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        mask_apart=False,
        min_split=MIN_SPLIT,
        merge_rows=merge_rows,
        merge_splits=max(1, min(32, 2048 * num_warps // (merge_rows * wide))),
    )
