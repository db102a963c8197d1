"""Attention on a paged cache, against attention on contiguous tensors, and cpu.py against it."""

import pytest
import torch

from compress.kernels.paged_attention import cpu, reference, write_kv
from compress.kernels.paged_attention.cache import FP8, INT8, quantize
from tests.kernels.paged import BLOCK, make, plain

# Of the sequences with one new token those of 16 and 17 share a batch, the others are alone.
MIXED = [(0, 1), (0, 37), (15, 1), (16, 1), (100, 20), (299, 1), (63, 2), (31, 1), (40, 16)]


@pytest.mark.parametrize("window", [None, 1, 16, 23, 1000])
@pytest.mark.parametrize("sizes", [(9, 3, 64), (6, 2, 8), (4, 4, 128), (3, 1, 48)])
def test_float32_against_contiguous(sizes, window):
    """Sums of a few hundred terms in float32: 1e-5 of values of order 1."""
    batch, contiguous = make(MIXED, *sizes, torch.float32)
    starts = batch[3].tolist()
    for implementation in (reference, cpu):
        found = implementation.paged_attention(*batch, 0.3, window)
        for row, (k, v) in enumerate(contiguous):
            run = slice(starts[row], starts[row + 1])
            expected = plain(batch[0][run], k, v, 0.3, window)
            torch.testing.assert_close(found[run].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("codes", [INT8, FP8])
@pytest.mark.parametrize("window", [None, 1, 23])
@pytest.mark.parametrize("sizes", [(9, 3, 64), (4, 4, 128), (3, 1, 48)])
def test_codes_against_contiguous(sizes, window, codes):
    """As in float32: codes and scales are what they stand for, exactly."""
    batch, contiguous = make(MIXED, *sizes, torch.float32, codes=codes)
    starts = batch[3].tolist()
    for implementation in (reference, cpu):
        found = implementation.paged_attention(*batch, 0.3, window)
        for row, (k, v) in enumerate(contiguous):
            run = slice(starts[row], starts[row + 1])
            expected = plain(batch[0][run], k, v, 0.3, window)
            torch.testing.assert_close(found[run].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("codes", [INT8, FP8])
def test_codes_are_the_nearest(codes):
    """Of all codes in use none is nearer to a number than the one that it has."""
    bits = torch.arange(256, dtype=torch.uint8).view(codes.dtype).double()
    all_codes = bits[bits.abs() <= codes.largest]
    x = torch.randn(50, 48) * 10.0 ** torch.arange(-25, 25)[:, None]
    held, scales = quantize(x, codes)
    assert torch.equal(scales, x.abs().amax(1) / codes.largest)
    steps = x.double() / scales.double()[:, None]
    nearest = (steps[..., None] - all_codes).abs().amin(-1)
    assert ((steps - held.double()).abs() <= nearest * (1 + 1e-6)).all()
    assert (held.double().abs().amax(1) == codes.largest).all()


@pytest.mark.parametrize("codes", [INT8, FP8])
def test_codes_of_what_cannot_be_coded(codes):
    """A row of zeros is zeros; NaN and infinities are NaN; a fixed scale cuts off."""
    x = torch.zeros(4, 8)
    x[1, 3], x[2, 7], x[3] = float("nan"), float("-inf"), torch.arange(8) - 3.0
    held, scales = quantize(x, codes)
    assert (held[0].float() * scales[0] == 0).all()
    assert scales.isnan().tolist() == [False, True, True, False]
    held, scales = quantize(x, codes, fixed=1 / codes.largest)
    assert scales.isnan().tolist() == [False, True, True, False]
    expected = x[3].clamp(-1, 1)
    torch.testing.assert_close(held[3].float() * scales[3], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("window", [None, 23])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])
def test_cpu_against_the_reference_in_16_bits(dtype, unit, window):
    """One query: the same arithmetic in float32, so the results differ by one step (four
    units) where they fall on two sides of a rounding.
    Runs: weights are rounded too, and sums of values of order 1 with them; 8 units are allowed."""
    batch, _ = make(MIXED, 9, 3, 64, dtype)
    found = cpu.paged_attention(*batch, 0.125, window)
    expected = reference.paged_attention(*batch, 0.125, window)
    assert found.dtype == dtype
    singles = [start for (_, new), start in zip(MIXED, batch[3].tolist(), strict=False) if new == 1]
    close = {"rtol": 4 * unit, "atol": unit / 8}
    torch.testing.assert_close(found[singles].float(), expected[singles].float(), **close)
    torch.testing.assert_close(found.float(), expected.float(), rtol=8 * unit, atol=8 * unit)


def test_many_sequences_of_one_token():
    """Every context from one token to past four blocks, in one batch."""
    batch, _ = make([(before, 1) for before in range(70)], 4, 2, 16, torch.float32)
    for window in (None, 5, 32):
        found = cpu.paged_attention(*batch, 0.25, window)
        expected = reference.paged_attention(*batch, 0.25, window)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_writing_leaves_other_places_alone():
    k_cache, v_cache = torch.zeros(2, 3, 2, BLOCK, 8)
    k, v = torch.ones(2, 2, 2, 8)
    write_kv(k_cache, v_cache, k, 2 * v, torch.tensor([5, 2 * BLOCK + 15]))
    assert k_cache.sum() == k.sum()
    assert torch.equal(v_cache[0, :, 5], 2 * v[0])
    assert torch.equal(v_cache[2, :, 15], 2 * v[1])
