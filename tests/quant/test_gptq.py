"""GPTQ against independent implementations on small matrices, and inside a block."""

from itertools import pairwise

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from compress.core.blocks import linears_of
from compress.core.config import build
from compress.core.errors import InputError
from compress.quant.awq import AwqConfig
from compress.quant.awq_gptq import AwqGptqConfig
from compress.quant.config import Grid
from compress.quant.formats.compressed_tensors import pack_weight
from compress.quant.gptq import Factor, GptqConfig, GptqStage
from compress.quant.rtn import RtnConfig
from compress.quant.scales import ScaleSearch
from compress.quant.weight import code_range

PLAIN = {"sweeps": 0, "shrinkage": 0.0}


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moment of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator)
    x = torch.randn(8 * columns, columns, generator=generator) @ mix
    x *= torch.linspace(0.3, 2, columns)[torch.randperm(columns, generator=generator)]
    return weight, x.T @ x / len(x)


def rounded(weight, moment, grid, config, dtype=torch.float32):
    factor = Factor.of(moment, grid.group_size or weight.shape[1], config)
    return GptqStage(config, {}).round(weight, factor, grid, dtype), factor


def brute_force_obq(weight, moment, scale, zero, bits, order):
    """Optimal brain quantization (arXiv 2208.11580, eq. 2) in a fixed order, in float64.

    After each column the inverse over the columns still to come is computed anew from its
    definition; no Cholesky factor, no blocks.
    """
    low, high = code_range(bits)
    weight = weight.double().clone()
    codes = torch.zeros_like(weight)
    left = order.tolist()
    total = torch.zeros(len(weight), dtype=torch.float64)
    while left:
        column = left[0]
        inverse = torch.linalg.inv(moment.double()[left][:, left])
        s, z = scale[:, column].double(), zero[:, column].double()
        codes[:, column] = (weight[:, column] / s + z).round().clamp(low, high)
        error = weight[:, column] - (codes[:, column] - z) * s
        total += error.square() / inverse[0, 0]
        weight[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
        left = left[1:]
    return codes, total


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("columns", "group", "symmetric", "act_order"),
    [
        (12, 4, True, True),
        (12, 12, True, True),
        (15, 5, False, True),
        (12, 4, False, False),
        (300, 300, True, True),  # a group of several blocks
        (160, 2, True, True),  # blocks of several groups
        (144, 48, False, True),
    ],
)
def test_equals_a_brute_force_optimal_brain_quantizer(columns, group, symmetric, act_order, bits):
    weight, moment = problem(6, columns, seed=bits)
    config = GptqConfig(**PLAIN, act_order=act_order, damping=1e-2)
    ours, factor = rounded(weight, moment, Grid(bits, group, symmetric), config)
    damped = moment + 1e-2 * moment.diagonal().mean() * torch.eye(columns)
    scale = ours.scale.repeat_interleave(group, dim=1)
    zero = torch.zeros_like(ours.scale) if ours.zero_point is None else ours.zero_point
    zero = zero.repeat_interleave(group, dim=1)
    codes, total = brute_force_obq(weight, damped, scale, zero, bits, factor.order)
    # Equal but where float32 puts a weight on the other side of a rounding boundary, after
    # which the columns to come differ too: that happened to no row at 4 columns a group.
    equal = (codes == ours.codes).all(dim=1)
    assert equal.float().mean() >= (1.0 if columns < 100 else 0.5)
    change = (ours.dequantize() - weight).double()
    loss = ((change @ damped.double()) * change).sum(dim=1)
    assert torch.allclose(loss[equal], total[equal], rtol=1e-3)


def test_order_is_by_activity_and_keeps_groups_together():
    moment = torch.diag(torch.tensor([1.0, 2, 9, 7, 5, 6]))
    assert Factor.of(moment, 2, GptqConfig()).order.tolist() == [2, 3, 5, 4, 1, 0]
    assert Factor.of(moment, 6, GptqConfig()).order.tolist() == [2, 3, 5, 4, 1, 0]
    stored = Factor.of(moment, 2, GptqConfig(act_order=False))
    assert stored.order.tolist() == list(range(6))


def test_sweeps_never_raise_the_error_and_end_where_no_single_code_helps():
    weight, moment = problem(5, 24)
    grid = Grid(3, 8)
    losses = []
    for sweeps in range(5):
        many = GptqConfig(sweeps=sweeps, shrinkage=0.0)
        ours, factor = rounded(weight, moment, grid, many)
        change = ours.dequantize()[:, factor.order] - weight[:, factor.order]
        losses.append(((change @ factor.moment) * change).sum().item())
    assert losses[1] < 0.999 * losses[0]
    assert all(later <= sooner * (1 + 1e-5) for sooner, later in pairwise(losses))

    ours, factor = rounded(weight, moment, grid, GptqConfig(sweeps=60, shrinkage=0.0))
    dense, order = ours.dequantize(), factor.order
    base = (dense - weight)[:, order]
    loss = ((base @ factor.moment) * base).sum(dim=1)
    scale = ours.scale.repeat_interleave(8, dim=1)
    for column in range(24):
        for step in (-1, 1):
            moved = ours.codes[:, column].int() + step
            allowed = (moved >= -4) & (moved <= 3)
            other = dense.clone()
            other[:, column] = moved * scale[:, column]
            change = (other - weight)[:, order]
            worse = ((change @ factor.moment) * change).sum(dim=1)
            assert (worse[allowed] >= loss[allowed] * (1 - 1e-4)).all()


def test_linears_of_one_input_are_rounded_as_if_alone():
    """One column loop over all rows: no row depends on another."""
    weight, moment = problem(10, 32)
    together, _ = rounded(weight, moment, Grid(4, 8), GptqConfig())
    alone, _ = rounded(weight[4:], moment, Grid(4, 8), GptqConfig())
    assert torch.equal(together.codes[4:], alone.codes)
    assert torch.allclose(together.scale[4:], alone.scale, rtol=1e-5)


def test_damping_rises_until_the_factorization_succeeds_and_is_reported():
    """A moment with a negative eigenvalue, as float32 sums can leave it."""
    _, moment = problem(1, 16)
    values, vectors = torch.linalg.eigh(moment)
    values[0] = -0.2 * moment.diagonal().mean()
    broken = vectors @ torch.diag(values) @ vectors.T
    factor = Factor.of(broken, 4, GptqConfig(shrinkage=0.0))
    assert factor.damping == pytest.approx(1.0)
    assert factor.note == "damping raised to 1"
    assert Factor.of(moment, 4, GptqConfig()).note == ""
    with pytest.raises(InputError, match="no Cholesky factor"):
        Factor.of(moment * float("nan"), 4, GptqConfig())


def test_an_input_that_is_always_zero_is_rounded_all_the_same():
    weight, _ = problem(4, 8)
    ours, _ = rounded(weight, torch.zeros(8, 8), Grid(4, 4), GptqConfig())
    assert (ours.dequantize() - weight).abs().max() < 0.6


def test_cross_moment_aims_at_the_originals_output():
    """Inputs that came out of compressed blocks: less error against W x₀ with C than without."""
    generator = torch.Generator().manual_seed(0)
    weight, _ = problem(16, 32)
    mix = torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)
    original = torch.randn(2000, 32, generator=generator) @ mix
    x = 0.8 * original + 0.2 * original.roll(1, dims=1)
    moment, cross = x.T @ x / 2000, original.T @ x / 2000
    config = GptqConfig(**PLAIN, damping=1e-3)
    factor = Factor.of(moment, 8, config)
    stage, grid = GptqStage(config, {}), Grid(4, 8)

    def error(target):
        dense = stage.round(target, factor, grid, torch.float32).dequantize()
        return (original @ weight.T - x @ dense.T).square().sum().item()

    best = weight + weight @ factor.correction(moment, cross)
    exact = weight @ cross @ torch.linalg.inv(moment)
    assert (best - exact).norm() < 0.02 * exact.norm()  # the damping
    assert error(best) < 0.2 * error(weight)
    assert factor.correction(moment, moment).abs().max() == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", [GptqConfig, AwqGptqConfig])
def test_gptq_leaves_less_error_than_awq_and_rtn(one_block, apply, method, symmetric, bits):
    """The reported errors of each linear, which test_awq holds to what is packed."""
    grid = {"bits": bits, "group_size": 16, "symmetric": symmetric}
    errors = {}
    for config in (RtnConfig(**grid), AwqConfig(**grid), method(**grid)):
        block, _ = one_block()
        moments = {n: s.second_moment for s in block.inputs for n in s.linears}
        before = {n: m.weight.detach().clone() for n, m in linears_of(block.module).items()}
        reports = {r.name.removeprefix(block.name + "."): r for r in apply(config, block).layers}
        if config.__class__ is RtnConfig:
            errors["rtn"] = 0.0
            for name, linear in linears_of(block.module).items():
                change, moment = linear.weight - before[name], moments[name]
                power = ((before[name] @ moment) * before[name]).sum()
                errors["rtn"] += (((change @ moment) * change).sum() / power).item()
        else:
            errors[type(config).__name__] = sum(r.output_error for r in reports.values())
    assert errors[method.__name__] < 0.9 * errors["AwqConfig"]
    assert errors["AwqConfig"] < errors["rtn"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, None])
def test_compressed_tensors_decompresses_to_our_weights_bit_for_bit(bits, symmetric, group_size):
    weight, moment = problem(24, 48)
    ours, _ = rounded(
        weight, moment, Grid(bits, group_size, symmetric), GptqConfig(), torch.bfloat16
    )
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if group_size else "channel",
        group_size=group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = PackedQuantizationCompressor.decompress(pack_weight(ours), scheme)["weight"]
    assert torch.equal(theirs, ours.dequantize())
    assert theirs.dtype == torch.bfloat16


def test_overrides_inside_one_input(one_block, apply):
    """v at 8 bits beside q and k at 4: each as if the whole input had its grid."""
    results = []
    for overrides in ({}, {"v_proj": {"bits": 8}}):
        block, _ = one_block()
        config = GptqConfig(group_size=16, overrides=overrides)
        outcome = apply(config, block)
        results.append((outcome, {r.name.rpartition(".")[2]: r for r in outcome.layers}))
    (plain, before), (mixed, after) = results
    assert (after["v_proj"].bits, after["q_proj"].bits) == (8, 4)
    assert after["v_proj"].output_error < 0.01 * before["v_proj"].output_error
    name = "self_attn.q_proj.weight_packed"
    assert torch.equal(plain.tensors[name], mixed.tensors[name])


def test_linear_that_calibration_never_reached_is_quantized_and_said(one_block, apply):
    block, _ = one_block()
    block.module.add_module("spare", torch.nn.Linear(48, 16))
    outcome = apply(GptqConfig(group_size=16), block)
    spare = next(layer for layer in outcome.layers if layer.name.endswith("spare"))
    assert spare.method == "gptq"
    assert spare.output_error is None
    assert "never reached" in spare.note


def test_awq_gptq_says_both(one_block, apply):
    block, before = one_block("qwen2")
    outcome = apply(AwqGptqConfig(group_size=16, bits=8), block)
    assert all("scaled into" in layer.note for layer in outcome.layers)
    assert block.probe is not None
    after = block.probe(block.module)
    assert (after - before).norm() < 0.01 * before.norm()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"damping": 0}, "damping"),
        ({"shrinkage": 1.5}, "shrinkage"),
        ({"sweep": 1}, "did you mean 'sweeps'"),
        ({"clip_least": 0}, "clip_least"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(InputError, match=message):
        build(GptqConfig, values, "method gptq")


def test_scales_are_searched_by_the_schur_complement_of_the_columns_to_come(monkeypatch):
    weight, moment = problem(4, 12)
    seen = []
    search = ScaleSearch.best

    def recording(self, by_group, metric, *rest):
        seen.append(metric[0])
        return search(self, by_group, metric, *rest)

    monkeypatch.setattr(ScaleSearch, "best", recording)
    _, factor = rounded(weight, moment, Grid(4, 4), GptqConfig())
    H = factor.moment.double()
    for start, metric in zip((0, 4, 8), seen, strict=True):
        here, later = slice(start, start + 4), slice(start + 4, 12)
        regained = H[here, later] @ torch.linalg.inv(H[later, later]) @ H[later, here]
        torch.testing.assert_close(metric.double(), H[here, here] - regained, rtol=1e-3, atol=1e-4)


def test_shrinkage_keeps_the_diagonal_and_weakens_the_rest():
    _, moment = problem(1, 6)
    factor = Factor.of(moment, 6, GptqConfig(shrinkage=0.25, damping=1e-3, act_order=False))
    expected = 0.75 * moment + 0.25 * moment.diagonal().diag()
    expected += 1e-3 * moment.diagonal().mean() * torch.eye(6)
    torch.testing.assert_close(factor.moment, expected)
    torch.testing.assert_close(
        factor.upper.T @ factor.upper, torch.linalg.inv(expected), rtol=1e-3, atol=1e-4
    )
