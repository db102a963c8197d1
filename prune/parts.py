"""The parts of a decoder block that pruning cuts, found in the module tree."""

from dataclasses import dataclass

import torch
from torch import nn

from compress.core.blocks import linears_of
from compress.core.errors import InputError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TRIED = 4  # random vectors that norms are tried on


@dataclass(frozen=True)
class Parts:
    """Names within a block.

    attention   the module that holds q_proj, k_proj, v_proj and o_proj
    mlp         the module that holds gate_proj, up_proj and down_proj
    norms       modules with a gain as wide as the hidden states, directly in the block
    """

    attention: str
    mlp: str
    norms: tuple[str, ...]

    def linear(self, leaf: str) -> str:
        """The name within the block of one of the seven linears."""
        return f"{self.attention if leaf in ATTENTION else self.mlp}.{leaf}"


def parts_of(block: nn.Module, ref: str) -> Parts:
    """The parts of a block of the model that `ref` names.

    Raises InputError where there are other linears, or some of these are missing: fused
    projections, mixtures of experts.
    """
    owners = {
        owner: {name.rpartition(".")[2] for name in linears_of(block.get_submodule(owner))}
        for owner, _ in block.named_children()
        if linears_of(block.get_submodule(owner))
    }
    attention = [owner for owner, leaves in owners.items() if leaves == set(ATTENTION)]
    mlp = [owner for owner, leaves in owners.items() if leaves == set(MLP)]
    if len(owners) != 2 or len(attention) != 1 or len(mlp) != 1:
        found = "; ".join(f"{owner}: {', '.join(sorted(names))}" for owner, names in owners.items())
        raise InputError(
            f"the blocks of '{ref}' have the linears {found}; known are attention of "
            f"{', '.join(ATTENTION)} and an MLP of {', '.join(MLP)}"
        )
    norms = [name for name, _ in block.named_children() if name not in owners]
    return Parts(attention[0], mlp[0], tuple(norms))


@torch.no_grad()
def check_norms(block: nn.Module, parts: Parts, ref: str) -> None:
    """Raise InputError for norms that are not gain * x / rms(x), tried out on random vectors.

    Of others (a gain of 1 + w, a mean that is taken off) fewer channels are not a norm of the same
    kind with a cut gain.
    """
    for name in parts.norms:
        norm = block.get_submodule(name)
        gain = getattr(norm, "weight", None)
        if not isinstance(gain, torch.Tensor) or len(list(norm.parameters())) != 1:
            raise InputError(_refusal(ref, name, norm))
        x = torch.randn(TRIED, len(gain), generator=torch.Generator().manual_seed(0))
        x = x.to(gain.device) + 1  # a mean to take off
        expected = gain * x / x.square().mean(-1, keepdim=True).sqrt()
        # float32 rounding, and an epsilon of up to 1e-3 beside a mean square of 2
        if not torch.allclose(norm(x), expected, rtol=2e-3, atol=1e-4):
            raise InputError(_refusal(ref, name, norm))


def _refusal(ref: str, name: str, norm: nn.Module) -> str:
    return (
        f"the norm {name} of '{ref}' ({type(norm).__name__}) is not gain * x / rms(x); hidden "
        "channels cannot be taken out of it: leave hidden as it is"
    )
