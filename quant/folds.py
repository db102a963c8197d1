"""Which per-channel scales can be folded away, found by experiment.

Scaling the input channels of some linears by s leaves a block's output unchanged if whatever
produces those channels is scaled by 1/s:

    norm -> q/k/v and gate/up     divide the norm's gain
    up   -> down                  divide up's rows (the gate passes through a nonlinearity)
    v    -> o                     divide v's rows; with grouped queries one scale a KV channel,
                                  repeated over the query heads that share it

Instead of a table of model classes, each possible producer in the block is tried: random powers
of two go into the consumers and their inverses into the candidate, and the fold is taken if and
only if the block's output on a calibration sample does not change.  Powers of two change no
mantissa, so for a true fold the outputs agree to the last bits, and a false one shows at once.
This covers biases, qk-norm, parallel attention and MLP, and gains stored as 1 + w.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# A fold changes the output by at most this share of what scaling the consumers alone changes.
# True folds give 0 (powers of two) or float32 rounding, about 1e-6 (gains stored as 1 + w); false
# ones are of order 1.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Fold:
    """Scales of `consumers`' input channels that `producer`'s output channels can absorb.

    offset    the producer's gain is `offset + weight` (1 in Gemma's norms, else 0)
    heads, repeats, head_dim   the producer's channels are [heads, head_dim], and each head feeds
              `repeats` consecutive heads of the consumers (1 without grouped queries)
    """

    consumers: tuple[str, ...]
    producer: str
    offset: int
    heads: int
    repeats: int
    head_dim: int

    def to_consumers(self, producer_channels: Tensor) -> Tensor:
        """Spread one value a producer channel, [P], over the consumers' input channels, [K]."""
        grouped = producer_channels.view(self.heads, 1, self.head_dim)
        return grouped.expand(-1, self.repeats, -1).reshape(-1)

    def to_producer(self, consumer_channels: Tensor) -> Tensor:
        """Average over the consumer channels that one producer channel feeds, [K] -> [P]."""
        return consumer_channels.view(self.heads, self.repeats, self.head_dim).mean(1).reshape(-1)

    def largest_of(self, consumer_channels: Tensor) -> Tensor:
        """The largest over the consumer channels that one producer channel feeds, [K] -> [P]."""
        return consumer_channels.view(self.heads, self.repeats, self.head_dim).amax(1).reshape(-1)

    def apply(self, block: nn.Module, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Fold `scale` (> 0, [P]) into the block's float32 weights, in place.

        A norm's new gain is first rounded to `dtype`, which it will be stored in, and the
        consumers get the exact ratio of old to new gain: storing costs the fold no accuracy.
        Returns the scale that the consumers' input channels got, [K].
        """
        weight = block.get_parameter(f"{self.producer}.weight").data
        if weight.dim() == 2:
            weight /= scale.unsqueeze(-1)
        else:
            gain = weight + self.offset
            weight.copy_((gain / scale - self.offset).to(dtype))
            exact = gain / (weight + self.offset)
            scale = torch.where((exact > 0) & torch.isfinite(exact), exact, 1.0)
            weight.copy_(torch.where(scale == exact, weight, gain - self.offset))
        if getattr(block.get_submodule(self.producer), "bias", None) is not None:
            block.get_parameter(f"{self.producer}.bias").data /= scale
        spread = self.to_consumers(scale)
        self.scale_consumers(block, spread)
        return spread

    def scale_consumers(self, block: nn.Module, spread: Tensor) -> None:
        """Multiply the consumers' input channels by `spread`, [K], in place."""
        for name in self.consumers:
            block.get_parameter(f"{name}.weight").data *= spread


def find_fold(
    block: nn.Module, consumers: tuple[str, ...], probe: Callable[[nn.Module], Tensor]
) -> Fold | None:
    """Return the fold for linears that share one input, or None if the block has none.

    `probe` runs a block like this one on a fixed sample and returns its output.
    """
    with torch.no_grad():
        before = probe(block)
        for fold in _candidates(block, consumers):
            trial = copy.deepcopy(block)
            powers = torch.randint(
                -2, 3, (fold.heads * fold.head_dim,), generator=torch.Generator().manual_seed(0)
            )
            scale = (2.0**powers).to(before.device)
            spread = fold.to_consumers(scale)
            fold.scale_consumers(trial, spread)
            effect = (probe(trial) - before).norm()
            fold.scale_consumers(trial, 1 / spread)
            fold.apply(trial, scale, torch.float32)
            change = (probe(trial) - before).norm()
            if effect > 0 and change <= TOLERANCE * effect:
                return fold
    return None


def _candidates(block: nn.Module, consumers: tuple[str, ...]) -> Iterator[Fold]:
    width = block.get_parameter(f"{consumers[0]}.weight").shape[1]
    found = (getattr(module, "head_dim", None) for module in block.modules())
    head_dims = sorted({head_dim for head_dim in found if isinstance(head_dim, int)})
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or name in consumers:
            continue
        channels = weight.shape[0]
        if weight.dim() == 1 and channels == width:
            for offset in (0, 1):
                yield Fold(consumers, name, offset, heads=1, repeats=1, head_dim=width)
        elif isinstance(module, nn.Linear) and channels == width:
            yield Fold(consumers, name, 0, heads=1, repeats=1, head_dim=width)
        elif isinstance(module, nn.Linear) and width % channels == 0:
            for head_dim in head_dims:
                if channels % head_dim == 0:
                    heads, repeats = channels // head_dim, width // channels
                    yield Fold(consumers, name, 0, heads, repeats, head_dim)
