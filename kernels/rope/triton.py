"""Rotary positions on a GPU: a table of angles a step, and all that a layer does to q, k and v.

`angles` is computed once a step.  `rope_and_write` then takes a layer's joint projection and, in
one launch, norms queries and keys where the model does (RMSNorm over a head, rounded as
rms_norm's reference.py), turns them as reference.py, writes keys and values into the paged cache,
and queries into a tensor of their own.  Angles and products are in float32, and the result is
rounded once, so that 16-bit results are nearer to the formula than those of reference.py.
Keys and values in 8 bits (paged_attention/cache.py) are rounded to codes from float32, and the
largest of a head is at hand, since a program has all of its dimensions.

A program takes one token and as many heads as make 16 numbers a thread.
"""

# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.entry import Entry
from compress.kernels.paged_attention.cache import FP8, INT8, Blocks, QuantizedBlocks, parts_of

ANGLES_BLOCK = 256
PROGRAM = 2048
"""Numbers that a program of `rope_and_write` holds."""


@triton.jit(do_not_specialize=["count", "half"], do_not_specialize_on_alignment=["positions"])
def _angles(positions, inv_freq, out, count, half, scaling, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    token = i // half
    frequency = i % half
    position = tl.load(positions + token, mask=inside, other=0).to(tl.float32)
    angle = position * tl.load(inv_freq + frequency, mask=inside, other=0.0)
    target = out + token * 2 * half + frequency
    tl.store(target, tl.cos(angle) * scaling, mask=inside)
    tl.store(target + half, tl.sin(angle) * scaling, mask=inside)


def angles(positions: Tensor, inv_freq: Tensor, scaling: float) -> Tensor:
    """Cosines, then sines, times `scaling`: float32 [T, R].

    positions  int64 [T]
    inv_freq   float32 [R/2], radians a position
    """
    half = len(inv_freq)
    count = len(positions) * half
    out = torch.empty((len(positions), 2 * half), dtype=torch.float32, device=positions.device)
    _angles[(triton.cdiv(count, ANGLES_BLOCK),)](
        positions, inv_freq, out, count, half, scaling, BLOCK=ANGLES_BLOCK, num_warps=4
    )
    return out


@triton.jit
def _gained(x, scale, q_gain, k_gain, is_query, dims, inside):
    """x times its row's scale, rounded, times the gain of queries or of keys, rounded."""
    query = tl.load(q_gain + dims, mask=inside, other=0.0)
    key = tl.load(k_gain + dims, mask=inside, other=0.0)
    gain = tl.where(is_query[:, None], query[None, :], key[None, :]).to(x.dtype).to(tl.float32)
    normed = (x.to(tl.float32) * scale[:, None]).to(x.dtype).to(tl.float32)
    return (normed * gain).to(x.dtype)


@triton.jit
def _as_e4m3(x):
    """Bits of e4m3 of |x| <= 448, rounded to even, as int8.

    Up from 2^-6 three bits behind the first are kept, and the exponent's bias is 7 instead of 127;
    below, codes are steps of 2^-9.
    """
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0.015625, _as_integer(size * 512.0), normal)
    return tl.where(x < 0.0, code - 128, code).to(tl.int8)


@triton.jit
def _as_integer(x):
    """int32 nearest to x, ties to even, for |x| < 2^22: what is left of 1.5 * 2^23 + x."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _coded(x, scale, LARGEST: tl.constexpr):
    """Codes of rows x [heads, dims] with their scales [heads], as int8."""
    steps = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    steps = tl.minimum(tl.maximum(steps, -LARGEST), LARGEST)
    return _as_e4m3(steps) if LARGEST == 448.0 else _as_integer(steps).to(tl.int8)


@triton.jit
def _put(
    x, scale, head, dims, inside, q, k_cache, v_cache, q_row, cache_row, slot, heads, kv_heads,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Store columns `dims` of all heads, float32, where they belong; no LARGEST, no codes."""
    is_query = head < heads
    is_key = (head >= heads) & (head < heads + kv_heads)
    is_value = (head >= heads + kv_heads) & (head < heads + 2 * kv_heads)
    kv_head = tl.where(is_key, head - heads, head - heads - kv_heads)
    q_place = q_row + head[:, None] * HEAD_DIM + dims[None, :]
    place = cache_row + kv_head[:, None] * (PAGE * HEAD_DIM) + dims[None, :]
    tl.store(q + q_place, x.to(q.dtype.element_ty), mask=is_query[:, None] & inside[None, :])
    row = x.to(k_cache.dtype.element_ty) if LARGEST is None else _coded(x, scale, LARGEST)
    key_there = (tl.where(is_key, slot, -1) >= 0)[:, None]
    value_there = (tl.where(is_value, slot, -1) >= 0)[:, None]
    tl.store(k_cache + place, row, mask=key_there & inside[None, :])
    tl.store(v_cache + place, row, mask=value_there & inside[None, :])


@triton.jit(
    do_not_specialize=["heads", "kv_heads", "eps", "k_fixed", "v_fixed"],
    do_not_specialize_on_alignment=["slots"],
)
def _rope_and_write(
    qkv, table, k_cache, v_cache, slots, q, q_gain, k_gain, k_scales, v_scales, heads, kv_heads,
    eps, k_fixed, v_fixed, NORM: tl.constexpr, LARGEST: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST: tl.constexpr, REST_PAD: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Grid (T, blocks of heads); dimensions of a head are HALF, HALF and REST."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    count = heads + 2 * kv_heads
    there = (head < count)[:, None]
    turned = (head < heads + kv_heads)[:, None]
    is_query = head < heads

    dims = tl.arange(0, HALF_PAD)
    inside = dims < HALF
    cos = tl.load(table + token * (2 * HALF) + dims, mask=inside, other=0.0)
    sin = tl.load(table + token * (2 * HALF) + HALF + dims, mask=inside, other=0.0)
    source = qkv + token * count * HEAD_DIM + head[:, None] * HEAD_DIM
    mask = there & inside[None, :]
    first = tl.load(source + dims[None, :], mask=mask, other=0.0)
    second = tl.load(source + HALF + dims[None, :], mask=mask, other=0.0)
    rest_dims = 2 * HALF + tl.arange(0, REST_PAD)
    rest_inside = rest_dims < HEAD_DIM
    if REST > 0:
        rest = tl.load(source + rest_dims[None, :], mask=there & rest_inside[None, :], other=0.0)
    if NORM:
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        squares = tl.sum(a * a + b * b, 1)
        if REST > 0:
            c = rest.to(tl.float32)
            squares += tl.sum(c * c, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)
        normed = _gained(first, scale, q_gain, k_gain, is_query, dims, inside)
        first = tl.where(turned, normed, first)
        normed = _gained(second, scale, q_gain, k_gain, is_query, HALF + dims, inside)
        second = tl.where(turned, normed, second)
        if REST > 0:
            normed = _gained(rest, scale, q_gain, k_gain, is_query, rest_dims, rest_inside)
            rest = tl.where(turned, normed, rest)
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    first = tl.where(turned, a * cos[None, :] - b * sin[None, :], a)
    second = tl.where(turned, b * cos[None, :] + a * sin[None, :], b)
    if REST > 0:
        rest = rest.to(tl.float32)

    slot = tl.load(slots + token)
    scale = tl.zeros([HEADS_BLOCK], tl.float32)
    if LARGEST is not None:
        most = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        broken = tl.sum(first * 0.0 + second * 0.0, 1)  # NaN, where a number is or is infinite
        if REST > 0:
            most = tl.maximum(most, tl.max(tl.abs(rest), 1))
            broken += tl.sum(rest * 0.0, 1)
        is_key = head < heads + kv_heads
        own = tl.maximum(tl.div_rn(most, tl.full(most.shape, LARGEST, tl.float32)), 2.0**-126)
        fixed = tl.where(is_key, k_fixed, v_fixed)
        scale = tl.where(fixed > 0.0, fixed, own) + broken
        written = tl.where((head >= heads) & (head < count), slot, -1) >= 0
        kv_head = tl.where(is_key, head - heads, head - heads - kv_heads)
        place = (slot // PAGE * kv_heads + kv_head) * PAGE + slot % PAGE
        tl.store(k_scales + place, scale, mask=written & is_key)
        tl.store(v_scales + place, scale, mask=written & (head >= heads + kv_heads))
    q_row = token * heads * HEAD_DIM
    cache_row = (slot // PAGE * kv_heads * PAGE + slot % PAGE) * HEAD_DIM
    _put(
        first, scale, head, dims, inside, q, k_cache, v_cache, q_row, cache_row, slot, heads,
        kv_heads, HEAD_DIM, PAGE, LARGEST,
    )  # fmt: skip
    _put(
        second, scale, head, HALF + dims, inside, q, k_cache, v_cache, q_row, cache_row, slot,
        heads, kv_heads, HEAD_DIM, PAGE, LARGEST,
    )  # fmt: skip
    if REST > 0:
        _put(
            rest, scale, head, rest_dims, rest_inside, q, k_cache, v_cache, q_row, cache_row,
            slot, heads, kv_heads, HEAD_DIM, PAGE, LARGEST,
        )  # fmt: skip


def rope_and_write(
    qkv: Tensor,
    angles: Tensor,
    k_cache: Blocks,
    v_cache: Blocks,
    slots: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
) -> Tensor:
    """Return the turned queries [T, N, H] in the dtype of qkv; keys and values go to the caches.

    qkv              [T, (N + 2K) H], contiguous, queries first, then keys, then values; without
                     KV heads queries alone, and the caches stay as they are
    angles           float32 [T, R], cosines and sines of `angles`, R <= H
    k_cache, v_cache  [num_blocks, K, 16, H], contiguous, in the dtype of qkv or in 8 bits
    slots            int64 [T], block * 16 + offset; below 0 nothing is written for the token
    q_gain, k_gain   [H], gains of a norm over each head before it is turned; both or neither
    """
    tokens = len(qkv)
    q = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    sizes = constants(head_dim, angles.shape[1])
    grid = (tokens, triton.cdiv(heads + 2 * kv_heads, sizes["HEADS_BLOCK"]))
    (keys, k_scales), (values, v_scales) = parts_of(k_cache), parts_of(v_cache)
    largest, fixed = None, (0.0, 0.0)
    if isinstance(k_cache, QuantizedBlocks) and isinstance(v_cache, QuantizedBlocks):
        largest = k_cache.kind.largest
        fixed = (k_cache.fixed or 0.0, v_cache.fixed or 0.0)
    _rope_and_write[grid](
        qkv, angles, keys, values, slots, q, q_gain, k_gain, k_scales, v_scales, heads, kv_heads,
        eps, *fixed, NORM=q_gain is not None, LARGEST=largest, **sizes, num_warps=4,
    )  # fmt: skip
    return q


def constants(head_dim: int, rotated: int) -> dict[str, int]:
    """The compile-time constants of `_rope_and_write`, without NORM and LARGEST."""
    half, rest = rotated // 2, head_dim - rotated
    half_pad, rest_pad = triton.next_power_of_2(half), triton.next_power_of_2(max(rest, 1))
    held = 2 * half_pad + (rest_pad if rest else 0)
    return {
        "HEAD_DIM": head_dim,
        "HALF": half,
        "HALF_PAD": half_pad,
        "REST": rest,
        "REST_PAD": rest_pad,
        "HEADS_BLOCK": max(1, PROGRAM // triton.next_power_of_2(held)),
        "PAGE": 16,
    }


def entries(capability: int) -> list[Entry]:
    """Heads of 64 and 128 dimensions in 16 bits, with norms at 128 and without; keys and values in
    8 bits beside bfloat16.
    """
    found = [
        Entry(
            "rope angles",
            _angles,
            {
                "positions": "*i64", "inv_freq": "*fp32", "out": "*fp32", "count": "i32",
                "half": "i32", "scaling": "fp32",
            },
            {"BLOCK": ANGLES_BLOCK},
            aligned=frozenset(["inv_freq", "out"]),
        )
    ]  # fmt: skip
    caches = [("fp16", None), ("bf16", None), ("bf16", INT8), ("bf16", FP8)]
    for kind, codes in caches:
        for head_dim, norm in ((64, False), (128, False), (128, True)):
            pointers = ["qkv", "k_cache", "v_cache", "q"]
            gains = ["q_gain", "k_gain"] if norm else []
            scales = ["k_scales", "v_scales"] if codes else []
            types = dict.fromkeys(pointers, f"*{kind}") | dict.fromkeys(gains + scales, "*fp32")
            if codes:
                types |= dict.fromkeys(("k_cache", "v_cache"), "*i8")
            absent = {"q_gain", "k_gain", "k_scales", "v_scales"} - {*gains, *scales}
            words = f"{' norm' if norm else ''} {kind}{f' {codes.name}' if codes else ''}"
            found.append(
                Entry(
                    f"rope h{head_dim}{words}",
                    _rope_and_write,
                    types
                    | {"table": "*fp32", "slots": "*i64", "heads": "i32", "kv_heads": "i32"}
                    | dict.fromkeys(("eps", "k_fixed", "v_fixed"), "fp32"),
                    constants(head_dim, head_dim)
                    | {"NORM": norm, "LARGEST": codes.largest if codes else None}
                    | dict.fromkeys(absent),
                    aligned=frozenset([*pointers, *gains, *scales, "table"]),
                )
            )
    return found
