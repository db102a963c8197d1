"""Training a block until it gives what the original gave."""

import copy

import pytest
import torch
from torch import nn

from compress.core.blocks import BlockModel, linears_of
from compress.core.device import default_device
from compress.core.source import resolve_model
from compress.core.stage import BlockSamples
from compress.quant.block_training import HELD_OUT, train_block
from compress.quant.training import Rates
from compress.quant.weight import minmax_grid, round_to_grid

RATES = Rates(0.05, 0.005)


@pytest.fixture
def rounded(model_folder):
    """Makes block 0 of a family, its samples in uneven batches, and its linears rounded."""

    def make(family="llama", dtype=torch.float32, bits=2):
        tokens = torch.randint(3, 120, (23, 32), generator=torch.Generator().manual_seed(0))
        device = torch.device("cpu")
        model = BlockModel(resolve_model(str(model_folder(family))), device, dtype)
        module = model.load_block(0)
        captured = list(model.capture_inputs(tokens.split(9)))
        inputs = [states for states, _ in captured]
        kwargs = [given[0] for _, given in captured]
        runner = model.compute_copy(module)
        with torch.no_grad():
            targets = [model.run_block(runner, *p) for p in zip(inputs, kwargs, strict=True)]
        weights = {}
        for name, linear in linears_of(module).items():
            weight = linear.weight.data
            scale, zero = minmax_grid(weight, bits, 16, True)
            weights[name] = round_to_grid(weight, scale, zero, bits, 16)
        return module, BlockSamples(inputs, targets, kwargs), weights

    return make


def error_of(module, weights, samples):
    """Mean squared error by the power of the target, per token, over all batches; written out."""
    module = copy.deepcopy(module).float()
    for name, weight in weights.items():
        module.get_submodule(name).weight.data = weight.dequantize()
    errors = []
    with torch.no_grad():
        for states, target, kwargs in zip(
            samples.inputs, samples.targets, samples.kwargs, strict=True
        ):
            in_float = {
                k: tuple(t.float() for t in v) if isinstance(v, tuple) else v
                for k, v in kwargs.items()
            }
            output = module(states.float(), **in_float)
            output = output[0] if isinstance(output, tuple) else output
            difference = (output - target.float()).norm(dim=-1) / target.float().norm(dim=-1)
            errors.append(difference.square().flatten())
    return torch.cat(errors).mean().item()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_it_lowers_the_blocks_error(family, rounded):
    module, samples, weights = rounded(family)
    before = error_of(module, weights, samples)
    norms = {name: p.clone() for name, p in module.named_parameters() if p.dim() == 1}
    original = copy.deepcopy(module)
    learned = train_block(module, samples, weights, RATES, epochs=16, seed=0)
    after = error_of(module, learned.weights, samples)
    assert after < 0.7 * before
    assert "by training" in learned.note
    moved = dict(module.named_parameters())
    assert any(not torch.equal(moved[name], norm) for name, norm in norms.items())
    for name, linear in linears_of(original).items():
        assert torch.equal(module.get_submodule(name).weight, linear.weight)  # the caller's to set
        assert learned.weights[name].scale.dtype == weights[name].scale.dtype


def test_scales_alone_keep_the_codes(rounded):
    module, samples, weights = rounded()
    before = error_of(module, weights, samples)
    learned = train_block(module, samples, weights, Rates(0.05, 0.005, "scales"), 3, seed=0)
    assert error_of(module, learned.weights, samples) < before
    for name, weight in weights.items():
        assert torch.equal(learned.weights[name].codes, weight.codes)
        assert not torch.equal(learned.weights[name].scale, weight.scale)


def test_equal_arguments_give_equal_bits(rounded):
    made = []
    for _ in range(2):
        module, samples, weights = rounded(dtype=torch.bfloat16)
        learned = train_block(module, samples, weights, RATES, 8, seed=7)
        made.append((learned, dict(module.named_parameters())))
    (one, one_module), (two, two_module) = made
    assert one.note == two.note
    assert all(torch.equal(one_module[name], two_module[name]) for name in one_module)
    for name, weight in one.weights.items():
        assert torch.equal(weight.codes, two.weights[name].codes)
        assert torch.equal(weight.scale, two.weights[name].scale)
    assert any(not torch.equal(w.codes, weights[name].codes) for name, w in one.weights.items())


def test_where_it_does_not_help_the_block_stays_as_it_was(rounded):
    """At such rates nothing is learned."""
    module, samples, weights = rounded(bits=4)
    before = {name: p.clone() for name, p in module.named_parameters()}
    learned = train_block(module, samples, weights, Rates(1.0, 1.0), epochs=1, seed=0)
    assert learned.weights is weights
    assert "did not help" in learned.note
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_held_out_sequences_are_not_trained_on(rounded):
    """What is trained on is the same with other targets for every eighth from the end."""
    results = []
    for spoiled in (False, True):
        module, samples, weights = rounded()
        if spoiled:
            flat = torch.cat(list(samples.targets))
            held_out = torch.arange(len(flat) - 1, -1, -HELD_OUT)
            flat[held_out] = 0.999 * flat[held_out]
            sizes = [len(batch) for batch in samples.targets]
            samples = BlockSamples(samples.inputs, flat.split(sizes), samples.kwargs)
        results.append(train_block(module, samples, weights, RATES, 1, seed=0))
    assert results[0].note != results[1].note  # they are what is measured
    for name, weight in results[0].weights.items():
        assert torch.equal(weight.codes, results[1].weights[name].codes)


def test_the_first_token_does_not_drown_the_others(rounded):
    """Its hidden state is often a thousand times larger: a token counts by its own size."""

    class Blind(nn.Module):
        def forward(self, states):
            return states

    samples = BlockSamples(
        [torch.ones(8, 3, 4)], [torch.ones(8, 3, 4) * torch.tensor([1e4, 2.0, 1.0])[:, None]], [{}]
    )
    from compress.quant.block_training import _error, _split

    held_out, taught = _split(samples)
    assert held_out == {0: [7]}
    assert taught == {0: list(range(7))}
    found = _error(Blind(), samples, held_out, default_device())
    assert found == pytest.approx((1 + 0.25 + 0) / 3, rel=1e-3)
