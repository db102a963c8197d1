"""The Triton kernels on codes of few bits, against arithmetic in float64.

In Triton's interpreter where there is no GPU, with float16 and float32; on one, bfloat16 too.
"""

import itertools
from dataclasses import replace
from importlib import resources

import pytest
import torch

from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.lowbit_matmul import triton as module
from compress.kernels.lowbit_matmul.configs import (
    CAPABILITIES,
    Config,
    as_json,
    candidates,
    choose,
    most_tokens,
    splits,
    table,
)
from compress.kernels.lowbit_matmul.layout import fits, layout_of, pack
from compress.kernels.lowbit_matmul.triton import TritonLinear, entries
from compress.kernels.workspace import Workspace
from tests.kernels.guarded import MARGIN, Guard

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE.type == "cuda")
BITS = (2, 3, 4, 8)
# Sums are in float32: a relative error of some 2^-24 for each of several hundred columns, which add
# up like random steps.  Where y is in 16 bits its rounding (half of 2^-10 and 2^-7 of a value at
# most) is nearly all of the error.
BOUND = {torch.float32: 2**-19, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def quantized(rows, columns, bits, group_size=None, shifted=False, bias=False):
    """Random codes over the whole range; scales of both signs, so that W is around 1 in size."""
    generator = torch.Generator().manual_seed(rows + 10 * columns + bits)
    group_size = group_size or columns
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (rows, columns), generator=generator, dtype=torch.int8)
    scale, shift = torch.randn(2, rows, columns // group_size, generator=generator)
    scale = (scale / -low).half().float()
    return LinearWeight(
        None,
        codes,
        scale,
        shift if shifted else None,  # float32: its scales are kept in float32 too
        group_size,
        bits,
        torch.randn(rows, generator=generator) if bias else None,
    )


def activations(tokens, columns, dtype, seed=1):
    """x as a view into a larger tensor of NaN, which shows what is read beyond it."""
    values = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    around = torch.full((tokens + 2, columns + 2 * MARGIN), torch.nan, dtype=dtype, device=DEVICE)
    x = around[1:-1, MARGIN:-MARGIN]
    x.copy_(values)
    return x


def exact(x, weight, silu_mul=False):
    """x Wᵀ + bias in float64, written out."""
    scale = weight.scale.double().repeat_interleave(weight.group_size, dim=1)
    dense = weight.codes.double() * scale
    if weight.shift is not None:
        dense += weight.shift.double().repeat_interleave(weight.group_size, dim=1)
    y = x.cpu().double() @ dense.mT
    if weight.bias is not None:
        y += weight.bias.double()
    if silu_mul:
        gate, up = y.chunk(2, dim=1)
        y = gate * torch.sigmoid(gate) * up
    return y


def error(found, expected):
    """Norm of the difference over the norm of what is expected."""
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()


@pytest.fixture
def run(monkeypatch):
    """A function that makes a layer and calls it, with NaN and margins around all it may write."""

    def call(weight, x, config="chosen", out_dtype=None, silu_mul=False):
        workspace = Workspace(DEVICE)
        workspace.floats(1 << 16).fill_(torch.nan)
        layer = TritonLinear(weight, x.dtype, DEVICE, workspace, silu_mul)
        guard = Guard()
        with monkeypatch.context() as patch:
            patch.setattr(module.torch, "empty", guard.empty)
            found = [
                layer(x, out_dtype) if config == "chosen" else layer.run(x, config, out_dtype)
                for _ in range(2)
            ]
        assert torch.equal(*found)
        assert not workspace.counters(1).any()
        guard.check()
        return found[0]

    return call


def covering():
    """Every width of codes with every size of groups, and the other choices in turn."""
    sizes = [(16, 336), (32, 576), (48, 576), (64, 320), (128, 640), (None, 77), (None, 1000)]
    tokens, rows = (1, 3, 16, 17, 65, 300), (77, 64, 1, 130)
    cases = [(bits, *size) for bits in BITS for size in sizes]
    for n, (bits, group_size, columns) in enumerate(cases):
        for shifted in (False, True):
            turn = 2 * n + shifted
            dtype = DTYPES[turn // 3 % len(DTYPES)]
            count = tokens[(turn + n // 6) % len(tokens)]
            yield bits, group_size, columns, shifted, rows[turn % 4], count, dtype


@pytest.mark.parametrize(
    ("bits", "group_size", "columns", "shifted", "rows", "tokens", "dtype"), covering()
)
def test_against_float64(run, bits, group_size, columns, shifted, rows, tokens, dtype):
    """With the table's configuration where that is a product, else with one for many tokens."""
    weight = quantized(rows, columns, bits, group_size, shifted, bias=rows == 77)
    x = activations(tokens, columns, dtype)
    config = choose(tokens, bits, 80) or Config(64, 128, 4, 2, 1)
    found = run(weight, x, config)
    assert (found.dtype, found.shape) == (dtype, (tokens, rows))
    assert error(found, exact(x, weight)) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group_size", "columns"), [(48, 96), (128, 256), (None, 77)])
def test_dequantized_weights_are_those_of_the_stored_grid(run, bits, group_size, columns, dtype):
    """x = 1 gives W itself.  Products of a code and a scale are exact in float32, so that W is
    rounded once, here and in `dequantize`; a shift is added after that product is rounded there,
    and before where the compiler makes it one operation."""
    weight = quantized(50, columns, bits, group_size)
    x = torch.eye(columns, dtype=dtype, device=DEVICE)
    for config in (None, Config(64, 128, 2, 2, 1)):
        assert torch.equal(run(weight, x, config).mT.cpu(), weight.dequantize(dtype))
    weight = quantized(50, columns, bits, group_size, shifted=True)
    expected = weight.dequantize(torch.float32)
    found = run(weight, x, None).mT.cpu()
    allowed = torch.finfo(dtype).eps * expected.abs() + 2**-22  # terms of up to 4, in float32
    assert ((found.float() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("silu_mul", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_many_tokens_are_multiplied_with_dequantized_rows(
    run, monkeypatch, silu_mul, bias, shifted
):
    """In runs of 64 rows here.  W and y, and gate and up, are rounded to float16 (2^-11 each at
    most, and the gate's error counts for more by its slope): four times that is allowed."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 100 * 192 * 2)
    weight = quantized(150, 192, 4, 64, shifted, bias)
    weight = replace(weight, bias=weight.bias.half().float() if bias else None)
    x = activations(300, 192, torch.float16)
    assert choose(300, 4, 80) is None
    found = run(weight, x / 8, silu_mul=silu_mul)
    assert error(found, exact(x / 8, weight, silu_mul)) < 2**-9


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (Config(16, 8, 1, 2, 1), 1),
        (Config(32, 16, 1, 3, 1), 1),
        (Config(64, 8, 2, 2, 100), 5),  # one for each tile
        (Config(128, 64, 8, 4, 100), 2),  # of three tiles, which is what four stages ask for
        (Config(16, 32, 1, 2, 14), 2),  # seven blocks of rows
    ],
)
@pytest.mark.parametrize("silu_mul", [False, True])
def test_configurations_give_the_same(run, config, parts, silu_mul):
    weight = quantized(100, 320, 4, 64, shifted=True, bias=True)
    x = activations(9, 320, torch.float16) / 16
    blocks = -(-9 // config.block_tokens) * -(-100 // config.block_rows)
    assert splits(config, blocks, 5, sm_count=1)[0] == parts
    found = run(weight, x, config, silu_mul=silu_mul)
    assert found.shape == (9, 50 if silu_mul else 100)
    assert error(found, exact(x, weight, silu_mul)) < BOUND[torch.float16]
    # y in float32 has the error of float32
    found = run(weight, x, config, torch.float32, silu_mul)
    assert found.dtype == torch.float32
    assert error(found, exact(x, weight, silu_mul)) < BOUND[torch.float32]


def test_another_dtype_of_y_is_never_dequantized(run, monkeypatch):
    monkeypatch.setattr(TritonLinear, "_by_dequantizing", None)
    weight = quantized(20, 64, 4, 32)
    x = activations(most_tokens(4, 80) + 1, 64, torch.float16)
    found = run(weight, x, out_dtype=torch.float32)
    assert error(found, exact(x, weight)) < BOUND[torch.float32]


def test_no_tokens_columns_apart_and_widths_between(run):
    weight = quantized(20, 64, 5, 32)  # stored as 8 bits
    x = activations(7, 64, torch.float16)
    assert run(weight, x[:0]).shape == (0, 20)
    expected = run(weight, x)
    assert error(expected, exact(x, weight)) < BOUND[torch.float16]
    assert torch.equal(run(weight, x.mT.contiguous().mT), expected)


def test_why_a_weight_does_not_fit():
    weight = quantized(8, 48, 4, 48)
    assert fits(weight) is None
    assert fits(quantized(8, 77, 4)) is None
    assert fits(quantized(8, 96, 4, 48)) is None
    assert "24 columns" in str(fits(quantized(8, 48, 4, 24)))
    assert "not quantized" in str(fits(LinearWeight.of_dense(torch.zeros(4, 16))))
    assert "9 bits" in str(fits(replace(weight, bits=9)))


@pytest.mark.parametrize(
    ("bits", "columns", "group_size", "words", "group", "tiles"),
    [
        (4, 4096, 128, 32, 128, 32),
        (4, 576, 64, 16, 64, 9),  # tiles of 128 columns would be padded
        (4, 4096, 16, 16, 16, 64),
        (4, 576, 48, 16, 16, 9),
        (4, 4096, 256, 32, 256, 32),
        (4, 1000, 1000, 32, 0, 8),
        (2, 4096, 64, 32, 64, 16),
        (2, 896, 128, 16, 128, 7),
        (3, 4096, 128, 16, 128, 16),
        (3, 576, 96, 16, 32, 3),
        (8, 4096, 4096, 64, 0, 32),
        (8, 4096, 32, 32, 32, 64),
        (6, 77, 77, 16, 0, 3),
    ],
)
def test_layouts(bits, columns, group_size, words, group, tiles):
    layout = layout_of(bits, columns, group_size)
    assert (layout.words, layout.group, layout.tiles) == (words, group, tiles)
    assert layout.whole == (columns == tiles * layout.tile)


@pytest.mark.parametrize("bits", BITS)
def test_nothing_but_the_bits_of_codes_is_stored(bits):
    """Every code is where unpack.py's formula finds it, and a width of b takes b bits a weight."""
    weight = quantized(5, 512, bits, 128)
    packed = pack(weight, torch.device("cpu"))
    assert packed.words.nbytes == 5 * 512 * bits // 8
    assert packed.scale.dtype == torch.float16
    assert packed.bytes == packed.words.nbytes + packed.scale.nbytes
    layout = packed.layout
    words = (packed.words.int() & 0xFFFF).tolist()  # [tile][plane][row][place]
    for row, column in itertools.product(range(5), range(512)):
        tile, rest = divmod(column, layout.tile)
        i, place = divmod(rest, layout.words)
        w = [plane[row][place] for plane in words[tile]]
        if bits == 3:
            high_bits = (2, 4, 6, 8, 0, 10, 12, 14, 3, 5, 7, 9, 1, 11, 13, 15)
            u = (w[i // 8] >> 2 * (i % 8)) & 3 | (w[2] >> high_bits[i] & 1) << 2
        else:
            u = (w[0] >> bits * i) & ((1 << bits) - 1)
        assert u - (1 << (bits - 1)) == weight.codes[row, column]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", BITS)
def test_the_table_has_a_choice_for_every_number_of_tokens(capability, bits):
    most = most_tokens(bits, capability)
    for tokens in (1, 2, 8, 9, 16, 17, 33, most):
        config = choose(tokens, bits, capability)
        assert config is not None
        assert config.block_tokens >= min(tokens, 32)
        # what the sums need of a program's registers, and mma.sync's 16 rows a warp
        assert config.block_rows * config.block_tokens // (32 * config.num_warps) <= 64
        assert config.block_rows >= 16 * config.num_warps
    assert choose(most + 1, bits, capability) is None
    assert choose(1, bits, capability + 3) == choose(1, bits, capability)
    assert {choose(n, bits, capability).block_tokens for n in (1, 16, 32)} <= {
        config.block_tokens for n in (1, 16, 32) for config in candidates(n, capability)
    }


def test_the_table_as_text():
    stored = resources.files("compress.kernels.lowbit_matmul").joinpath("configs.json")
    assert stored.read_text(encoding="utf-8") == as_json(table())


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_entries_name_every_argument(capability):
    found = entries(capability)
    assert 15 <= len(found) <= 24
    assert len({entry.name for entry in found}) == len(found)
    for entry in found:
        assert {*entry.types, *entry.constants} == set(entry.kernel.arg_names)
        assert not {*entry.types} & {*entry.constants}
        assert entry.aligned <= set(entry.types)
