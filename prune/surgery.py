"""Cutting a block down to what is kept, in place.

    q [N H, D], k and v [K H, D], o [D, N H]     gate and up [F, D], down [D, F]

Hidden channels are columns of q, k, v, gate and up, rows of o and down, and entries of the norms'
gains; a head is H rows of q and H columns of o; a neuron is a row of gate and up and a column of
down.  Biases go with rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.prune.parts import Parts

Place = tuple[Tensor | None, Tensor | None]  # rows and columns of a weight; None for all


@dataclass(frozen=True)
class Kept:
    """What a block keeps: ascending indices, int64; None for all.

    hidden [D'], heads [N'], kv_heads [K'], ffn [F']
    """

    hidden: Tensor | None = None
    heads: Tensor | None = None
    kv_heads: Tensor | None = None
    ffn: Tensor | None = None


def channels_of(heads: Tensor | None, head_dim: int) -> Tensor | None:
    """The channels of some heads, in the heads' order; None for all."""
    if heads is None:
        return None
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).reshape(-1)


def places_of(parts: Parts, kept: Kept, head_dim: int) -> dict[str, Place]:
    """For each linear, by its name in the block, the rows and the columns that are kept."""
    queries, keys = (channels_of(heads, head_dim) for heads in (kept.heads, kept.kv_heads))
    places = {
        "q_proj": (queries, kept.hidden),
        "k_proj": (keys, kept.hidden),
        "v_proj": (keys, kept.hidden),
        "o_proj": (kept.hidden, queries),
        "gate_proj": (kept.ffn, kept.hidden),
        "up_proj": (kept.ffn, kept.hidden),
        "down_proj": (kept.hidden, kept.ffn),
    }
    return {parts.linear(leaf): place for leaf, place in places.items()}


def cut(block: nn.Module, parts: Parts, kept: Kept, head_dim: int) -> None:
    """Leave in a block's parameters what is kept; the block is to be written, not to be run."""
    for name, (rows, columns) in places_of(parts, kept, head_dim).items():
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight = _parameter(take(linear.weight.data, rows, columns))
        if linear.bias is not None:
            linear.bias = _parameter(take(linear.bias.data, rows))
    for name in parts.norms:
        norm = block.get_submodule(name)
        for key, gain in list(norm.named_parameters()):
            setattr(norm, key, _parameter(take(gain.data, kept.hidden)))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def take(tensor: Tensor, rows: Tensor | None, columns: Tensor | None = None) -> Tensor:
    """Some rows and columns of a tensor, contiguous; None for all."""
    if rows is not None:
        tensor = tensor.index_select(0, rows.to(tensor.device))
    return tensor if columns is None else tensor.index_select(1, columns.to(tensor.device))
