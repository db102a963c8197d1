"""The GPTQ layout, read here from its definition, one number at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.core.errors import InputError
from compress.quant.config import Grid
from compress.quant.formats import gptq
from compress.quant.weight import QuantizedWeight, code_range


def random_weight(rows, columns, bits, group_size, symmetric, seed=0):
    """Any codes, scales of both signs, zero points of the whole range."""
    generator = torch.Generator().manual_seed(seed)
    low, high = code_range(bits)
    groups = -(-columns // group_size)
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator).to(torch.int8)
    scale = torch.randn(rows, groups, generator=generator).half()
    zero_point = torch.randint(low, high + 1, scale.shape, generator=generator).to(torch.int8)
    return QuantizedWeight(codes, scale, None if symmetric else zero_point, bits, group_size)


def fields(words, bits):
    """Unsigned fields of a run of int32 words: `bits` each, the low bits first.

    3 bits as AutoGPTQ's pack loop does it: 10 fields in the first word, the 11th split 2 + 1, ten
    in the second, the 22nd split 1 + 2, ten in the third.
    """
    words = [int(word) & 0xFFFFFFFF for word in words]
    if bits != 3:
        mask = (1 << bits) - 1
        return [(w >> shift) & mask for w in words for shift in range(0, 32, bits)]
    out = []
    for first, second, third in zip(words[::3], words[1::3], words[2::3], strict=True):
        out += [(first >> 3 * k) & 7 for k in range(10)]
        out.append((first >> 30) | (second & 1) << 2)
        out += [(second >> 3 * k + 1) & 7 for k in range(10)]
        out.append((second >> 31) | (third & 3) << 1)
        out += [(third >> 3 * k + 2) & 7 for k in range(10)]
    return out


def read(tensors, bits, version):
    """The dense weight [out, in] in float64, by plain loops."""
    qweight, qzeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy()
    scales, g_idx = tensors["scales"].numpy().astype(np.float64), tensors["g_idx"].numpy()
    columns, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    weight = np.zeros((rows, columns))
    zeros = [fields(line, bits) for line in qzeros]
    for o in range(rows):
        q = fields(qweight[:, o], bits)
        for i in range(columns):
            group = g_idx[i]
            zero = zeros[group][o] + (version == "gptq")
            weight[o, i] = scales[group, o] * (q[i] - zero)
    return weight


def config_for(weight, **changes):
    size = None if weight.group_size == weight.shape[1] else weight.group_size
    grid = Grid(weight.bits, size, weight.symmetric)
    return gptq.quantization_config({"layer": grid}, []) | changes


SHAPES = {2: (16, 48), 3: (32, 96), 4: (8, 40), 8: (12, 36)}  # the least, and odd multiples


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [4, None])
def test_layout_read_by_definition(bits, symmetric, group_size):
    rows, columns = SHAPES[bits]
    weight = random_weight(rows, columns, bits, group_size or columns, symmetric)
    assert (weight.scale < 0).any()
    tensors, config = gptq.pack_weight(weight), config_for(weight)
    assert tensors["qweight"].shape == (columns * bits // 32, rows)
    assert tensors["qzeros"].shape == (weight.scale.shape[1], rows * bits // 32)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32, torch.float16}
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    dense = torch.from_numpy(read(tensors, bits, config["checkpoint_format"]))
    wide = QuantizedWeight(
        weight.codes, weight.scale.double(), weight.zero_point, bits, weight.group_size
    )
    assert torch.equal(dense, wide.dequantize())


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    group_size=st.sampled_from([1, 8, 12, 32]),  # 12 does not divide: the last group is short
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(bits, rows, columns, group_size, symmetric, seed):
    weight = random_weight(32 * rows, 32 * columns, bits, group_size, symmetric, seed)
    config = config_for(weight) | {"group_size": group_size}
    tensors = gptq.pack_weight(weight)
    again = gptq.unpack_weight(tensors, config, "layer")
    assert_same(again, weight)
    assert all(torch.equal(tensors[k], v) for k, v in gptq.pack_weight(again).items())


def assert_same(one, two):
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scale, two.scale)
    assert (one.bits, one.group_size) == (two.bits, two.group_size)
    for name in ("zero_point", "group_of", "offset"):
        first, second = getattr(one, name), getattr(two, name)
        assert (first is None) == (second is None), name
        assert first is None or torch.equal(first, second), name


def hand_made(bits=4, version="gptq"):
    """A v1 or v2 checkpoint's tensors, packed here, with columns grouped in activation order."""
    generator = np.random.default_rng(0)
    rows, columns, groups = 8, 32, 4
    q = generator.integers(0, 1 << bits, (columns, rows))
    z = generator.integers(1, 1 << bits, (groups, rows))  # no 0, which v1 cannot say
    scales = generator.normal(size=(groups, rows)).astype(np.float16)
    g_idx = generator.permutation(np.repeat(np.arange(groups), columns // groups))
    per_word = 32 // bits
    qweight = np.zeros((columns // per_word, rows), np.int64)
    for i in range(columns):
        qweight[i // per_word] |= q[i] << (bits * (i % per_word))
    qzeros = np.zeros((groups, rows // per_word), np.int64)
    for o in range(rows):
        qzeros[:, o // per_word] |= (z[:, o] - (version == "gptq")) << (bits * (o % per_word))
    dense = (scales[g_idx].astype(np.float64) * (q - z[g_idx])).T
    tensors = {"qweight": qweight.astype(np.uint32).view(np.int32), "scales": scales}
    tensors |= {"qzeros": qzeros.astype(np.uint32).view(np.int32)}
    tensors |= {"g_idx": g_idx.astype(np.int32)}
    return {name: torch.from_numpy(t.copy()) for name, t in tensors.items()}, dense


@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("bits", [4, 8])
def test_activation_order_and_versions_are_read(version, bits):
    tensors, dense = hand_made(bits, version or "gptq")
    config = {"bits": bits, "group_size": 8, "sym": False, "desc_act": True}
    config |= {"checkpoint_format": version} if version else {}  # AutoGPTQ wrote none: v1
    weight = gptq.unpack_weight(tensors, config, "layer")
    assert weight.group_of is not None
    assert weight.scale.dtype == torch.float16
    wide = QuantizedWeight(
        weight.codes, weight.scale.double(), weight.zero_point, bits, 8, group_of=weight.group_of
    )
    assert np.array_equal(wide.dequantize().numpy(), dense)
    packed = gptq.pack_weight(weight)  # v2
    for name in ("qweight", "scales", "g_idx") if version != "gptq_v2" else packed:
        assert torch.equal(packed[name], tensors[name]), name


def test_symmetric_only_if_every_zero_point_is_in_the_middle():
    weight = random_weight(8, 32, 4, 8, symmetric=True)
    tensors, config = gptq.pack_weight(weight), config_for(weight)
    assert gptq.unpack_weight(tensors, config, "layer").zero_point is None
    assert gptq.unpack_weight(tensors, config | {"sym": False}, "layer").zero_point is not None
    tensors["qzeros"][1] += 1 << 8  # the third output's zero point in the second group
    zero_point = gptq.unpack_weight(tensors, config, "layer").zero_point
    assert zero_point is not None
    assert zero_point.count_nonzero() == 1
    assert zero_point[2, 1] == 1


def test_v1_zero_points_of_zero_are_refused():
    weight = random_weight(8, 32, 4, 8, symmetric=False)
    weight.zero_point[3, 2] = -8
    tensors = gptq.pack_weight(weight)
    tensors["qzeros"] -= 0x11111111  # what writers of v1 do to the words
    with pytest.raises(InputError, match=r"layer stores zero points of 0 in GPTQ v1.*gptq_v2"):
        gptq.unpack_weight(tensors, config_for(weight, checkpoint_format="gptq"), "layer")


@pytest.mark.parametrize(
    ("bits", "shape", "message"),
    [
        (4, (8, 20), "20 inputs of 4 bits do not fill words of 32 bits"),
        (4, (20, 8), "20 outputs of 4 bits"),
        (3, (32, 48), "48 inputs of 3 bits"),
        (2, (8, 16), "8 outputs of 2 bits"),
        (8, (2, 16), "2 outputs of 8 bits"),
    ],
)
def test_shapes_that_do_not_fill_words_are_refused(bits, shape, message):
    refusal = gptq.refusal({"a.b": Grid(bits, None)}, {"a.b": shape})
    assert refusal is not None
    assert refusal.startswith(f"a.b: {message}")
    assert gptq.refusal({"a.b": Grid(bits, None)}, {"a.b": SHAPES[bits]}) is None


def test_dynamic_says_what_differs_and_what_is_left():
    block = "model.layers.1"
    names = {"attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("up_proj", "down_proj")}
    grids = {f"{block}.{part}.{n}": Grid(4, 128) for part in names for n in names[part]}
    grids |= {f"model.layers.1{i}.mlp.up_proj": Grid(4, 128) for i in range(9)}
    eight = [f"{block}.attn.{n}" for n in names["attn"]]
    grids |= dict.fromkeys(eight, Grid(8, 32))
    left = [f"{block}.mlp.down_proj", "lm_head"]
    del grids[left[0]]
    config = gptq.quantization_config(grids, left)
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 128, True)
    changes = {"bits": 8, "group_size": 32, "sym": True}
    rules = {rf"+:^model\.layers\.1\.attn\.{n}$": changes for n in ("q_proj", "k_proj", "v_proj")}
    rules[r"+:^model\.layers\.1\.attn\.qkv_proj$"] = changes  # vLLM's name of the three
    rules[r"-:^model\.layers\.1\.mlp\.down_proj$"] = {}
    assert config["dynamic"] == rules
    for name, grid in grids.items():
        assert gptq.grid_of(config, name) == grid


def test_versions_cannot_be_mixed():
    grids = {"a": Grid(4, 8, True), "b": Grid(4, 8, False)}
    refusal = gptq.refusal(grids, dict.fromkeys(grids, (8, 32)))
    assert refusal is not None
    assert refusal.startswith("b: it is asymmetric and a is not")
