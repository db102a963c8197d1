"""How much the model's predictions move when a linear is rounded, without running the model again.

To second order the divergence of the changed model from the original is a quadratic form in the
Fisher information: for a change of a linear's output by e_t = dW x_t at each of N tokens, with g_t
the gradient there of the log-likelihood of tokens drawn from the model itself,

    KL ≈ 1/2 · 1/N · E Σ_t (g_tᵀ e_t)²                    nats a token,

where the parts of different tokens are taken to be independent, and so are those of different
outputs, E g_o g_p ≈ 0 (K-FAC's assumptions; Martens and Grosse, arXiv 1503.05671).  What is kept
of K-FAC is not that g is independent of x: a few tokens have activations hundreds of times the
others' and next to no gradient.  So the second moment is weighted by gradient, token by token,

    H_g = 1/N Σ_t |g_t|² x_t x_tᵀ   [K, K],        f_o = Σ_t g_to² / Σ_t |g_t|²   [R],
    KL ≈ 1/2 Σ_o f_o (dW H_g dWᵀ)_oo

and any rounding of W is priced by arithmetic, in nats, so that linears of all blocks compare.
benchmarks/LOG.md has how this predicts measured divergences, and what else was tried.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.core.blocks import linears_of
from compress.quant.awq import AwqConfig, AwqStage
from compress.quant.config import Grid

ROWS = 256  # of a linear, evenly spaced: they stand for all, since rows of a linear are much alike
ROUNDING = AwqStage(AwqConfig(clip_points=8), {})  # each group's scale is searched


class LinearSensitivity:
    """N H_g and f of one linear, as sums over the tokens that reach it.

    tokens         that reached it
    second_moment  float32 [in, in]
    shares         float32 [out]
    """

    def __init__(self, linear: nn.Linear) -> None:
        device = linear.weight.device
        self.tokens = 0
        self.second_moment = torch.zeros(linear.in_features, linear.in_features, device=device)
        self.shares = torch.zeros(linear.out_features, device=device)

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Take in inputs [..., in] and the gradients of their outputs [..., out], float32."""
        x, squares = inputs.flatten(0, -2), gradients.flatten(0, -2).square()
        self.second_moment += (x * squares.sum(dim=1, keepdim=True)).T @ x
        self.shares += squares.sum(dim=0)
        self.tokens += len(x)

    def increases(
        self, weight: Tensor, grids: Sequence[Grid], dtype: torch.dtype, tokens: int
    ) -> list[float]:
        """The predicted divergence, nats a token, for a weight [out, in] rounded on each grid.

        Scales are kept in `dtype`.  `tokens` is how many the model was run on, of which a linear
        may see a part.  Rounding is to nearest on searched scales: cheap, and the methods that do
        better do so on all grids alike.
        """
        rows = slice(None, None, max(1, len(weight) // ROWS))
        moment, chosen = self.second_moment / tokens, weight[rows]
        tiny = torch.finfo(torch.float32).tiny
        shares = self.shares[rows] / self.shares[rows].sum().clamp(min=tiny)
        found = []
        for grid in grids:
            rounded = ROUNDING.round(chosen, moment, grid, dtype).dequantize().float()
            change = rounded - chosen
            errors = ((change @ moment) * change).sum(dim=1)
            found.append(0.5 * float((shares * errors).sum()))
        return found


@contextmanager
def watching_gradients(block: nn.Module) -> Iterator[dict[str, LinearSensitivity]]:
    """Inside, each forward and backward pass through the block adds to its linears' sensitivities.

    Yields them by the linear's name in the block.
    """
    linears = linears_of(block)
    found = {name: LinearSensitivity(linear) for name, linear in linears.items()}

    def watch(sensitivity: LinearSensitivity):
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()
            output.register_hook(lambda gradient: sensitivity.add(x, gradient))

        return hook

    handles = [linears[name].register_forward_hook(watch(one)) for name, one in found.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
