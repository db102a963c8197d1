"""Latents of multi-head latent attention at a size that an optimizer can train.

`compress convert --to mla` takes the norm of a latent off by making the latent's rows small, of
1e-9, so that the norm's epsilon is all that counts.  AdamW moves every weight by about the learning
rate, whatever the weight's size: its first step would leave nothing of such rows.  With another
epsilon the norm is the same function of larger ones:

    W x / sqrt(mean((W x)^2) + e)  =  (W / c) x / sqrt(mean(((W / c) x)^2) + e / c^2)

Both that and what reads the latent, whose size the norm's gain makes up for, get the size of the
output projection: a step changes each by as much of itself as the weights of the original.  Factors
are powers of two, so that both sides are equal to the last bit.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

# norm of a latent -> what makes the latent, and what reads it
PROJECTIONS = {
    "kv_a_layernorm": ("kv_a_proj_with_mqa", "kv_b_proj"),
    "q_a_layernorm": ("q_a_proj", "q_b_proj"),
}
LEAST = 8  # powers of two between rows and the size that weights have, below which they stay


class LatentScale:
    """`LatentScale(model)` enlarges small latent rows in place; `restored` makes them small again.

    The model computes the same: the epsilon of its latents' norms goes with the rows, their gain
    with what reads the latents.
    """

    def __init__(self, model: nn.Module) -> None:
        self._scaled: dict[str, tuple[int, float]] = {}  # parameter -> rows, factor
        for name, module in model.named_modules():
            for norm_name, linears in PROJECTIONS.items():
                parts = [getattr(module, part, None) for part in (norm_name, *linears)]
                if None not in parts:
                    self._enlarge(name, module, norm_name, *linears)

    @torch.no_grad()
    def _enlarge(self, name: str, attention: Any, norm_name: str, made: str, read: str) -> None:
        norm, maker, reader = (getattr(attention, part) for part in (norm_name, made, read))
        rows = len(norm.weight)
        usual = _size(attention.o_proj.weight)  # of a matrix that is as the original's
        size = _size(maker.weight[:rows])
        if not size or not usual or (power := round(math.log2(usual / size))) < LEAST:
            return
        norm.variance_epsilon *= 4.0**power
        for leaf, parameter in maker.named_parameters():
            self._scale(f"{name}.{made}.{leaf}", parameter, rows, 2.0**power)
        factor = 2.0 ** round(math.log2(usual / max(_size(reader.weight), TINY)))
        self._scale(f"{name}.{read}.weight", reader.weight, len(reader.weight), factor)
        self._scale(f"{name}.{norm_name}.weight", norm.weight, rows, 1 / factor)

    def _scale(self, name: str, parameter: Tensor, rows: int, factor: float) -> None:
        parameter[:rows] *= factor
        self._scaled[name] = (rows, factor)

    def restored(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Some of the model's weights by name, with the rows at the size that they had."""
        found = dict(weights)
        for name in self._scaled.keys() & weights.keys():
            rows, factor = self._scaled[name]
            found[name] = weights[name].clone()
            found[name][:rows] /= factor
        return found


def _size(weight: Tensor) -> float:
    """The root of its mean square."""
    return weight.float().square().mean().sqrt().item()


TINY = torch.finfo(torch.float32).tiny
