"""Which blocks, warps and stages a product is computed with: a table, made by benchmarks/tune.py.

configs.json is a list of rows: a compute capability, a width of codes, the most tokens (rows of x)
that the row is for, and a Config.  Beyond the last row's tokens W is de-quantized and multiplied
by the vendor's library.

What the first table follows, read off the machine code (nothing has been measured yet):
- `mma.sync` takes its left operand from registers, so that codes go from words to the tensor cores
  without a second way through shared memory.  Triton uses it for capability 90 and 100 where
  num_warps is no multiple of 4, and for 80 always.
- On 90, 4 warps and 64 rows are `wgmma` with W in registers too: fewer instructions, from 64 tokens
  on.
- On 100, 4 warps would be `tcgen05`, whose operands would be written to shared or tensor memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from importlib import resources

CAPABILITIES = (80, 90, 100)
FLOAT32_TOKENS = 16  # of products in float32: not on tensor cores


@dataclass(frozen=True)
class Config:
    """How one launch of the product is cut up.

    block_rows      rows of W of a program: 16 or more, a power of two
    block_tokens    rows of x of a program: 8 or more, a power of two
    num_warps       of a program
    num_stages      tiles that a program has in shared memory, or on their way there
    blocks_per_sm   programs on each multiprocessor that the columns are split for
    """

    block_rows: int
    block_tokens: int
    num_warps: int
    num_stages: int
    blocks_per_sm: int


Row = tuple[int, int, int, Config]
"""Capability, bits, most tokens, and the choice for them."""


@lru_cache
def choose(tokens: int, bits: int, capability: int) -> Config | None:
    """The table's choice for `tokens` rows of x; None where de-quantizing is faster."""
    rows = _table()[_nearest(capability), bits]
    return next((config for most, config in rows if tokens <= most), None)


def most_tokens(bits: int, capability: int) -> int:
    """The most tokens for which `choose` has a Config."""
    return _table()[_nearest(capability), bits][-1][0]


def splits(config: Config, blocks: int, tiles: int, sm_count: int) -> tuple[int, int]:
    """How many programs share the tiles of each of y's `blocks`, and how many tiles each takes.

    As many as fill the device, but not so many that a program has fewer tiles than it asks
    memory for at once.
    """
    wanted = max(1, config.blocks_per_sm * sm_count // blocks)
    each = max(-(-tiles // wanted), min(tiles, config.num_stages - 1), 1)
    return -(-tiles // each), each


def candidates(tokens: int, capability: int) -> list[Config]:
    """What benchmarks/tune.py tries for `tokens` rows of x on such a device."""
    least = max(8, 1 << (tokens - 1).bit_length())  # block that holds all tokens
    found = []
    for block_tokens in {min(least, 128), min(least, 64), min(least, 32)}:
        few = block_tokens <= 16
        for block_rows in (32, 64, 128):
            for num_warps in (1, 2, 4, 8):
                accumulators = block_rows * block_tokens // (32 * num_warps)  # of a thread
                if block_rows < 16 * num_warps or accumulators > 64:
                    continue
                if _nearest(capability) == 100 and num_warps >= 4:
                    continue
                for num_stages in (3, 4, 6) if few else (2, 3, 4):
                    for blocks_per_sm in (4, 8, 12) if few else (1, 2, 4):
                        parts = (block_rows, block_tokens, num_warps, num_stages, blocks_per_sm)
                        found.append(Config(*parts))
    return found


def as_json(rows: Iterable[Row]) -> str:
    """A table as the text of configs.json."""
    lines = [
        json.dumps({"capability": capability, "bits": bits, "most_tokens": most} | asdict(config))
        for capability, bits, most, config in sorted(rows, key=lambda row: row[:3])
    ]
    return "[\n  " + ",\n  ".join(lines) + "\n]\n"


def table() -> list[Row]:
    """The rows of configs.json."""
    folder = resources.files("compress.kernels.lowbit_matmul")
    stored = json.loads(folder.joinpath("configs.json").read_text(encoding="utf-8"))
    names = [field.name for field in fields(Config)]
    return [
        (row["capability"], row["bits"], row["most_tokens"], Config(*(row[name] for name in names)))
        for row in stored
    ]


@cache
def _table() -> dict[tuple[int, int], list[tuple[int, Config]]]:
    """(capability, bits) -> its rows, fewest tokens first."""
    found: dict[tuple[int, int], list[tuple[int, Config]]] = {}
    for capability, bits, most, config in sorted(table(), key=lambda row: row[:3]):
        found.setdefault((capability, bits), []).append((most, config))
    return found


def _nearest(capability: int) -> int:
    """The newest generation of the table that is no newer than a device's."""
    return max(known for known in CAPABILITIES if known <= max(capability, CAPABILITIES[0]))
