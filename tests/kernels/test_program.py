"""The AVX-512 kernels, operation by operation against the reference, and their promise about rows.

Buffers between operations are poisoned with NaN before a program runs: an operation that reads what
no other wrote gives NaN. Skipped where the processor or the compiler is missing.
"""

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.paged_attention import reference as attention
from compress.kernels.paged_attention import write_kv
from compress.kernels.program.build import reason_against
from compress.kernels.rms_norm import rms_norm
from compress.kernels.rope import apply_rope, rope_table
from compress.runtime.batch import Batch

pytestmark = pytest.mark.skipif(reason_against() is not None, reason=str(reason_against()))

BLOCK = 16
ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 63, 64, 65, 97, 200)  # around every change of the row blocks


def batch_of(sequences: list[tuple[int, int]], seed: int = 0) -> Batch:
    """Sequences of (tokens before, new tokens), in blocks that lie anywhere."""
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.tensor([before + new for before, new in sequences])
    counts = -(-contexts // BLOCK)
    free = torch.randperm(int(counts.sum()), generator=generator)
    tables = torch.zeros(len(sequences), int(counts.max()), dtype=torch.int32)
    positions, slots = [], []
    for row, ((before, new), count) in enumerate(zip(sequences, counts.tolist(), strict=True)):
        tables[row, :count], free = free[:count].int(), free[count:]
        places = torch.arange(before, before + new)
        positions.append(places)
        slots.append(tables[row, places // BLOCK].long() * BLOCK + places % BLOCK)
    starts = torch.tensor([0, *(new for _, new in sequences)]).cumsum(0)
    total = int(starts[-1])
    return Batch(
        tokens=torch.randint(0, 50, (total,), generator=generator),
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        starts=starts.int(),
        contexts=contexts.int(),
        block_tables=tables,
        rows=torch.arange(total),
    )


def recorder(dtype: torch.dtype, most: int = 256) -> Any:
    from compress.kernels.program import Recorder

    return Recorder(dtype, most, most)


def run(program: Any, batch: Batch, **inputs: Tensor) -> None:
    """Poison the buffers that are not inputs, fill those that are, and run."""
    kept = {id(tensor) for tensor in inputs.values()}
    for buffer in program._buffers.values():
        if id(buffer) not in kept:
            buffer.fill_(math.nan)
    program.run(batch)


def grid(
    rows: int, columns: int, group: int, bits: int, shift: bool, seed: int = 0
) -> LinearWeight:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=generator)
    scale = torch.randn(rows, columns // group, generator=generator) / 50
    offsets = torch.randn(rows, columns // group, generator=generator) / 10 if shift else None
    bias = torch.randn(rows, generator=generator) if rows % 3 == 0 else None
    return LinearWeight(None, codes, scale, offsets, group, bits, bias)


def exact(x: Tensor, weight: LinearWeight) -> Tensor:
    """The product in float64 of what the operands hold."""
    y = x.double() @ weight.dequantize(torch.float64).T
    return y if weight.bias is None else y + weight.bias.double()


# rows, columns, group, bits, shift: whole and broken tiles, every layout, groups wider than a chunk
GRIDS = [
    (64, 64, 64, 4, False),
    (45, 48, 16, 4, True),
    (96, 576, 64, 4, True),
    (33, 576, 576, 4, False),
    (70, 160, 160, 3, False),
    (64, 80, 40, 2, True),
    (40, 96, 12, 8, True),
    (50, 576, 576, 8, False),
    (32, 36, 4, 8, False),
    (32, 60, 6, 4, False),  # no whole steps in a group: de-quantized
]


@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_on_codes(shape: tuple[int, int, int, int, bool], dtype: torch.dtype) -> None:
    """bfloat16: codes and x are exact, the sums are float32's: some 1e-6 of the largest term.

    Where the weight is de-quantized to bfloat16 its rounding, 2^-9 a term, is the error.
    """
    rows, columns, group, bits, shift = shape
    weight = grid(rows, columns, group, bits, shift)
    program = recorder(dtype)
    x = torch.randn(256, columns).to(dtype)
    y = program.linear("y", x, program.pack(weight))
    dense = dtype == torch.bfloat16 and group % (8 if bits <= 4 else 4) != 0
    for count in ROWS:
        run(program, batch_of([(0, count)]))
        expected = exact(x[:count], weight)
        tolerance = (2e-3 if dense else 2e-6) * math.sqrt(columns) * float(expected.abs().max())
        assert (y[:count].double() - expected).abs().max() < tolerance, count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantized", [True, False])
def test_gate_and_up(dtype: torch.dtype, quantized: bool) -> None:
    """silu(gate) * up comes out in the activations' dtype: one rounding of it, 2^-9 or 2^-24."""
    weight = grid(2 * 45, 48, 16, 4, True)
    if not quantized:
        weight = LinearWeight.of_dense(weight.dequantize(dtype), weight.bias)
    program = recorder(dtype)
    x = torch.randn(256, 48).to(dtype)
    y = program.linear("y", x, program.pack(weight, silu_mul=True))
    for count in ROWS:
        run(program, batch_of([(0, count)]))
        gate, up = exact(x[:count], weight).chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
        unit = 2**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y[:count].double(), expected, rtol=unit, atol=unit / 10)


def test_dense_linear() -> None:
    weight = LinearWeight.of_dense(torch.randn(77, 130).bfloat16(), torch.randn(77))
    for dtype in (torch.bfloat16, torch.float32):
        program = recorder(dtype)
        x = torch.randn(256, 130).to(dtype)
        y = program.linear("y", x, program.pack(weight))
        run(program, batch_of([(0, 90)]))
        expected = exact(x[:90], weight)
        torch.testing.assert_close(y[:90].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["int4", "int4 with shift", "int8", "dense"])
def test_a_row_has_the_same_bits_in_any_batch(kind: str, dtype: torch.dtype) -> None:
    weight = grid(96, 160, 32, 8 if kind == "int8" else 4, "shift" in kind)
    if kind == "dense":
        weight = LinearWeight.of_dense(torch.randn(96, 160).bfloat16())
    for silu_mul in (False, True):
        program = recorder(dtype)
        x = torch.randn(256, 160).to(dtype)
        y = program.linear("y", x, program.pack(weight, silu_mul))
        run(program, batch_of([(0, 200)]))
        all_rows = y[:200].clone()
        saved = x.clone()
        for count in ROWS:
            first = 200 - count
            x[:count] = saved[first:200]
            run(program, batch_of([(0, count)]))
            assert torch.equal(y[:count], all_rows[first:]), count
            x.copy_(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [8, 48, 50, 576])
def test_rms_norm_and_rows(width: int, dtype: torch.dtype) -> None:
    program = recorder(dtype)
    table, gain = torch.randn(50, width).to(dtype), torch.rand(width) + 0.5
    delta = torch.randn(256, width)
    hidden = program.embed(table)
    _, normed = program.rms_norm(hidden, delta, gain, 1e-5)
    taken = program.take_rows(hidden, delta)
    _, of_rows = program.rms_norm(taken, None, gain, 1e-5)
    batch = batch_of([(0, 30), (5, 1)])
    batch = Batch(**{**vars(batch), "rows": torch.tensor([3, 29, 30])})
    run(program, batch)
    expected, expected_normed = rms_norm(table[batch.tokens].float(), gain, 1e-5, delta[:31])
    unit = 2**-8 if dtype == torch.bfloat16 else 2e-6  # one rounding, or a few of float32's
    torch.testing.assert_close(hidden[:31], expected, rtol=0, atol=0)
    torch.testing.assert_close(normed[:31].float(), expected_normed, rtol=unit, atol=unit)
    again = (expected + delta[:31])[batch.rows]
    torch.testing.assert_close(taken[:3], again, rtol=0, atol=0)
    expected_rows = rms_norm(again, gain, 1e-5)[1]
    torch.testing.assert_close(of_rows[:3].float(), expected_rows, rtol=unit, atol=unit)


MIXED = [
    (0, 1),
    (0, 37),
    (15, 1),
    (16, 1),
    (100, 20),
    (299, 1),
    (63, 2),
    (255, 3),
    (700, 1),
    (40, 16),
]
HEADS = [
    (9, 3, 64),
    (6, 2, 8),
    (4, 4, 128),
    (3, 1, 48),
    (8, 1, 80),
    (5, 5, 96),
    (4, 2, 256),
    (2, 1, 20),
]


def attention_program(dtype, sizes, window, gains, blocks):
    heads, kv_heads, head_dim = sizes
    program = recorder(dtype)
    qkv = torch.randn(256, (heads + 2 * kv_heads) * head_dim)
    keys, values = program.new_cache(blocks, kv_heads, head_dim, head_dim)
    keys.fill_(math.nan)  # as another request may have left them
    values.fill_(math.nan)
    inv_freq = 1.0 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    out = program.attention(
        qkv, program.angles(inv_freq, 1.1), keys, values, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, q_gain=gains[0], k_gain=gains[1], eps=1e-6, window=window,
    )  # fmt: skip
    return program, qkv, out, inv_freq


@pytest.mark.parametrize("window", [None, 1, 16, 23, 300])
@pytest.mark.parametrize("sizes", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention(sizes, dtype, window) -> None:
    """Sequences of many lengths over three steps, against the reference on a plain cache.

    float32: sums of hundreds of terms, 1e-5 of values of order 1.  bfloat16: queries, keys,
    values and weights have 8 bits; each weight's rounding, 2^-9, averages out over the keys, and
    what stays is about a rounding of the result itself and one of the weights: 2^-6 of the values.
    """
    heads, kv_heads, head_dim = sizes
    gains = (torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5) if heads == 8 else (None, None)
    final = batch_of(MIXED)
    blocks = int(final.block_tables.max()) + 1
    program, qkv, out, inv_freq = attention_program(dtype, sizes, window, gains, blocks)
    plain_k = torch.zeros(blocks, kv_heads, BLOCK, head_dim)
    plain_v = plain_k.clone()
    steps = [[min(before, 24)] for before, _ in MIXED]
    for index, (before, new) in enumerate(MIXED):
        while sum(steps[index]) < before:
            steps[index].append(min(24, before - sum(steps[index])))
        steps[index].append(new)
    for index in range(max(map(len, steps))):
        sequences = [(sum(s[:index]), s[index]) for s in steps if index < len(s) and s[index]]
        rows = [row for row, s in enumerate(steps) if index < len(s) and s[index]]
        if not sequences:
            continue
        batch = batch_of(sequences)
        table = final.block_tables[rows]
        slots = torch.cat(
            [
                table[i, places // BLOCK].long() * BLOCK + places % BLOCK
                for i, (before, new) in enumerate(sequences)
                for places in [torch.arange(before, before + new)]
            ]
        )
        batch = Batch(**{**vars(batch), "block_tables": table, "slots": slots})
        total = len(batch.tokens)
        qkv[:total] = torch.randn(total, qkv.shape[1])
        run(program, batch)
        q, k, v = qkv[:total].view(total, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
        if gains[0] is not None:
            q, k = rms_norm(q, gains[0], 1e-6)[1], rms_norm(k, gains[1], 1e-6)[1]
        q, k = apply_rope(q, k, *rope_table(batch.positions, inv_freq, 1.1, torch.float32))
        write_kv(plain_k, plain_v, k.to(dtype).float(), v.to(dtype).float(), slots)
        rounded = (q * head_dim**-0.5).to(dtype).float()
        expected = attention.paged_attention(
            rounded, plain_k, plain_v, batch.starts, batch.contexts, table, 1.0, window
        ).reshape(total, -1)
        unit = 2**-6 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(out[:total].float(), expected, rtol=unit, atol=unit)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_attention_has_the_same_bits_alone_and_shared_out(threads: int) -> None:
    """A lone query of 1,000 keys is shared out in parts, in a batch of 200 it is not."""
    sizes, dtype = (9, 3, 64), torch.bfloat16
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        program, qkv, out, _ = attention_program(dtype, sizes, None, (None, None), 64)
        batch = batch_of([(0, 200)])
        table = torch.arange(63, dtype=torch.int32)[None]
        torch.manual_seed(0)
        inputs = torch.randn(1000, qkv.shape[1])
        for first in range(0, 1000, 200):
            places = torch.arange(first, first + 200)
            qkv[:200] = inputs[first : first + 200]
            contexts = torch.tensor([first + 200], dtype=torch.int32)
            step = {"positions": places, "slots": places, "contexts": contexts}
            run(program, Batch(**{**vars(batch), **step, "block_tables": table}))
        together = out[:200].clone()
        single = batch_of([(0, 1)])
        for place in (800, 801, 900, 999):
            qkv[0] = inputs[place]
            at = torch.tensor([place])
            step = {"positions": at, "slots": at, "contexts": (at + 1).int()}
            run(program, Batch(**{**vars(single), **step, "block_tables": table}))
            assert torch.equal(out[0], together[place - 800]), place
    finally:
        torch.set_num_threads(before)


def attention_of(inputs, program, qkv, out, begin: int, end: int) -> Tensor:
    """Outputs of some tokens of one sequence, in one step; the cache has those before."""
    places = torch.arange(begin, end)
    qkv[: end - begin] = inputs[begin:end]
    batch = batch_of([(begin, end - begin)])
    table = torch.arange(-(-end // BLOCK), dtype=torch.int32)[None]
    run(program, Batch(**{**vars(batch), "slots": places, "block_tables": table}))
    return out[: end - begin].clone()


@pytest.mark.parametrize("window", [None, 20, 300])
@pytest.mark.parametrize("sizes", [(9, 3, 64), (4, 4, 64), (8, 1, 80), (3, 3, 96), (6, 3, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_have_the_same_bits_beside_their_neighbours(sizes, dtype, window) -> None:
    """Neighbours go through the keys together, in groups that depend on how many there are."""
    program, qkv, out, _ = attention_program(dtype, sizes, window, (None, None), 64)
    torch.manual_seed(0)
    inputs = torch.randn(600, qkv.shape[1])
    last = (inputs, program, qkv, out)
    alone = torch.cat([attention_of(*last, place, place + 1) for place in range(600)])
    for begin in (0, 14, 15, 29, 253, 255, 508, 511, 590):  # around blocks, parts, windows
        for count in (2, 3, 4, 5, 8, 10):
            together = attention_of(*last, begin, begin + count)
            assert torch.equal(together, alone[begin : begin + count]), (begin, count)


@pytest.mark.parametrize("sizes", [(9, 3, 64), (4, 4, 64)])
def test_what_comes_later_may_be_nan(sizes) -> None:
    """A refused proposal is beside the tokens before it, which do not see it."""
    program, qkv, out, _ = attention_program(torch.bfloat16, sizes, None, (None, None), 64)
    inputs = torch.randn(40, qkv.shape[1])
    expected = attention_of(inputs, program, qkv, out, 0, 40)
    inputs[37:] = math.nan
    for begin in (30, 35, 36):
        found = attention_of(inputs, program, qkv, out, begin, 40)
        assert torch.equal(found[: 37 - begin], expected[begin:37])
        assert found[37 - begin :].isnan().all()


@pytest.mark.parametrize("threads", [1, 3])
def test_any_thread_may_run_a_program(threads: int) -> None:
    """OpenMP would give a thread that is not the one of set_num_threads all processors."""
    before = torch.get_num_threads()
    weight = grid(160, 64, 16, 4, True)
    try:
        torch.set_num_threads(threads)
        program = recorder(torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    x = torch.randn(256, 64).bfloat16()
    y = program.linear("y", x, program.pack(weight))
    other = threading.Thread(target=run, args=(program, batch_of([(0, 200)])))
    other.start()
    other.join()
    torch.testing.assert_close(y[:200].double(), exact(x[:200], weight), rtol=1e-4, atol=1e-4)


def test_a_batch_may_want_no_logits() -> None:
    """A chunk in the middle of a prompt."""
    program = recorder(torch.bfloat16)
    hidden = program.embed(torch.randn(50, 16).bfloat16())
    taken = program.take_rows(hidden, torch.zeros(256, 16))
    program.logits(taken.bfloat16(), program.pack(grid(50, 16, 16, 4, True)))
    batch = batch_of([(0, 5)])
    assert program.run(Batch(**{**vars(batch), "rows": batch.rows[:0]})).shape == (0, 50)


def test_a_batch_without_room_is_refused() -> None:
    program = recorder(torch.float32, most=4)
    program.embed(torch.randn(50, 16))
    with pytest.raises(ValueError, match="5 tokens"):
        program.run(batch_of([(0, 5)]))
