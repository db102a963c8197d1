"""Scales of a block's input channels, folded into what produces them: AWQ's and SmoothQuant's.

    W x = (W diag(s)) (diag(s)^-1 x)

Consumers' columns are multiplied by s, and the producer's rows or gains divided, so that the block
computes what it did (folds.py finds producers).  What s is, a method decides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from compress.core.stage import Block
from compress.core.statistics import InputStatistics
from compress.quant.config import Grid
from compress.quant.folds import Fold, find_fold


class ChannelScaling:
    """Find a scale for every input of a block, and fold it; a method implements `search`."""

    def __init__(self, grids: Mapping[str, Grid]) -> None:
        self.grids = grids
        self._folds: dict[tuple, Fold | None] = {}

    def search(
        self,
        weights: Sequence[tuple[Tensor, Grid]],
        stats: InputStatistics,
        fold: Fold,
    ) -> tuple[Tensor, float]:
        """Return the scale of the fold's producer channels, > 0, [P], and its exponent.

        weights [out, K] are the linears that share the input, with their grids.
        """
        raise NotImplementedError

    def apply(self, block: Block, linears: Mapping[str, nn.Linear]) -> list[str]:
        """Scale every input of the block that something can absorb the scale of.

        Changes the block's weights and its inputs' statistics in place, and returns a remark for
        each input.  Linears outside `linears` that share an input are scaled with it, but have no
        say in the scale.
        """
        notes = []
        for stats in block.inputs:
            chosen = [name for name in stats.linears if name in linears]
            fold = self._fold_of(block, stats.linears) if chosen else None
            if fold is None:
                notes.append("not scaled: nothing absorbs the scale of its input")
                continue
            weights = [(linears[name].weight, self.grids[block.full_name(name)]) for name in chosen]
            scale, exponent = self.search(weights, stats, fold)
            stats.rescale(fold.apply(block.module, scale, block.dtype))
            notes.append(f"scaled into {fold.producer}, a = {exponent:.2f}")
        return notes

    def state(self) -> list[tuple[tuple, dict[str, Any] | None]]:
        """The folds found so far, for a run that is broken off (see Stage.state)."""
        return [(key, asdict(fold) if fold else None) for key, fold in self._folds.items()]

    def restore(self, state: Sequence[tuple[tuple, dict[str, Any] | None]]) -> None:
        """Take over what `state` returned."""
        self._folds = {key: Fold(**fold) if fold else None for key, fold in state}

    def _fold_of(self, block: Block, consumers: Sequence[str]) -> Fold | None:
        """The fold for an input, tried out once for each distinct structure of block."""
        shapes = tuple((n, tuple(p.shape)) for n, p in block.module.named_parameters())
        key = (type(block.module).__qualname__, shapes, tuple(consumers))
        if key not in self._folds:
            assert block.probe is not None
            self._folds[key] = find_fold(block.module, tuple(consumers), block.probe)
        return self._folds[key]
