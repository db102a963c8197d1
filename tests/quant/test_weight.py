"""Grids, codes and packing, against the compressed-tensors library."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.core.errors import InputError
from compress.quant.config import Grid
from compress.quant.formats.compressed_tensors import (
    pack_weight,
    quantization_config,
    unpack_weight,
)
from compress.quant.formats.packing import pack_int32, unpack_int32
from compress.quant.weight import code_range, minmax_grid, round_to_grid


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8), rows=st.integers(1, 9), n=st.integers(1, 101), seed=st.integers(0, 99)
)
def test_packing_round_trips_and_equals_the_library(bits, rows, n, seed):
    low, high = code_range(bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high + 1, (rows, n), generator=generator).to(torch.int8)
    packed = pack_int32(codes, bits)
    assert torch.equal(unpack_int32(packed, bits, n), codes)
    assert torch.equal(packed, pack_to_int32(codes, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, None])
def test_rounding_equals_the_library_bit_for_bit(dtype, symmetric, bits, group_size):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(24, 96, generator=generator).to(dtype)
    weight[3, 16:32] = 0  # a group of zeros
    weight[5] = weight[5].abs() + 1  # rows of one sign: zero must stay inside the range
    weight[6] = -weight[5]
    group = group_size or 96
    scale, zero_point = minmax_grid(weight, bits, group, symmetric)
    ours = round_to_grid(weight, scale, zero_point, bits, group)

    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if group_size else "channel",
        group_size=group_size,
    )
    grouped = weight.view(24, -1, group)
    their_scale, their_zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    assert torch.equal(scale, their_scale)
    live = torch.ones_like(scale, dtype=torch.bool)
    live[3, 16 // group] = bool(group_size is None)  # the library's zero point there is NaN's cast
    if zero_point is not None:
        assert torch.equal(zero_point[live], their_zero.to(torch.int8)[live])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight": weight, "weight_scale": scale}
    if zero_point is not None:
        state["weight_zero_point"] = zero_point
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    packed = pack_weight(ours)
    assert set(packed) == set(theirs)
    for name, tensor in packed.items():
        assert torch.equal(tensor, theirs[name]), name
    dense = PackedQuantizationCompressor.decompress(theirs, scheme)["weight"]
    assert torch.equal(ours.dequantize(), dense)
    assert ours.dequantize().dtype == dtype
    config = quantization_config({"a": Grid(bits, group_size, symmetric)}, [])
    again = unpack_weight(packed, config, "a")
    assert torch.equal(again.codes, ours.codes)
    assert again.group_size == group
    assert torch.equal(again.dequantize(), dense)


def test_the_older_packing_of_3_bits_is_refused():
    config = quantization_config({"a": Grid(3, None)}, [])
    packed = {"weight_packed": torch.zeros(2, 10, dtype=torch.int32)}  # 96 codes, 10 a word
    packed |= {"weight_shape": torch.tensor([2, 96]), "weight_scale": torch.ones(2, 1)}
    with pytest.raises(InputError, match=r"a has 10 words a row, not 9.*before 2026"):
        unpack_weight(packed, config, "a")


def test_group_of_zeros_stays_zero():
    for symmetric in (True, False):
        weight = torch.randn(2, 32)
        weight[1, :16] = 0
        rounded = round_to_grid(weight, *minmax_grid(weight, 4, 16, symmetric), 4, 16)
        assert torch.equal(rounded.dequantize()[1, :16], torch.zeros(16))


def test_group_size_must_divide_the_width():
    with pytest.raises(ValueError, match="group size 5 does not divide the width 32"):
        minmax_grid(torch.ones(2, 32), 4, 5, True)


@pytest.mark.parametrize("group_size", [64, None])
def test_config_is_valid_for_the_library(group_size):
    config = quantization_config({"a": Grid(4, group_size, False)}, ["lm_head"])
    parsed = QuantizationConfig.model_validate(config)
    weights = parsed.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, group_size, False)
    assert parsed.ignore == ["lm_head"]
