"""How much of a step's attention each program computes: decided on the host, before the launch.

A tile is a run of new tokens of one sequence that is attended as one matrix, the query heads of
one KV head packed beside each other: row r of a tile is new token r // G of it, head r % G of
G = N / K.  A split is a share of a tile's keys.  One program computes one split of one tile and KV
head; grids follow from shapes alone, so that CUDA graphs may hold them.
"""

import numpy as np

TILE_ROWS = 128
"""Rows of a tile at most.  64 positions of 128 dimensions are 32 KiB of 16-bit keys and values, and
about 1000 cycles of an H100's tensor cores with 128 rows, so that an SM asks the L2 cache for 32
bytes a cycle, which is near what it gives; with 64 rows it would ask for twice that."""

MIN_SPLIT = 256
"""Positions of a split at least (shapes.py takes more for tall tiles): 128 KiB of keys and values
at 128 dimensions, against 2 KiB of partial sums for four heads, and some 4 microseconds of reading
against 2 of merging."""

PROGRAMS_PER_SM = 2
"""Programs of a decode kernel that an SM holds at a time, by their shared memory (64 KiB in flight
each, see triton.py)."""


def tile_tokens(heads: int, kv_heads: int) -> int:
    """New tokens of a tile at most."""
    tokens = TILE_ROWS // (heads // kv_heads)
    if tokens == 0:
        raise ValueError(
            f"{heads} query heads on {kv_heads} KV heads: at most {TILE_ROWS} heads can share one"
        )
    return tokens


def tiles_of(starts: np.ndarray, heads: int, kv_heads: int) -> np.ndarray | None:
    """int32 [tiles, 2], (sequence, first of its new tokens in the tile), or None: one tile each.

    starts  int32 [S + 1], first token of each sequence in the flat batch

    The last tokens of a sequence come first, since they see the most keys: long programs that
    begin late would leave the rest of the device idle.
    """
    tokens = tile_tokens(heads, kv_heads)
    counts = np.diff(starts)
    if counts.max(initial=0) <= tokens:
        return None
    runs = [
        (sequence, first)
        for sequence, count in enumerate(counts.tolist())
        for first in reversed(range(0, count, tokens))
    ]
    return np.array(runs, dtype=np.int32)


def splits_of(tiles: int, kv_heads: int, most_context: int, sm_count: int) -> int:
    """Splits of every tile (a dimension of the grid), for contexts up to `most_context`.

    The fewest that keep the device nearly as busy as the best number would.  With `work` programs
    in rounds of `slots` at a time the device is busy for work / slots of ceil(work / slots) rounds.
    """
    programs = tiles * kv_heads
    slots = PROGRAMS_PER_SM * sm_count
    most = min(-(-most_context // MIN_SPLIT), -(-4 * slots // max(programs, 1)))
    busy = {}
    for splits in range(1, max(most, 1) + 1):
        rounds = splits * programs / slots
        busy[splits] = rounds / max(1, -(-splits * programs // slots))
    enough = 0.95 * max(busy.values())
    return next(splits for splits, share in busy.items() if share >= enough)
