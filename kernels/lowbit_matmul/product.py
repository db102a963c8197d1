# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
"""Triton kernels on codes of few bits: a product, and de-quantizing.  layout.py has the layouts.

    y[m, n] = sum over groups g of scale[g, n] * (sum over k in g of x[m, k] * code[n, k])
            + sum over g of shift[g, n] * (sum over k in g of x[m, k])  +  bias[n]

Codes are exact in the dtype of x, and every sum is in float32, so that the products are those of
the stored grid: no weight is rounded.  The tensor cores compute W xᵀ: W is their left operand,
which may come from registers, so that the words go from shared memory to registers in the
operand's layout, become numbers there, and are never written back.  The sum of x of a group is a
product with ones.

Partial results of splits go to fixed places, and the last program to arrive adds them in the
order of their columns: y is the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress.kernels.entry import INTERPRETED
from compress.kernels.lowbit_matmul.unpack import (
    assembly,
    codes_of,
    high_bit,
    low_bits,
    low_shift,
    low_word,
)

_ASM = tl.constexpr(not INTERPRETED)


@triton.jit
def _code(low, high, BITS: tl.constexpr, i: tl.constexpr, dtype: tl.constexpr):
    """Code i of the words, in `dtype`: low is the word with its low bits, high the third one."""
    if _ASM and dtype != tl.float32:
        asm: tl.constexpr = assembly(BITS, i, dtype.name)
        if BITS == 3:
            code = tl.inline_asm_elementwise(
                asm, "=r,r,r", [low, high], dtype=dtype.value, is_pure=True, pack=2
            )
        else:
            code = tl.inline_asm_elementwise(
                asm, "=r,r", [low], dtype=dtype.value, is_pure=True, pack=2
            )
    else:
        bits: tl.constexpr = low_bits(BITS)
        u = (low >> low_shift(BITS, i)) & ((1 << bits) - 1)
        if BITS == 3:
            u |= ((high >> high_bit(i)) & 1) << 2
        code = (u.to(tl.int32) - (1 << (BITS - 1))).to(dtype)
    return code


@triton.jit
def _words(pointers, plane, BITS: tl.constexpr):
    """The words of a tile: low bits of the first codes, of the others, and the high bits."""
    first = tl.load(pointers, eviction_policy="evict_first")
    if BITS == 3:
        second = tl.load(pointers + plane, eviction_policy="evict_first")
        high = tl.load(pointers + 2 * plane, eviction_policy="evict_first")
    else:
        second = first
        high = first
    return first, second, high


@triton.jit
def _of_tile(numbers, t, row, rows, GROUP: tl.constexpr, TILE: tl.constexpr):
    """The scales, or shifts, of a tile's groups: a tuple."""
    if GROUP >= TILE:
        found = (tl.load(numbers + t * TILE // GROUP * rows + row),)
    else:
        found = ()
        at = numbers + t * (TILE // GROUP) * rows + row
        for _ in tl.static_range(TILE // GROUP):
            found = found + (tl.load(at),)  # noqa: RUF005 (Triton knows no stars)
            at += rows
    return found


@triton.jit(do_not_specialize=["tokens", "tiles", "tiles_per_split"])
def product(
    x, words, scale, shift, bias, y, partials, counters,
    tokens, rows, columns, stride, tiles, tiles_per_split,
    BITS: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    SILU_MUL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, blocks of rows, splits of the columns)."""
    CODES: tl.constexpr = codes_of(BITS)
    TILE: tl.constexpr = CODES * WORDS
    first = tl.program_id(2) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    n = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = tl.minimum(n, rows - 1)
    k = tl.arange(0, WORDS)
    plane = rows * WORDS
    tile_words = 3 * plane if BITS == 3 else plane
    w_at = words + first.to(tl.int64) * tile_words + row[:, None] * WORDS + k[None, :]
    x_at = x + tl.minimum(m, tokens - 1)[None, :].to(tl.int64) * stride + k[:, None] + first * TILE
    number: tl.constexpr = x.dtype.element_ty
    ones = tl.full([BLOCK_ROWS, WORDS], 1.0, number)
    total = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
    part = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
    SHARED: tl.constexpr = min(GROUP, TILE)  # columns of a tile that share a scale
    if GROUP != 0:
        scales = _of_tile(scale, first, row, rows, GROUP, TILE)
        if shift is not None:
            shifts = _of_tile(shift, first, row, rows, GROUP, TILE)
    for t in tl.range(first, last):
        w0, w1, high = _words(w_at, plane, BITS)
        if GROUP != 0:  # these loads do not go through shared memory: asked for one tile ahead
            ahead = tl.minimum(t + 1, last - 1)
            next_scales = _of_tile(scale, ahead, row, rows, GROUP, TILE)
            if shift is not None:
                next_shifts = _of_tile(shift, ahead, row, rows, GROUP, TILE)
        for i in tl.static_range(CODES):
            if WHOLE:
                xt = tl.load(x_at + i * WORDS, eviction_policy="evict_last")
            else:
                inside = t * TILE + i * WORDS + k < columns
                xt = tl.load(x_at + i * WORDS, mask=inside[:, None], other=0.0)
            w = w0 if low_word(BITS, i) == 0 else w1
            code = _code(w, high, BITS, i, number)
            if GROUP != 0 and (i * WORDS) % SHARED == 0:
                part = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
                sums = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
            part = tl.dot(code, xt, part, input_precision="ieee")
            if shift is not None:
                sums = tl.dot(ones, xt, sums, input_precision="ieee")
            if GROUP != 0 and ((i + 1) * WORDS) % SHARED == 0:
                total += scales[i * WORDS // SHARED].to(tl.float32)[:, None] * part
                if shift is not None:
                    total += shifts[i * WORDS // SHARED].to(tl.float32)[:, None] * sums
        if GROUP != 0:
            scales = next_scales
            if shift is not None:
                shifts = next_shifts
        w_at += tile_words
        x_at += TILE
    if GROUP == 0:
        total = tl.load(scale + row).to(tl.float32)[:, None] * part
        if shift is not None:
            total += tl.load(shift + row).to(tl.float32)[:, None] * sums
    result = tl.trans(total)  # [tokens, rows]
    splits = tl.num_programs(2)
    left = 0
    if splits > 1:
        block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        inside = tl.arange(0, BLOCK_TOKENS)[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        SIZE: tl.constexpr = BLOCK_TOKENS * BLOCK_ROWS
        at = partials + block.to(tl.int64) * splits * SIZE + inside
        here = (m < tokens)[:, None] & (n < rows)[None, :]
        tl.store(at + tl.program_id(2) * SIZE, result, mask=here)
        tl.debug_barrier()
        left = splits - 1 - tl.atomic_add(counters + block, 1, sem="acq_rel")
        if left == 0:
            result = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
            for s in tl.range(0, splits, loop_unroll_factor=4):
                result += tl.load(at + s * SIZE, mask=here, other=0.0, cache_modifier=".cg")
            tl.store(counters + block, 0)
    if left == 0:
        if bias is not None:
            result += tl.load(bias + row)[None, :]
        if SILU_MUL:
            gate, up = tl.split(tl.reshape(result, [BLOCK_TOKENS, BLOCK_ROWS // 2, 2]))
            value = gate / (1.0 + tl.exp(-gate)) * up
            j = tl.program_id(1) * (BLOCK_ROWS // 2) + tl.arange(0, BLOCK_ROWS // 2)
            width = rows // 2
        else:
            value = result
            j = n
            width = rows
        here = (m < tokens)[:, None] & (j < width)[None, :]
        y_at = y + m[:, None].to(tl.int64) * width + j[None, :]
        tl.store(y_at, value.to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["first_row", "end_row"])
def dequantize(
    words, scale, shift, out, rows, columns, first_row, end_row,
    BITS: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SILU_MUL: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """out [end_row - first_row, columns] = rows of W.  Grid: (tiles, blocks of rows).

    With SILU_MUL the gates' rows come first, then the rows of up.
    """
    CODES: tl.constexpr = codes_of(BITS)
    t = tl.program_id(0)
    n = first_row + tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(n, rows - 1)
    k = tl.arange(0, WORDS)
    plane = rows * WORDS
    tile_words = 3 * plane if BITS == 3 else plane
    w_at = words + t.to(tl.int64) * tile_words + row[:, None] * WORDS + k[None, :]
    w0, w1, high = _words(w_at, plane, BITS)
    to = n - first_row
    if SILU_MUL:
        to = to // 2 + (to % 2) * ((end_row - first_row) // 2)
    out_at = out + to[:, None].to(tl.int64) * columns
    number: tl.constexpr = out.dtype.element_ty
    for i in tl.static_range(CODES):
        column = (t * CODES + i) * WORDS
        w = w0 if low_word(BITS, i) == 0 else w1
        g = column // GROUP * rows if GROUP != 0 else 0
        # All codes are exact in float16, and take fewer instructions than in bfloat16.
        value = _code(w, high, BITS, i, tl.float16).to(tl.float32)
        value *= tl.load(scale + g + row).to(tl.float32)[:, None]
        if shift is not None:
            value += tl.load(shift + g + row).to(tl.float32)[:, None]
        here = (n < end_row)[:, None] & (column + k < columns)[None, :]
        tl.store(out_at + column + k[None, :], value.to(number), mask=here)
