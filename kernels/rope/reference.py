"""Rotary position embedding in halves of a head, in plain PyTorch.

With R the rotated dimensions of a head and angle[i] = position * inv_freq[i], for i < R / 2:

    y[i]         = x[i] * cos(angle[i]) - x[i + R/2] * sin(angle[i])
    y[i + R/2]   = x[i + R/2] * cos(angle[i]) + x[i] * sin(angle[i])
    y[R:]        = x[R:]

Angles, cosines and sines are computed in float32 and rounded to the dtype of x, in which the rest
is done: the order of casts of transformers' LlamaRotaryEmbedding and apply_rotary_pos_emb.

Source: Su et al., RoFormer, 2021, arXiv:2104.09864; pairs (i, i + R/2) as in transformers.
"""

import torch
from torch import Tensor


def rope_table(
    positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, R/2] in `dtype`, both times `scaling`.

    positions  int64 [T]
    inv_freq   float32 [R/2], radians a position
    """
    angles = positions[:, None].float() * inv_freq  # [T, R/2]
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries [T, N, H] and keys [T, K, H]; cos, sin [T, R/2] in their dtype, R <= H."""
    return _rotated(q, cos[:, None], sin[:, None]), _rotated(k, cos[:, None], sin[:, None])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
