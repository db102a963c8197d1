"""Laying out what the AVX-512 kernels read of latent attention; avx512.h and heads.h say how."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.core.errors import InputError
from compress.kernels.latent_attention.weights import LatentShape, UpProjections

LANES = 16
WIDEST_HEAD = 512  # as WIDEST in rope/avx512.h
WIDEST_RANK = 2048  # as in strip.h


def sizes_of(shape: LatentShape) -> dict[str, int]:
    """The sizes that operations take.  Raises InputError for what they have no room for."""
    widest = max(shape.nope_dim, shape.rope_dim, shape.value_dim)
    if widest > WIDEST_HEAD or shape.rank > WIDEST_RANK:
        raise InputError(
            f"heads have {widest} dimensions and latents {shape.rank}; at most {WIDEST_HEAD} and "
            f"{WIDEST_RANK} are served"
        )
    return {
        "heads": shape.heads,
        "nope": shape.nope_dim,
        "rope": shape.rope_dim,
        "value": shape.value_dim,
        "rank": shape.rank,
        "padded_rank": _padded(shape.rank),
        "padded_rope": _padded(shape.rope_dim),
    }


def pack_up(up: UpProjections, dtype: torch.dtype) -> UpProjections:
    """Up-projections as matrices of words: [N, words of inputs, outputs, 1 or 2 inputs]."""
    return UpProjections(_words(up.keys, dtype), _words(up.values.transpose(1, 2), dtype))


def _words(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, inputs, outputs] -> [N, words, outputs rounded up to 16, inputs of a word]"""
    beside = 4 // dtype.itemsize
    inputs, outputs = heads.shape[1:]
    wide = pad(heads.to(dtype), (0, _padded(outputs) - outputs, 0, -inputs % beside))
    return wide.unflatten(1, (-1, beside)).transpose(2, 3).contiguous()


def _padded(count: int) -> int:
    """Rounded up to whole vectors."""
    return -(-count // LANES) * LANES
