"""Statistics per distinct input, and the identity everything rests on."""

import pytest
import torch

from compress.core.blocks import BlockModel, linears_of
from compress.core.source import resolve_model
from compress.core.statistics import TILE, InputStatistics, collecting
from compress.quant.weight import minmax_grid, round_to_grid
from compress.quant.weight_only import output_error


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_output_error_equals_tr_dw_h_dw(family, model_folder):
    """tr(dW H dWᵀ) from the statistics equals the error measured on the linear's outputs."""
    model = BlockModel(resolve_model(str(model_folder(family))), torch.device("cpu"), torch.float32)
    tokens = torch.randint(3, 120, (3, 32), generator=torch.Generator().manual_seed(0))
    inputs = model.capture_inputs(list(tokens.split(1)))
    block = model.load_block(0)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, linear in linears_of(block).items():
        linear.register_forward_pre_hook(
            lambda _m, args, name=name: seen.setdefault(name, []).append(args[0])
        )
    with collecting(block) as groups:
        model.run_block(block, inputs.hidden, inputs.kwargs[0])
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
