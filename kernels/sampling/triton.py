"""Tokens drawn from logits on a GPU: temperature, top_k, top_p, min_p, one uniform number a row.

    d      = max - logit                                       distance, at least 0
    weight = round(2^36 exp(-d / temperature))                 int64
    kept   = d <= t,   t = min(t_k, t_p, -log(min_p) temperature)
    t_k    = least t with |d <= t| >= top_k
    t_p    = least t with weight(d <= t) >= top_p weight(d <= t_k)
    token  = first i with sum of the kept weights up to i > uniform * sum of all kept weights

The truth is `compress.runtime.sampler`, `draw` and `_least`.  Tokens that tie with the last one
kept stay.  Two tokens whose distances differ in float32 never tie, even where their quotients by
the temperature round to one number.

Weights are whole numbers.  Their sums are exact in any order, so a row's token depends on that row
alone, the search below may see tokens in any order, and no rounding picks a token of weight 0 or
falls off the end.  A token less than 2^-37 as likely as the likeliest weighs nothing.

A row is cut into chunks of CHUNK logits, one program each; of a row's programs the last one to
arrive puts the chunks' results together.

    _draw      the chunks' maxima, and their weights relative to those; then the token of every row
               without filters.  Without filters in the batch that is all: one launch.
    narrow     twice: counts and weights of what is nearer than each of 8 pivots; (lo, hi], which
               holds t_k and t_p, shrinks to what is between two pivots.
    list_open  the distances in (lo, hi].
    search     t_k and t_p in that list, 8 pivots a round, over the bits of float32 until one value
               is left: exact whatever the pivots before were, only slower for a longer list.
    _draw      again, with the weights of what is kept.

Rows without filters cost the last five launches an early return each.
"""

# Triton's language: constants are parameters, and a kernel is called through its grid.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.entry import Entry
from compress.kernels.sampling.search import (
    COUNT,
    FIELDS,
    HI,
    INFINITE,
    KEEP,
    LO,
    MASS,
    OPEN,
    SETTINGS,
    arrived_last,
    at,
    inverse_of,
    list_open,
    narrow,
    search,
    weights_of,
)
from compress.kernels.workspace import Workspace

CHUNK = 4096  # logits a program
MOST_CHUNKS = 128
LIST = 1024  # distances that the search holds in registers; narrow leaves shorter lists alone
WARPS = 8
LANES = 32 * WARPS


def draw(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    *,
    filtered: bool,
    workspace: Workspace,
) -> Tensor:
    """Return a token for each row, int64 [R]; -1 for a row that cannot be drawn from.

    logits       float32 [R, V], rows contiguous; -inf masks a token
    uniform      float64 [R], in [0, 1): the host's own numbers, since float32 rounds some up to 1
    temperature  float32 [R]; 0 takes the likeliest token, of equals the first
    top_k        int32 [R]; off at 0 or less, and at V or more
    top_p        float32 [R], above 0; 1 is off
    min_p        float32 [R]; 0 is off
    filtered     whether any row may have top_k, top_p or min_p, which are ignored otherwise

    A row with NaN cannot be drawn from, nor can one whose maximum is infinite, unless its
    temperature is 0.  Filters take R * V numbers of the workspace.
    """
    rows, columns = logits.shape
    chunks = triton.cdiv(columns, CHUNK)
    if chunks > MOST_CHUNKS:
        raise ValueError(f"{columns} tokens; this kernel takes at most {MOST_CHUNKS * CHUNK}")
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or uniform.dtype != torch.float64:
        raise ValueError("give logits in float32 with contiguous rows, and uniform in float64")
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    counters = workspace.counters(2 * rows)
    sizes = [rows * chunks, rows, rows * columns if filtered else 0]
    maxima, highest, distances = _cut(workspace.floats(_room(sizes)), sizes)
    sizes = [rows * chunks, rows * FIELDS.value, rows * chunks * 8 if filtered else 0]
    masses, state, tallies = _cut(workspace.scratch(_room(sizes), torch.int64), sizes)
    grid = (rows, chunks)

    def pick(again: bool) -> None:
        _draw[grid](
            logits, uniform, temperature, top_k, top_p, min_p, tokens, maxima, highest, masses,
            state, counters, columns, logits.stride(0), chunks,
            **_draw_constants(filtered, again), num_warps=WARPS,
        )  # fmt: skip

    pick(False)
    if filtered:
        for _ in range(2):
            narrow[grid](
                logits, temperature, top_k, top_p, highest, tallies, state, counters, columns,
                logits.stride(0), chunks, **_NARROW, num_warps=WARPS,
            )  # fmt: skip
        list_open[grid](
            logits, highest, distances, state, counters, columns, logits.stride(0), CHUNK=CHUNK,
            num_warps=WARPS,
        )  # fmt: skip
        search[(rows,)](
            temperature, top_k, top_p, distances, state, counters, columns, **_SEARCH,
            num_warps=WARPS,
        )  # fmt: skip
        pick(True)
    return tokens


def entries(capability: int) -> list[Entry]:
    """Every specialisation that `draw` launches, for vocabularies that are multiples of 16."""
    types = {
        "logits": "*fp32", "uniform": "*fp64", "temperature": "*fp32", "top_k": "*i32",
        "top_p": "*fp32", "min_p": "*fp32", "tokens": "*i64", "maxima": "*fp32",
        "highest": "*fp32", "masses": "*i64", "tallies": "*i64", "distances": "*fp32",
        "state": "*i64", "counters": "*i32", "columns": "i32", "stride": "i32", "chunks": "i32",
    }  # fmt: skip
    aligned = frozenset(types) - {"chunks", *SETTINGS}

    def entry(name, kernel, constants):
        own = {arg: types[arg] for arg in kernel.arg_names if arg in types}
        name = f"sampling {name}"
        return Entry(name, kernel, own, constants, WARPS, aligned=aligned & frozenset(own))

    return [
        entry("draw", _draw, _draw_constants(False, False)),
        entry("draw filtered", _draw, _draw_constants(True, False)),
        entry("narrow", narrow, _NARROW),
        entry("list", list_open, {"CHUNK": CHUNK}),
        entry("search", search, _SEARCH),
        entry("draw kept", _draw, _draw_constants(True, True)),
    ]


_NARROW = {"CHUNK": CHUNK, "MOST_CHUNKS": MOST_CHUNKS, "LIST": LIST, "LANES": LANES}
_SEARCH = {"LIST": LIST, "LANES": LANES}


def _draw_constants(filtered: bool, again: bool) -> dict[str, object]:
    sizes: dict[str, object] = {"CHUNK": CHUNK, "MOST_CHUNKS": MOST_CHUNKS}
    return sizes | {"FILTERED": filtered, "AGAIN": again}


def _padded(size: int) -> int:
    return -size % 16 + size  # so that every part's address is aligned


def _room(sizes: list[int]) -> int:
    return sum(_padded(size) for size in sizes)


def _cut(buffer: Tensor, sizes: list[int]) -> list[Tensor]:
    parts, start = [], 0
    for size in sizes:
        parts.append(buffer[start : start + size])
        start += _padded(size)
    return parts


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=SETTINGS)
def _draw(
    logits, uniform, temperature, top_k, top_p, min_p, tokens, maxima, highest, masses, state,
    counters, columns, stride, chunks,
    CHUNK: tl.constexpr, MOST_CHUNKS: tl.constexpr, FILTERED: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """AGAIN: only rows that have a filter; weights are relative to the row's maximum, not the
    chunk's, and are 0 beyond what is kept."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    fields = state + row * FIELDS
    heat = tl.load(temperature + row)
    keep = 0
    if AGAIN:
        keep = tl.load(fields + KEEP).to(tl.int32)
        reference = tl.load(highest + row)
        # log(0) = -inf: off
        least = (-tl.log(tl.load(min_p + row)) * heat).to(tl.int32, bitcast=True)
        if keep < 0:
            return
        keep = tl.minimum(keep, least & 0x7FFFFFFF)
    inverse = inverse_of(heat)
    lanes = tl.arange(0, CHUNK)
    places = chunk * CHUNK + lanes
    values = tl.load(logits + row * stride + places, mask=places < columns, other=float("-inf"))
    if AGAIN:
        kept = (reference - values).to(tl.int32, bitcast=True) <= keep
        result = tl.sum(tl.where(kept, weights_of(reference - values, inverse), 0), 0)
    else:
        bad = tl.max((values != values).to(tl.int32), 0)
        reference = tl.max(values, 0)
        tl.store(maxima + row * chunks + chunk, tl.where(bad > 0, float("nan"), reference))
        if heat == 0:
            result = tl.min(tl.where(values == reference, places, columns), 0).to(tl.int64)
        else:
            reference = tl.where(reference > float("-inf"), reference, 0.0)
            result = tl.sum(weights_of(reference - values, inverse), 0)
    tl.store(masses + row * chunks + chunk, result)

    if arrived_last(counters, row, chunks):
        parts = tl.arange(0, MOST_CHUNKS)
        own = row * chunks + parts
        held = tl.load(masses + own, mask=parts < chunks, other=0, cache_modifier=".cg")
        token = tl.full((), -1, tl.int64)
        drawn = True
        scaled = held
        tops = tl.full((MOST_CHUNKS,), 0.0, tl.float32)
        if not AGAIN:
            tops = tl.load(
                maxima + own, mask=parts < chunks, other=float("-inf"), cache_modifier=".cg"
            )
            broken = tl.max((tops != tops).to(tl.int32), 0) > 0
            top = tl.max(tops, 0)
            drawn = (heat > 0) & (not broken) & (tl.abs(top) < float("inf"))
            if (heat == 0) & (not broken):
                first = tl.where((tops == top) & (parts < chunks), held, columns)
                token = tl.min(first, 0)
            if FILTERED:
                k, p = tl.load(top_k + row), tl.load(top_p + row)
                searched = drawn & (((k > 0) & (k < columns)) | (p < 1))
                later = searched | (drawn & (tl.load(min_p + row) > 0))
                tl.store(fields + LO, -1)
                tl.store(fields + HI, INFINITE)
                tl.store(fields + COUNT, 0)
                tl.store(fields + MASS, 0)
                tl.store(fields + OPEN, tl.where(searched, 0x7FFFFFFF, 0))
                tl.store(fields + KEEP, tl.where(later, INFINITE, -1))
                tl.store(highest + row, top)
                drawn = drawn & (not later)
            shrunk = tl.exp2((top - tops) * -inverse).to(tl.float64)
            scaled = (held.to(tl.float64) * shrunk + 0.5).to(tl.int64)
        if drawn:
            total = tl.sum(scaled, 0)
            target = (tl.load(uniform + row) * total.to(tl.float64)).to(tl.int64)
            target = tl.minimum(target, total - 1)
            there = tl.sum((tl.cumsum(scaled, 0) <= target).to(tl.int32), 0)
            target -= tl.sum(tl.where(parts < there, scaled, 0), 0)
            if not AGAIN:  # in the chunk's own measure
                share = target.to(tl.float64) / at(scaled, parts, there).to(tl.float64)
                target = (share * at(held, parts, there).to(tl.float64)).to(tl.int64)
                reference = at(tops, parts, there)
            places = there * CHUNK + lanes
            values = tl.load(
                logits + row * stride + places, mask=places < columns, other=float("-inf")
            )
            weights = weights_of(reference - values, inverse)
            if AGAIN:
                kept = (reference - values).to(tl.int32, bitcast=True) <= keep
                weights = tl.where(kept, weights, 0)
            target = tl.minimum(target, tl.sum(weights, 0) - 1)
            before = tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
            token = (there * CHUNK + before).to(tl.int64)
        tl.store(tokens + row, token)
