"""AWQ on the second moment."""

import pytest
import torch

from compress.core.blocks import linears_of
from compress.core.config import build
from compress.core.errors import InputError
from compress.quant.awq import AwqConfig, AwqStage
from compress.quant.config import Grid
from compress.quant.formats.compressed_tensors import quantization_config, unpack_weight
from compress.quant.rtn import RtnConfig


@pytest.fixture
def error_after(one_block, apply):
    """A function that says how far a method moves the output of a block, relative."""

    def measure(config) -> float:
        block, before = one_block()
        apply(config, block)
        return ((block.probe(block.module) - before).square().sum() / before.square().sum()).item()

    return measure


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_step_lowers_the_blocks_error(error_after, symmetric):
    """RTN > AWQ's scales alone > scales and clipping, on a block with outlier channels."""
    grid = {"bits": 4, "group_size": 16, "symmetric": symmetric}
    rtn = error_after(RtnConfig(**grid))
    scaled = error_after(AwqConfig(**grid, clip=False))
    both = error_after(AwqConfig(**grid))
    assert scaled < 0.9 * rtn
    assert both < scaled


def test_reported_error_is_the_error_of_what_is_packed(one_block, apply):
    """The report's number, recomputed from the packed tensors and the inputs themselves."""
    block, _ = one_block("qwen2")
    outcome = apply(AwqConfig(group_size=16), block)
    config = quantization_config({block.full_name("mlp.down_proj"): Grid(4, 16)}, [])
    name = "mlp.down_proj"
    packed = {
        key.removeprefix(f"{name}."): tensor
        for key, tensor in outcome.tensors.items()
        if key.startswith(f"{name}.")
    }
    dense = unpack_weight(packed, config, block.full_name(name)).dequantize()
    assert torch.equal(dense, linears_of(block.module)[name].weight)
    report = next(layer for layer in outcome.layers if layer.name.endswith(name))
    assert report.output_error is not None
    assert 0 < report.output_error < 0.05
    assert "scaled into mlp.up_proj" in report.note


def test_ignored_linears_stay_exact_up_to_the_fold(one_block, apply):
    """An ignored linear is still scaled with its siblings, so the function stays the same."""
    block, before = one_block()
    everything = AwqConfig(group_size=16, ignore=("re:.*",))
    outcome = apply(everything, block)
    assert not outcome.tensors
    assert all("named by ignore" in layer.note for layer in outcome.layers)
    only_q = AwqConfig(
        group_size=16,
        ignore=("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        bits=8,
    )
    apply(only_q, block)
    assert block.probe is not None
    after = block.probe(block.module)
    # what is left is 8-bit rounding of q alone
    assert (after - before).norm() < 0.01 * before.norm()


def test_linear_that_calibration_never_reached_is_quantized_and_said(one_block, apply):
    block, _ = one_block()
    block.module.add_module("spare", torch.nn.Linear(48, 16))
    outcome = apply(AwqConfig(group_size=16), block)
    spare = next(layer for layer in outcome.layers if layer.name.endswith("spare"))
    assert spare.method == "awq"
    assert "never reached" in spare.note


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"grupsize": 64}, "did you mean 'group_size'"),
        ({"clip_least": 1.5}, "clip_least"),
        ({"symmetric": "perhaps"}, "symmetric"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(InputError, match=message):
        build(AwqConfig, values, "method awq")


def test_symmetric_search_uses_both_signs_and_beats_every_unsigned_scale():
    """Against brute force: 400 positive scales a group, the error measured on the inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 16, generator=generator)
    weight[:, 3] = weight[:, 3].abs() + 3  # the largest weight of each row is positive
    x = torch.randn(200, 16, generator=generator) * torch.linspace(0.2, 3, 16)
    ours = AwqStage(AwqConfig(), {}).round(weight, x.T @ x / 200, Grid(4, 16), torch.float32)
    assert (ours.scale < 0).float().mean() > 0.7
    error = ((ours.dequantize() - weight) @ x.T).square().sum(1)
    best = torch.full((32,), float("inf"))
    for factor in torch.linspace(0.3, 1.2, 400):
        scale = weight.abs().amax(1, keepdim=True) / 7.5 * factor
        dense = (weight / scale).round().clamp(-8, 7) * scale
        best = torch.minimum(best, ((dense - weight) @ x.T).square().sum(1))
    assert error.sum() < 0.95 * best.sum()


def test_scales_too_small_for_float16_stay_usable():
    """A group of tiny weights would get scale 0 in float16, and codes of 0 / 0."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    weight[:, :16] *= 1e-9
    rounded = AwqStage(AwqConfig(), {}).round(weight, torch.eye(32), Grid(4, 16), torch.float16)
    assert (rounded.scale != 0).all()
    dense = rounded.dequantize().float()
    assert torch.equal(dense[:, :16], torch.zeros(4, 16))
    assert (dense[:, 16:] - weight[:, 16:]).abs().max() < 0.5
