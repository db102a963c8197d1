"""The gate of a feed-forward network (SwiGLU), in plain PyTorch.

    y = silu(gate) * up          silu(g) = g / (1 + exp(-g))

silu is rounded to the dtype of its input before the product, as in transformers' LlamaMLP.

Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202.
"""

from torch import Tensor
from torch.nn import functional as F


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2F], gate first, any float dtype -> [..., F] in that dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
