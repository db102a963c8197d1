"""Paged attention on a GPU: decode, several new tokens a sequence, and chunked prefill.

One kernel computes what reference.py does, for one tile (plan.py) and one KV head a program, over
a share of the tile's keys.  With scores s[r, j] = q[r] · k[j], in base two and by blocks of
positions:

    c = scale * log2(e)
    m' = max(m, c * max_j s[r, j])      p[r, j] = 2^(c * s[r, j] - m')
    total' = total * 2^(m - m') + sum_j p[r, j]
    acc' = acc * 2^(m - m') + sum_j p[r, j] v[j]          out[r] = acc / total

All is float32 but p, which is rounded to the dtype of q for the product with v.

A cache in 8 bits (cache.py) has codes ck, cv and scales sk, sv.  Codes become numbers in registers,
exactly, in the dtype of q, fp8's by moving their bits under float16's exponent.  Scales stay apart:

    s[r, j] = sk[j] * q[r] · ck[j]
    acc' = acc * 2^(m - m') * u / u' + sum_j p[r, j] (sv[j] / u') cv[j]

with u' = max(u, max_j sv[j]), the largest scale so far, by which acc is multiplied at last: what is
rounded to 16 bits is at most 1 then, which float16 needs.

Splits.  The positions that a tile sees are cut in `splits` equal shares, none below MIN_SPLIT, so
that one grid serves all contexts: programs without a share return at once.  A program whose share
is everything writes the output.  Others put (acc, m, total) in the workspace, and the last of a
tile's programs to arrive adds all of them in order of their index: the same bits at each run.

Layouts.  The cache is [num_blocks, K, 16, H].  A position's key is H contiguous numbers, a page of
a head 16H, so that a block of positions is read in rows, 16 bytes a thread, and the page's number
is looked up for each row (the table is small and stays in the L1 cache).  Pages of the next block
are looked up while this one is computed: the compiler then keeps `num_stages - 1` blocks of keys
and values on their way, which it does not where an address waits for a load of the same turn.

Sources: Dao et al., FlashAttention, 2022, arXiv:2205.14135; Dao et al., Flash-Decoding, 2023;
Kwon et al., 2023, arXiv:2309.06180; Milakov and Gimelshein, 2018, arXiv:1805.02867.
"""

# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.entry import Entry
from compress.kernels.paged_attention.cache import (
    FP8,
    INT8,
    Blocks,
    Codes,
    QuantizedBlocks,
    parts_of,
)
from compress.kernels.paged_attention.plan import TILE_ROWS, tile_tokens
from compress.kernels.paged_attention.shapes import PAGE, Shape, capability_of, choose, padded
from compress.kernels.workspace import Workspace

EVERYTHING = 2**30
"""A window that no context reaches."""

EVERY_ROWS = (16, 32, TILE_ROWS, TILE_ROWS + 1)
"""One number of rows in a step for each of the programs that `choose` knows."""

FACTORS = {INT8: 1, FP8: 256}
"""What `_numbers` leaves to the scales."""

RUNTIME = ("tiled", "heads", "kv_heads", "most_new", "window", "table_row", "table_column")
CACHE = ("k_cache", "v_cache", "k_scales", "v_scales")
INDICES = ("starts", "contexts", "block_tables", "tiles", "counters")


@triton.jit
def _pages(table, table_column, start, high, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):
    """Block of the cache of each of the positions from `start`."""
    columns = start + tl.arange(0, BLOCK_N)
    return tl.load(table + columns // PAGE * table_column, mask=columns < high, other=0)


@triton.jit
def _rows(
    cache, offsets, inside, in_head, MASKED: tl.constexpr, WHOLE_HEAD: tl.constexpr
):  # fmt: skip
    """Keys or values of a block of positions, as they are stored."""
    if MASKED and WHOLE_HEAD:
        rows = tl.load(cache + offsets, mask=inside[:, None], other=0.0)
    elif MASKED:
        rows = tl.load(cache + offsets, mask=inside[:, None] & in_head[None, :], other=0.0)
    elif WHOLE_HEAD:
        rows = tl.load(cache + offsets)
    else:
        rows = tl.load(cache + offsets, mask=in_head[None, :], other=0.0)
    return rows


@triton.jit
def _numbers(codes, like, FACTOR: tl.constexpr):
    """What codes (int8) stand for over FACTOR, in the dtype of `like`, exactly.

    The bits of e4m3 stand under those of float16, whose exponent is as wide and one more: 2^-8 of
    the number.
    """
    if FACTOR == 1:
        numbers = codes.to(like.dtype)
    else:
        bits = (codes.to(tl.int16) << 7) & -16385  # all but bit 14
        numbers = bits.to(tl.float16, bitcast=True).to(like.dtype)
    return numbers


@triton.jit
def _attend_block(
    q, m, total, acc, unit, k_cache, v_cache, k_scales, v_scales, pages, page_stride, base, start,
    high, window, factor, places, dims, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr, FACTOR: tl.constexpr, MASKED: tl.constexpr, WHOLE_HEAD: tl.constexpr,
):  # fmt: skip
    """(m, total, acc, unit) with the block of positions from `start`; no FACTOR, no codes."""
    columns = start + tl.arange(0, BLOCK_N)
    inside = columns < high
    in_head = dims < HEAD_DIM
    rows = pages.to(tl.int64) * page_stride + (base + columns % PAGE * HEAD_DIM)
    offsets = rows[:, None] + dims[None, :]
    k = _rows(k_cache, offsets, inside, in_head, MASKED, WHOLE_HEAD)
    v = _rows(v_cache, offsets, inside, in_head, MASKED, WHOLE_HEAD)
    if FACTOR is not None:
        k_scale = tl.load(k_scales + rows // HEAD_DIM, mask=inside, other=0.0) * FACTOR
        v_scale = tl.load(v_scales + rows // HEAD_DIM, mask=inside, other=0.0) * FACTOR
        k = _numbers(k, q, FACTOR)
        v = _numbers(v, q, FACTOR)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if FACTOR is not None:
        scores *= k_scale[None, :]
    if MASKED:
        seen = (columns[None, :] <= places[:, None]) & (columns[None, :] > places[:, None] - window)
        scores = tl.where(seen & inside[None, :], scores, float("-inf"))
    largest = tl.maximum(m, tl.max(scores, 1) * factor)
    p = tl.exp2(tl.fma(scores, factor, -largest[:, None]))
    shrink = tl.exp2(m - largest)
    total = total * shrink + tl.sum(p, 1)
    if FACTOR is not None:
        wider = tl.maximum(unit, tl.max(v_scale, 0))
        p *= (v_scale / wider)[None, :]
        shrink *= unit / wider
        unit = wider
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return largest, total, acc, unit


@triton.jit
def _merge(
    partial_acc, partial_m, partial_l, out, tile, used, splits, rows, heads, group,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    MERGE_ROWS: tl.constexpr, MERGE_SPLITS: tl.constexpr,
):  # fmt: skip
    """Add the partial results of a tile's `used` splits in order, and write the output."""
    dims = tl.arange(0, HEAD_PAD)
    for row0 in range(0, rows, MERGE_ROWS):
        r = row0 + tl.arange(0, MERGE_ROWS)
        m = tl.full([MERGE_ROWS], -1e30, tl.float32)
        total = tl.zeros([MERGE_ROWS], tl.float32)
        acc = tl.zeros([MERGE_ROWS, HEAD_PAD], tl.float32)
        for split0 in range(0, used, MERGE_SPLITS):
            split = split0 + tl.arange(0, MERGE_SPLITS)
            place = (tile * splits + split)[:, None] * BLOCK_M + r[None, :]
            there = (split < used)[:, None] & (r < rows)[None, :]
            ms = tl.load(partial_m + place, mask=there, other=-1e30, cache_modifier=".cg")
            ls = tl.load(partial_l + place, mask=there, other=0.0, cache_modifier=".cg")
            part = tl.load(
                partial_acc + place[:, :, None] * HEAD_DIM + dims[None, None, :],
                mask=there[:, :, None] & (dims < HEAD_DIM)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )  # [MERGE_SPLITS, MERGE_ROWS, HEAD_PAD]
            largest = tl.maximum(m, tl.max(ms, 0))
            weight = tl.exp2(ms - largest[None, :])
            shrink = tl.exp2(m - largest)
            total = total * shrink + tl.sum(weight * ls, 0)
            acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * part, 0)
            m = largest
        target = (r // group * heads + r % group) * HEAD_DIM
        seen = tl.where(total == 0.0, 1.0, total)  # there are rows beyond the last
        tl.store(
            out + target[:, None] + dims[None, :],
            (acc / seen[:, None]).to(out.dtype.element_ty),
            mask=(r < rows)[:, None] & (dims < HEAD_DIM)[None, :],
        )


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=INDICES)
def _attend(
    q, k_cache, v_cache, k_scales, v_scales, out, starts, contexts, block_tables, tiles, partials,
    counters, tiled, heads, kv_heads, most_new, window, table_row, table_column, factor,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE: tl.constexpr, MIN_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_APART: tl.constexpr,
    MERGE_ROWS: tl.constexpr, MERGE_SPLITS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * parts of a tile, K, splits)."""
    group = heads // kv_heads
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)

    # This program's new tokens: `count` of sequence `sequence`, from its `first`.
    tokens = BLOCK_M // group  # of a part
    parts = tl.cdiv(most_new, tokens)
    place = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    sequence = place
    tile_first = 0
    if tiled:
        sequence = tl.load(tiles + 2 * place)
        tile_first = tl.load(tiles + 2 * place + 1)
    start = tl.load(starts + sequence)
    new = tl.load(starts + sequence + 1) - start
    context = tl.load(contexts + sequence)
    first = tile_first + part * tokens
    count = tl.minimum(tl.minimum(tokens, most_new - part * tokens), new - first)
    if count <= 0:
        return

    # The positions that it sees, and its split's share of them.
    place0 = context - new + first
    end = tl.maximum(place0 + count, 0)
    begin = tl.maximum(place0 - window + 1, 0) // PAGE * PAGE
    share = tl.maximum(tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_N) * BLOCK_N, MIN_SPLIT)
    used = tl.maximum(tl.cdiv(end - begin, share), 1)
    if split >= used:
        return
    low = begin + split * share
    high = tl.minimum(low + share, end)

    # Blocks [front, back) are seen whole by all rows; those around them need masks.
    blocks = tl.cdiv(high - low, BLOCK_N)
    front = 0
    back = 0
    if MASK_APART:
        front = tl.cdiv(tl.maximum(place0 + count - window - low, 0), BLOCK_N)
        front = tl.minimum(front, blocks)
        back = tl.maximum((tl.minimum(place0 + 1, high) - low) // BLOCK_N, front)
    # The first pages are looked up before the queries are waited for.
    table = block_tables + sequence.to(tl.int64) * table_row
    pages = _pages(table, table_column, low + front * BLOCK_N, high, BLOCK_N, PAGE)

    r = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_PAD)
    rows = count * group
    head0 = ((start + first).to(tl.int64) * heads + kv_head * group) * HEAD_DIM
    target = (r // group * heads + r % group) * HEAD_DIM
    there = (r < rows)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(q + head0 + target[:, None] + dims[None, :], mask=there, other=0.0)
    places = place0 + r // group
    m = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    unit = tl.full([], 2.0**-126, tl.float32)  # no scale is below
    page_stride = kv_heads * (PAGE * HEAD_DIM)
    base = kv_head * (PAGE * HEAD_DIM)

    block_start = low
    if MASK_APART:
        for block in range(front, back):
            block_start = low + block * BLOCK_N
            following = _pages(table, table_column, block_start + BLOCK_N, high, BLOCK_N, PAGE)
            m, total, acc, unit = _attend_block(
                queries, m, total, acc, unit, k_cache, v_cache, k_scales, v_scales, pages,
                page_stride, base, block_start, high, window, factor, places, dims, BLOCK_N, PAGE,
                HEAD_DIM, FACTOR, False, HEAD_DIM == HEAD_PAD,
            )  # fmt: skip
            pages = following
        block_start = low + tl.where(front > 0, 0, back) * BLOCK_N
        pages = _pages(table, table_column, block_start, high, BLOCK_N, PAGE)
    for step in range(1, blocks - back + front + 1):
        following_start = low + tl.where(step < front, step, step + back - front) * BLOCK_N
        following = _pages(table, table_column, following_start, high, BLOCK_N, PAGE)
        m, total, acc, unit = _attend_block(
            queries, m, total, acc, unit, k_cache, v_cache, k_scales, v_scales, pages, page_stride,
            base, block_start, high, window, factor, places, dims, BLOCK_N, PAGE, HEAD_DIM, FACTOR,
            True, HEAD_DIM == HEAD_PAD,
        )  # fmt: skip
        block_start = following_start
        pages = following

    if FACTOR is not None:
        acc *= unit
    # The same offsets again, where the compiler cannot know it: kept through the loops they spill.
    r += tl.minimum(window, 0)
    target = (r // group * heads + r % group) * HEAD_DIM
    there = (r < rows)[:, None] & (dims < HEAD_DIM)[None, :]
    if used == 1:
        seen = tl.where(total == 0.0, 1.0, total)  # nothing is seen where the sequence is padding
        result = (acc / seen[:, None]).to(out.dtype.element_ty)
        tl.store(out + head0 + target[:, None] + dims[None, :], result, mask=there)
    else:
        tile = tl.program_id(0) * kv_heads + kv_head
        size = tl.num_programs(0) * kv_heads * splits * BLOCK_M
        partial_m = partials
        partial_l = partials + size
        partial_acc = partials + 2 * size
        spot = (tile * splits + split) * BLOCK_M + r
        tl.store(partial_m + spot, m, mask=r < rows)
        tl.store(partial_l + spot, total, mask=r < rows)
        tl.store(partial_acc + spot[:, None] * HEAD_DIM + dims[None, :], acc, mask=there)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == used - 1:
            tl.store(counters + tile, 0)
            _merge(
                partial_acc, partial_m, partial_l, out + head0, tile, used, splits, rows, heads,
                group, BLOCK_M, HEAD_DIM, HEAD_PAD, MERGE_ROWS, MERGE_SPLITS,
            )  # fmt: skip


def paged_attention(
    q: Tensor,
    k_cache: Blocks,
    v_cache: Blocks,
    starts: Tensor,
    contexts: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int | None = None,
    *,
    tiles: Tensor | None,
    most_new: int,
    splits: int,
    workspace: Workspace,
    shape: Shape | None = None,
) -> Tensor:
    """See reference.py; q and the caches are contiguous, scale is above 0.

    The caches are in the dtype of q, or both in 8 bits.

    block_tables  int32 [S, W], any strides
    tiles         int32 [tiles, 2] of plan.tiles_of, or None: every sequence is one tile
    most_new      new tokens of a sequence at most
    splits        shares of the keys at most, see plan.splits_of
    shape         of shapes.candidates, for a tuner; None for `choose`'s

    Rows of a sequence whose context is 0 (padding) become zeros, and nothing is read for them.
    """
    heads, head_dim = q.shape[1:]
    (keys, k_scales), (values, v_scales) = parts_of(k_cache), parts_of(v_cache)
    codes = k_cache.kind if isinstance(k_cache, QuantizedBlocks) else None
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    if shape is None:
        device = capability_of(q.device)
        shape = choose(most_new * group, group, head_dim, q.dtype, device, codes is not None)
    if tiles is not None:
        most_new = min(most_new, tile_tokens(heads, kv_heads))  # of a tile
    parts = -(-most_new // (shape.block_m // group))
    count = parts * (len(starts) - 1 if tiles is None else len(tiles))
    out = torch.empty_like(q)
    partials = 0 if splits == 1 else count * kv_heads * splits * shape.block_m * (head_dim + 2)
    _attend[(count, kv_heads, splits)](
        q, keys, values, k_scales, v_scales, out, starts, contexts, block_tables,
        starts if tiles is None else tiles, workspace.floats(max(partials, 1)),
        workspace.counters(count * kv_heads), int(tiles is not None), heads, kv_heads, most_new,
        EVERYTHING if window is None else window, block_tables.stride(0), block_tables.stride(1),
        scale * math.log2(math.e), **constants(shape, head_dim, codes),
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    return out


def constants(shape: Shape, head_dim: int, codes: Codes | None = None) -> dict[str, Any]:
    """The compile-time constants of `_attend`."""
    return {
        "HEAD_DIM": head_dim,
        "HEAD_PAD": padded(head_dim),
        "PAGE": PAGE,
        "MIN_SPLIT": shape.min_split,
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "MASK_APART": shape.mask_apart,
        "MERGE_ROWS": shape.merge_rows,
        "MERGE_SPLITS": shape.merge_splits,
        "FACTOR": None if codes is None else FACTORS[codes],
    }


def entries(capability: int) -> list[Entry]:
    """Every height of program for heads of 64 and 128 dimensions in 16 bits, and beside bfloat16 a
    cache in 8 bits.

    Groups of more than 16 query heads and other sizes of a head are compiled when met, as is a
    cache in 8 bits beside float16.
    """
    found = []
    for kind, codes in (("fp16", None), ("bf16", None), ("bf16", INT8), ("bf16", FP8)):
        for head_dim in (64, 128):
            coded = codes is not None
            shapes = [
                choose(rows, 1, head_dim, torch.bfloat16, capability, coded) for rows in EVERY_ROWS
            ]
            words = f"h{head_dim} {kind}{f' {codes.name}' if codes else ''}"
            absent = {} if codes else {"k_scales": None, "v_scales": None}
            found += [
                Entry(
                    f"paged_attention rows{shape.block_m} {words}",
                    _attend,
                    types(kind, codes),
                    constants(shape, head_dim, codes) | absent,
                    shape.num_warps,
                    shape.num_stages,
                    frozenset(["q", "out", "partials", *CACHE[: 4 if codes else 2]]),
                )
                for shape in shapes
            ]
    return found


def types(kind: str, codes: Codes | None = None) -> dict[str, str]:
    """Types of the arguments of `_attend` for queries of `kind`."""
    cache = dict.fromkeys(CACHE[:2], f"*{kind}")
    if codes:
        cache = dict.fromkeys(CACHE[:2], "*i8") | dict.fromkeys(CACHE[2:], "*fp32")
    return (
        dict.fromkeys(("q", "out"), f"*{kind}")
        | cache
        | dict.fromkeys(INDICES, "*i32")
        | {"partials": "*fp32", "factor": "fp32"}
        | dict.fromkeys(RUNTIME, "i32")
    )
