"""RMSNorm, with an optional residual sum before it, in plain PyTorch.

    h = x + residual
    y = cast(h / sqrt(mean(h²) + eps)) * weight          mean over the last dimension

The sum is in the dtype of x, the norm in float32, and the product with the gain in the dtype of x
again: the order of casts of transformers' LlamaRMSNorm, so that 16-bit results agree.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.
"""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (h, y): the residual sum (x itself without one) and its norm.

    x, residual  [..., D], any float dtype, the same for both
    weight       [D], gains; cast to the dtype of x
    """
    if residual is not None:
        x = x + residual
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return x, normed.to(x.dtype) * weight.to(x.dtype)
