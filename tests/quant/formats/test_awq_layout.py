"""The AutoAWQ layout, read here from its definition, one number at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.core.errors import InputError
from compress.quant.config import Grid
from compress.quant.formats import awq
from compress.quant.weight import QuantizedWeight

NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each nibble within a word, low nibble first


def random_weight(rows, columns, group_size, symmetric, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
    scale = torch.randn(rows, columns // group_size, generator=generator).half()
    zero_point = torch.randint(-8, 8, scale.shape, generator=generator).to(torch.int8)
    zero_point[0, 0] = 5  # never zero everywhere, which is read as symmetric
    return QuantizedWeight(codes, scale, None if symmetric else zero_point, 4, group_size)


def read(tensors, group_size):
    """The dense weight [out, in] in float64, by plain loops."""
    qweight, qzeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales = tensors["scales"].double()
    columns, rows = len(qweight), 8 * len(qweight[0])
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(columns):
        group = i // group_size
        for word in range(rows // 8):
            for nibble, place in enumerate(NIBBLES):
                q = (qweight[i][word] >> 4 * nibble) & 15
                z = (qzeros[group][word] >> 4 * nibble) & 15
                output = 8 * word + place
                weight[output, i] = scales[group, output] * (q - z)
    return weight


def config_for(group_size):
    return awq.quantization_config({"layer": Grid(4, group_size)}, ["lm_head"])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "group_size"), [((8, 12), 4), ((24, 33), 11), ((16, 7), None)])
def test_layout_read_by_definition(shape, group_size, symmetric):
    size = group_size or shape[1]
    weight = random_weight(*shape, size, symmetric)
    assert (weight.scale < 0).any()
    tensors = awq.pack_weight(weight)
    assert tensors["qweight"].shape == (shape[1], shape[0] // 8)
    assert tensors["qzeros"].shape == (shape[1] // size, shape[0] // 8)
    assert tensors["scales"].shape == (shape[1] // size, shape[0])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32, torch.float16}
    wide = QuantizedWeight(weight.codes, weight.scale.double(), weight.zero_point, 4, size)
    assert torch.equal(read(tensors, size), wide.dequantize())
    if symmetric:
        assert (tensors["qzeros"] == 0x88888888 - (1 << 32)).all()


@settings(max_examples=30, deadline=None)
@given(
    words=st.integers(1, 4),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 9),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(words, groups, group_size, symmetric, seed):
    weight = random_weight(8 * words, groups * group_size, group_size, symmetric, seed)
    tensors = awq.pack_weight(weight)
    again = awq.unpack_weight(tensors, config_for(group_size), "layer")
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert again.symmetric == symmetric
    if not symmetric:
        assert torch.equal(again.zero_point, weight.zero_point)
    assert again.group_size == group_size
    assert all(torch.equal(tensors[k], v) for k, v in awq.pack_weight(again).items())


@pytest.mark.parametrize(
    ("grids", "shape", "reordered", "message"),
    [
        ({"a": Grid(8, 16)}, (8, 32), (), "a: AWQ has 4 bits, not 8"),
        (
            {"a": Grid(4, 16), "b": Grid(4, 32)},
            (8, 32),
            (),
            "b: its group size is 32 and that of a",
        ),
        ({"a": Grid(4, 16)}, (12, 32), (), "a: 12 outputs are no multiple of 8"),
        ({"a": Grid(4, 16)}, (8, 32), ("a",), "a: its columns are grouped in activation order"),
    ],
)
def test_refusals(grids, shape, reordered, message):
    refusal = awq.refusal(grids, dict.fromkeys(grids, shape), reordered)
    assert refusal is not None
    assert refusal.startswith(message)


def test_old_names_and_other_versions():
    assert awq.grid_of({"w_bit": 4, "q_group_size": 64}, "layer").group_size == 64
    assert awq.foreign(config_for(64)) is None
    assert awq.foreign({"version": "GEMV"}) == "version gemv"
    assert awq.foreign({"version": "gemm", "zero_point": False}) == "zero_point false"
    with pytest.raises(InputError, match="bits"):
        awq.grid_of({"group_size": 64}, "layer")
