"""Packing weights for the AVX-512 kernel; avx512.h has the layouts and the arithmetic."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.kernels.lowbit_matmul.weight import SCALE_DTYPES, LinearWeight, least_exact

TILE = 32  # rows of W side by side
WIDEST_CHUNK = 128
INT4, INT8, BF16, FP32 = range(4)
NO_SCALE = len(SCALE_DTYPES)
STEP = {INT4: 8, INT8: 4}  # columns of one vector of codes


@dataclass(frozen=True)
class PackedLinear:
    """A weight in tiles: what the kernel's arguments are called, and the tensors they point to."""

    kind: int
    scale_kind: int
    rows: int
    columns: int
    chunk: int
    silu_mul: bool
    codes: Tensor
    scale: Tensor | None
    shift: Tensor | None
    bias: Tensor | None

    @property
    def bytes(self) -> int:
        """What a product reads of it."""
        parts = (self.codes, self.scale, self.shift, self.bias)
        return sum(part.nbytes for part in parts if part is not None)


def pack(weight: LinearWeight, dtype: torch.dtype, silu_mul: bool = False) -> PackedLinear:
    """Lay out a weight for products with activations of `dtype` (bfloat16 or float32).

    Codes stay codes when activations are bfloat16 and the grid's groups can be cut into chunks of
    whole vectors; else the weight is de-quantized.  With `silu_mul` the weight is gate over up,
    and their tiles alternate.  Raises InputError for an odd number of columns in bfloat16.
    """
    kind, chunk = FP32, WIDEST_CHUNK
    if dtype == torch.bfloat16:
        kind = BF16
        if weight.codes is not None:
            narrow = INT4 if weight.bits <= 4 else INT8
            if whole := _chunk(weight, STEP[narrow]):
                kind, chunk = narrow, whole
    order = tile_order(weight.shape[0], silu_mul)
    layout, scale_dtype, scale, shift = (
        _dense(weight, kind, order) if kind in (BF16, FP32) else _coded(weight, kind, chunk, order)
    )
    return PackedLinear(
        kind=kind,
        scale_kind=NO_SCALE if scale_dtype is None else SCALE_DTYPES.index(scale_dtype),
        rows=weight.shape[0],
        columns=weight.shape[1],
        chunk=chunk,
        silu_mul=silu_mul,
        codes=layout,
        scale=scale,
        shift=shift,
        bias=None if weight.bias is None else by_row(weight.bias.float(), order).flatten(),
    )


_Parts = tuple[Tensor, torch.dtype | None, Tensor | None, Tensor | None]


def _dense(weight: LinearWeight, kind: int, order: Tensor) -> _Parts:
    """Tiles of numbers; no scales."""
    if kind == FP32:
        return by_row(weight.dequantize(torch.float32), order).mT.contiguous(), None, None, None
    if weight.shape[1] % 2:
        raise InputError(
            f"a linear layer reads {weight.shape[1]} columns, and bfloat16 products here take an "
            "even number; use float32"
        )
    return _pairs(by_row(weight.dequantize(torch.bfloat16), order)), None, None, None


def _coded(weight: LinearWeight, kind: int, chunk: int, order: Tensor) -> _Parts:
    """Tiles of codes, and the scales and shifts of each chunk in the least dtype that is exact."""
    assert weight.codes is not None
    assert weight.scale is not None
    codes = by_row(weight.codes, order)
    given = [weight.scale] if weight.shift is None else [weight.scale, weight.shift]
    dtype = least_exact(given)
    group = torch.arange(0, weight.shape[1], chunk) // weight.group_size  # of each chunk
    scale, *shift = [by_row(s[:, group], order).mT.to(dtype).contiguous() for s in given]
    layout = _nibbles(codes) if kind == INT4 else _bytes(codes)
    return layout, dtype, scale, shift[0] if shift else None


def tile_order(rows: int, silu_mul: bool) -> Tensor:
    """The row of W in each place of the tiles, int64 [tiles * 32]; -1 is padding."""
    parts = [torch.arange(rows)]
    if silu_mul:
        parts = list(torch.arange(rows).chunk(2))
    padded = [
        torch.nn.functional.pad(part, (0, -len(part) % TILE), value=-1).view(-1, TILE)
        for part in parts
    ]
    return torch.stack(padded, dim=1).flatten()


def by_row(tensor: Tensor, order: Tensor) -> Tensor:
    """Rows in tile order, [tiles, 32, ...], zeros for padding."""
    taken = tensor[order.clamp(min=0)]
    taken[order < 0] = 0
    return taken.view(-1, TILE, *tensor.shape[1:])


def _chunk(weight: LinearWeight, step: int) -> int | None:
    """The widest cut of a group into equal chunks of whole steps, or None."""
    widths = range(WIDEST_CHUNK - WIDEST_CHUNK % step, 0, -step)
    return next((width for width in widths if weight.group_size % width == 0), None)


def _pairs(dense: Tensor) -> Tensor:
    """[tiles, 32, K] -> [tiles, K / 2, 32, 2]"""
    tiles, _, columns = dense.shape
    return dense.view(tiles, TILE, columns // 2, 2).movedim(1, 2).contiguous()


def _nibbles(codes: Tensor) -> Tensor:
    """int8 [tiles, 32, K] -> uint32 words as int32 [tiles, K / 8, 32]"""
    tiles, _, columns = codes.shape
    unsigned = (codes.to(torch.int64) + 8).view(tiles, TILE, columns // 8, 4, 2)
    shifts = torch.tensor([[4 * i + 16 * half for half in range(2)] for i in range(4)])
    words = (unsigned << shifts).sum(dim=(-2, -1))
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.to(torch.int32).movedim(1, 2).contiguous()


def _bytes(codes: Tensor) -> Tensor:
    """int8 [tiles, 32, K] -> [tiles, K / 4, 2 vectors, 2 elements, 16 rows, 2]"""
    tiles, _, columns = codes.shape
    return codes.view(tiles, 2, 16, columns // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).contiguous()
