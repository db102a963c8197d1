"""Attention on latents in the recorded program: what it writes, attention, and its promise on rows.

The cache is filled with what another request may have left: NaN, or codes of any bits with scales
that are NaN. Skipped where the processor or the compiler is missing.
"""

import math

import pytest
import torch

from compress.kernels.latent_attention import LatentShape, LatentWeights, UpProjections
from compress.kernels.paged_attention.cache import FP8, INT8, quantize
from compress.kernels.program.build import reason_against
from compress.kernels.rope import apply_rope, rope_table
from compress.runtime.batch import Batch
from tests.kernels.latents import plain
from tests.kernels.test_program import BLOCK, MIXED, attention_of, batch_of, run

pytestmark = pytest.mark.skipif(reason_against() is not None, reason=str(reason_against()))

SIZES = [(9, 32, 32, 64, 128), (3, 7, 2, 5, 20), (40, 16, 8, 16, 48), (2, 12, 20, 10, 90)]
DTYPES = [torch.bfloat16, torch.float32]
EPS = 0.1


def program_of(dtype, sizes, blocks, codes=None):
    """A program that attends: itself, its input, its output, its weights, frequencies and cache."""
    from compress.kernels.program import Recorder

    heads, nope, rope, value, rank = sizes
    program = Recorder(dtype, 256, 256, codes)
    shape = LatentShape(heads, nope, rope, value, rank, (nope + rope) ** -0.5)
    generator = torch.Generator().manual_seed(7)
    up = UpProjections(
        *(torch.randn(heads, dim, rank, generator=generator) / rank**0.5 for dim in (nope, value))
    ).to(torch.device("cpu"), dtype)
    weights = LatentWeights(torch.rand(rank, generator=generator) + 0.5, EPS, up)
    joint = torch.randn(256, heads * (nope + rope) + rank + rope)
    cache = program.new_cache(blocks, 1, rope, rank)
    for part in cache:
        if codes is None:
            part.fill_(math.nan)
        else:
            part.codes.view(torch.uint8).random_(0, 256)
            part.scales.fill_(math.nan)
    inv_freq = 1.0 / 10000 ** (torch.arange(0, rope, 2) / rope)
    out = program.latent_attention(
        joint, joint, program.angles(inv_freq, 1.1), *cache, program.pack_latent(weights), shape
    )
    return program, joint, out, weights, inv_freq, cache


def written(x, weights, inv_freq, places, sizes):
    """What tokens are to leave in the cache, and their queries, in float32."""
    heads, nope, rope, _, rank = sizes
    q = x[:, : heads * (nope + rope)].view(len(x), heads, -1)
    c, k = x[:, -rank - rope :].split([rank, rope], dim=1)
    c = c * torch.rsqrt(c.square().mean(1, keepdim=True) + EPS) * weights.gain
    turned, k = apply_rope(
        q[..., nope:], k[:, None], *rope_table(places, inv_freq, 1.1, torch.float32)
    )
    return torch.cat([q[..., :nope], turned], dim=-1), k[:, 0], c


@pytest.mark.parametrize("codes", [None, INT8, FP8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_attention(sizes, dtype, codes) -> None:
    """What is written, and attention in float64 on what was.

    The program's own turns and norms differ from ours by float32's last bits, so a few codes are a
    step away.  float32: 2e-5 of the largest value.  bfloat16: queries round before they are
    absorbed and after it, by up to 2^-9 each, which moves a score of 10 by 0.03, and its weight by
    as much.
    """
    final = batch_of(MIXED)
    program, joint, out, weights, inv_freq, cache = program_of(
        dtype, sizes, int(final.block_tables.max()) + 1, codes
    )
    torch.manual_seed(1)
    for row, (before, new) in enumerate(MIXED):
        table, held, context = final.block_tables[row : row + 1], [], before + new
        for first in range(0, context, 200):
            count = min(200, context - first)
            joint[:count] = torch.randn(count, joint.shape[1]) * (torch.rand(count, 1) * 4 + 0.1)
            places = torch.arange(first, first + count)
            slots = table[0, places // BLOCK].long() * BLOCK + places % BLOCK
            batch = batch_of([(first, count)])
            run(program, Batch(**{**vars(batch), "block_tables": table, "slots": slots}))
            held.append(written(joint[:count], weights, inv_freq, places, sizes))
        k, c = (torch.cat([part[i] for part in held]) for i in (1, 2))
        slots = table[0, torch.arange(context) // BLOCK].long() * BLOCK
        slots += torch.arange(context) % BLOCK
        stored = [rows_of(part, x, slots, codes) for part, x in zip(cache, (k, c), strict=True)]
        expected = plain(held[-1][0], *stored, weights.up, sum(sizes[1:3]) ** -0.5).flatten(1)
        unit = 2**-5 if dtype == torch.bfloat16 else 2e-5
        difference = out[: len(expected)].double() - expected
        assert difference.abs().max() < unit * expected.abs().max()


def rows_of(part, x, slots, codes):
    """What the cache holds of rows x, after comparing the two: float64."""
    tensor = part if codes is None else part.codes
    rows = tensor.flatten().view(-1, -(-x.shape[1] // 16) * 16)[slots, : x.shape[1]].double()
    if codes is None:
        unit = 2**-8 if tensor.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(rows, x.double(), rtol=unit, atol=1e-5)
        return rows
    scales = part.scales.flatten()[slots].double()
    expected, expected_scales = quantize(x, codes)
    torch.testing.assert_close(scales.float(), expected_scales, rtol=1e-5, atol=0)
    assert (rows != expected.double()).float().mean() < 5e-3
    return rows * scales[:, None]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("codes", [None, INT8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[2]])
def test_tokens_have_the_same_bits_beside_their_neighbours(sizes, dtype, codes, threads) -> None:
    """Alone, where threads share out the context, or the heads, and in chunks."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        program, joint, out, *_ = program_of(dtype, sizes, 64, codes)
        torch.manual_seed(0)
        inputs = torch.randn(600, joint.shape[1])
        last = (inputs, program, joint, out)
        together = torch.cat([attention_of(*last, place, place + 200) for place in (0, 200, 400)])
        for begin in (0, 14, 31, 253, 255, 508, 590):
            for count in (1, 2, 3, 5, 10):
                found = attention_of(*last, begin, begin + count)
                assert torch.equal(found, together[begin : begin + count]), (begin, count)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("codes", [None, FP8])
def test_what_comes_later_may_be_nan(codes) -> None:
    """A refused proposal is beside the tokens before it, which do not see it."""
    program, joint, out, *_ = program_of(torch.bfloat16, SIZES[0], 64, codes)
    inputs = torch.randn(40, joint.shape[1])
    last = (program, joint, out)
    expected = attention_of(inputs, *last, 0, 40)
    assert not expected.isnan().any()
    inputs[37:] = math.nan
    for begin in (30, 36):
        found = attention_of(inputs, *last, begin, 40)
        assert torch.equal(found[: 37 - begin], expected[begin:37])
        assert found[37 - begin :].isnan().all()
