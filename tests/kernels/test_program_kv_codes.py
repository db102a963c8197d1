"""Keys and values in 8 bits in the recorded program: codes, scales, attention, and its promise.

The cache is filled with what another request may have left: codes of any bits, and scales that are
NaN. Skipped where the processor or the compiler is missing.
"""

import math

import pytest
import torch

from compress.kernels.paged_attention.cache import FP8, INT8, quantize, with_scales
from compress.kernels.program.build import reason_against
from compress.kernels.rope import apply_rope, rope_table
from compress.runtime.batch import Batch
from tests.kernels.paged import plain
from tests.kernels.test_program import BLOCK, MIXED, attention_of, batch_of, run

pytestmark = pytest.mark.skipif(reason_against() is not None, reason=str(reason_against()))

CODES = [INT8, FP8]
DTYPES = [torch.bfloat16, torch.float32]


def attention_program(dtype, sizes, window, blocks, codes, fixed=None):
    """A program that attends; returns it, its input, output, frequencies, keys and values."""
    from compress.kernels.program import Recorder

    heads, kv_heads, head_dim = sizes
    program = Recorder(dtype, 256, 256, codes)
    qkv = torch.randn(256, (heads + 2 * kv_heads) * head_dim)
    cache = program.new_cache(blocks, kv_heads, head_dim, head_dim)
    for part in cache:
        part.codes.view(torch.uint8).random_(0, 256)
        part.scales.fill_(math.nan)
    cache = with_scales(cache, fixed and (fixed, fixed))
    inv_freq = 1.0 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    out = program.attention(
        qkv, program.angles(inv_freq, 1.1), *cache, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, q_gain=None, k_gain=None, eps=1e-6, window=window,
    )  # fmt: skip
    return program, qkv, out, inv_freq, cache


def rows_of(part, is_key, table, context, sizes, dtype):
    """Codes [context, K, H] and scales [context, K] of a sequence, from the program's layout."""
    _, kv_heads, head_dim = sizes
    beside = 4 // dtype.itemsize
    blocks = part.codes[table[: -(-context // BLOCK)].long()]
    count = len(blocks)
    if is_key:
        wide = blocks.view(count, kv_heads, -1, BLOCK, beside).permute(0, 3, 1, 2, 4).flatten(3)
    else:
        padded = blocks.shape[1] // kv_heads // BLOCK
        wide = blocks.view(count, kv_heads, -1, padded, beside).permute(0, 2, 4, 1, 3).flatten(1, 2)
    scales = part.scales[table[:count].long()].transpose(1, 2)  # [count, 16, K]
    wide = wide.reshape(-1, kv_heads, wide.shape[-1])[:context, :, :head_dim]
    return wide.double(), scales.reshape(-1, kv_heads)[:context].double()


@pytest.mark.parametrize("window", [None, 23])
@pytest.mark.parametrize("sizes", [(9, 3, 64), (4, 4, 128), (8, 1, 80), (4, 2, 256), (2, 1, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", CODES)
def test_attention(codes, dtype, sizes, window) -> None:
    """What is written, and then attention in float64 on what was.

    Values of the program's own rotation differ from ours by float32's last bits, so a code may be
    one step away where it falls on the other side of a rounding: of a few ten thousand, some.
    Attention is as without codes: float32 2e-5 of the largest value, bfloat16 2^-6 (queries,
    weights and the result have 8 bits).
    """
    heads, kv_heads, head_dim = sizes
    final = batch_of(MIXED)
    program, qkv, out, inv_freq, cache = attention_program(
        dtype, sizes, window, int(final.block_tables.max()) + 1, codes
    )
    torch.manual_seed(1)
    contexts = [before + new for before, new in MIXED]
    written = {row: [] for row in range(len(MIXED))}
    for row, context in enumerate(contexts):
        for first in range(0, context, 200):
            count = min(200, context - first)
            qkv[:count] = torch.randn(count, qkv.shape[1]) * torch.rand(count, 1) * 4
            places = torch.arange(first, first + count)
            table = final.block_tables[row : row + 1]
            batch = batch_of([(first, count)])
            slots = table[0, places // BLOCK].long() * BLOCK + places % BLOCK
            run(program, Batch(**{**vars(batch), "block_tables": table, "slots": slots}))
            wide = qkv[:count].clone().view(count, -1, head_dim)
            split = wide.split([heads, kv_heads, kv_heads], dim=1)
            rope = rope_table(places, inv_freq, 1.1, torch.float32)
            written[row].append((*apply_rope(split[0], split[1], *rope), split[2]))
        k, v = (torch.cat([part[i] for part in written[row]]) for i in (1, 2))
        q = (written[row][-1][0] * head_dim**-0.5).to(dtype)
        found = []
        for part, is_key, x in ((cache[0], True, k), (cache[1], False, v)):
            stored, scales = rows_of(part, is_key, final.block_tables[row], context, sizes, dtype)
            expected, expected_scales = quantize(x, codes)
            torch.testing.assert_close(scales.float(), expected_scales, rtol=1e-6, atol=0)
            apart = stored != expected.double()
            assert apart.float().mean() < (2e-3 if is_key else 1e-9)
            step = scales[..., None] * (stored.abs() / 8).clamp(min=1)  # e4m3's, int8's at least
            assert ((stored * scales[..., None] - x).abs() <= step).all()
            found.append(stored * scales[..., None])
        expected = plain(q, *found, 1.0, window).reshape(len(q), -1)
        unit = 2**-6 if dtype == torch.bfloat16 else 2e-5
        size = float(expected.abs().max())
        difference = out[: len(q)].double() - expected
        assert difference.abs().max() < unit * size


@pytest.mark.parametrize("codes", CODES)
def test_codes_of_all_sizes(codes) -> None:
    """Values are written as they come, so codes are the reference's, ties and all, bit for bit."""
    sizes = (1, 1, 64)
    program, qkv, _, _, cache = attention_program(torch.bfloat16, sizes, None, 16, codes)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(250, 64, generator=generator) * 10.0 ** torch.arange(-30, 20).repeat(5)[:, None]
    x[0], x[1], x[2] = 0, 1e-44, torch.arange(64) / 64 * 448  # ties of both kinds of codes
    x[3] = torch.arange(64) * 2.0 - 63.5
    x[3, 0] = -127
    x[4] = 2.0 ** -torch.arange(64.0)
    x[5, 7], x[6, 60] = math.inf, math.nan
    qkv[:250, 128:] = x
    attention_of(qkv.clone(), program, qkv, qkv, 0, 250)
    stored, scales = rows_of(cache[1], False, torch.arange(16), 250, sizes, torch.bfloat16)
    expected, expected_scales = quantize(x, codes)
    assert torch.equal(scales[:, 0].float().nan_to_num(-1), expected_scales.nan_to_num(-1))
    whole = scales[:, 0].isfinite()
    assert (~whole).sum() == 2
    assert torch.equal(stored[whole, 0], expected.double()[whole])


@pytest.mark.parametrize("codes", CODES)
def test_fixed_scales(codes) -> None:
    """All rows have the layer's scale, and what lies beyond it is cut off."""
    sizes = (1, 1, 64)
    program, qkv, _, _, cache = attention_program(
        torch.bfloat16, sizes, None, 16, codes, fixed=0.01
    )
    inputs = torch.randn(100, qkv.shape[1]) * 3
    attention_of(inputs, program, qkv, qkv, 0, 100)
    stored, scales = rows_of(cache[1], False, torch.arange(16), 100, sizes, torch.bfloat16)
    expected, _ = quantize(inputs[:, 128:], codes, 0.01)
    assert (scales == torch.tensor(0.01).double()).all()
    assert torch.equal(stored[:, 0], expected.double())
    assert (stored.abs() == codes.largest).any()


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("sizes", [(9, 3, 64), (4, 4, 64), (6, 3, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", CODES)
def test_tokens_have_the_same_bits_beside_their_neighbours(codes, dtype, sizes, window) -> None:
    """Alone, where threads share the context out, and in a chunk."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        program, qkv, out, _, _ = attention_program(dtype, sizes, window, 64, codes)
        torch.manual_seed(0)
        inputs = torch.randn(600, qkv.shape[1])
        last = (inputs, program, qkv, out)
        alone = torch.cat([attention_of(*last, place, place + 1) for place in range(600)])
        for begin in (0, 14, 253, 255, 508, 590):
            for count in (2, 3, 5, 10):
                together = attention_of(*last, begin, begin + count)
                assert torch.equal(together, alone[begin : begin + count]), (begin, count)
        assert torch.equal(attention_of(*last, 400, 600), alone[400:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("codes", CODES)
def test_what_comes_later_may_be_nan(codes) -> None:
    """A refused proposal is beside the tokens before it, which do not see it."""
    program, qkv, out, _, _ = attention_program(torch.bfloat16, (9, 3, 64), None, 64, codes)
    inputs = torch.randn(40, qkv.shape[1])
    expected = attention_of(inputs, program, qkv, out, 0, 40)
    inputs[37:] = math.nan
    for begin in (30, 36):
        found = attention_of(inputs, program, qkv, out, begin, 40)
        assert torch.equal(found[: 37 - begin], expected[begin:37])
        assert found[37 - begin :].isnan().all()
