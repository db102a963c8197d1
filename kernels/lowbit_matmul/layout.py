"""Packing weights for the Triton kernels: what lies where.

A tile is TILE columns of W.  Its codes are stored in 16-bit words (unpack.py says which bits),
WORDS places to a row and `codes_of(bits)` codes in each place, TILE = codes_of(bits) * WORDS:

    words   int16 [tiles, planes(bits), rows, WORDS]
            code i of place k of tile t is column t * TILE + i * WORDS + k
    scale   float16, bfloat16 or float32, the least that is exact   [groups, rows]
    shift   likewise, or None
    bias    float32 [rows], or None

so that the words of any run of rows of a tile are contiguous (for each plane), and code i of a
block of words is a block of WORDS neighbouring columns.  The last tile is filled up with codes of
0.  Codes of other widths than 2, 3, 4 and 8 bits are stored in the next wider of these.

A group is kept if it is whole tiles or part of one, else it is cut into equal parts of `group`
columns with its scale repeated; a part is whole blocks of WORDS columns.  One group for all
columns is `group` 0.

With silu_mul W is gate over up, and their rows alternate: row j of the gate is row 2 j here, row j
of up is row 2 j + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.kernels.lowbit_matmul.unpack import (
    codes_of,
    high_bit,
    low_bits,
    low_shift,
    low_word,
    planes,
)
from compress.kernels.lowbit_matmul.weight import LinearWeight, least_exact

LEAST_WORDS = 16  # columns of a product on tensor cores
MOST_WORDS = {2: 32, 3: 16, 4: 32, 8: 64}  # tiles of 256 columns for 2 and 3 bits, of 128 else


@dataclass(frozen=True)
class Layout:
    """How the columns of a weight are cut.  `group` is 0 where one scale is for a whole row."""

    bits: int
    words: int
    group: int
    columns: int

    @property
    def tile(self) -> int:
        """Columns of a tile."""
        return codes_of(self.bits) * self.words

    @property
    def tiles(self) -> int:
        """How many there are."""
        return -(-self.columns // self.tile)

    @property
    def whole(self) -> bool:
        """Whether the last tile is full."""
        return self.columns % self.tile == 0

    @property
    def groups(self) -> int:
        """Scales of a row, those of padding counted in."""
        return -(-self.tiles * self.tile // self.group) if self.group else 1


@dataclass(frozen=True)
class PackedWeight:
    """A weight in this module's layout."""

    layout: Layout
    rows: int
    silu_mul: bool
    words: Tensor
    scale: Tensor
    shift: Tensor | None
    bias: Tensor | None

    @property
    def bytes(self) -> int:
        """What a product reads of it."""
        parts = (self.words, self.scale, self.shift, self.bias)
        return sum(part.nbytes for part in parts if part is not None)


def fits(weight: LinearWeight) -> str | None:
    """Why a weight cannot be laid out so, or None if it can."""
    if weight.codes is None:
        return "it is not quantized"
    if weight.bits > max(MOST_WORDS):
        return f"its codes have {weight.bits} bits, and at most {max(MOST_WORDS)} are taken"
    if weight.group_size != weight.shape[1] and weight.group_size % LEAST_WORDS:
        return f"groups of {weight.group_size} columns are no multiple of {LEAST_WORDS}"
    return None


def layout_of(bits: int, columns: int, group_size: int) -> Layout:
    """The cut with the least padding, and of these the one with the widest tiles."""
    bits = next(width for width in MOST_WORDS if width >= bits)
    whole_row = group_size == columns
    cuts = []
    words = LEAST_WORDS
    while words <= MOST_WORDS[bits]:
        tile = words * codes_of(bits)
        group = group_size if group_size % tile == 0 else gcd(group_size, tile)
        if whole_row or group % words == 0:
            cuts.append(Layout(bits, words, 0 if whole_row else group, columns))
        words *= 2
    return min(cuts, key=lambda cut: (cut.tiles * cut.tile, -cut.tile))


def pack(weight: LinearWeight, device: torch.device, silu_mul: bool = False) -> PackedWeight:
    """Lay a weight out on a device.  It must fit (`fits`); with `silu_mul` it is gate over up."""
    assert weight.codes is not None
    assert weight.scale is not None
    rows, columns = weight.shape
    layout = layout_of(weight.bits, columns, weight.group_size)
    order = torch.arange(rows, device=device)
    if silu_mul:
        order = order.view(2, -1).mT.flatten()
    given = [weight.scale] if weight.shift is None else [weight.scale, weight.shift]
    dtype = least_exact(given)
    scale, *shift = [_by_group(s.to(device)[order], weight, layout).to(dtype) for s in given]
    return PackedWeight(
        layout,
        rows,
        silu_mul,
        _words(weight.codes.to(device)[order], layout),
        scale,
        shift[0] if shift else None,
        None if weight.bias is None else weight.bias.to(device, torch.float32)[order],
    )


def _words(codes: Tensor, layout: Layout) -> Tensor:
    """int8 [rows, columns] -> int16 [tiles, planes, rows, words]"""
    bits, (rows, columns) = layout.bits, codes.shape
    padded = F.pad(codes, (0, layout.tiles * layout.tile - columns))
    by_code = padded.view(rows, layout.tiles, codes_of(bits), layout.words)
    shape = (layout.tiles, planes(bits), rows, layout.words)
    words = torch.zeros(shape, dtype=torch.int16, device=codes.device)
    for i in range(codes_of(bits)):
        signed = by_code[:, :, i].movedim(1, 0)  # [tiles, rows, words]
        unsigned = signed.to(torch.int16) + (1 << (bits - 1))
        low = unsigned & ((1 << low_bits(bits)) - 1)
        words[:, low_word(bits, i)] |= low << low_shift(bits, i)
        if bits == 3:
            words[:, 2] |= (unsigned >> 2) << high_bit(i)
    return words


def _by_group(numbers: Tensor, weight: LinearWeight, layout: Layout) -> Tensor:
    """[rows, groups of the weight] -> [groups of the layout, rows], zeros for padding."""
    if layout.group:
        numbers = numbers.repeat_interleave(weight.group_size // layout.group, dim=1)
    return F.pad(numbers, (0, layout.groups - numbers.shape[1])).mT.contiguous()
