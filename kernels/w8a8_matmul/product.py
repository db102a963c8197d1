# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
"""Triton kernel that multiplies codes of 8 bits, and makes y of the sums.

    y[m, n] = scale[n] * (token_scale[m] * sum over k of x[m, k] * weight[n, k]
                          + sum over found elements i of value[m, i] * weight[n, index[m, i]])
            + sum over outlier columns j of outliers[m, j] * outlier_weight[n, j]  +  bias[n]

rounding.py says what there is of a token.  Int8 codes are summed in int32, exactly.  Codes of fp8
are multiplied as such from compute capability 8.9 on (NATIVE) and summed in float32 every tile;
elsewhere their bits become float16, 2^-8 of the number, which is exact for all of them.  Stored
outlier columns are multiplied in the dtype of x.

Splits of the columns are added up as in lowbit_matmul: by the last program to arrive, in the order
of their columns, from fixed places; int32 is kept there as the bits of a float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress.kernels.lowbit_matmul.weight import MOST_FOUND

MOST: tl.constexpr = tl.constexpr(MOST_FOUND)


@triton.jit
def _half(bits):
    """float8_e4m3fn's bits, int8 -> float16, 2^-8 of the number."""
    wide = bits.to(tl.int16)  # the sign fills the upper byte
    return (((wide & 0x7F) << 7) | (wide & -32768)).to(tl.float16, bitcast=True)


@triton.jit
def _number(code, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """A code of W in float32."""
    if FP8 and not NATIVE:
        code = _half(code) * 256.0
    return code.to(tl.float32)


@triton.jit
def _sums(
    x, weight, row, m, first, last, tokens, width, FP8: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Products of codes over some tiles of columns: [rows, tokens], int32 or float32."""
    k = tl.arange(0, BLOCK_COLUMNS)
    w_at = weight + row[:, None].to(tl.int64) * width + first * BLOCK_COLUMNS + k[None, :]
    x_row = tl.minimum(m, tokens - 1)[None, :].to(tl.int64)
    x_at = x + x_row * width + first * BLOCK_COLUMNS + k[:, None]
    part = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32 if FP8 else tl.int32)
    for _ in tl.range(first, last):
        w = tl.load(w_at, eviction_policy="evict_first")
        xt = tl.load(x_at, eviction_policy="evict_last")
        if FP8 and NATIVE:
            part = tl.dot(w, xt, part, max_num_imprecise_acc=BLOCK_COLUMNS)
        elif FP8:
            part = tl.dot(_half(w), _half(xt), part)
        else:
            part = tl.dot(w, xt, part, out_dtype=tl.int32)
        w_at += BLOCK_COLUMNS
        x_at += BLOCK_COLUMNS
    return part * 65536.0 if FP8 and not NATIVE else part


@triton.jit
def _found(
    total, weight, count, index, value, row, m, tokens, width,
    FP8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`total` [tokens, rows] with the products of the elements that were not rounded."""
    number = tl.load(count + m, mask=m < tokens, other=0)
    for j in tl.range(0, tl.max(number)):
        live = j < number
        at = m.to(tl.int64) * MOST + j
        column = tl.load(index + at, mask=live, other=0)
        of_x = tl.load(value + at, mask=live, other=0.0)
        code = tl.load(weight + row[None, :].to(tl.int64) * width + column[:, None])
        total += of_x[:, None] * _number(code, FP8, NATIVE)
    return total


@triton.jit
def _stored(
    outliers, outlier_weight, row, m, tokens, OUTLIERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Products of the stored outlier columns: [tokens, rows]"""
    j = tl.arange(0, 16)
    part = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
    w_at = outlier_weight + row[:, None].to(tl.int64) * OUTLIERS + j[None, :]
    x_at = outliers + tl.minimum(m, tokens - 1)[None, :].to(tl.int64) * OUTLIERS + j[:, None]
    for _ in tl.range(0, OUTLIERS, 16):
        part = tl.dot(tl.load(w_at), tl.load(x_at), part, input_precision="ieee")
        w_at += 16
        x_at += 16
    return tl.trans(part)


@triton.jit(do_not_specialize=["tokens", "tiles", "tiles_per_split"])
def product(
    x, token_scale, count, index, value, outliers, weight, scale, bias, outlier_weight, y,
    partials, counters, tokens, rows, width, tiles, tiles_per_split,
    FP8: tl.constexpr, NATIVE: tl.constexpr, THRESHOLD: tl.constexpr, OUTLIERS: tl.constexpr,
    SILU_MUL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, blocks of rows, splits of the columns)."""
    first = tl.program_id(2) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    n = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = tl.minimum(n, rows - 1)
    sums = tl.trans(
        _sums(
            x, weight, row, m, first, last, tokens, width, FP8, NATIVE,
            BLOCK_ROWS, BLOCK_TOKENS, BLOCK_COLUMNS,
        )
    )  # fmt: skip
    splits = tl.num_programs(2)
    left = 0
    if splits > 1:
        block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        inside = tl.arange(0, BLOCK_TOKENS)[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        SIZE: tl.constexpr = BLOCK_TOKENS * BLOCK_ROWS
        at = partials + block.to(tl.int64) * splits * SIZE + inside
        here = (m < tokens)[:, None] & (n < rows)[None, :]
        tl.store(at + tl.program_id(2) * SIZE, sums.to(tl.float32, bitcast=True), mask=here)
        tl.debug_barrier()
        left = splits - 1 - tl.atomic_add(counters + block, 1, sem="acq_rel")
        if left == 0:
            sums = tl.zeros_like(sums)
            for s in tl.range(0, splits, loop_unroll_factor=4):
                one = tl.load(at + s * SIZE, mask=here, other=0.0, cache_modifier=".cg")
                sums += one.to(sums.dtype, bitcast=True)
            tl.store(counters + block, 0)
    if left == 0:
        total = sums.to(tl.float32) * tl.load(token_scale + tl.minimum(m, tokens - 1))[:, None]
        if THRESHOLD:
            total = _found(total, weight, count, index, value, row, m, tokens, width, FP8, NATIVE)
        total *= tl.load(scale + row)[None, :]
        if OUTLIERS != 0:
            total += _stored(
                outliers, outlier_weight, row, m, tokens, OUTLIERS, BLOCK_ROWS, BLOCK_TOKENS
            )
        if bias is not None:
            total += tl.load(bias + row)[None, :]
        if SILU_MUL:
            gate, up = tl.split(tl.reshape(total, [BLOCK_TOKENS, BLOCK_ROWS // 2, 2]))
            result = gate / (1.0 + tl.exp(-gate)) * up
            j = tl.program_id(1) * (BLOCK_ROWS // 2) + tl.arange(0, BLOCK_ROWS // 2)
            outputs = rows // 2
        else:
            result = total
            j = n
            outputs = rows
        here_y = (m < tokens)[:, None] & (j < outputs)[None, :]
        y_at = y + m[:, None].to(tl.int64) * outputs + j[None, :]
        tl.store(y_at, result.to(y.dtype.element_ty), mask=here_y)
