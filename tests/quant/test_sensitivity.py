"""What a rounding is predicted to lose, against divergences computed from the model itself."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress.quant.config import Grid
from compress.quant.sensitivity import ROUNDING, LinearSensitivity, watching_gradients


def fisher_by_hand(x: torch.Tensor, gradients: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """1/2 1/N Σ_o f_o Σ_t |g_t|² (dW x_t)_o², token by token."""
    share = gradients.square().sum(0) / gradients.square().sum()
    total = torch.zeros((), dtype=torch.float64)
    for token, gradient in zip(x, gradients, strict=True):
        error = (change @ token).double()
        total += gradient.double().square().sum() * (share.double() * error.square()).sum()
    return total / (2 * len(x))


def test_price_of_a_grid_is_the_formula_of_the_docstring():
    torch.manual_seed(0)
    linear = nn.Linear(32, 24, bias=False)
    x, gradients = torch.randn(50, 32), torch.randn(50, 24) * torch.rand(24)
    x[7] *= 100
    gradients[7] *= 1e-3
    found = LinearSensitivity(linear)
    found.add(x[:20].view(2, 10, 32), gradients[:20].view(2, 10, 24))
    found.add(x[20:], gradients[20:])
    grids = [Grid(bits, 16, symmetric) for bits in (2, 4) for symmetric in (True, False)]
    prices = found.increases(linear.weight.data, grids, torch.float32, 50)
    moment = found.second_moment / 50
    for grid, price in zip(grids, prices, strict=True):
        rounded = ROUNDING.round(linear.weight.data, moment, grid, torch.float32).dequantize()
        by_hand = fisher_by_hand(x, gradients, rounded - linear.weight.data)
        # float32 sums of 50 x 32 x 24 terms
        assert price == pytest.approx(float(by_hand), rel=1e-4)


class TwoLinears(nn.Module):
    """A model of one token at a time, whose tokens are independent, as the formula takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 512), nn.Linear(512, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def test_predicted_divergence_is_the_measured_one():
    """For small changes, in a model with independent tokens.

    What is left are outputs' correlations, and the draw: of 20,000 tokens, about 2%.
    """
    torch.manual_seed(0)
    model = TwoLinears().requires_grad_(False)
    head = torch.randn(40, 32) * 0.5
    x = torch.randn(20_000, 32).requires_grad_()
    with watching_gradients(model) as found:
        predicted = F.log_softmax(model(x) @ head.T, dim=-1)
        original = predicted.detach()
        drawn = torch.multinomial(original.exp(), 1)
        torch.autograd.grad(predicted.gather(1, drawn).sum(), x)
    for name in ("up", "down"):
        linear = model.get_submodule(name)
        weight = linear.weight.data.clone()
        (price,) = found[name].increases(weight, [Grid(4, 32)], torch.float32, len(x))
        moment = found[name].second_moment / len(x)
        rounded = ROUNDING.round(weight, moment, Grid(4, 32), torch.float32).dequantize()
        linear.weight.data.copy_(rounded)
        with torch.no_grad():
            changed = F.log_softmax(model(x) @ head.T, dim=-1)
        linear.weight.data.copy_(weight)
        measured = (original.exp() * (original - changed)).sum(dim=-1).mean()
        assert price == pytest.approx(float(measured), rel=0.15)


def test_rows_are_a_sample_of_many():
    """Of 4,096 rows 256 are priced; evenly spaced, rows alike: within 10%."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 4096, bias=False)
    x, gradients = torch.randn(64, 16), torch.randn(64, 4096)
    found = LinearSensitivity(linear)
    found.add(x, gradients)
    (price,) = found.increases(linear.weight.data, [Grid(3, 16)], torch.float32, len(x))
    moment = found.second_moment / 64
    rounded = ROUNDING.round(linear.weight.data, moment, Grid(3, 16), torch.float32).dequantize()
    by_hand = fisher_by_hand(x, gradients, rounded - linear.weight.data)
    assert price == pytest.approx(float(by_hand), rel=0.1)


def test_a_linear_that_sees_half_of_the_tokens_costs_half():
    """The mean is over the tokens of the model, so that linears compare."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 24, bias=False)
    found = LinearSensitivity(linear)
    found.add(torch.randn(50, 32), torch.randn(50, 24))
    grids = [Grid(3, 16)]
    (alone,) = found.increases(linear.weight.data, grids, torch.float32, 50)
    (half,) = found.increases(linear.weight.data, grids, torch.float32, 100)
    # scales are chosen by errors on H, all halved: a power of two, so the same choices
    assert half == pytest.approx(alone / 2, rel=1e-6)
