"""Triton's paged attention against attention in float64 on contiguous tensors."""

import numpy as np
import pytest
import torch

from compress.kernels.paged_attention import plan, reference
from compress.kernels.paged_attention import triton as kernels
from compress.kernels.paged_attention.cache import FP8, INT8, QuantizedBlocks
from compress.kernels.paged_attention.shapes import candidates, choose
from compress.kernels.workspace import Workspace
from tests.kernels.guarded import Guard
from tests.kernels.paged import make, plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter computes in bfloat16 in a way of its own.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# float32: sums of a few hundred terms of order 1.  16 bits: one rounding of the result, one of each
# weight; both are half a step relative to values below 4, of steps 2^-10 and 2^-7.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4 * 2**-11, torch.bfloat16: 4 * 2**-8}
MIXED = [(0, 1), (0, 37), (15, 1), (16, 1), (100, 20), (299, 1), (63, 2), (31, 1), (40, 16)]


@pytest.fixture
def guard(monkeypatch):
    guard = Guard()
    monkeypatch.setattr(kernels.torch, "empty_like", guard.empty_like)
    yield guard
    guard.check()


def on_device(x):
    if isinstance(x, QuantizedBlocks):
        return QuantizedBlocks(x.kind, x.codes.to(DEVICE), x.scales.to(DEVICE))
    return x.to(DEVICE)


def check(
    sequences, sizes, dtype, window=None, splits=1, tiled=False, transposed=False, shape=None,
    codes=None,
):  # fmt: skip
    """Run, and compare with float64 sequence by sequence; return the arguments and the output."""
    heads, kv_heads, _ = sizes
    batch, contiguous = make(sequences, *sizes, dtype, codes=codes)
    starts = batch[3].numpy()
    tiles = plan.tiles_of(starts, heads, kv_heads) if tiled else None
    if tiled and tiles is None:
        tiles = np.array([(row, 0) for row in range(len(sequences))], np.int32)
    most_new = max(new for _, new in sequences)
    arguments = [on_device(x) for x in batch]
    if transposed:
        arguments[5] = arguments[5].T.contiguous().T
    workspace = Workspace(torch.device(DEVICE))
    workspace.floats(1 << 20).fill_(float("nan"))
    options = {
        "tiles": None if tiles is None else torch.from_numpy(tiles).to(DEVICE),
        "most_new": most_new,
        "splits": splits,
        "workspace": workspace,
        "shape": shape,
    }
    found = kernels.paged_attention(*arguments, 0.3, window, **options)
    for row, (k, v) in enumerate(contiguous):
        run = slice(starts[row], starts[row + 1])
        expected = plain(batch[0][run], k, v, 0.3, window)
        close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(found[run].double().cpu(), expected, **close)
    assert not workspace.counters(1).any()
    if splits > 1:  # who arrives last must not matter
        again = kernels.paged_attention(*arguments, 0.3, window, **options)
        assert torch.equal(found, again)
    return arguments, options, found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ((9, 3, 64), None),
        ((9, 3, 64), 23),
        ((6, 2, 8), None),
        ((6, 2, 8), 1),
        ((4, 4, 128), 23),
        ((3, 1, 48), None),
    ],
)
def test_mixed_batch(sizes, window, dtype, guard):
    check(MIXED, sizes, dtype, window, splits=1, tiled=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 700])
def test_decode_in_splits(window, splits, dtype, guard):
    """Of 5 splits the first context fills 4, of which the window leaves 3, and the others 1."""
    sequences = [(1023, 1), (0, 1), (255, 1), (256, 1)]
    check(sequences, (6, 2, 32), dtype, window, splits, transposed=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 300])
def test_several_new_tokens_in_splits(window, dtype, guard):
    """Causal among themselves; the last split of 514 holds two keys that the first of five new
    tokens does not see, so that a row has no key in it."""
    check([(509, 5), (3, 5), (700, 4), (0, 1)], (6, 2, 32), dtype, window, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("longest", [9, 17, 40])
def test_drafts_of_several_lengths(longest, dtype, guard):
    """Four heads a token: in 16 bits 36 rows are one program's, 68 two programs', and 160 those of
    two tall ones.  None are listed as tiles; the longest context fills up to three splits."""
    sequences = [(1100, longest), (0, 2), (30, 1), (511, 5)]
    if dtype != torch.float32:
        height = choose(4 * longest, 4, 16, dtype, 90).block_m
        assert (height, -(-4 * longest // height)) == {9: (64, 1), 17: (64, 2), 40: (128, 2)}[
            longest
        ]
    check(sequences, (4, 1, 16), dtype, None, 3)
    check(sequences, (4, 1, 16), dtype, 100, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [None, 1150])
def test_prefill_behind_a_cached_prefix(window, splits, dtype, guard):
    """Tiles of 42 tokens, three heads each, the last one not full, in up to two splits."""
    check([(1200, 50), (0, 43), (1030, 1)], (3, 1, 64), dtype, window, splits, tiled=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", [INT8, FP8])
@pytest.mark.parametrize(
    ("sizes", "window"), [((9, 3, 64), 23), ((4, 4, 128), None), ((3, 1, 48), None)]
)
def test_codes_of_8_bits(sizes, window, codes, dtype, guard):
    """As without codes, since these are exact in 16 bits; values and keys of a row are as large as
    those, or a thousandth, which float16's weights have to bear."""
    check(MIXED, sizes, dtype, window, tiled=True, codes=codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", [INT8, FP8])
def test_codes_in_splits(codes, dtype, guard):
    """Decode, drafts, and a prefill behind a prefix, each in several splits."""
    check([(1023, 1), (0, 1), (255, 1)], (6, 2, 32), dtype, None, 5, transposed=True, codes=codes)
    check([(509, 5), (3, 5), (700, 4)], (6, 2, 32), dtype, 300, 4, codes=codes)
    check([(1200, 50), (0, 43)], (3, 1, 64), dtype, None, 3, tiled=True, codes=codes)


def test_small_values_of_float16_are_not_lost(guard):
    """With scales of 1e-8 alone all weights would be zero in float16."""
    batch, _ = make([(300, 1), (40, 1)], 4, 2, 32, torch.float16, codes=INT8)
    batch[2].scales.mul_(1e-7)
    large = kernels.paged_attention(
        *map(on_device, batch[:6]), 0.3, tiles=None, most_new=1, splits=2,
        workspace=Workspace(torch.device(DEVICE)),
    )  # fmt: skip
    exact = reference.paged_attention(batch[0].float(), *batch[1:], 0.3)
    assert exact.abs().max() < 1e-6
    step = 2**-24  # of float16's smallest numbers, in which the result is
    torch.testing.assert_close(large.float().cpu(), exact, atol=0.6 * step, rtol=0)


@pytest.mark.parametrize("group", [1, 16, 20])
def test_group_sizes(group, guard):
    check([(300, 3), (17, 1)], (2 * group, 2, 16), torch.float16, None, 2)


def test_head_of_256(guard):
    check([(270, 40), (300, 1)], (4, 1, 256), torch.float16, None, 2, tiled=True)


@pytest.mark.parametrize("splits", [1, 4])
def test_padding(splits, guard):
    """Sequences without a context, as CUDA graphs have them: zeros, whatever q holds."""
    sequences = [(300, 1), (600, 1)]
    arguments, options, found = check(sequences, (6, 2, 32), torch.float16, None, splits)
    q, k_cache, v_cache, _, contexts, tables = arguments
    padding = torch.full((2, *q.shape[1:]), float("nan"), dtype=q.dtype, device=DEVICE)
    more = kernels.paged_attention(
        torch.cat([q, padding]), k_cache, v_cache,
        torch.arange(5, dtype=torch.int32, device=DEVICE),
        torch.cat([contexts, torch.zeros_like(contexts)]),
        torch.cat([tables, torch.full_like(tables, -1)]), 0.3, **options,
    )  # fmt: skip
    assert torch.equal(more[:2], found)
    assert (more[2:] == 0).all()


def test_other_shapes():
    """What a tuner may choose gives the same result, for a tile of five tokens in two splits."""
    chosen, *others = candidates(15, 3, 16, torch.float16, 90)
    assert chosen == choose(15, 3, 16, torch.float16, 90)
    for shape in others[::16]:
        check([(400, 5), (3, 1)], (3, 1, 16), torch.float16, None, 2, shape=shape)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shapes_hold_every_tile(dtype, capability):
    for head_dim in (8, 64, 80, 128, 256):
        for group in (1, 3, 8, 20, 128):
            tokens = plan.tile_tokens(group, 1)
            for new in range(1, tokens + 1):
                shape = choose(new * group, group, head_dim, dtype, capability)
                assert group <= shape.block_m <= plan.TILE_ROWS
                assert plan.MIN_SPLIT % shape.block_n == 0


def test_what_is_compiled_ahead_is_what_is_chosen():
    """Any number of new tokens of heads in groups up to 16, in 16 bits, one tile or more."""
    for capability in (80, 90, 100):
        compiled = [entry.constants for entry in kernels.entries(capability)]
        for head_dim in (64, 128):
            for group in range(1, 17):
                for new in range(1, plan.tile_tokens(group, 1) + 2):
                    sizes = (new * group, group, head_dim, torch.bfloat16, capability)
                    for codes in (None, INT8, FP8):
                        shape = choose(*sizes, coded=codes is not None)
                        expected = kernels.constants(shape, head_dim, codes)
                        absent = {} if codes else {"k_scales": None, "v_scales": None}
                        assert expected | absent in compiled


def test_tiles_cover_every_token_once():
    starts = np.array([0, 1, 101, 101, 144], np.int32)
    tiles = plan.tiles_of(starts, 9, 3)
    assert tiles is not None
    assert tiles.dtype == np.int32
    size = plan.tile_tokens(9, 3)
    assert size == 42
    covered = []
    for sequence, first in tiles.tolist():
        count = starts[sequence + 1] - starts[sequence]
        covered += range(starts[sequence] + first, starts[sequence] + min(first + size, count))
    assert sorted(covered) == list(range(144))
    assert plan.tiles_of(np.array([0, 1, 43], np.int32), 9, 3) is None
    with pytest.raises(ValueError, match="129 query heads"):
        plan.tile_tokens(129, 1)


def test_splits():
    """Of 132 SMs with two programs each."""
    assert plan.splits_of(1, 8, 32768, 132) == 32  # 256 of 264 at a time
    assert plan.splits_of(1, 8, 100, 132) == 1
    assert plan.splits_of(1, 3, 1024, 132) == 4  # no share below 256
    assert plan.splits_of(1000, 8, 32768, 132) == 1
    for tiles in range(1, 70):
        splits = plan.splits_of(tiles, 8, 1 << 17, 132)
        programs = splits * tiles * 8
        assert programs / 264 / -(-programs // 264) > 0.75  # busy
