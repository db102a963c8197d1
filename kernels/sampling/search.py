"""The least probable token that top_k and top_p keep: kernels, and what they share with the draw.

`compress.kernels.sampling.triton` says what is computed and in which launches.

A tally adds up one int64 a token, 2^49 plus its weight, for each of 8 pivots.  So one sum gives how
many tokens are at the pivot or nearer (the bits from 49 up) and their weight (those below), of up
to 4,096 tokens.
"""

# Triton's language: constants are parameters, and a kernel is called through its grid.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

SETTINGS = ["uniform", "temperature", "top_k", "top_p", "min_p"]  # slices of a caller's table

# A row's numbers between launches, int64 [8].
LO = tl.constexpr(0)  # bits of a float32: what is searched for is in (lo, hi]
HI = tl.constexpr(1)
COUNT = tl.constexpr(2)  # tokens at lo or nearer
MASS = tl.constexpr(3)  # and their weight
ALL = tl.constexpr(4)  # weight of all tokens
OPEN = tl.constexpr(5)  # tokens in (lo, hi]; 0 for a row without top_k and top_p
KEEP = tl.constexpr(6)  # bits of t; -1 for a row that is drawn already
FIELDS = tl.constexpr(8)

_UNIT = tl.constexpr(2.0**36)  # weight of the likeliest
_SHIFT = tl.constexpr(49)
_ONE = tl.constexpr(2**49)  # one token, beside the weight of up to CHUNK
INFINITE = tl.constexpr(0x7F800000)
_LOG2E = tl.constexpr(1.4426950408889634)
_SHORT = tl.constexpr(-(1 << 20))  # all but a float32's last 20 bits
_STEP = tl.constexpr(2.0)  # most that two pivots differ by, except the last two


@triton.jit
def inverse_of(temperature):
    """What makes distances powers of 2; finite and above 0, so that 0 and inf stay."""
    return tl.minimum(tl.maximum(_LOG2E / temperature, 1e-37), 3e38)


@triton.jit
def weights_of(distance, inverse):
    """Whole weights; the product with a power of 2 is exact, so fused or not gives one result."""
    return (tl.exp2(distance * -inverse) * _UNIT + 0.5).to(tl.int64)


@triton.jit
def at(values, places, place):
    """values[place], or 0 outside."""
    return tl.sum(tl.where(places == place, values, 0), 0)


@triton.jit
def arrived_last(counters, row, chunks):
    """Whether all other programs of this row have stored their results; the counter is 0 again."""
    tl.debug_barrier()
    last = tl.atomic_add(counters + 2 * row, 1, sem="acq_rel") == chunks - 1
    if last:
        tl.store(counters + 2 * row, 0)
    return last


@triton.jit
def _pivot(start, step, end, place):
    """Pivot 0 to 7; `step` times 7 or less is exact, so fused or not gives one result."""
    return tl.where(place < 7, tl.minimum(start + step * (place + 1), end), end)


@triton.jit
def _near(distance, weights, start, step, end, place: tl.constexpr, LANES: tl.constexpr):
    """One column of `_tally`, in LANES parts; what is added up here is one thread's own."""
    near = tl.where(distance <= _pivot(start, step, end, place), weights, 0)
    return tl.sum(tl.sum(tl.reshape(near, [near.shape[0] // (4 * LANES), LANES, 4]), 2), 0)


@triton.jit
def _tally(distance, weights, start, step, end, LANES: tl.constexpr):
    """Tokens at each of 8 pivots or nearer, times _ONE, plus their weight; int64 [8].

    distance  float32, or its bits in int32; and so `start`, `step` and `end`, see `_pivot`
    weights   int64, with _ONE added; 0 where there is no token
    """
    a = _near(distance, weights, start, step, end, 0, LANES)
    b = _near(distance, weights, start, step, end, 1, LANES)
    c = _near(distance, weights, start, step, end, 2, LANES)
    d = _near(distance, weights, start, step, end, 3, LANES)
    e = _near(distance, weights, start, step, end, 4, LANES)
    f = _near(distance, weights, start, step, end, 5, LANES)
    g = _near(distance, weights, start, step, end, 6, LANES)
    h = _near(distance, weights, start, step, end, 7, LANES)
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.sum(tl.reshape(tl.join(even, odd), [LANES, 8]), 0)


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=SETTINGS)
def narrow(
    logits, temperature, top_k, top_p, highest, tallies, state, counters, columns, stride, chunks,
    CHUNK: tl.constexpr, MOST_CHUNKS: tl.constexpr, LIST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Shrink (lo, hi] around t_k and t_p, where it holds more than LIST tokens."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    fields = state + row * FIELDS
    lo, hi = tl.load(fields + LO).to(tl.int32), tl.load(fields + HI).to(tl.int32)
    top, inverse = tl.load(highest + row), inverse_of(tl.load(temperature + row))
    if tl.load(fields + OPEN) <= LIST:
        return
    nearest = tl.maximum(lo, 0).to(tl.float32, bitcast=True)
    farthest = hi.to(tl.float32, bitcast=True)
    order = tl.arange(0, 8)
    step = tl.minimum((farthest - nearest) / 8, _STEP).to(tl.int32, bitcast=True)
    step = (step & _SHORT).to(tl.float32, bitcast=True)

    places = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = places < columns
    values = tl.load(logits + row * stride + places, mask=inside, other=float("-inf"))
    distance = top - values
    weights = tl.where(inside, weights_of(distance, inverse) + _ONE, 0)
    tally = _tally(distance, weights, nearest, step, farthest, LANES)
    tl.store(tallies + (row * chunks + chunk) * 8 + order, tally)

    if arrived_last(counters, row, chunks):
        parts = tl.arange(0, MOST_CHUNKS)
        own = (row * chunks + parts[:, None]) * 8 + order[None, :]
        all_of = tl.load(
            tallies + own, mask=(parts < chunks)[:, None], other=0, cache_modifier=".cg"
        )
        counts = tl.sum(all_of >> _SHIFT, 0)  # up to each pivot
        masses = tl.sum(all_of & (_ONE - 1), 0)
        count, mass = tl.load(fields + COUNT), tl.load(fields + MASS)
        k, p = tl.load(top_k + row), tl.load(top_p + row).to(tl.float64)
        limited = (k > 0) & (k < columns)
        if hi == INFINITE:
            tl.store(fields + ALL, at(masses, order, 7))
        # t_k is in (pivots[last - 1], pivots[last]], and so t_p, in which t_k is unknown yet, is
        # beyond what holds top_p of the weight up to pivots[last - 1].
        last = tl.sum((counts < k).to(tl.int32), 0)
        last = tl.where(limited, last, 7)
        held = tl.where(last > 0, at(masses, order, last - 1), mass)
        if not limited:
            held = tl.where(hi == INFINITE, at(masses, order, 7), tl.load(fields + ALL))
        first = last
        if p < 1:
            first = tl.sum((masses.to(tl.float64) < p * held.to(tl.float64)).to(tl.int32), 0)
            first = tl.minimum(first, last)
            last = tl.where(limited, last, first)
        bits = _pivot(nearest, step, farthest, order).to(tl.int32, bitcast=True)
        if first > 0:
            lo = at(bits, order, first - 1)
            count = at(counts, order, first - 1)
            mass = at(masses, order, first - 1)
        tl.store(fields + LO, lo)
        tl.store(fields + HI, at(bits, order, last))
        tl.store(fields + COUNT, count)
        tl.store(fields + MASS, mass)
        tl.store(fields + OPEN, at(counts, order, last) - count)


@triton.jit
def list_open(logits, highest, distances, state, counters, columns, stride, CHUNK: tl.constexpr):
    """Write the distances in (lo, hi] to distances[row], in any order."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    fields = state + row * FIELDS
    lo, hi = tl.load(fields + LO).to(tl.int32), tl.load(fields + HI).to(tl.int32)
    top = tl.load(highest + row)
    if tl.load(fields + OPEN) == 0:
        return
    places = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = places < columns
    values = tl.load(logits + row * stride + places, mask=inside, other=float("-inf"))
    distance = top - values
    bits = distance.to(tl.int32, bitcast=True)
    listed = (bits > lo) & (bits <= hi) & inside
    ranks = tl.cumsum(listed.to(tl.int32), 0)
    start = tl.atomic_add(counters + 2 * row + 1, tl.max(ranks, 0), sem="relaxed")
    tl.store(distances + row * columns + start + ranks - 1, distance, mask=listed)


@triton.jit(do_not_specialize_on_alignment=SETTINGS)
def search(
    temperature, top_k, top_p, distances, state, counters, columns,
    LIST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Find t_k and then t_p among the distances listed, one program a row."""
    row = tl.program_id(0).to(tl.int64)
    fields = state + row * FIELDS
    length = tl.load(fields + OPEN)
    lo, hi = tl.load(fields + LO).to(tl.int32), tl.load(fields + HI).to(tl.int32)
    count, mass = tl.load(fields + COUNT), tl.load(fields + MASS)
    held = tl.load(fields + ALL)
    k, p = tl.load(top_k + row), tl.load(top_p + row).to(tl.float64)
    inverse = inverse_of(tl.load(temperature + row))
    if length == 0:
        return
    tl.store(counters + 2 * row + 1, 0)
    own = distances + row * columns
    limited = (k > 0) & (k < columns)
    for goal in range(2):  # t_k, then t_p
        least_count = tl.where(goal == 0, k, 0)
        least_mass = tl.where(goal == 0, 0, tl.ceil(p * held.to(tl.float64)).to(tl.int64))
        if tl.where(goal == 0, limited, p < 1):
            hi, held = _least(
                own, length, lo, hi, count, mass, least_count, least_mass, inverse, LIST, LANES
            )
    tl.store(fields + KEEP, hi)


@triton.jit
def _least(
    distances, length, lo, hi, count, mass, least_count, least_mass, inverse,
    LIST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The least t in (lo, hi] with enough tokens, of enough weight, up to it; and their weight.

    distances    float32 [length], of the tokens in (lo, hi] and maybe beyond
    count, mass  the number of tokens at lo or nearer, and their weight
    """
    order = tl.arange(0, 8)
    lanes = tl.arange(0, LIST)
    inside = lanes < length
    first = tl.load(distances + lanes, mask=inside, other=0.0)
    first_weights = tl.where(inside, weights_of(first, inverse) + _ONE, 0)
    first = first.to(tl.int32, bitcast=True)
    reached = mass
    more = True
    while more:
        step = (hi - lo + 7) >> 3
        tally = _tally(first, first_weights, lo, step, hi, LANES)
        counts, masses = count + (tally >> _SHIFT), mass + (tally & (_ONE - 1))
        for start in range(LIST, length, LIST):
            inside = start + lanes < length
            distance = tl.load(distances + start + lanes, mask=inside, other=0.0)
            weights = tl.where(inside, weights_of(distance, inverse) + _ONE, 0)
            distance = distance.to(tl.int32, bitcast=True)
            tally = _tally(distance, weights, lo, step, hi, LANES)
            counts += tally >> _SHIFT
            masses += tally & (_ONE - 1)
        enough = (counts >= least_count) & (masses >= least_mass)
        place = tl.minimum(8 - tl.sum(enough.to(tl.int32), 0), 7)
        reached = at(masses, order, place)
        bits = _pivot(lo, step, hi, order)
        lo = tl.where(place > 0, at(bits, order, place - 1), lo)
        hi = at(bits, order, place)
        more = hi - lo > 1
    return hi, reached
