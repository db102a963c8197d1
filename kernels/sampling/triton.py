"""Tokens drawn from logits on a GPU: temperature, top_k, top_p, min_p, one uniform number a row.

    d      = max - logit                                       distance, at least 0
    weight = round(2^36 exp(-d / temperature))                 int64
    kept   = d <= t,   t = min(t_k, t_p, -log(min_p) temperature)
    t_k    = least t with |d <= t| >= top_k
    t_p    = least t with weight(d <= t) >= top_p weight(d <= t_k)
    token  = first i with sum of the kept weights up to i > uniform * sum of all kept weights

The truth is `compress.runtime.sampler.draw`.  Tokens that tie with the last one kept
stay.  Two tokens whose distances differ in float32 never tie, even where their quotients by the
temperature round to one number.

Weights are whole numbers.  Their sums are exact in any order, so a row's token depends on that row
alone, the search below may see tokens in any order, and no rounding picks a token of weight 0 or
falls off the end.  A token less than 2^-37 as likely as the likeliest weighs nothing.

A row is cut into chunks of CHUNK logits, one program each; of a row's programs the last one to
arrive puts the chunks' results together.

    _draw    the chunks' maxima, and their weights relative to those; then the token of every row
             without filters.  Without filters in the batch this is all: one launch, one reading.
    _narrow  twice: counts and weights of what is nearer than each of 8 pivots; (lo, hi] around
             t_k and t_p shrinks to one step between pivots, or from one pivot to another.
    _select  lists the distances in (lo, hi] and searches the list, 8 pivots a round, over the bits
             of float32 until one value is left: exact whatever the pivots were, only slower where
             many tokens are in (lo, hi].
    _draw    again, with the weights of what is kept.

Rows without filters cost the last four launches one early return.
"""

# Triton's language: constants are parameters, and a kernel is called through its grid.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.entry import Entry
from compress.kernels.workspace import Workspace

CHUNK = 4096  # logits a program
MOST_CHUNKS = 128
PIVOTS = 8
LIST = 1024  # distances that the search holds in registers; _narrow leaves shorter lists alone
WARPS = 8

# A row's numbers between launches, int64 [8].
_LO = tl.constexpr(0)  # bits of a float32: what is searched for is in (lo, hi]
_HI = tl.constexpr(1)
_COUNT = tl.constexpr(2)  # tokens at lo or nearer
_MASS = tl.constexpr(3)  # and their weight
_ALL = tl.constexpr(4)  # weight of all tokens
_OPEN = tl.constexpr(5)  # tokens in (lo, hi]; 0 for a row without top_k and top_p
_KEEP = tl.constexpr(6)  # bits of t; -1 for a row that is drawn already
_FIELDS = tl.constexpr(8)

_UNIT = tl.constexpr(2.0**36)  # weight of the likeliest
_SHIFT = tl.constexpr(49)
_ONE = tl.constexpr(2**49)  # one token, beside the weight of up to CHUNK
_INFINITE = tl.constexpr(0x7F800000)
_LOG2E = tl.constexpr(1.4426950408889634)
_STEP = tl.constexpr(2.0)  # most that two pivots differ by, except the last two


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
    sizes = [rows * chunks, rows * _FIELDS.value, rows * chunks * PIVOTS if filtered else 0]
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
            _narrow[grid](
                logits, temperature, top_k, top_p, highest, tallies, state, counters, columns,
                logits.stride(0), chunks, **_NARROW, num_warps=WARPS,
            )  # fmt: skip
        _select[grid](
            logits, temperature, top_k, top_p, highest, distances, state, counters, columns,
            logits.stride(0), chunks, **_SELECT, num_warps=WARPS,
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
    aligned = frozenset(types) - {"chunks", *_SETTINGS}

    def entry(name, kernel, constants):
        own = {arg: types[arg] for arg in kernel.arg_names if arg in types}
        name = f"sampling {name}"
        return Entry(name, kernel, own, constants, WARPS, aligned=aligned & frozenset(own))

    return [
        entry("draw", _draw, _draw_constants(False, False)),
        entry("draw filtered", _draw, _draw_constants(True, False)),
        entry("narrow", _narrow, _NARROW),
        entry("select", _select, _SELECT),
        entry("draw kept", _draw, _draw_constants(True, True)),
    ]


_NARROW = {"CHUNK": CHUNK, "MOST_CHUNKS": MOST_CHUNKS, "PIVOTS": PIVOTS, "LIST": LIST}
_SELECT = {"CHUNK": CHUNK, "PIVOTS": PIVOTS, "LIST": LIST}
_SETTINGS = ["uniform", "temperature", "top_k", "top_p", "min_p"]  # slices of a caller's table


def _draw_constants(filtered: bool, again: bool) -> dict[str, object]:
    sizes = {"CHUNK": CHUNK, "MOST_CHUNKS": MOST_CHUNKS}
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


@triton.jit
def _inverse(temperature):
    """What distances are multiplied by for powers of 2; finite and above 0, so that 0 and inf stay."""
    return tl.minimum(tl.maximum(_LOG2E / temperature, 1e-38), 3e38)


@triton.jit
def _weights(distance, inverse):
    """Whole weights; the product with a power of 2 is exact, so fused or not gives one result."""
    return (tl.exp2(distance * -inverse) * _UNIT + 0.5).to(tl.int64)


@triton.jit
def _at(values, places, place):
    """values[place], or 0 outside."""
    return tl.sum(tl.where(places == place, values, 0), 0)


@triton.jit
def _arrived_last(counters, row, chunks):
    """Whether all other programs of this row have stored their results; the counter is 0 again."""
    tl.debug_barrier()
    last = tl.atomic_add(counters + 2 * row, 1, sem="acq_rel") == chunks - 1
    if last:
        tl.store(counters + 2 * row, 0)
    return last


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=_SETTINGS)
def _draw(
    logits, uniform, temperature, top_k, top_p, min_p, tokens, maxima, highest, masses, state,
    counters, columns, stride, chunks,
    CHUNK: tl.constexpr, MOST_CHUNKS: tl.constexpr, FILTERED: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """AGAIN: only rows that have a filter; weights are relative to the row's maximum, not the
    chunk's, and are 0 beyond what is kept."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    fields = state + row * _FIELDS
    keep = 0
    if AGAIN:
        keep = tl.load(fields + _KEEP).to(tl.int32)
        if keep < 0:
            return
    heat = tl.load(temperature + row)
    inverse = _inverse(heat)
    lanes = tl.arange(0, CHUNK)
    places = chunk * CHUNK + lanes
    values = tl.load(logits + row * stride + places, mask=places < columns, other=float("-inf"))
    if AGAIN:
        reference = tl.load(highest + row)
        # log(0) = -inf: off
        least = (-tl.log(tl.load(min_p + row)) * heat).to(tl.int32, bitcast=True)
        keep = tl.minimum(keep, least & 0x7FFFFFFF)
        kept = (reference - values).to(tl.int32, bitcast=True) <= keep
        result = tl.sum(tl.where(kept, _weights(reference - values, inverse), 0), 0)
    else:
        bad = tl.max((values != values).to(tl.int32), 0)
        reference = tl.max(values, 0)
        tl.store(maxima + row * chunks + chunk, tl.where(bad > 0, float("nan"), reference))
        if heat == 0:
            result = tl.min(tl.where(values == reference, places, columns), 0).to(tl.int64)
        else:
            reference = tl.where(reference > float("-inf"), reference, 0.0)
            result = tl.sum(_weights(reference - values, inverse), 0)
    tl.store(masses + row * chunks + chunk, result)

    if _arrived_last(counters, row, chunks):
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
                tl.store(fields + _LO, -1)
                tl.store(fields + _HI, _INFINITE)
                tl.store(fields + _COUNT, 0)
                tl.store(fields + _MASS, 0)
                tl.store(fields + _OPEN, tl.where(searched, 0x7FFFFFFF, 0))
                tl.store(fields + _KEEP, tl.where(later, _INFINITE, -1))
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
                share = target.to(tl.float64) / _at(scaled, parts, there).to(tl.float64)
                target = (share * _at(held, parts, there).to(tl.float64)).to(tl.int64)
                reference = _at(tops, parts, there)
            places = there * CHUNK + lanes
            values = tl.load(
                logits + row * stride + places, mask=places < columns, other=float("-inf")
            )
            weights = _weights(reference - values, inverse)
            if AGAIN:
                kept = (reference - values).to(tl.int32, bitcast=True) <= keep
                weights = tl.where(kept, weights, 0)
            target = tl.minimum(target, tl.sum(weights, 0) - 1)
            before = tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
            token = (there * CHUNK + before).to(tl.int64)
        tl.store(tokens + row, token)


@triton.jit
def _tally(distance, weights, pivots):
    """Tokens at each pivot or nearer, times _ONE, plus their weight; int64 [PIVOTS].

    weights  int64, with _ONE added; 0 where there is no token
    """
    nearer = distance[:, None] <= pivots[None, :]
    return tl.sum(tl.where(nearer, weights[:, None], 0), 0)


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=_SETTINGS)
def _narrow(
    logits, temperature, top_k, top_p, highest, tallies, state, counters, columns, stride, chunks,
    CHUNK: tl.constexpr, MOST_CHUNKS: tl.constexpr, PIVOTS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Shrink (lo, hi] around t_k and t_p, where it holds more than LIST tokens."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    fields = state + row * _FIELDS
    if tl.load(fields + _OPEN) <= LIST:
        return
    lo, hi = tl.load(fields + _LO).to(tl.int32), tl.load(fields + _HI).to(tl.int32)
    nearest = tl.maximum(lo, 0).to(tl.float32, bitcast=True)
    farthest = hi.to(tl.float32, bitcast=True)
    order = tl.arange(0, PIVOTS)
    step = tl.minimum((farthest - nearest) / PIVOTS, _STEP)
    pivots = tl.minimum(nearest + step * (order + 1).to(tl.float32), farthest)
    pivots = tl.where(order == PIVOTS - 1, farthest, pivots)

    places = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = places < columns
    values = tl.load(logits + row * stride + places, mask=inside, other=float("-inf"))
    distance = tl.load(highest + row) - values
    weights = _weights(distance, _inverse(tl.load(temperature + row)))
    tally = _tally(distance, tl.where(inside, weights + _ONE, 0), pivots)
    tl.store(tallies + (row * chunks + chunk) * PIVOTS + order, tally)

    if _arrived_last(counters, row, chunks):
        parts = tl.arange(0, MOST_CHUNKS)
        own = (row * chunks + parts[:, None]) * PIVOTS + order[None, :]
        all_of = tl.load(
            tallies + own, mask=(parts < chunks)[:, None], other=0, cache_modifier=".cg"
        )
        counts = tl.sum(all_of >> _SHIFT, 0)  # up to each pivot
        masses = tl.sum(all_of & (_ONE - 1), 0)
        count, mass = tl.load(fields + _COUNT), tl.load(fields + _MASS)
        k, p = tl.load(top_k + row), tl.load(top_p + row).to(tl.float64)
        limited = (k > 0) & (k < columns)
        if hi == _INFINITE:
            tl.store(fields + _ALL, _at(masses, order, PIVOTS - 1))
        # t_k is in (pivots[last - 1], pivots[last]], and so t_p, in which t_k is unknown yet, is
        # beyond what holds top_p of the weight up to pivots[last - 1].
        last = tl.sum((counts < k).to(tl.int32), 0)
        last = tl.where(limited, last, PIVOTS - 1)
        held = tl.where(last > 0, _at(masses, order, last - 1), mass)
        if not limited:
            held = tl.where(hi == _INFINITE, _at(masses, order, PIVOTS - 1), tl.load(fields + _ALL))
        first = last
        if p < 1:
            first = tl.sum((masses.to(tl.float64) < p * held.to(tl.float64)).to(tl.int32), 0)
            first = tl.minimum(first, last)
            last = tl.where(limited, last, first)
        bits = pivots.to(tl.int32, bitcast=True)
        if first > 0:
            lo = _at(bits, order, first - 1)
            count = _at(counts, order, first - 1)
            mass = _at(masses, order, first - 1)
        tl.store(fields + _LO, lo)
        tl.store(fields + _HI, _at(bits, order, last))
        tl.store(fields + _COUNT, count)
        tl.store(fields + _MASS, mass)
        tl.store(fields + _OPEN, _at(counts, order, last) - count)


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=_SETTINGS)
def _select(
    logits, temperature, top_k, top_p, highest, distances, state, counters, columns, stride,
    chunks,
    CHUNK: tl.constexpr, PIVOTS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """List the distances in (lo, hi], in any order; find t_k and then t_p among them."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    fields = state + row * _FIELDS
    if tl.load(fields + _OPEN) == 0:
        return
    lo, hi = tl.load(fields + _LO).to(tl.int32), tl.load(fields + _HI).to(tl.int32)
    places = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = places < columns
    values = tl.load(logits + row * stride + places, mask=inside, other=float("-inf"))
    distance = tl.load(highest + row) - values
    bits = distance.to(tl.int32, bitcast=True)
    listed = (bits > lo) & (bits <= hi) & inside
    ranks = tl.cumsum(listed.to(tl.int32), 0)
    start = tl.atomic_add(counters + 2 * row + 1, tl.max(ranks, 0), sem="relaxed")
    tl.store(distances + row * columns + start + ranks - 1, distance, mask=listed)

    if _arrived_last(counters, row, chunks):
        tl.store(counters + 2 * row + 1, 0)
        length = tl.load(fields + _OPEN)
        count, mass = tl.load(fields + _COUNT), tl.load(fields + _MASS)
        k, p = tl.load(top_k + row), tl.load(top_p + row).to(tl.float64)
        inverse = _inverse(tl.load(temperature + row))
        own = distances + row * columns
        held = tl.load(fields + _ALL)
        if (k > 0) & (k < columns):
            hi, held = _search(own, length, lo, hi, count, mass, k, 0, inverse, PIVOTS, LIST)
        if p < 1:
            part = tl.ceil(p * held.to(tl.float64)).to(tl.int64)
            hi, _ = _search(own, length, lo, hi, count, mass, 0, part, inverse, PIVOTS, LIST)
        tl.store(fields + _KEEP, hi)


@triton.jit
def _search(
    distances, length, lo, hi, count, mass, least_count, least_mass, inverse,
    PIVOTS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """The least t in (lo, hi] up to which there are enough tokens, of enough weight, and this weight.

    distances    float32 [length], of the tokens in (lo, hi] and maybe beyond
    count, mass  the number of tokens at lo or nearer, and their weight
    """
    order = tl.arange(0, PIVOTS)
    lanes = tl.arange(0, LIST)
    inside = lanes < length
    first = tl.load(distances + lanes, mask=inside, other=0.0, cache_modifier=".cg")
    first_weights = tl.where(inside, _weights(first, inverse) + _ONE, 0)
    first = first.to(tl.int32, bitcast=True)
    reached = mass
    more = True
    while more:
        bits = lo + ((hi.to(tl.int64) - lo) * (order + 1) // PIVOTS).to(tl.int32)
        tally = _tally(first, first_weights, bits)
        counts, masses = count + (tally >> _SHIFT), mass + (tally & (_ONE - 1))
        for start in range(LIST, length, LIST):
            inside = start + lanes < length
            distance = tl.load(
                distances + start + lanes, mask=inside, other=0.0, cache_modifier=".cg"
            )
            weights = tl.where(inside, _weights(distance, inverse) + _ONE, 0)
            tally = _tally(distance.to(tl.int32, bitcast=True), weights, bits)
            counts += tally >> _SHIFT
            masses += tally & (_ONE - 1)
        enough = (counts >= least_count) & (masses >= least_mass)
        place = tl.minimum(PIVOTS - tl.sum(enough.to(tl.int32), 0), PIVOTS - 1)
        reached = _at(masses, order, place)
        lo = tl.where(place > 0, _at(bits, order, place - 1), lo)
        hi = _at(bits, order, place)
        more = hi - lo > 1
    return hi, reached
