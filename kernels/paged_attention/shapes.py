"""Shapes of the programs of triton.py: a pure function of rows, head, dtype and device.

Decode reads each key once for at most 32 rows, so bytes in flight decide.  An H100's SM needs some
30 KiB on their way at all times (25 bytes a nanosecond, a microsecond of latency under load).  A
block of positions is 8192 numbers of keys and as many values, 32 KiB in 16 bits; three stages hold
two blocks (the third is being computed), so that a program has 32 to 64 KiB in flight in 70 KiB of
shared memory: two programs an SM on sm_80, three on sm_90 and later.  Four warps share the columns
of a product, since 16 rows are a single tensor core instruction high.  A block takes 550
instructions a warp, a third of what an SM can issue while 32 KiB arrive.

A few new tokens of each sequence, as when drafts are verified, are up to 64 rows, which keeps that
shape: 64 rows are what one warp group multiplies on sm_90, and take about half of the time that a
block of positions takes to arrive.  Up to plan.TILE_ROWS they are two parts of 64 rows, which read
the same keys at about the same time, so that the second finds them in the L2 cache; a sequence with
fewer new tokens costs the second part an early return.

Prefill has 128 rows (plan.TILE_ROWS) with 8 warps, 16 rows a warp on sm_80 and a warp group for
each 64 on sm_90.  Blocks of 64 positions keep scores, weights and sums in registers without
spills; heads above 128 dimensions need 32 positions, and 64 rows on sm_80, to fit.

float32 is multiplied without tensor cores; each thread holds whole rows, which asks for small
tiles.  It is there to be right, not fast.

These are the choices of arithmetic and of the compiler's register counts.  `candidates` lists what
a tuner should time.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

from compress.kernels.paged_attention.plan import MIN_SPLIT, TILE_ROWS

PAGE = 16
"""Positions that a block of the cache holds."""

CODES_SPILL = {64: (80, 100), TILE_ROWS: (80,)}
"""Rows of a program, and where the registers for codes in 8 bits are had by half the positions."""


@dataclass(frozen=True)
class Shape:
    """One program: rows of its tile, positions at a time, and how it merges splits."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    mask_apart: bool  # blocks of positions that all rows see are computed without masks
    min_split: int  # positions of a split at least
    merge_rows: int
    merge_splits: int


def choose(
    rows: int, group: int, head_dim: int, dtype: torch.dtype, capability: int, coded: bool = False
) -> Shape:
    """Shape for sequences with up to `rows` rows in the step, `group` of them for a token.

    dtype       of queries
    capability  80, 90 or 100, see `capability_of`
    coded       whether keys and values are in 8 bits
    """
    wide = padded(head_dim)
    least = padded(group)
    rows = max(padded(rows), least)
    if dtype == torch.float32:
        if wide > 128 or (wide > 64 and capability == 80):
            return _shape(least, 16, 4, 2, wide)
        if rows > 16 and wide <= 64:
            return _shape(max(64, least), 32, 8, 2, wide)
        return _shape(least, 64, 4, 2, wide)
    block_n = min(128, max(32, 8192 // wide))
    if rows <= 32:
        num_warps = 8 if rows == 32 and wide <= 64 else 4  # with 4 it spills on some devices
        return _shape(rows, block_n, num_warps, 3, wide)
    if rows <= TILE_ROWS and wide <= 128 and group <= 64:
        # a loop of its own for the last block, the only one with masks, would start up anew
        block_n //= 2 if coded and capability in CODES_SPILL[64] else 1
        return replace(_shape(64, block_n, 4, 3, wide), mask_apart=False)
    if wide <= 128:
        block_n = 32 if coded and capability in CODES_SPILL[TILE_ROWS] else 64
        return _shape(TILE_ROWS, block_n, 8, 3, wide)
    if capability == 80:
        return _shape(max(64, least), 32, 8, 2, wide)
    return _shape(TILE_ROWS, 32, 8, 3, wide)


def candidates(
    rows: int, group: int, head_dim: int, dtype: torch.dtype, capability: int
) -> list[Shape]:
    """What a tuner should time: `choose` first, then shapes near it.

    Some of these need more shared memory than a device has, which the launch says.
    """
    chosen = choose(rows, group, head_dim, dtype, capability)
    merges = [replace(chosen, merge_splits=splits) for splits in (4, 8, 16, 32)]
    loops = [
        replace(
            chosen,
            block_n=block_n,
            num_stages=num_stages,
            num_warps=num_warps,
            mask_apart=mask_apart,
        )
        for block_n in (16, 32, 64, 128)
        for num_stages in (2, 3, 4, 5)
        for num_warps in (2, 4, 8)
        for mask_apart in (False, True)
    ]
    return list(dict.fromkeys([chosen, *merges, *loops]))


def _shape(block_m: int, block_n: int, num_warps: int, num_stages: int, wide: int) -> Shape:
    """Partial sums are merged by 64 numbers a thread: few rows of many splits for decode, so that
    sixteen splits of 128 dimensions wait for the L2 cache at once; more would spill.

    A split of 128 rows takes about a microsecond to merge, and about 90 positions to compute, so
    that with T positions in n splits, T / 90 / n + n microseconds pass: least for splits of 900
    positions where T is 8192, and of 1700 where it is 32768.  Half the rows are merged in half the
    time, and their splits are half as long.
    """
    tall = block_m > 32
    merge_rows = 16 if tall else 4
    merge_splits = max(1, 2048 * num_warps // (merge_rows * wide))
    return Shape(
        block_m,
        block_n,
        num_warps,
        num_stages,
        tall,
        MIN_SPLIT * max(1, block_m // 32),
        merge_rows,
        min(32, merge_splits),
    )


def padded(count: int) -> int:
    """The power of two that holds `count`, and is a size of `tl.dot`."""
    return max(16, 1 << (count - 1).bit_length())


def capability_of(device: torch.device) -> int:
    """80, 90 or 100: which of these kernels for the device are like.

    Newer devices with little shared memory (sm_120) multiply like sm_80; the interpreter takes any.
    """
    return 90 if device.type == "cpu" else _capability(device.index or 0)


@cache
def _capability(index: int) -> int:
    major, _ = torch.cuda.get_device_capability(index)
    return {9: 90, 10: 100}.get(major, 80)
