"""Triton kernels of linear layers that round their inputs, against arithmetic in float64.

In Triton's interpreter where there is no GPU, with float16 and float32; on one, bfloat16 too.
"""

from dataclasses import replace

import pytest
import torch

from compress.kernels.lowbit_matmul.configs import CAPABILITIES, Config, splits
from compress.kernels.lowbit_matmul.weight import InputRounding
from compress.kernels.w8a8_matmul import reference
from compress.kernels.w8a8_matmul import triton as module
from compress.kernels.w8a8_matmul.configs import choose
from compress.kernels.w8a8_matmul.triton import TritonRoundingLinear, entries
from compress.kernels.workspace import Workspace
from tests.kernels.guarded import MARGIN, Guard
from tests.kernels.rounding import KINDS, error, outlying, rounding_weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE.type == "cuda")
# Codes and their sums are exact (fp8: float32's rounding, which adds up like random steps).
# Scales, found and stored outliers are float32: a few units of 2^-24, some tens of terms.  Where y
# has 16 bits, its rounding (half of 2^-10 and 2^-7 of a value at most) is nearly all of the error.
BOUND = {torch.float32: 2**-20, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def activations(tokens, columns, dtype):
    """x as a view into a larger tensor of NaN, which shows what is read beyond it."""
    around = torch.full((tokens + 2, columns + 2 * MARGIN), torch.nan, dtype=dtype, device=DEVICE)
    x = around[1:-1, MARGIN:-MARGIN]
    x.copy_(outlying(tokens, columns))
    return x


def expected_of(x, weight, silu_mul=False):
    """What reference.py says, in float64; stored outliers are in the dtype of x here."""
    inputs = weight.inputs
    if inputs.outlier_weight is not None:
        kept = replace(inputs, outlier_weight=inputs.outlier_weight.to(x.dtype))
        weight = replace(weight, inputs=kept)
    y = reference.linear(x.cpu(), weight)
    if silu_mul:
        gate, up = y.chunk(2, dim=1)
        y = gate * torch.sigmoid(gate) * up
    return y


@pytest.fixture
def run(monkeypatch):
    """A function that makes a layer and calls it, with NaN and margins around all it may write."""

    def call(weight, x, config=None, out_dtype=None, silu_mul=False):
        workspace = Workspace(DEVICE)
        workspace.floats(1 << 16).fill_(torch.nan)
        workspace.scratch(1 << 20, torch.uint8).fill_(0x7F)
        surplus = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        layer = TritonRoundingLinear(weight, x.dtype, DEVICE, workspace, surplus, silu_mul)
        guard = Guard()
        with monkeypatch.context() as patch:
            patch.setattr(module.torch, "empty", guard.empty)
            found = [layer.run(x, config or choose(len(x)), out_dtype) for _ in range(2)]
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
        assert not workspace.counters(1).any()
        guard.check()
        inputs = replace(weight.inputs, outlier_weight=None)
        told = sum(reference.round_token(token, inputs).surplus for token in x.cpu())
        assert surplus.item() == 2 * told
        return found[0]

    return call


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "dtype"),
    [
        (77, 576, 1, torch.float16),
        (64, 77, 3, torch.float32),
        (1, 64, 17, torch.float16),
        (130, 130, 40, torch.float32),
        (50, 1000, 9, DTYPES[-1]),
        (140, 192, 150, torch.float16),
    ],
)
def test_against_float64(run, kind, rows, columns, tokens, dtype):
    weight = rounding_weight(kind, rows, columns, bias=rows == 77)
    x = activations(tokens, columns, dtype)
    found = run(weight, x)
    assert (found.dtype, found.shape) == (dtype, (tokens, rows))
    assert error(found, expected_of(x, weight)) < BOUND[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (Config(16, 8, 1, 2, 1), 1),
        (Config(64, 8, 2, 2, 100), 5),  # one for each tile
        (Config(128, 64, 8, 4, 100), 2),  # of three tiles, which is what four stages ask for
        (Config(32, 16, 1, 2, 8), 2),  # four blocks of rows
    ],
)
@pytest.mark.parametrize("silu_mul", [False, True])
def test_configurations_give_the_same(run, kind, config, parts, silu_mul):
    weight = rounding_weight(kind, 100, 320, bias=True)
    x = activations(9, 320, torch.float16)
    blocks = -(-9 // config.block_tokens) * -(-100 // config.block_rows)
    assert splits(config, blocks, 5, sm_count=1)[0] == parts
    found = run(weight, x, config, torch.float32, silu_mul)
    assert found.shape == (9, 50 if silu_mul else 100)
    expected = expected_of(x, weight, silu_mul)
    # the gate's error counts for more by its slope
    assert error(found, expected) < (4 if silu_mul else 1) * BOUND[torch.float32]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_ratio_is_rounded_as_pytorch_does(kind):
    """All codes, the halves between them and their neighbours, both signs; the first is largest."""
    whole = torch.arange(-128.0, 128)
    if kind == "fp8":
        whole = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
        whole = whole[whole.isfinite()].sort().values
    between = (whole[1:] + whole[:-1]) / 2
    largest = 127.0 if kind == "int8" else 448.0
    points = torch.cat([torch.tensor([largest]), whole, between])
    points = torch.cat([points, points.nextafter(torch.tensor(9e9))])
    points = torch.cat([points, -points]).clamp(-largest, largest)
    layer = TritonRoundingLinear(
        replace(
            rounding_weight(kind, 4, len(points)), inputs=InputRounding(kind, largest)
        ),
        torch.float32, DEVICE, Workspace(DEVICE), torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    tokens = layer._round(points[None].to(DEVICE))
    assert tokens.scales.item() == 1
    expected = points.round() if kind == "int8" else points.to(torch.float8_e4m3fn).float()
    codes = tokens.codes[: len(points)].cpu()
    codes = codes.float() if kind == "int8" else codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(codes, expected)
    assert not tokens.codes[len(points) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_in_its_row(run, kind):
    weight = rounding_weight(kind, 20, 96)
    x = activations(3, 96, torch.float32)
    plain = run(weight, x)
    x[1, 50] = torch.nan
    found = run(weight, x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], plain[[0, 2]])
    x[1, 50] = torch.inf
    assert not run(weight, x)[1].isfinite().any()


def test_no_tokens_and_columns_apart(run):
    weight = rounding_weight("llm.int8", 20, 64)
    x = activations(7, 64, torch.float16)
    assert run(weight, x[:0]).shape == (0, 20)
    assert torch.equal(run(weight, x.mT.contiguous().mT), run(weight, x))


def test_bytes_are_those_of_the_checkpoint():
    """Codes, scales, and stored outlier columns, which are padded to sixteens."""
    surplus = torch.zeros(1, dtype=torch.int64)
    for kind, stored in (("fp8", 0), ("llm.int8", 16 * 2)):
        weight = rounding_weight(kind, 20, 128)
        layer = TritonRoundingLinear(weight, torch.float16, DEVICE, Workspace(DEVICE), surplus)
        assert layer.bytes == 20 * (128 + 4 + stored)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_entries_name_every_argument(capability):
    found = entries(capability)
    assert 15 <= len(found) <= 32
    for entry in found:
        assert {*entry.types, *entry.constants} == set(entry.kernel.arg_names)
        assert not {*entry.types} & {*entry.constants}
        assert entry.aligned <= set(entry.types)
