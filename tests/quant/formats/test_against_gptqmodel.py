"""What gptqmodel makes of our GPTQ and AWQ tensors, where it is installed."""

import pytest
import torch

from compress.quant.config import Grid
from compress.quant.formats import awq, gptq
from compress.quant.weight import QuantizedWeight, code_range

pytest.importorskip("gptqmodel")


def random_weight(bits, group_size, symmetric):
    generator = torch.Generator().manual_seed(bits)
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (64, 128), generator=generator).to(torch.int8)
    scale = torch.randn(64, 128 // group_size, generator=generator).half()
    zero_point = torch.randint(low, high + 1, scale.shape, generator=generator).to(torch.int8)
    return QuantizedWeight(codes, scale, None if symmetric else zero_point, bits, group_size)


def loaded(module, tensors):
    assert {name for name, _ in module.named_buffers()} >= set(tensors)
    for name, tensor in tensors.items():
        buffer = getattr(module, name)
        assert buffer.shape == tensor.shape, name
        assert buffer.dtype == tensor.dtype, name
        buffer.copy_(tensor)
    return module


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
def test_gptq(bits, symmetric, group_size):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    weight = random_weight(bits, group_size, symmetric)
    config = gptq.quantization_config({"a": Grid(bits, group_size, symmetric)}, [])
    module = TorchLinear(bits, group_size, symmetric, False, 128, 64)
    loaded(module, gptq.pack_weight(weight))
    if config["checkpoint_format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.post_init()
    # both multiply an integer by a float16 scale once
    assert torch.equal(module.dequantize_weight().T.half(), weight.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
def test_awq(symmetric, group_size):
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    weight = random_weight(4, group_size, symmetric)
    module = AwqTorchLinear(4, group_size, symmetric, False, 128, 64, register_buffers=True)
    loaded(module, awq.pack_weight(weight))
    module.post_init()
    identity = torch.eye(128, dtype=torch.float16)
    assert torch.equal(module(identity).T, weight.dequantize())


def test_dynamic_rules():
    from gptqmodel.quantization.config import dynamic_get

    names = [f"model.layers.{i}.mlp.{n}" for i in range(12) for n in ("up_proj", "down_proj")]
    grids = dict.fromkeys(names, Grid(4, 32)) | {names[3]: Grid(8, 64)}
    left = grids.popitem()[0]
    dynamic = gptq.quantization_config(grids, [left])["dynamic"]
    assert dynamic_get(dynamic, left) is False
    for name, grid in grids.items():
        assert dynamic_get(dynamic, name, "bits", 4) == grid.bits, name
        assert dynamic_get(dynamic, name, "group_size", 32) == grid.group_size, name
