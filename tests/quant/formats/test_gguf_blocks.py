"""GGUF blocks against gguf-py's own quantizer and de-quantizer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.quant.formats.gguf import BLOCK_BYTES, pack_blocks, unpack_blocks

gguf = pytest.importorskip("gguf")


def of_type(kind):
    return gguf.GGMLQuantizationType[kind]


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(sorted(BLOCK_BYTES)),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_weights_quantized_by_gguf_come_back_bit_for_bit(kind, rows, blocks, seed):
    weight = np.random.default_rng(seed).normal(size=(rows, 32 * blocks)).astype(np.float32)
    data = gguf.quants.quantize(weight, of_type(kind))
    unpacked = unpack_blocks(torch.from_numpy(data), kind)
    assert unpacked.scale.dtype == torch.float32
    theirs = gguf.quants.dequantize(data, of_type(kind))
    assert np.array_equal(unpacked.dequantize().numpy(), theirs)
    assert np.array_equal(pack_blocks(unpacked, kind).numpy(), data)


@pytest.mark.parametrize("kind", sorted(BLOCK_BYTES))
def test_every_byte_counts(kind):
    """Random bytes, with finite floats, of every sign and size."""
    generator = np.random.default_rng(1)
    data = generator.integers(0, 256, (7, 3, BLOCK_BYTES[kind]), dtype=np.uint8)
    floats = 2 if kind == "Q4_1" else 1
    values = generator.normal(size=(7, 3, floats)).astype(np.float16)
    values[0, 0] = 6e-8  # the least float16
    data[..., : 2 * floats] = values.view(np.uint8)
    data = data.reshape(7, -1)
    unpacked = unpack_blocks(torch.from_numpy(data), kind)
    theirs = gguf.quants.dequantize(data, of_type(kind))
    assert np.array_equal(unpacked.dequantize().numpy(), theirs)
    assert np.array_equal(pack_blocks(unpacked, kind).numpy(), data)
