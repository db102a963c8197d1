"""Attention on latents on a GPU: decode, drafts and prefill, absorbed.

    latent_write   norms and turns what a layer's projections give: writes the cache, turns queries
    (bmm)          Uᵀ q, a product for each head, by the vendor's library
    attend         the softmax of scale (Uᵀ q · c[j] + q · k[j]), times c[j]
    (bmm)          V times that, a product for each head

reference.py has the formula; splits, online softmax and codes in 8 bits are those of
paged_attention/triton.py, with latents as keys and as values: a block of them is read once, and
multiplied twice.

Prefill is absorbed, too.  Un-absorbed, a chunk of T tokens of a context of S would first make
S N (P + v) numbers of keys and values, R products each, and then save 2 R - P - v products for a
position, a token and a head.  Sizes of DeepSeek-V3 (R 512, d 64, P 128, v 128) make that part of
attention 3.4 times cheaper, (128, 32, 64, 64) 1.8 times.  Of the products of a prefill of 2,048
tokens it is an eighth at 8 billion parameters (R 512, 32 heads and layers), and two fifths at 135
million; of long prompts it is most.  It would take memory for the keys and values of a chunk's
whole context, a second cache of sorts, and is not built.

Source: DeepSeek-AI, DeepSeek-V2, 2024, arXiv:2405.04434, appendix C.
"""

# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.entry import Entry
from compress.kernels.latent_attention.shapes import choose, head_blocks, most_rows
from compress.kernels.latent_attention.weights import LatentShape, LatentWeights, UpProjections
from compress.kernels.paged_attention.cache import (
    FP8,
    INT8,
    Blocks,
    Codes,
    QuantizedBlocks,
    parts_of,
)
from compress.kernels.paged_attention.plan import TILE_ROWS
from compress.kernels.paged_attention.shapes import PAGE, Shape, capability_of, padded
from compress.kernels.paged_attention.triton import FACTORS, _merge, _numbers, _pages, _rows
from compress.kernels.rope.triton import _coded
from compress.kernels.workspace import Workspace

PROGRAM = 2048
"""Numbers of queries that a program of `latent_write` holds."""

EVERY_ROWS = (16, 32, 64)
"""One number of rows in a step for each of the programs that `choose` knows."""

RUNTIME = ("tiled", "heads", "most_new", "table_row", "table_column")
CACHE = ("k_cache", "c_cache", "k_scales", "c_scales")
INDICES = ("starts", "contexts", "block_tables", "tiles", "counters")
SIZES = ("queries_width", "joint_width", "heads", "query_dim")


@triton.jit
def _store_row(
    cache, scales, row, dims, inside, slot, fixed, DIM: tl.constexpr, LARGEST: tl.constexpr
):
    """A token's row [DIM], float32, where it belongs; no LARGEST, no codes."""
    place = cache + slot * DIM + dims
    if LARGEST is None:
        tl.store(place, row.to(cache.dtype.element_ty), mask=inside)
    else:
        most = tl.max(tl.abs(row), 0)
        own = tl.maximum(tl.div_rn(most, LARGEST * 1.0), 2.0**-126)
        scale = tl.where(fixed > 0.0, fixed, own) + tl.sum(row * 0.0, 0)  # NaN where a number is
        tl.store(scales + slot, scale)
        codes = _coded(row[None, :], tl.full([1], 0.0, tl.float32) + scale, LARGEST)
        tl.store(place[None, :], codes, mask=inside[None, :])


@triton.jit
def _turned(source, table, token, pairs, inside, HALF: tl.constexpr):
    """Halves of rows of queries or keys, turned: float32 [rows, pairs] each."""
    there = (pairs < HALF)[None, :]
    cos = tl.load(table + token * (2 * HALF) + pairs, mask=pairs < HALF, other=0.0)[None, :]
    sin = tl.load(table + token * (2 * HALF) + HALF + pairs, mask=pairs < HALF, other=0.0)[None, :]
    a = tl.load(source + pairs[None, :], mask=inside & there, other=0.0).to(tl.float32)
    b = tl.load(source + HALF + pairs[None, :], mask=inside & there, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit(
    do_not_specialize=[*SIZES, "eps", "k_fixed", "c_fixed"],
    do_not_specialize_on_alignment=["slots", "queries"],
)
def _latent_write(
    queries, joint, table, gain, k_cache, c_cache, k_scales, c_scales, slots, turned, queries_width,
    joint_width, heads, query_dim, eps, k_fixed, c_fixed, RANK: tl.constexpr,
    RANK_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Grid (T, 1 + blocks of heads): the first of a token writes the cache, the others queries."""
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, HALF_PAD)
    if tl.program_id(1) == 0:
        slot = tl.load(slots + token)
        if slot >= 0:
            source = joint + (token + 1) * joint_width - RANK - 2 * HALF
            dims = tl.arange(0, RANK_PAD)
            inside = dims < RANK
            x = tl.load(source + dims, mask=inside, other=0.0).to(tl.float32)
            x *= tl.rsqrt(tl.sum(x * x, 0) / RANK + eps)
            x *= tl.load(gain + dims, mask=inside, other=0.0)
            _store_row(c_cache, c_scales, x, dims, inside, slot, c_fixed, RANK, LARGEST)
            row = source + RANK + tl.zeros([1, 1], tl.int32)
            first, second = _turned(row, table, token, pairs, (pairs < HALF)[None, :], HALF)
            both = tl.reshape(tl.trans(tl.join(first, second), 0, 2, 1), [2 * HALF_PAD])
            column = tl.arange(0, 2 * HALF_PAD)
            place = tl.where(column < HALF_PAD, column, column - HALF_PAD + HALF)
            inside = column % HALF_PAD < HALF
            _store_row(k_cache, k_scales, both, place, inside, slot, k_fixed, 2 * HALF, LARGEST)
    else:
        head = (tl.program_id(1) - 1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
        there = (head < heads)[:, None]
        source = (
            queries + token * queries_width + (head * query_dim + query_dim - 2 * HALF)[:, None]
        )
        first, second = _turned(source, table, token, pairs, there, HALF)
        target = turned + (token * heads + head)[:, None] * (2 * HALF) + pairs[None, :]
        mask = there & (pairs < HALF)[None, :]
        tl.store(target, first.to(turned.dtype.element_ty), mask=mask)
        tl.store(target + HALF, second.to(turned.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=INDICES)
def _attend_latents(
    q, turned, k_cache, c_cache, k_scales, c_scales, out, starts, contexts, block_tables, tiles,
    partials, counters, tiled, heads, most_new, table_row, table_column, factor,
    RANK: tl.constexpr, RANK_PAD: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr,
    PAGE: tl.constexpr, MIN_SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MERGE_ROWS: tl.constexpr, MERGE_SPLITS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * parts of a tile, blocks of heads, splits)."""
    group = heads // tl.num_programs(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)

    # This program's new tokens: `count` of sequence `sequence`, from its `first`.
    tokens = BLOCK_M // group  # of a part
    parts = tl.cdiv(most_new, tokens)
    sequence = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    tile_first = 0
    if tiled:
        tile_first = tl.load(tiles + 2 * sequence + 1)
        sequence = tl.load(tiles + 2 * sequence)
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
    share = tl.maximum(tl.cdiv(tl.cdiv(end, splits), BLOCK_N) * BLOCK_N, MIN_SPLIT)
    used = tl.maximum(tl.cdiv(end, share), 1)
    if split >= used:
        return
    low = split * share
    high = tl.minimum(low + share, end)
    table = block_tables + sequence.to(tl.int64) * table_row
    pages = _pages(table, table_column, low, high, BLOCK_N, PAGE)

    r = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, RANK_PAD)
    rope_dims = tl.arange(0, ROPE_PAD)
    rows = count * group
    row0 = (start + first).to(tl.int64) * heads + tl.program_id(1) * group
    row = r // group * heads + r % group
    there = (r < rows)[:, None]
    in_rank = dims < RANK
    in_rope = rope_dims < ROPE
    absorbed = tl.load(
        q + row0 * RANK + row[:, None] * RANK + dims[None, :],
        mask=there & in_rank[None, :],
        other=0.0,
    )
    queries = tl.load(
        turned + row0 * ROPE + row[:, None] * ROPE + rope_dims[None, :],
        mask=there & in_rope[None, :], other=0.0,
    )  # fmt: skip
    places = place0 + r // group
    m = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, RANK_PAD], tl.float32)
    unit = tl.full([], 2.0**-126, tl.float32)  # no scale is below
    for block in range(tl.cdiv(high - low, BLOCK_N)):
        columns = low + block * BLOCK_N + tl.arange(0, BLOCK_N)
        following = _pages(table, table_column, low + (block + 1) * BLOCK_N, high, BLOCK_N, PAGE)
        inside = columns < high
        slot = pages.to(tl.int64) * PAGE + columns % PAGE
        c = _rows(
            c_cache, slot[:, None] * RANK + dims[None, :], inside, in_rank, True, RANK == RANK_PAD
        )
        k = _rows(
            k_cache, slot[:, None] * ROPE + rope_dims[None, :], inside, in_rope, True,
            ROPE == ROPE_PAD,
        )  # fmt: skip
        if FACTOR is not None:
            c_scale = tl.load(c_scales + slot, mask=inside, other=0.0) * FACTOR
            k_scale = tl.load(k_scales + slot, mask=inside, other=0.0) * FACTOR
            c = _numbers(c, absorbed, FACTOR)
            k = _numbers(k, absorbed, FACTOR)
        scores = tl.dot(absorbed, tl.trans(c), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if FACTOR is not None:
            scores *= c_scale[None, :]
            of_keys = tl.dot(queries, tl.trans(k), input_precision="ieee")
            scores += of_keys * k_scale[None, :]
        else:
            scores = tl.dot(queries, tl.trans(k), scores, input_precision="ieee")
        seen = (columns[None, :] <= places[:, None]) & inside[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        largest = tl.maximum(m, tl.max(scores, 1) * factor)
        p = tl.exp2(tl.fma(scores, factor, -largest[:, None]))
        shrink = tl.exp2(m - largest)
        total = total * shrink + tl.sum(p, 1)
        if FACTOR is not None:
            wider = tl.maximum(unit, tl.max(c_scale, 0))
            p *= (c_scale / wider)[None, :]
            shrink *= unit / wider
            unit = wider
        acc = tl.dot(p.to(c.dtype), c, acc * shrink[:, None], input_precision="ieee")
        m = largest
        pages = following
    if FACTOR is not None:
        acc *= unit

    # The same offsets again, where the compiler cannot know it: kept through the loop they spill.
    r += tl.minimum(table_column, 0)
    row = r // group * heads + r % group
    there = (r < rows)[:, None] & (dims < RANK)[None, :]
    if used == 1:
        seen = tl.where(total == 0.0, 1.0, total)  # nothing is seen where the sequence is padding
        result = (acc / seen[:, None]).to(out.dtype.element_ty)
        tl.store(out + row0 * RANK + row[:, None] * RANK + dims[None, :], result, mask=there)
    else:
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        size = tl.num_programs(0) * tl.num_programs(1) * splits * BLOCK_M
        spot = (tile * splits + split) * BLOCK_M + r
        tl.store(partials + spot, m, mask=r < rows)
        tl.store(partials + size + spot, total, mask=r < rows)
        tl.store(partials + 2 * size + spot[:, None] * RANK + dims[None, :], acc, mask=there)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == used - 1:
            tl.store(counters + tile, 0)
            _merge(
                partials + 2 * size, partials, partials + size, out + row0 * RANK, tile, used,
                splits, rows, heads, group, BLOCK_M, RANK, RANK_PAD, MERGE_ROWS, MERGE_SPLITS,
            )  # fmt: skip


def latent_write(
    queries: Tensor,
    joint: Tensor,
    angles: Tensor,
    keys: Blocks,
    latents: Blocks,
    slots: Tensor,
    weights: LatentWeights,
    shape: LatentShape,
) -> Tensor:
    """Return the turned dimensions of queries, [T, N, d]; keys and latents go to the caches.

    queries        [T, >= N (P + d)], contiguous rows; `joint` itself where queries stand in front
    joint          [T, >= R + d], contiguous, whose last columns are the latents and the keys
    angles         float32 [T, d], cosines and sines of rope's `angles`
    keys, latents  [num_blocks, 1, 16, d] and [..., R], in the dtype of joint or in 8 bits
    slots          int64 [T], block * 16 + offset; below 0 nothing is written for the token
    """
    tokens = len(joint)
    turned = joint.new_empty(tokens, shape.heads, shape.rope_dim)
    (k_cache, k_scales), (c_cache, c_scales) = parts_of(keys), parts_of(latents)
    largest, fixed = None, (0.0, 0.0)
    if isinstance(keys, QuantizedBlocks) and isinstance(latents, QuantizedBlocks):
        largest, fixed = keys.kind.largest, (keys.fixed or 0.0, latents.fixed or 0.0)
    sizes = write_constants(shape.rank, shape.rope_dim)
    _latent_write[(tokens, 1 + triton.cdiv(shape.heads, sizes["HEADS_BLOCK"]))](
        queries, joint, angles, weights.gain, k_cache, c_cache, k_scales, c_scales, slots, turned,
        queries.shape[1], joint.shape[1], shape.heads, shape.query_dim, weights.eps, *fixed,
        LARGEST=largest, **sizes, num_warps=4,
    )  # fmt: skip
    return turned


def latent_attention(
    nope: Tensor,
    turned: Tensor,
    keys: Blocks,
    latents: Blocks,
    up: UpProjections,
    starts: Tensor,
    contexts: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    tiles: Tensor | None,
    most_new: int,
    splits: int,
    workspace: Workspace,
) -> Tensor:
    """See reference.py, with queries in two parts: nope [T, N, P], any strides, turned [T, N, d].

    The last four are as paged_attention's, for `head_blocks(N, R)` KV heads.  Returns [T, N, v].
    """
    tokens, heads, _ = nope.shape
    rank, value_dim = up.keys.shape[2], up.values.shape[1]
    absorbed = nope.new_empty(tokens, heads, rank)
    torch.bmm(nope.transpose(0, 1), up.keys, out=absorbed.transpose(0, 1))
    summed = attend_latents(
        absorbed, turned, keys, latents, starts, contexts, block_tables, scale, tiles=tiles,
        most_new=most_new, splits=splits, workspace=workspace,
    )  # fmt: skip
    out = nope.new_empty(tokens, heads, value_dim)
    torch.bmm(summed.transpose(0, 1), up.values.transpose(1, 2), out=out.transpose(0, 1))
    return out


def attend_latents(
    absorbed: Tensor,
    turned: Tensor,
    keys: Blocks,
    latents: Blocks,
    starts: Tensor,
    contexts: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    tiles: Tensor | None,
    most_new: int,
    splits: int,
    workspace: Workspace,
) -> Tensor:
    """Weighted sums of latents [T, N, R], for queries absorbed [T, N, R] and turned [T, N, d]."""
    heads, rank = absorbed.shape[1:]
    (k_cache, k_scales), (c_cache, c_scales) = parts_of(keys), parts_of(latents)
    codes = latents.kind if isinstance(latents, QuantizedBlocks) else None
    blocks = head_blocks(heads, rank)
    group = heads // blocks
    if tiles is not None:
        most_new = min(most_new, TILE_ROWS // group)  # of a tile
    device = capability_of(absorbed.device)
    shape = choose(most_new * group, group, rank, absorbed.dtype, device, codes is not None)
    parts = -(-most_new // (shape.block_m // group))
    count = parts * (len(starts) - 1 if tiles is None else len(tiles))
    out = torch.empty_like(absorbed)
    partials = 0 if splits == 1 else count * blocks * splits * shape.block_m * (rank + 2)
    _attend_latents[(count, blocks, splits)](
        absorbed, turned, k_cache, c_cache, k_scales, c_scales, out, starts, contexts,
        block_tables, starts if tiles is None else tiles, workspace.floats(max(partials, 1)),
        workspace.counters(count * blocks), int(tiles is not None), heads, most_new,
        block_tables.stride(0), block_tables.stride(1), scale * math.log2(math.e),
        **constants(shape, rank, turned.shape[2], codes),
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    return out


def constants(shape: Shape, rank: int, rope_dim: int, codes: Codes | None = None) -> dict[str, Any]:
    """The compile-time constants of `_attend_latents`."""
    return {
        "RANK": rank,
        "RANK_PAD": padded(rank),
        "ROPE": rope_dim,
        "ROPE_PAD": padded(rope_dim),
        "PAGE": PAGE,
        "MIN_SPLIT": shape.min_split,
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "MERGE_ROWS": shape.merge_rows,
        "MERGE_SPLITS": shape.merge_splits,
        "FACTOR": None if codes is None else FACTORS[codes],
    }


def write_constants(rank: int, rope_dim: int) -> dict[str, int]:
    """The compile-time constants of `_latent_write`, without LARGEST."""
    half = triton.next_power_of_2(rope_dim // 2)
    return {
        "RANK": rank,
        "RANK_PAD": triton.next_power_of_2(rank),
        "HALF": rope_dim // 2,
        "HALF_PAD": half,
        "HEADS_BLOCK": max(1, PROGRAM // (2 * half)),
    }


def entries(capability: int) -> list[Entry]:
    """Latents of 128 and 512 numbers with keys of 32 and 64, every height of program in 16 bits;
    beside bfloat16 a cache in 8 bits.

    Other sizes are compiled when met, as is a cache in 8 bits beside float16.
    """
    found = []
    for kind, codes in (("fp16", None), ("bf16", None), ("bf16", INT8), ("bf16", FP8)):
        absent = {} if codes else {"k_scales": None, "c_scales": None}
        cached = frozenset(CACHE[: 4 if codes else 2])
        for rank, rope in ((128, 32), (512, 64)):
            words = f"r{rank} {kind}{f' {codes.name}' if codes else ''}"
            found.append(
                Entry(
                    f"latent_write {words}",
                    _latent_write,
                    write_types(kind, codes),
                    write_constants(rank, rope)
                    | {"LARGEST": codes.largest if codes else None}
                    | absent,
                    aligned=frozenset(["joint", "table", "gain", "turned"]) | cached,
                )
            )
            for rows in (rows for rows in EVERY_ROWS if rows <= most_rows(rank)):
                shape = choose(rows, 1, rank, torch.bfloat16, capability, codes is not None)
                found.append(
                    Entry(
                        f"latent_attention rows{shape.block_m} {words}",
                        _attend_latents,
                        types(kind, codes),
                        constants(shape, rank, rope, codes) | absent,
                        shape.num_warps,
                        shape.num_stages,
                        frozenset(["q", "turned", "out", "partials"]) | cached,
                    )
                )
    return found


def types(kind: str, codes: Codes | None = None) -> dict[str, str]:
    """Types of the arguments of `_attend_latents` for queries of `kind`."""
    return (
        dict.fromkeys(("q", "turned", "out"), f"*{kind}")
        | _cache_types(kind, codes)
        | dict.fromkeys(INDICES, "*i32")
        | {"partials": "*fp32", "factor": "fp32"}
        | dict.fromkeys(RUNTIME, "i32")
    )


def write_types(kind: str, codes: Codes | None = None) -> dict[str, str]:
    """Types of the arguments of `_latent_write` for activations of `kind`."""
    return (
        dict.fromkeys(("queries", "joint", "turned"), f"*{kind}")
        | _cache_types(kind, codes)
        | {"table": "*fp32", "gain": "*fp32", "slots": "*i64"}
        | dict.fromkeys(SIZES, "i32")
        | dict.fromkeys(("eps", "k_fixed", "c_fixed"), "fp32")
    )


def _cache_types(kind: str, codes: Codes | None) -> dict[str, str]:
    found: dict[str, str] = dict.fromkeys(CACHE[:2], "*i8" if codes else f"*{kind}")
    return found | dict.fromkeys(CACHE[2:] if codes else (), "*fp32")
