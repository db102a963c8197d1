"""Latents of multi-head latent attention at a size that an optimizer can train.

`compress convert --to mla` takes the norm of a latent off by making the latent's rows small, of
1e-9, so that the norm's epsilon is all that counts.  AdamW moves every weight by about the learning
rate, whatever the weight's size: its first step would leave nothing of such rows.  With another
epsilon the norm is the same function of larger ones:

    W x / sqrt(mean((W x)^2) + e)  =  (W / c) x / sqrt(mean(((W / c) x)^2) + e / c^2)

c is a power of two, so that both sides are equal to the last bit.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = {"kv_a_layernorm": "kv_a_proj_with_mqa", "q_a_layernorm": "q_a_proj"}
LEAST = 8  # powers of two between rows and the size that weights have, below which they stay


class LatentScale:
    """`LatentScale(model)` enlarges small latent rows in place; `restored` makes them small again.

    The model computes the same: the epsilon of its latents' norms goes with the rows.
    """

    def __init__(self, model: nn.Module) -> None:
        self._scaled: dict[str, tuple[int, float]] = {}  # parameter -> rows, factor
        for name, module in model.named_modules():
            for norm_name, linear_name in PROJECTIONS.items():
                norm, linear = getattr(module, norm_name, None), getattr(module, linear_name, None)
                if norm is not None and linear is not None:
                    self._enlarge(f"{name}.{linear_name}", linear, norm)

    @torch.no_grad()
    def _enlarge(self, name: str, linear: nn.Module, norm: Any) -> None:
        rows = len(norm.weight)
        parameters = dict(linear.named_parameters())
        size = parameters["weight"][:rows].float().square().mean().sqrt().item()
        usual = 1 / math.sqrt(parameters["weight"].shape[1])  # gives outputs as large as inputs
        if not size or (power := round(math.log2(usual / size))) < LEAST:
            return
        factor = 2.0**power
        norm.variance_epsilon *= factor**2
        for leaf, parameter in parameters.items():
            parameter[:rows] *= factor
            self._scaled[f"{name}.{leaf}"] = (rows, factor)

    def restored(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Some of the model's weights by name, with the rows at the size that they had."""
        found = dict(weights)
        for name in self._scaled.keys() & weights.keys():
            rows, factor = self._scaled[name]
            found[name] = weights[name].clone()
            found[name][:rows] /= factor
        return found
