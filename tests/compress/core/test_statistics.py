"""Statistics per distinct input, and the identity everything rests on."""

import pytest
import torch

from compress.core.blocks import BlockModel, linears_of
from compress.core.source import resolve_model
from compress.core.statistics import TILE, InputStatistics, collecting
from compress.quant.stage import output_error
from compress.quant.weight import minmax_grid, round_to_grid


def run_first_block(model, block, inputs) -> list[torch.Tensor]:
    return [model.run_block(block, hidden, kwargs[0]) for hidden, kwargs in inputs]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_output_error_equals_tr_dw_h_dw(family, model_folder):
    """tr(dW H dWᵀ) from the statistics equals the error measured on the linear's outputs."""
    model = BlockModel(resolve_model(str(model_folder(family))), torch.device("cpu"), torch.float32)
    tokens = torch.randint(3, 120, (3, 32), generator=torch.Generator().manual_seed(0))
    inputs = list(model.capture_inputs(tokens.split(1)))
    block = model.load_block(0)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, linear in linears_of(block).items():
        linear.register_forward_pre_hook(
            lambda _m, args, name=name: seen.setdefault(name, []).append(args[0])
        )
    with collecting(block) as groups:
        run_first_block(model, block, inputs)
    assert sorted(name for g in groups for name in g.linears) == sorted(linears_of(block))
    assert len(groups) == 4  # qkv, o, gate and up, down
    for group in groups:
        assert group.tokens == 96
        for name in group.linears:
            weight = linears_of(block)[name].weight
            change = (
                round_to_grid(weight, *minmax_grid(weight, 4, 16, True), 4, 16).dequantize()
                - weight
            )
            x = torch.cat([part.reshape(-1, weight.shape[1]) for part in seen[name]]).double()
            measured = (x @ change.double().T).square().sum(-1).mean()
            predicted = output_error(change, group.second_moment)
            # float32 sums of about 100 tokens x 80 channels: a few 1e-6 relative
            assert predicted.item() == pytest.approx(measured.item(), rel=2e-5)
            assert torch.equal(group.max_abs, x.abs().amax(0).float())
            torch.testing.assert_close(group.mean_abs, x.abs().mean(0).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moment_is_exact_and_symmetric_across_tiles(dtype):
    width = TILE + 37  # more than one tile, and a ragged one
    x = torch.randn(300, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    stats = InputStatistics(("a",), width, torch.device("cpu"))
    stats.add(x[:100].view(2, 50, width))
    stats.add(x[100:])
    exact = x.double().T @ x.double() / 300
    H = stats.second_moment
    assert torch.equal(H, H.T)
    # float32 accumulation of 300 products of order 1; bfloat16 products are exact in float32
    assert (H.double() - exact).abs().max() < 2e-6


def test_cross_moment_pairs_each_input_with_the_originals(model_folder):
    """Calls in pairs: statistics are of the second of each, C = E[x₀ xᵀ] of both."""
    model = BlockModel(resolve_model(str(model_folder())), torch.device("cpu"), torch.float32)
    tokens = torch.randint(3, 120, (4, 32), generator=torch.Generator().manual_seed(0))
    inputs = list(model.capture_inputs(tokens.split(1)))
    block = model.load_block(0)
    linear = block.get_submodule("mlp.down_proj")
    seen: list[torch.Tensor] = []
    linear.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    with collecting(block, with_originals=True) as groups:
        run_first_block(model, block, inputs)
    stats = groups[-1]
    assert stats.linears == ("mlp.down_proj",)
    assert stats.tokens == 64
    original, x = torch.cat(seen[::2]), torch.cat(seen[1::2])
    assert stats.cross_moment is not None
    torch.testing.assert_close(stats.cross_moment, original.T @ x / 64)
    torch.testing.assert_close(stats.second_moment, x.T @ x / 64)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_statistics_are_the_same_without_the_last_product(family, model_folder):
    model = BlockModel(resolve_model(str(model_folder(family))), torch.device("cpu"), torch.float32)
    tokens = torch.randint(3, 120, (3, 32), generator=torch.Generator().manual_seed(0))
    inputs = list(model.capture_inputs(tokens.split(1)))
    block = model.load_block(0)
    found = []
    for outputs in (True, False):
        with collecting(block, outputs=outputs) as groups:
            results = run_first_block(model, block, inputs)
        found.append((groups, results))
    (whole, outputs), (short, _) = found
    for one, other in zip(whole, short, strict=True):
        assert one.linears == other.linears
        assert torch.equal(one.second_moment, other.second_moment)
        assert torch.equal(one.mean_abs, other.mean_abs)
    # and the block is as it was
    again = run_first_block(model, block, inputs)
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
