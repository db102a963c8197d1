"""How a product of 8-bit codes is cut up on a GPU, by the number of tokens.  Not measured yet.

What the choices follow: up to 32 tokens a product waits for W, so programs are small and many, each
with several tiles on their way; `mma.sync` multiplies.  From 64 tokens on 4 warps a block of 64
rows are `wgmma` on 9.0.  From 256 tokens on a block of 128 x 128 reads each code of W and x once
for 128 products, and nothing is split.
"""

from __future__ import annotations

from compress.kernels.lowbit_matmul.configs import Config

WIDTH = 64  # columns are padded to a multiple of it
COLUMNS = (128, 64)  # of a tile, the first that divides the padded width

# (most tokens, choice); the last is for any more
_TABLE = (
    (8, Config(64, 8, 2, 5, 6)),
    (16, Config(64, 16, 2, 5, 6)),
    (32, Config(64, 32, 2, 4, 4)),
    (64, Config(64, 64, 4, 4, 2)),
    (128, Config(128, 64, 4, 4, 1)),
)
_MANY = Config(128, 128, 8, 3, 1)


def choose(tokens: int) -> Config:
    """The choice for `tokens` rows of x."""
    return next((config for most, config in _TABLE if tokens <= most), _MANY)


def tile_columns(width: int) -> int:
    """Columns of a tile of a weight that is `width` columns wide with its padding."""
    return next(columns for columns in COLUMNS if width % columns == 0)
