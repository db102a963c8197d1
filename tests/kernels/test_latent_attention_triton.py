"""Triton's latent attention against attention in float64, and what it writes against PyTorch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.kernels.latent_attention import LatentShape, LatentWeights
from compress.kernels.latent_attention import triton as kernels
from compress.kernels.latent_attention.shapes import MOST_ROWS, choose, head_blocks, most_rows
from compress.kernels.paged_attention import plan
from compress.kernels.paged_attention.cache import FP8, INT8, QuantizedBlocks, new_blocks, quantize
from compress.kernels.rope import apply_rope, rope_table
from compress.kernels.workspace import Workspace
from tests.kernels.guarded import Guard
from tests.kernels.latents import make, plain

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter computes in bfloat16 in a way of its own.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
# float32: sums of a few hundred terms of order 1.  16 bits: absorbed queries, weights, sums of
# latents and the result round once each, half a step relative to values below 4.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 8 * 2**-11, torch.bfloat16: 8 * 2**-8}
MIXED = [(0, 1), (0, 37), (15, 1), (16, 1), (100, 20), (299, 1), (63, 2), (40, 16)]
OURS = (9, 32, 32, 64, 128)


@pytest.fixture
def guard(monkeypatch):
    guard = Guard()
    monkeypatch.setattr(kernels.torch, "empty_like", guard.empty_like)
    yield guard
    guard.check()


def on_device(x):
    if isinstance(x, QuantizedBlocks):
        return replace(x, codes=x.codes.to(DEVICE), scales=x.scales.to(DEVICE))
    return x.to(DEVICE)


def check(sequences, sizes, dtype, splits=1, tiled=False, codes=None) -> None:
    """Run, compare with float64 sequence by sequence, and run again: no matter who arrives last."""
    heads, nope, *_ = sizes
    batch, contiguous = make(sequences, sizes, dtype, codes)
    q, keys, latents, up, starts, contexts, tables = batch
    tiles = plan.tiles_of(starts.numpy(), heads, head_blocks(heads, sizes[4])) if tiled else None
    if tiled and tiles is None:
        tiles = np.array([(row, 0) for row in range(len(sequences))], np.int32)
    workspace = Workspace(DEVICE)
    workspace.floats(1 << 20).fill_(float("nan"))

    def run():
        on = on_device(q)
        return kernels.latent_attention(
            on[..., :nope], on[..., nope:].contiguous(), on_device(keys), on_device(latents),
            up.to(DEVICE, dtype), on_device(starts), on_device(contexts),
            on_device(tables.T.contiguous()).T, 0.3,
            tiles=None if tiles is None else torch.from_numpy(tiles).to(DEVICE),
            most_new=max(new for _, new in sequences), splits=splits, workspace=workspace,
        )  # fmt: skip

    found = run()
    for row, (k, c) in enumerate(contiguous):
        new = slice(starts[row], starts[row + 1])
        expected = plain(q[new], k, c, up, 0.3)
        close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(found[new].double().cpu(), expected, **close)
    assert not workspace.counters(1).any()
    if splits > 1:
        assert torch.equal(found, run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [OURS, (3, 7, 2, 5, 20), (20, 16, 8, 16, 48)])
def test_mixed_batch(sizes, dtype, guard) -> None:
    check(MIXED, sizes, dtype, tiled=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 5])
def test_decode_in_splits(splits, dtype, guard) -> None:
    """Of 5 splits the first context fills 4, the others 1."""
    check([(1023, 1), (0, 1), (255, 1), (256, 1)], (9, 12, 8, 10, 32), dtype, splits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_drafts_in_splits(dtype, guard) -> None:
    """Several new tokens, causal among themselves: up to 81 rows, of two programs; the last split
    of 514 positions holds two that the first of five new tokens does not see."""
    check([(509, 5), (3, 5), (700, 9), (0, 1)], (9, 12, 8, 10, 32), dtype, 4)


@pytest.mark.parametrize("codes", [INT8, FP8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_8_bits(dtype, codes, guard) -> None:
    """Rows of the cache are of order 1, or a thousandth, which float16's weights have to bear."""
    check(MIXED, (3, 12, 8, 10, 20), dtype, tiled=True, codes=codes)
    check([(600, 2), (0, 1)], (9, 12, 8, 10, 32), dtype, 3, codes=codes)


def test_more_heads_than_a_program_takes(guard) -> None:
    check([(20, 2), (0, 1)], (2 * MOST_ROWS, 4, 4, 4, 16), torch.float32)


@pytest.mark.parametrize("rank", [20, 512])
@pytest.mark.parametrize("heads", [1, 9, 16, 64, 71, 96, 128, 130])
def test_heads_are_shared_out_evenly(heads, rank) -> None:
    blocks, most = head_blocks(heads, rank), {20: 64, 512: 32}[rank]
    assert most_rows(rank) == most
    assert heads % blocks == 0
    assert heads // blocks <= most
    fewer = [n for n in range(1, blocks) if heads % n == 0]
    assert all(heads // n > most for n in fewer)
    for rows in (1, 16, 33, 200):
        shape = choose(rows * heads // blocks, heads // blocks, rank, torch.bfloat16, 90)
        assert shape.block_m >= heads // blocks


@pytest.mark.parametrize("codes", [None, INT8, FP8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [OURS, (3, 7, 2, 5, 20), (70, 12, 12, 8, 16)])
@pytest.mark.parametrize("apart", [False, True])
def test_what_is_written(apart, sizes, dtype, codes) -> None:
    """Norm, turns and codes are computed in float32 and rounded once, with queries in front of the
    latents or in a tensor of their own.  A padding token (slot -1) writes nothing."""
    heads, nope, rope, value, rank = sizes
    shape = LatentShape(heads, nope, rope, value, rank, 1.0)
    torch.manual_seed(0)
    tokens, blocks = 5, 3
    joint = torch.randn(tokens, (3 if apart else heads * shape.query_dim) + rank + rope).to(dtype)
    queries = torch.randn(tokens, heads * shape.query_dim).to(dtype) if apart else joint
    weights = LatentWeights(torch.rand(rank) + 0.5, 0.1, None)
    positions, slots = torch.arange(tokens) * 7, torch.tensor([33, 2, -1, 46, 17])
    inv_freq = 1.0 / 100 ** (torch.arange(0, rope, 2) / rope)
    cos, sin = rope_table(positions, inv_freq, 1.1, torch.float32)
    keys, latents = (
        on_device(new_blocks((blocks, 1, 16, dim), (blocks, 1, 16), dtype, DEVICE, codes))
        for dim in (rope, rank)
    )
    for part in (keys, latents):
        for tensor in (part,) if codes is None else (part.codes.view(torch.int8), part.scales):
            tensor.fill_(99)
    found = kernels.latent_write(
        queries.to(DEVICE), joint.to(DEVICE), torch.cat([cos, sin], dim=1).to(DEVICE), keys,
        latents, slots.to(DEVICE), replace(weights, gain=weights.gain.to(DEVICE)), shape,
    )  # fmt: skip
    wide = queries[:, : heads * shape.query_dim].float().view(tokens, heads, -1)[..., nope:]
    c, k = joint[:, -rank - rope :].float().split([rank, rope], dim=1)
    turned, k = apply_rope(wide, k[:, None], cos, sin)
    c = c * torch.rsqrt(c.square().mean(1, keepdim=True) + 0.1) * weights.gain
    close = {"rtol": 1e-5 if dtype == torch.float32 else 2**-8, "atol": 1e-5}
    torch.testing.assert_close(found.cpu().float(), turned, **close)
    there = slots >= 0
    for part, x in ((keys, k[:, 0]), (latents, c)):
        if codes is None:
            rows = part.cpu().flatten(0, 2)
            torch.testing.assert_close(rows[slots[there]].float(), x[there], **close)
        else:
            rows, scales = part.codes.cpu().flatten(0, 2), part.scales.cpu().flatten()
            held = rows[slots[there]].float() * scales[slots[there], None]
            _, expected = quantize(x[there], codes)
            torch.testing.assert_close(scales[slots[there]], expected, rtol=1e-5, atol=0)
            step = expected[:, None] * (held / expected[:, None] / 8).abs().clamp(min=1)
            assert ((held - x[there]).abs() <= 0.51 * step).all()
            rows = part.codes.view(torch.int8).cpu().flatten(0, 2)
        others = [row for row in range(48) if row not in slots.tolist()]
        assert (rows[others] == 99).all()
