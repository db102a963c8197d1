"""Linear layers by PyTorch's native operations against de-quantizing and multiplying."""

from dataclasses import replace

import pytest
import torch

from compress.kernels.lowbit_matmul import LinearWeight, pack
from compress.kernels.lowbit_matmul.cpu import DENSE_ROWS
from compress.kernels.lowbit_matmul.reference import linear

CPU = torch.device("cpu")


def quantized(rows, columns, bits, group_size, shifted=False, bias=False):
    """Random codes over the whole range, and scales of both signs that bfloat16 holds."""
    generator = torch.Generator().manual_seed(rows + columns)
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (rows, columns), generator=generator, dtype=torch.int8)
    groups = columns // group_size
    scale, shift = torch.randn(2, rows, groups, generator=generator).mul(0.1).bfloat16().float()
    return LinearWeight(
        None,
        codes,
        scale,
        shift if shifted else None,
        group_size,
        bits,
        torch.randn(rows, generator=generator) if bias else None,
    )


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_dequantize_in_runs_of_rows(monkeypatch):
    weight = quantized(37, 48, 4, 16, shifted=True)
    scale = weight.scale.repeat_interleave(16, dim=1)
    expected = weight.codes * scale + weight.shift.repeat_interleave(16, dim=1)
    monkeypatch.setattr("compress.kernels.lowbit_matmul.weight.CHUNK_ELEMENTS", 5 * 48)
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert torch.equal(weight.dequantize(torch.bfloat16), expected.bfloat16())
    dense = LinearWeight.of_dense(expected.bfloat16())
    assert dense.dequantize(torch.bfloat16) is dense.dense
    assert (dense.shape, dense.bits) == ((37, 48), 16)


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "group_size", "shifted", "kind"),
    [
        (960, 576, 4, 64, False, "int4 (aten)"),
        (48, 576, 4, 32, True, "int4 (aten)"),
        (50, 576, 4, 576, False, "int4 (aten)"),  # rows padded, one group of 576 as nine of 64
        (3, 96, 3, 96, True, "int4 (aten)"),
        (17, 512, 2, 512, True, "int4 (aten)"),
        (64, 1536, 4, 128, False, "int4 (aten)"),
        (50, 48, 4, 48, False, "int8 (aten)"),
        (51, 576, 8, 576, False, "int8 (aten)"),
        (7, 80, 8, 80, False, "int8 (aten)"),
        (50, 72, 8, 72, False, "dense"),  # the operation reads past the end of such a row
        (50, 576, 8, 64, False, "dense"),
        (50, 576, 8, 576, True, "dense"),
        (50, 48, 4, 16, False, "dense"),
    ],
)
@pytest.mark.parametrize("tokens", [1, 2, 5, 33, DENSE_ROWS])
def test_against_the_reference_in_bfloat16(rows, columns, bits, group_size, shifted, kind, tokens):
    """The reference rounds W to bfloat16, the native operations do not (or do it elsewhere), and
    all round y: two or three roundings of 2^-9, random, so about 2^-9 of the norm; four times that
    is allowed."""
    weight = quantized(rows, columns, bits, group_size, shifted, bias=rows % 2 == 0)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed = pack(weight, torch.bfloat16, CPU)
    assert packed.kind == kind
    found = packed(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == (tokens, rows)
    assert relative_error(found, linear(x, weight)) < 2**-7
    # Against arithmetic in float32 as well: the scales here are exact in bfloat16.
    bias = None if weight.bias is None else weight.bias.bfloat16().float()
    exact = linear(x.float(), replace(weight, bias=bias))
    assert relative_error(found, exact) < 2**-7


def test_scales_that_bfloat16_does_not_hold_are_rounded():
    """All weights of a group change by one factor, up to 1 + 2^-9 (and y is rounded)."""
    weight = quantized(64, 576, 4, 64)
    generator = torch.Generator().manual_seed(4)
    weight = replace(weight, scale=torch.randn(64, 9, generator=generator))
    x = torch.randn(3, 576, generator=generator).bfloat16()
    found = pack(weight, torch.bfloat16, CPU)(x)
    assert relative_error(found, linear(x.float(), weight)) < 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_dense(dtype):
    weight = quantized(50, 96, 4, 32, shifted=True, bias=True)
    packed = pack(weight, dtype, CPU)
    assert packed.kind == "dense"
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(packed(x), linear(x, weight))


def test_views_are_taken_as_x():
    """Rows of a larger tensor, as slices of a batch are."""
    weight = quantized(64, 64, 4, 32)
    wide = torch.randn(6, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    packed = pack(weight, torch.bfloat16, CPU)
    assert torch.equal(packed(wide[::2, :64]), packed(wide[::2, :64].contiguous()))
