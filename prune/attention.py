"""The attention of a decoder block as numbers: its weights by head, and the channels RoPE turns.

    q [N H, D], k and v [K H, D], o [D, N H]

A head's channels come in pairs that RoPE turns by one angle.  How they pair differs by class (the
halves of a head, or neighbours), and is found by experiment: a random complex factor on each pair
of the keys, and what undoes it on the queries, leave a block's output as it was if and only if the
pairs are right.  Under norms on queries or keys none are.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.prune.parts import Parts

# A change of the output, as a share of what the factors on the keys alone change: float32 rounding
# gives about 1e-6, wrong pairs give something of order 1.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Pairs:
    """Channels of a head that RoPE turns together: int64 [P] each, P = H / 2."""

    real: Tensor
    imaginary: Tensor

    @classmethod
    def neighbours(cls, head_dim: int, device: torch.device) -> "Pairs":
        """Channels 0 and 1, 2 and 3, ..."""
        first = torch.arange(0, head_dim, 2, device=device)
        return cls(first, first + 1)

    def cpu(self) -> "Pairs":
        """The same on the CPU."""
        return Pairs(self.real.cpu(), self.imaginary.cpu())

    def to_complex(self, heads: Tensor) -> Tensor:
        """[..., H, X] as complex [..., P, X]; float64, or complex128 for weights in float64."""
        heads = heads.movedim(-2, -1)
        found = torch.complex(heads[..., self.real], heads[..., self.imaginary])
        return found.movedim(-1, -2)

    def to_real(self, pairs: Tensor) -> Tensor:
        """The inverse of `to_complex`."""
        pairs = pairs.movedim(-2, -1)
        heads = torch.empty(
            *pairs.shape[:-1], 2 * len(self.real), dtype=pairs.real.dtype, device=pairs.device
        )
        heads[..., self.real], heads[..., self.imaginary] = pairs.real, pairs.imag
        return heads.movedim(-1, -2)


@dataclass
class AttentionWeights:
    """The linears of attention by head, float64; a bias is one column more of its weight.

    q [N, H, D + 1], k and v [K, H, D + 1], o [N, D, H]; which linears have a bias is in `biased`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    o_bias: Tensor | None
    biased: dict[str, bool]

    @classmethod
    def of(cls, block: nn.Module, parts: Parts, head_dim: int) -> "AttentionWeights":
        """Of a block, copied."""
        by_head, biased = {}, {}
        for leaf in ("q_proj", "k_proj", "v_proj"):
            weight, bias = _weight_and_bias(block, parts.linear(leaf))
            biased[leaf] = bias is not None
            column = torch.zeros(len(weight)).to(weight) if bias is None else bias
            joined = torch.cat([weight, column[:, None]], dim=1)
            by_head[leaf[0]] = joined.unflatten(0, (-1, head_dim))
        weight, bias = _weight_and_bias(block, parts.linear("o_proj"))
        out = weight.unflatten(1, (-1, head_dim)).transpose(0, 1).contiguous()
        return cls(**by_head, o=out, o_bias=bias, biased=biased)

    def cpu(self) -> "AttentionWeights":
        """The same on the CPU."""
        bias = None if self.o_bias is None else self.o_bias.cpu()
        heads = (self.q.cpu(), self.k.cpu(), self.v.cpu(), self.o.cpu())
        return AttentionWeights(*heads, bias, self.biased)

    def tensors(self, parts: Parts) -> dict[str, Tensor]:
        """Parameters by name in the block, float32."""
        found = {}
        for leaf in ("q_proj", "k_proj", "v_proj"):
            joined = getattr(self, leaf[0]).flatten(0, 1).float()
            found[f"{parts.linear(leaf)}.weight"] = joined[:, :-1].contiguous()
            if self.biased[leaf]:
                found[f"{parts.linear(leaf)}.bias"] = joined[:, -1].contiguous()
        name = parts.linear("o_proj")
        found[f"{name}.weight"] = self.o.transpose(0, 1).flatten(1).float().contiguous()
        if self.o_bias is not None:
            found[f"{name}.bias"] = self.o_bias.float()
        return found


def _weight_and_bias(block: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    bias = None if linear.bias is None else linear.bias.detach().double()
    return linear.weight.detach().double(), bias


@torch.no_grad()
def find_pairs(
    block: nn.Module,
    parts: Parts,
    head_dim: int,
    turned: Sequence[int],
    probe: Callable[[nn.Module], Tensor],
) -> Pairs | None:
    """How the channels of a head pair, or None where no way of pairing leaves the output alone.

    block   in float32
    turned  numbers of channels that RoPE may turn, the first ones of a head; the rest pair anyhow
    probe   runs a module like the block on a calibration sample
    """
    before = probe(block)
    weights = AttentionWeights.of(block, parts, head_dim)
    draw = torch.Generator().manual_seed(0)
    kv_heads, size = len(weights.k), (len(weights.k), head_dim // 2, 1)
    angle = torch.rand(size, generator=draw, dtype=torch.float64) * 2 * torch.pi
    factor = torch.polar(1 + torch.rand(size, generator=draw, dtype=torch.float64), angle)
    factor = factor.to(weights.k.device)
    for pairs in _candidates(head_dim, turned, weights.k.device):
        trial = copy.copy(weights)
        trial.k = pairs.to_real(pairs.to_complex(weights.k) * factor)
        effect = (_with(block, trial, parts, probe) - before).norm()
        grouped = weights.q.unflatten(0, (kv_heads, -1))
        undone = pairs.to_complex(grouped) / factor[:, None].conj()
        trial.q = pairs.to_real(undone).flatten(0, 1)
        change = (_with(block, trial, parts, probe) - before).norm()
        if effect > 0 and change <= TOLERANCE * effect:
            return pairs
    return None


def turned_channels(config: Any, head_dim: int) -> tuple[int, ...]:
    """Numbers of channels of a head that RoPE may turn, by a transformers config."""
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    part = int(head_dim * (share or 1.0)) // 2 * 2
    return tuple(dict.fromkeys((part or head_dim, head_dim)))


def _with(
    block: nn.Module,
    weights: AttentionWeights,
    parts: Parts,
    probe: Callable[[nn.Module], Tensor],
) -> Tensor:
    """What a block gives with other weights of the same shapes."""
    other = copy.deepcopy(block)
    other.load_state_dict(weights.tensors(parts), strict=False)
    return probe(other)


def _candidates(head_dim: int, turned: Sequence[int], device: torch.device) -> Iterator[Pairs]:
    yield Pairs.neighbours(head_dim, device)
    for count in turned:
        first = torch.arange(count // 2, device=device)
        rest = torch.arange(count, head_dim, 2, device=device)
        yield Pairs(torch.cat([first, rest]), torch.cat([first + count // 2, rest + 1]))
