"""Packing weights for the AVX-512 kernel that rounds its inputs; avx512.h has the layouts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.core.progress import say
from compress.kernels.lowbit_matmul.avx512 import NO_SCALE, TILE, by_row, tile_order
from compress.kernels.lowbit_matmul.weight import (
    MOST_FOUND,
    SCALE_DTYPES,
    LinearWeight,
    least_exact,
)
from compress.kernels.program.build import processor_has

VNNI, FP8, BF16 = range(3)
INSTRUCTIONS = {"int8": (VNNI, "avx512_vnni"), "fp8": (FP8, "avx512vbmi")}
LANES = 16
PAIR = 2 * TILE  # rows that are computed together
TOKEN_WORDS = 3 + 2 * MOST_FOUND  # of a RoundedToken in avx512.h


@dataclass(frozen=True)
class PackedRoundingLinear:
    """A weight in tiles: what the kernel's arguments are called, and the tensors they point to."""

    kind: int
    fp8: bool
    rows: int
    columns: int
    silu_mul: bool
    largest: float
    threshold: float
    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    rounded: Tensor | None
    outlier_index: Tensor | None
    outlier_weight: Tensor | None

    @property
    def bytes(self) -> int:
        """What a product reads of it."""
        parts = (self.codes, self.scale, self.bias, self.outlier_weight)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def outliers(self) -> int:
        """Columns that are not rounded."""
        return 0 if self.outlier_index is None else len(self.outlier_index)

    @property
    def scale_kind(self) -> int:
        """The dtype of the outliers' weights, by its place in SCALE_DTYPES."""
        if self.outlier_weight is None:
            return NO_SCALE
        return SCALE_DTYPES.index(self.outlier_weight.dtype)

    @property
    def words(self) -> int:
        """Of 32 bits, that a token's codes take."""
        columns = -(-self.columns // 4) * 4
        return columns // 4 if self.kind == VNNI else columns // 2


def pack(weight: LinearWeight, silu_mul: bool = False) -> PackedRoundingLinear:
    """Lay out a weight with `inputs`, for activations in bfloat16 or float32.

    On a processor without the instruction for its codes they are kept in bfloat16, at twice the
    bytes, which is said.  With `silu_mul` the weight is gate over up, and their tiles alternate.
    """
    inputs, codes = weight.inputs, weight.codes
    assert inputs is not None
    assert codes is not None
    assert weight.scale is not None
    kind, instruction = INSTRUCTIONS[inputs.kind]
    if not processor_has(instruction):
        say(f"{inputs.kind} codes are held in bfloat16: the processor lacks {instruction}")
        kind = BF16
    rows, columns = weight.shape
    order = tile_order(rows, silu_mul)
    order = F.pad(order, (0, -len(order) % PAIR), value=-1)
    padded = F.pad(codes.view(torch.uint8), (0, -columns % 4)).view(codes.dtype)
    index, outlier_weight = inputs.outlier_index, None
    if index is not None and not len(index):
        index = None
    if index is not None:
        given = inputs.outlier_weight
        assert given is not None
        tiles = by_row(given.to(least_exact([given])), order)  # [tiles, 32, outliers]
        outlier_weight = tiles.view(-1, PAIR, len(index)).mT.contiguous()
    return PackedRoundingLinear(
        kind=kind,
        fp8=inputs.kind == "fp8",
        rows=rows,
        columns=columns,
        silu_mul=silu_mul,
        largest=inputs.largest,
        threshold=math.nan if inputs.threshold is None else inputs.threshold,
        codes=_LAYOUTS[kind](padded, order),
        scale=by_row(weight.scale, order).flatten(),
        bias=None if weight.bias is None else by_row(weight.bias.float(), order).flatten(),
        rounded=None if index is None else _bits(index, columns),
        outlier_index=index,
        outlier_weight=outlier_weight,
    )


def _bytes(codes: Tensor, order: Tensor) -> Tensor:
    """int8 [rows, K] -> uint8 [tiles, K / 4, 32, 4], 128 added"""
    tiles = by_row(codes, order)
    unsigned = (tiles.view(torch.uint8) ^ 0x80).view(len(tiles), TILE, -1, 4)
    return unsigned.movedim(1, 2).contiguous()


def _fp8_bytes(codes: Tensor, order: Tensor) -> Tensor:
    """float8_e4m3fn [rows, K] -> uint8 [tiles, K / 4, 2 vectors, 4 lanes, 2 pairs, 4 rows, 2]"""
    tiles = by_row(codes.view(torch.uint8), order)
    parts = tiles.view(len(tiles), 2, 4, 4, -1, 2, 2)  # vector, lane, row, step, pair, inside
    return parts.permute(0, 4, 1, 2, 5, 3, 6).contiguous()


def _floats(codes: Tensor, order: Tensor) -> Tensor:
    """[rows, K] -> bfloat16 [tiles, K / 2, 32, 2]"""
    tiles = by_row(codes.to(torch.bfloat16), order)
    return tiles.view(len(tiles), TILE, -1, 2).movedim(1, 2).contiguous()


_LAYOUTS = {VNNI: _bytes, FP8: _fp8_bytes, BF16: _floats}


def _bits(outlier_index: Tensor, columns: int) -> Tensor:
    """A bit for each column, 0 for stored outliers: int16 [columns / 16, rounded up]"""
    kept = torch.ones(-(-columns // LANES) * LANES, dtype=torch.int32)
    kept[outlier_index] = 0
    return (kept.view(-1, LANES) << torch.arange(LANES)).sum(dim=1).to(torch.int16)
