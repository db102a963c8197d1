"""Which blocks, warps and stages a product is computed with: a table, made by benchmarks/tune.py.

configs.json is a list of rows: a compute capability, a width of codes, the most tokens (rows of x) a row
is for, and a Config.  Beyond the last row's tokens W is de-quantized and multiplied by the
vendor's library.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Config:
    """How one launch of the product is cut up.

    block_rows      rows of W of a program: 16 or more, a power of two
    block_tokens    rows of x of a program: 8 or more, a power of two
    num_warps       up to 2 with block_rows up to 64 keep to mma.sync, whose left operand is registers
    num_stages      tiles on their way from memory, plus one
    blocks_per_sm   programs that the columns are split for, on each multiprocessor
    """

    block_rows: int
    block_tokens: int
    num_warps: int
    num_stages: int
    blocks_per_sm: int


def choose(tokens: int, bits: int, capability: int) -> Config | None:
    """The table's choice for `tokens` rows of x; None where de-quantizing is faster."""
    table = _table()[_nearest(capability), bits]
    return next((config for most, config in table if tokens <= most), None)


def most_tokens(bits: int, capability: int) -> int:
    """The most tokens for which `choose` has a Config."""
    return _table()[_nearest(capability), bits][-1][0]


def splits(config: Config, blocks: int, tiles: int, sm_count: int) -> tuple[int, int]:
    """How many programs share the tiles of one block of y, and how many tiles each takes.

    `blocks` is how many blocks of y there are.  Every program gets one tile at least, and several
    where the device is full already.
    """
    wanted = max(1, config.blocks_per_sm * sm_count // blocks)
    tiles_per_split = max(-(-tiles // wanted), min(tiles, LEAST_TILES))
    return -(-tiles // tiles_per_split), tiles_per_split


LEAST_TILES = 2  # of a program: fewer do not pay for its beginning and its part of the sum


def candidates(tokens: int, capability: int) -> list[Config]:
    """What benchmarks/tune.py tries for `tokens` rows of x."""
    block_tokens = min(128, max(8, 1 << (tokens - 1).bit_length()))
    found = []
    for rows in (32, 64, 128):
        for warps in (1, 2, 4, 8):
            elements = rows * block_tokens // (32 * warps)  # accumulators of a thread
            if not 16 * warps <= rows * max(1, block_tokens // 16) or elements > 128:
                continue
            for stages in (3, 4, 6) if block_tokens <= 16 else (2, 3, 4):
                for blocks_per_sm in (4, 8, 12) if block_tokens <= 16 else (1, 2, 4):
                    found.append(Config(rows, block_tokens, warps, stages, blocks_per_sm))
    return found


def rows_of(table: dict[tuple[int, int], list[tuple[int, Config]]]) -> list[dict[str, int]]:
    """A table in the form of configs.json."""
    return [
        {"capability": capability, "bits": bits, "most_tokens": most, **asdict(config)}
        for (capability, bits), entries in sorted(table.items())
        for most, config in entries
    ]


@cache
def _table() -> dict[tuple[int, int], list[tuple[int, Config]]]:
    """(capability, bits) -> [(most tokens, Config)], fewest tokens first."""
    text = resources.files(__package__).joinpath("configs.json").read_text(encoding="utf-8")
    table: dict[tuple[int, int], list[tuple[int, Config]]] = {}
    for row in sorted(json.loads(text), key=lambda row: row["most_tokens"]):
        config = Config(**{field.name: row[field.name] for field in fields(Config)})
        entries = table.setdefault((row["capability"], row["bits"]), [])
        entries.append((row["most_tokens"], config))
    return table


def _nearest(capability: int) -> int:
    """The newest generation of the table that is no newer than a device's."""
    return max(known for known in CAPABILITIES if known <= max(capability, CAPABILITIES[0]))
