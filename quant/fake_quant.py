"""Fake quantization: linears that compute with the weights they will be packed to, and can learn.

A weight is kept as a latent u, in steps of its grid, and a group's scale as a gain g on the scale
s₀ that it began with.  With z the zero point (0 on a symmetric grid)

    c = clip(round(u + z), q_min, q_max)        the codes that will be packed
    s = g s₀                                    rounded to the dtype that scales are stored in
    Ŵ = (c - z) s                               [out, in]

in float32, where the product of a code and a scale of 16 bits is exact.  So Ŵ is what loaders make
of the checkpoint, bit for bit: in float32 as it is, in a dtype of 16 bits rounded once.  The
gradients are straight through the rounding, and none where it clips (Bengio et al.,
arXiv 1308.3432; Jacob et al., arXiv 1712.05877):

    ∂L/∂u = s ∂L/∂Ŵ    if q_min - 1/2 <= u + z <= q_max + 1/2, else 0
    ∂L/∂s = a Σ (c - z) ∂L/∂Ŵ    over the group, with a = 1 / sqrt(n q_max), n weights a group

The second is LSQ (Esser et al., arXiv 1902.08153, eq. 3 and section 2.2) for a weight w = u s: to
its ∂Ŵ/∂s = c - z - w/s inside the range comes ∂Ŵ/∂w ∂w/∂s = u, and outside it is c - z already.
Why in steps, and not in the weight's own unit:

- A code flips after half a unit of movement in every group of every layer, and a gain moves in
  shares of its scale.  So one learning rate of each fits all of a model, where Adam's steps of
  equal length would be everything to a small group and nothing to a large one.
- Training starts from a good quantized model.  LSQ's own c - z - w/s sees rounding errors alone
  there; in steps a scale has its exact derivative from the first step on.
- A change of the scale moves no weight over a rounding boundary.
- A scale may be negative (ARCHITECTURE.md, "Signed scales"): the latents do not know of it.

A latent starts inside the cell of its code, towards where the unrounded weight w was:

    u = (c - z) + 0.8 clip(w / s - (c - z), -1/2, 1/2)

Codes are those of the start, and weights that could as well have been rounded the other way are
near that edge.  With all latents on their grid values none flips for a long time and then very many
do in the same few steps, since Adam's steps have one length (benchmarks/LOG.md has the figures).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from compress.quant.weight import QuantizedWeight, code_range, never_zero

PLACE = 0.8  # of the way from the middle of a cell to where the unrounded weight was


class _FakeQuantize(torch.autograd.Function):
    """See `fake_quantize`.  Keeps its arguments for the backward pass, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
    ) -> Tensor:
        ctx.save_for_backward(latent, scale, zero_point)
        ctx.bits = bits
        steps = _steps(latent, scale.shape[1], zero_point, bits)
        return steps.mul_(scale.unsqueeze(-1)).view(latent.shape)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        latent, scale, zero_point = ctx.saved_tensors
        groups = scale.shape[1]
        steps = _steps(latent, groups, zero_point, ctx.bits)
        grad = grad.view(steps.shape).to(steps.dtype)
        grad_latent = grad_scale = None
        if ctx.needs_input_grad[1]:
            weight = (steps.shape[-1] * code_range(ctx.bits)[1]) ** -0.5
            grad_scale = (steps * grad).sum(dim=-1).mul_(weight)
        if ctx.needs_input_grad[0]:
            # What the rounding moved by more than half a step, it clipped.
            clipped = steps.sub_(latent.view(steps.shape)).abs_() > 0.5
            grad_latent = grad.mul(scale.unsqueeze(-1)).masked_fill_(clipped, 0)
            grad_latent = grad_latent.view(latent.shape)
        return grad_latent, grad_scale, None, None


def fake_quantize(latent: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """The weight Ŵ on its grid [out, in], in the latent's dtype, with the gradients stated above.

    latent      float [out, in], in steps of the grid; float32 in training, since a step of Adam is
                a hundredth of one
    scale       [out, groups] in the latent's dtype, with values that the stored dtype has
    zero_point  int8 [out, groups], or None when symmetric; it does not learn
    """
    return _FakeQuantize.apply(latent, scale, zero_point, bits)  # type: ignore[return-value]


def _steps(latent: Tensor, groups: int, zero_point: Tensor | None, bits: int) -> Tensor:
    """Codes less zero points, [out, groups, group_size] in the latent's dtype."""
    steps = latent.detach().view(len(latent), groups, -1)
    if zero_point is None:
        return steps.round().clamp_(*code_range(bits))
    zero = zero_point.to(steps.dtype).unsqueeze(-1)
    return (steps + zero).round_().clamp_(*code_range(bits)).sub_(zero)


class FakeQuantLinear(nn.Module):
    """A linear that computes with the weight it will be packed to.

    latent      parameter, float32 [out, in], in steps of the grid
    gain        parameter, float32 [out, groups], 1 at the start
    bias        parameter [out], or None
    scale       buffer [out, groups], the scale at the start, in the dtype that it is stored in
    zero_point  buffer int8 [out, groups], or None
    """

    scale: Tensor
    zero_point: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, weight: QuantizedWeight, unrounded: Tensor, bias: nn.Parameter | None = None
    ) -> None:
        """Start from a quantized weight and, inside its cells, from the unrounded one [out, in].

        The grid must be runs of columns without offsets.
        """
        super().__init__()
        assert weight.offset is None
        assert weight.group_of is None
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size = weight.bits, weight.group_size
        self.latent = nn.Parameter(steps_of(weight) + PLACE * place_in_cell(weight, unrounded))
        self.gain = nn.Parameter(torch.ones_like(weight.scale, dtype=torch.float32))
        self.register_parameter("bias", bias)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)

    @property
    def weight(self) -> Tensor:
        """The weight on its grid, float32 [out, in]."""
        return fake_quantize(self.latent, self._scale().float(), self.zero_point, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The codes and scales with which `forward` computes."""
        scale = self._scale()
        steps = _steps(self.latent, scale.shape[1], self.zero_point, self.bits)
        if self.zero_point is not None:
            steps += self.zero_point.to(steps.dtype).unsqueeze(-1)
        codes = steps.view(self.latent.shape).to(torch.int8)
        return QuantizedWeight(codes, scale, self.zero_point, self.bits, self.group_size)

    @torch.no_grad()
    def place(self) -> Tensor:
        """How far each latent lies from the middle of its code's cell (`place_in_cell`)."""
        steps = _steps(self.latent, self.scale.shape[1], self.zero_point, self.bits)
        return (self.latent - steps.view(self.latent.shape)).clamp(-0.5, 0.5)

    def extra_repr(self) -> str:
        """As nn.Linear says it, and the grid."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}"
        )

    def _scale(self) -> Tensor:
        """g s₀ in the stored dtype, and never zero; the gradient passes through the rounding."""
        return never_zero((self.gain * self.scale.to(self.gain.dtype)).to(self.scale.dtype))


def steps_of(weight: QuantizedWeight) -> Tensor:
    """Codes less zero points, float32 [out, in]."""
    return replace(weight, scale=torch.ones_like(weight.scale, dtype=torch.float32)).dequantize()


def place_in_cell(weight: QuantizedWeight, unrounded: Tensor) -> Tensor:
    """How far an unrounded weight [out, in] lies from the middle of its code's cell, in steps.

    Float32 [out, in], between -1/2 and 1/2: a weight outside its cell, which a method that looks at
    more than the nearest value may leave, counts as on the edge.
    """
    scale = weight.scale.float().repeat_interleave(weight.group_size, dim=1)
    return (unrounded.float() / scale - steps_of(weight)).clamp(-0.5, 0.5)


def put_on_grid(
    module: nn.Module, weights: Mapping[str, QuantizedWeight]
) -> dict[str, FakeQuantLinear]:
    """Replace linears, by name within `module`, by ones that start from these quantized weights.

    The linears hold the unrounded weights.  Biases stay the same parameters.  Returns the new
    linears by name.
    """
    placed = {}
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        placed[name] = FakeQuantLinear(weight, linear.weight.data, linear.bias)
        setattr(module.get_submodule(owner), leaf, placed[name])
    return placed
