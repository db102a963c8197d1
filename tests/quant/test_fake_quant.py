"""Fake-quantized linears: what they compute, and their gradients."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress.quant.fake_quant import FakeQuantLinear, fake_quantize, put_on_grid
from compress.quant.training import Rates, parameter_groups
from compress.quant.weight import QuantizedWeight, code_range

ROWS, COLUMNS, GROUP = 5, 24, 8


def problem(bits, symmetric, dtype=torch.float64, seed=0):
    """Latents inside and outside the range, scales of both signs, zero points, a gradient."""
    generator = torch.Generator().manual_seed(seed + bits)
    low, high = code_range(bits)
    latent = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64) * 1.2 * high
    scale = torch.randn(ROWS, COLUMNS // GROUP, generator=generator).to(dtype)
    zero = None
    if not symmetric:
        zero = torch.randint(low, high + 1, scale.shape, generator=generator).to(torch.int8)
    upstream = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    return latent, scale, zero, upstream


def spread(per_group):
    return per_group.repeat_interleave(GROUP, dim=1)


CASES = pytest.mark.parametrize(
    ("bits", "symmetric"), [(bits, s) for bits in (2, 3, 4, 8) for s in (True, False)]
)


@CASES
def test_gradients_are_autograds_on_a_surrogate_in_float64(bits, symmetric):
    """The surrogate computes the same weight, autograd sees the identity instead of rounding."""
    latent, scale, zero, upstream = problem(bits, symmetric)
    low, high = code_range(bits)
    offset = 0 if zero is None else spread(zero).double()

    ours = [latent.clone().requires_grad_(), scale.clone().requires_grad_()]
    (fake_quantize(ours[0], ours[1], zero, bits) * upstream).sum().backward()

    theirs = [latent.clone().requires_grad_(), scale.clone().requires_grad_()]
    # clamp passes no gradient outside its limits, the detached remainder none anywhere
    within = (theirs[0] + offset).clamp(low - 0.5, high + 0.5) - offset
    codes = (latent + offset).round().clamp(low, high)
    surrogate = (within + (codes - offset - within).detach()) * spread(theirs[1])
    assert torch.equal(surrogate, fake_quantize(latent, scale, zero, bits))
    (surrogate * upstream).sum().backward()

    lsq = (GROUP * high) ** -0.5
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[1].grad, lsq * theirs[1].grad, rtol=1e-12, atol=1e-12)
    clipped = (latent + offset < low - 0.5) | (latent + offset > high + 0.5)
    assert clipped.any()
    assert not clipped.all()
    assert torch.equal(ours[0].grad == 0, clipped)


@CASES
def test_the_gradient_of_a_scale_is_the_slope(bits, symmetric):
    """Codes hold still when a scale moves, so any difference will do."""
    latent, scale, zero, upstream = problem(bits, symmetric, seed=1)
    scale.requires_grad_()
    (fake_quantize(latent, scale, zero, bits) * upstream).sum().backward()
    slope = torch.empty_like(scale)
    with torch.no_grad():
        for place in torch.cartesian_prod(*map(torch.arange, scale.shape)).tolist():
            moved = scale.clone()
            moved[tuple(place)] += 0.25
            change = fake_quantize(latent, moved, zero, bits) - fake_quantize(
                latent, scale, zero, bits
            )
            slope[tuple(place)] = (change * upstream).sum() / 0.25
    lsq = (GROUP * code_range(bits)[1]) ** -0.5
    torch.testing.assert_close(scale.grad, lsq * slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_gradients_are_lsqs_for_a_weight_that_moves_with_its_scale(bits):
    """Esser et al., eq. 3, written out: ŵ of (w, s), with w = u s."""
    latent, scale, _, upstream = problem(bits, True, seed=2)
    low, high = code_range(bits)
    ours = [latent.clone().requires_grad_(), scale.clone().requires_grad_()]
    (fake_quantize(ours[0], ours[1], None, bits) * upstream).sum().backward()

    v = latent  # w / s
    inside = (v >= low - 0.5) & (v <= high + 0.5)
    by_scale = torch.where(inside, v.round() - v, v.round().clamp(low, high))
    by_weight = inside.double()
    total = by_scale + by_weight * latent  # the chain through w = u s
    expected = (total * upstream).view(ROWS, -1, GROUP).sum(dim=-1) * (GROUP * high) ** -0.5
    torch.testing.assert_close(ours[1].grad, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours[0].grad, by_weight * spread(scale) * upstream)


def quantized(bits=4, symmetric=True, dtype=torch.float32, seed=0):
    latent, scale, zero, _ = problem(bits, symmetric, dtype, seed)
    codes = latent.round().clamp(*code_range(bits)).to(torch.int8)
    return QuantizedWeight(codes, scale, zero, bits, GROUP)


def loaded(weight):
    """What loaders make of a packed weight for a model in float32."""
    return replace(weight, scale=weight.scale.float()).dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@CASES
def test_it_computes_with_what_will_be_packed_bit_for_bit(bits, symmetric, dtype):
    """At the start, and after training has moved latents, gains and the signs of scales."""
    start = quantized(bits, symmetric, dtype)
    generator = torch.Generator().manual_seed(3)
    unrounded = loaded(start) + torch.randn(ROWS, COLUMNS, generator=generator)
    linear = FakeQuantLinear(start, unrounded)
    assert torch.equal(linear.weight, loaded(start))
    assert torch.equal(linear.quantized().codes, start.codes)
    assert torch.equal(linear.quantized().scale, start.scale)
    with torch.no_grad():
        linear.latent += torch.randn(linear.latent.shape, generator=generator) * 2
        linear.gain += torch.randn(linear.gain.shape, generator=generator)
        linear.gain[0, 0] = 0  # a scale of zero would make codes meaningless
    now = linear.quantized()
    assert not torch.equal(now.codes, start.codes)
    assert now.scale.dtype == dtype
    assert (now.scale != 0).all()
    assert torch.equal(linear.weight, loaded(now))
    assert torch.equal(linear.weight.to(dtype), now.dequantize())
    x = torch.randn(3, COLUMNS, generator=generator)
    assert torch.equal(linear(x), F.linear(x, loaded(now)))


def test_a_code_flips_after_half_a_step_whatever_the_scale_and_its_sign():
    scale = torch.tensor([[1e-3, -50.0, 1.0]])
    start = QuantizedWeight(torch.zeros(1, 24, dtype=torch.int8), scale, None, 4, GROUP)
    linear = FakeQuantLinear(start, torch.zeros(1, 24))
    with torch.no_grad():
        linear.latent += 0.49
        assert (linear.quantized().codes == 0).all()
        linear.latent += 0.02
        assert (linear.quantized().codes == 1).all()
        linear.gain *= -3  # moves no weight over a boundary
        assert (linear.quantized().codes == 1).all()


def test_a_latent_starts_in_its_cell_towards_where_the_weight_was():
    """Scales of both signs, a zero point; weights left and right, outside, and past the range."""
    scale = torch.tensor([[0.5], [-0.5]])
    codes = torch.tensor([[0, 1, 2, 7]] * 2, dtype=torch.int8)
    zero = torch.tensor([[1], [0]], dtype=torch.int8)
    weight = QuantizedWeight(codes, scale, zero, 4, 4)
    offset = torch.tensor([0.25, -0.5, 1.7, 3.0])  # in steps
    steps = codes - zero.float()
    linear = FakeQuantLinear(weight, (steps + offset) * scale)
    expected = torch.tensor([0.2, -0.4, 0.4, 0.4])
    torch.testing.assert_close(linear.latent.detach(), steps + expected)
    torch.testing.assert_close(linear.place(), expected.expand(2, 4))
    assert torch.equal(linear.quantized().codes, codes)


def test_it_keeps_no_tensor_for_the_backward_pass_but_its_arguments():
    latent, scale, _, _ = problem(4, True, torch.float32)
    latent = latent.float().requires_grad_()
    scale.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_quantize(latent, scale, None, 4)
    assert {t.data_ptr() for t in kept} == {latent.data_ptr(), scale.data_ptr()}


def test_under_autocast_gradients_stay_float32():
    linear = FakeQuantLinear(quantized(), loaded(quantized()), nn.Parameter(torch.zeros(ROWS)))
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(torch.randn(3, COLUMNS))
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
    for parameter in (linear.latent, linear.gain, linear.bias):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0


def test_put_on_grid_replaces_linears_and_keeps_biases():
    module = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.ReLU(), nn.Sequential(nn.Linear(ROWS, 2)))
    bias = module[0].bias
    placed = put_on_grid(module, {"0": quantized()})
    assert module[0] is placed["0"]
    assert placed["0"].bias is bias
    assert isinstance(module[2][0], nn.Linear)
    assert "bits=4" in repr(module)


def test_what_learns_and_at_which_rate():
    """Gains, latents, and vectors by their size; no other matrix, and no vector of zeros."""
    module = nn.Sequential(
        nn.Embedding(3, COLUMNS), nn.LayerNorm(COLUMNS), nn.Linear(COLUMNS, ROWS)
    )
    with torch.no_grad():
        module[1].weight.fill_(-3)
        module[2].bias.fill_(0.5)
    linear = put_on_grid(module, {"2": quantized()})["2"]
    groups = parameter_groups(module, Rates(0.02, 0.01))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates == {
        id(linear.gain): 0.01,
        id(linear.latent): 0.02,
        id(module[1].weight): pytest.approx(0.03),
        id(linear.bias): pytest.approx(0.005),
    }
    assert {id(p) for p in module.parameters() if p.requires_grad} == set(rates)
    assert all(group["weight_decay"] == 0 for group in groups)

    scales_only = copy.deepcopy(module)
    parameter_groups(scales_only, Rates(0.02, 0.01, "scales"))
    assert not scales_only[2].latent.requires_grad
    scales_only(torch.tensor([0, 2])).sum().backward()
    assert scales_only[2].latent.grad is None
    assert scales_only[2].gain.grad is not None
