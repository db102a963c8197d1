"""Latent attention in plain PyTorch and its faster way on a CPU, against attention in float64."""

import pytest
import torch

from compress.kernels.latent_attention import cpu, latent_attention, reference
from compress.kernels.paged_attention.cache import FP8, INT8
from tests.kernels.latents import make, plain

SIZES = [(9, 32, 8, 24, 64), (1, 7, 2, 3, 5), (3, 40, 16, 48, 24)]
MIXED = [(0, 1), (0, 37), (15, 1), (100, 20), (63, 2), (0, 90), (40, 90), (299, 1)]
# Sums of a few hundred terms of order 1 in float32.  In bfloat16 keys, values, weights and the
# result round by 2^-9 each, relative to values of up to 4, in the half that is un-absorbed.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4 * 2**-7}


@pytest.mark.parametrize("way", [reference, cpu])
@pytest.mark.parametrize("codes", [None, INT8, FP8])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", SIZES)
def test_mixed_batch(sizes, dtype, codes, way) -> None:
    batch, contiguous = make(MIXED, sizes, dtype, codes)
    q, _, _, up, starts, *_ = batch
    found = way.latent_attention(*batch, 0.3)
    assert found.dtype == dtype
    for row, (keys, latents) in enumerate(contiguous):
        run = slice(starts[row], starts[row + 1])
        expected = plain(q[run], keys, latents, up, 0.3)
        close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(found[run].double(), expected, **close)


def test_which_form_is_cheaper() -> None:
    """Products of a position: R (P + v) to expand it, then P + v a token and head; 2 R absorbed."""
    for sizes in SIZES:
        batch, _ = make([(0, 1)], sizes, torch.float32)
        _, nope, _, value, rank = sizes
        for new in (1, 2, 16, 31, 32, 64, 65, 200):
            expanded = rank * (nope + value) + new * (nope + value)
            assert cpu.expanding_pays(new, batch[3]) == (expanded < new * 2 * rank), (sizes, new)


def test_both_forms_are_in_the_mixed_batch() -> None:
    up = make([(0, 1)], SIZES[0], torch.float32)[0][3]
    assert {cpu.expanding_pays(new, up) for _, new in MIXED} == {True, False}


def test_a_cpu_takes_its_own_way(monkeypatch) -> None:
    batch, _ = make([(0, 3)], SIZES[0], torch.float32)
    monkeypatch.setattr(cpu, "latent_attention", lambda *_: "cpu")
    assert latent_attention(*batch, 1.0) == "cpu"
