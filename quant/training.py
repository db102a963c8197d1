"""What learns in a fake-quantized module, and at which rates."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from compress.quant.fake_quant import FakeQuantLinear

Trained = Literal["weights+scales", "scales"]


@dataclass(frozen=True)
class Rates:
    """Lengths of Adam's steps (see qat.py) and what is trained.

    weights  of latents, in steps of the grid
    scales   of gains, and of vectors as a share of their root mean square
    """

    weights: float
    scales: float
    trained: Trained = "weights+scales"


def parameter_groups(module: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """Freeze all of a module but what learns; returns that as groups for an optimizer.

    Latents and gains of fake-quantized linears learn, and vectors: gains of norms and biases.
    Matrices in float do not.  No group has weight decay: it would pull codes towards zero.
    """
    module.requires_grad_(False)
    linears = [linear for linear in module.modules() if isinstance(linear, FakeQuantLinear)]
    groups: list[dict[str, Any]] = [{"params": [m.gain for m in linears], "lr": rates.scales}]
    if rates.trained == "weights+scales":
        groups.append({"params": [m.latent for m in linears], "lr": rates.weights})
    for vector in module.parameters():
        size = float(vector.detach().square().mean().sqrt()) if vector.dim() == 1 else 0.0
        if size:
            groups.append({"params": [vector], "lr": rates.scales * size})
    for group in groups:
        group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    return groups
