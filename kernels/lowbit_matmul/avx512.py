"""Packing weights for the AVX-512 kernel; avx512.h has the layouts and the arithmetic."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.lowbit_matmul.weight import LinearWeight

TILE = 32  # rows of W side by side
WIDEST_CHUNK = 128
INT4, INT8, BF16, FP32 = range(4)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NO_SCALE = len(SCALE_DTYPES)


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
    and their tiles alternate.  Raises ValueError for an odd number of columns in bfloat16.
    """
    rows, columns = weight.shape
    order = _tile_order(rows, silu_mul)
    step = {INT4: 8, INT8: 4}
    kind = FP32 if dtype == torch.float32 else BF16
    if weight.codes is not None and kind == BF16:
        kind = INT4 if weight.bits <= 4 else INT8
        chunk = _chunk(min(weight.group_size, columns), step[kind])
        if chunk is None or columns % step[kind]:
            kind = BF16
    bias = None if weight.bias is None else _by_row(weight.bias.float(), order).flatten()
    if kind in (BF16, FP32):
        if kind == BF16 and columns % 2:
            raise ValueError(f"{columns} columns; bfloat16 products need an even number")
        dense = _by_row(weight.dequantize(dtype), order)
        layout = _pairs(dense) if kind == BF16 else dense.movedim(1, 2).contiguous()
        return PackedLinear(
            kind, NO_SCALE, rows, columns, WIDEST_CHUNK, silu_mul, layout, None, None, bias
        )
    assert weight.codes is not None
    assert weight.scale is not None
    assert chunk is not None
    codes = _by_row(weight.codes, order)
    scales = [weight.scale] if weight.shift is None else [weight.scale, weight.shift]
    scale_dtype = _least_exact(scales)
    group_of_chunk = torch.arange(0, columns, chunk) // weight.group_size
    tiled = [
        _by_row(s[:, group_of_chunk], order).movedim(1, 2).to(scale_dtype).contiguous()
        for s in scales
    ]
    return PackedLinear(
        kind,
        SCALE_DTYPES.index(scale_dtype),
        rows,
        columns,
        chunk,
        silu_mul,
        _nibbles(codes) if kind == INT4 else _bytes(codes),
        tiled[0],
        None if weight.shift is None else tiled[1],
        bias,
    )


def _tile_order(rows: int, silu_mul: bool) -> Tensor:
    """The row of W in each place of the tiles, int64 [tiles * 32]; -1 is padding."""
    parts = [torch.arange(rows)]
    if silu_mul:
        parts = list(torch.arange(rows).chunk(2))
    padded = [
        torch.nn.functional.pad(part, (0, -len(part) % TILE), value=-1).view(-1, TILE)
        for part in parts
    ]
    return torch.stack(padded, dim=1).flatten()


def _by_row(tensor: Tensor, order: Tensor) -> Tensor:
    """Rows in tile order, [tiles, 32, ...], zeros for padding."""
    taken = tensor[order.clamp(min=0)]
    taken[order < 0] = 0
    return taken.view(-1, TILE, *tensor.shape[1:])


def _chunk(group_size: int, step: int) -> int | None:
    """The widest cut of a group into equal chunks of whole steps, or None."""
    widths = range(WIDEST_CHUNK - WIDEST_CHUNK % step, 0, -step)
    return next((width for width in widths if group_size % width == 0), None)


def _least_exact(tensors: list[Tensor]) -> torch.dtype:
    return next(
        dtype
        for dtype in SCALE_DTYPES
        if all(torch.equal(tensor.to(dtype).float(), tensor.float()) for tensor in tensors)
    )


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
