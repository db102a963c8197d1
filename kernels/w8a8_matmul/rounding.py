# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
"""Triton kernel that rounds the inputs of a linear layer, a program a token.

reference.py has the arithmetic.  A row is read twice, in blocks: once for its largest element and
what exceeds the threshold, once for its codes; the second time from a cache.

    codes    int8 [tokens, width], zeros beyond the columns; those of fp8 are float8_e4m3fn's bits
    scales   float32 [tokens]
    count    int32 [tokens], of the elements that exceed the threshold and are not rounded
    index    int32 [tokens, MOST_FOUND], value float32 likewise: those elements
    outliers [tokens, OUTLIERS] in x's dtype: the stored outlier columns, zeros for padding

Codes are made by integer arithmetic on float32's bits, the same on every generation of GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress.kernels.lowbit_matmul.weight import MOST_FOUND

MOST: tl.constexpr = tl.constexpr(MOST_FOUND)


@triton.jit
def _block(x, rounded, column, columns, count, threshold, THRESHOLD: tl.constexpr):
    """A block of a token: which elements are rounded, all in float32, which are found, how many."""
    here = column < columns
    if rounded is not None:
        here &= tl.load(rounded + column, mask=here, other=0) != 0
    value = tl.load(x + column, mask=here, other=0.0).to(tl.float32)
    place = column
    found = column < 0
    if THRESHOLD:
        exceeding = here & (tl.abs(value) >= threshold)
        place = count + tl.cumsum(exceeding.to(tl.int32), 0) - 1
        found = exceeding & (place < MOST)
        count += tl.sum(exceeding.to(tl.int32))
        here &= ~found
    return here, value, found, place, count


@triton.jit
def _int8(ratio):
    """Nearest whole number in [-128, 127], halves to even."""
    within = tl.minimum(tl.maximum(ratio, -128.0), 127.0)
    magic = 12582912.0  # 1.5 * 2^23: its last bit is 1
    return ((within + magic).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def _fp8(ratio):
    """Bits of the nearest float8_e4m3fn within +-448, halves to even."""
    size = tl.minimum(tl.abs(ratio), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    magic = 16384.0  # its last bit is 2^-9, that of the smallest numbers
    small = (size + magic).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    return tl.where(ratio < 0, code | 0x80, code).to(tl.int8)


@triton.jit
def round_inputs(
    x, rounded, outlier_index, codes, scales, count, index, value, outliers, surplus,
    columns, stride, width, largest, threshold,
    FP8: tl.constexpr, THRESHOLD: tl.constexpr, OUTLIERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: tokens."""
    t = tl.program_id(0).to(tl.int64)
    x += t * stride
    lane = tl.arange(0, BLOCK)
    most = 0.0
    nan = 0
    number = 0
    for start in tl.range(0, columns, BLOCK):
        here, of_x, found, place, number = _block(
            x, rounded, start + lane, columns, number, threshold, THRESHOLD
        )
        if THRESHOLD:
            tl.store(index + t * MOST + place, start + lane, mask=found)
            tl.store(value + t * MOST + place, of_x, mask=found)
        nan = tl.maximum(nan, tl.max((of_x != of_x).to(tl.int32)))
        most = tl.maximum(most, tl.max(tl.where(here, tl.abs(of_x), 0.0)))
    scale = tl.div_rn(most, largest)
    scale = tl.where(scale == 0.0, 1.0, scale)
    scale = tl.where(nan > 0, float("nan"), scale)
    tl.store(scales + t, scale)
    if THRESHOLD:
        tl.store(count + t, tl.minimum(number, MOST))
        if number > MOST:
            tl.atomic_add(surplus, (number - MOST).to(tl.int64))
    number = 0
    for start in tl.range(0, width, BLOCK):
        here, of_x, found, place, number = _block(
            x, rounded, start + lane, columns, number, threshold, THRESHOLD
        )
        ratio = tl.div_rn(of_x, tl.zeros_like(of_x) + scale)
        code = _fp8(ratio) if FP8 else _int8(ratio)
        code = tl.where(here, code, 0).to(tl.int8)
        tl.store(codes + t * width + start + lane, code, mask=start + lane < width)
    if OUTLIERS != 0:
        j = tl.arange(0, OUTLIERS)
        of_x = tl.load(outlier_index + j)
        stored = tl.load(x + tl.maximum(of_x, 0), mask=of_x >= 0, other=0.0)
        tl.store(outliers + t * OUTLIERS + j, stored)
