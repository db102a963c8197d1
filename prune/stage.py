"""Pruning as a stage: score every block, decide on all of them, then cut them one by one.

    collect   sums over activations, and norms of weights
    decide    which blocks stay, one set of hidden channels for all, each block's heads and neurons
    apply     cut the block, and solve for the weights that are left (refit.py)

Both walks run the original model: what is refitted gives what the original gave on the original's
inputs.  Aiming it at the original's outputs on what the pruned blocks before it give lost far more
(benchmarks/LOG.md).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.core.stage import Block
from compress.prune.config import PruneConfig
from compress.prune.parts import Parts
from compress.prune.refit import refit
from compress.prune.scores import Activations, block_score, unit_scores, watching, weight_norms
from compress.prune.shape import Shape
from compress.prune.surgery import Kept, cut, places_of, take

LARGE_ODD = 1_000_003  # keeps the seeds of blocks apart


@dataclass(frozen=True)
class Plan:
    """What is kept of a model.

    layers       indices of the blocks
    hidden       channels, ascending, int64 [D']; None for all
    heads, ...   the same for each block that is kept
    gains        for each of these blocks what its norms' gains are multiplied by, by norm
    final_gain   the same of the norm after the last block
    depth_scores of all blocks, where some go
    """

    layers: list[int]
    hidden: Tensor | None
    heads: dict[int, Tensor | None]
    kv_heads: dict[int, Tensor | None]
    ffn: dict[int, Tensor | None]
    gains: dict[int, dict[str, float]]
    final_gain: float
    depth_scores: list[float]

    def kept(self, index: int) -> Kept | None:
        """Of a block; None where it goes."""
        if index not in self.layers:
            return None
        return Kept(self.hidden, self.heads[index], self.kv_heads[index], self.ffn[index])


@dataclass(frozen=True)
class RefitReport:
    """What a refitted linear, by its full name in the original, lost (prune/refit.py)."""

    name: str
    error: float
    cut_error: float
    damping: float


class PruneStage:
    """Makes a model of `shape` one of `target`, in the steps of compress.core.stage.

    parts  of its blocks; None where only blocks are removed
    """

    needs_reference: bool = False
    counts_above: float | None = None
    trains_blocks: bool = False
    workspace: ClassVar[int] = 4  # [K, K]: H, its kept part, the factor and a product

    def __init__(
        self, config: PruneConfig, shape: Shape, target: Shape, parts: Parts | None
    ) -> None:
        self.config = config
        self.shape = shape
        self.target = target
        self.parts = parts
        self.needs_statistics = config.refit and target.is_narrower_than(shape)

    @property
    def observes(self) -> bool:
        """Whether the decision takes running the model."""
        by_activations = self.config.score in ("contribution", "activation")
        of_units = self.target.is_narrower_than(self.shape) and by_activations
        of_blocks = self._is_shorter and self.config.depth_score == "influence"
        return of_units or of_blocks or self.needs_removals or self.needs_statistics

    @property
    def needs_removals(self) -> bool:
        """Whether `decide` takes the loss without each block, as `removal` among its sums."""
        return self._is_shorter and self.config.depth_score == "removal"

    @property
    def _is_shorter(self) -> bool:
        return self.target.depth < self.shape.depth

    def observe(self, _index: int, block: nn.Module) -> AbstractContextManager[list[Activations]]:
        """Watch a block that runs for its scores."""
        return watching(block, self.parts, self.shape.head_dim)

    def collect(self, block: Block) -> dict[str, Any]:
        """Sums over activations, where the block was observed, and norms of weights."""
        found = block.observed[0].sums if block.observed else {}
        sums = {name: total.cpu() for name, total in found.items()}
        weights = weight_norms(block.module, self.parts, self.shape.head_dim)
        return {"sums": sums, "weights": weights}

    def decide(self, summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The fields of a Plan, from what `collect` gave for each block."""
        layers, depth_scores = list(range(self.shape.depth)), []
        if self._is_shorter:
            depth_scores = [
                block_score(self.config.depth_score, **summary, seed=self._seed(index))
                for index, summary in enumerate(summaries)
            ]
            layers = best(torch.tensor(depth_scores), self.target.depth).tolist()
        scores = {}
        if self.target.is_narrower_than(self.shape):
            scores = {
                index: unit_scores(self.config.score, **summaries[index], seed=self._seed(index))
                for index in layers
            }
        hidden = None
        if self.target.hidden < self.shape.hidden:
            of_blocks = [units["hidden"] for units in scores.values()]
            hidden = best(torch.stack(of_blocks).sum(dim=0), self.target.hidden)
        heads, kv_heads, ffn, gains = {}, {}, {}, {}
        for index in layers:
            heads[index], kv_heads[index] = self._heads(scores.get(index))
            ffn[index] = None
            if self.target.ffn < self.shape.ffn:
                ffn[index] = best(scores[index]["ffn"], self.target.ffn)
            gains[index] = {
                name: self._gain(f"share.{name}", summaries[index]["sums"], hidden)
                for name in (self.parts.norms if self.parts else ())
            }
        final_gain = self._gain("share.", summaries[-1]["sums"], hidden)
        return asdict(Plan(layers, hidden, heads, kv_heads, ffn, gains, final_gain, depth_scores))

    def _seed(self, index: int) -> int:
        return (self.config.seed + LARGE_ODD * (index + 1)) % (1 << 63)

    def _heads(self, scores: Mapping[str, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
        """Heads and KV heads that a block keeps; None for all.

        A KV head counts as much as all its heads.
        """
        if scores is None or self.target.heads == self.shape.heads:
            return None, None
        by_group = scores["heads"].view(self.shape.kv_heads, -1)
        kept = best(by_group.square().sum(1), self.target.kv_heads)
        heads = [
            group * self.shape.queries + best(by_group[group], self.target.queries)
            for group in kept.tolist()
        ]
        return torch.cat(heads), kept

    def _gain(self, name: str, sums: Mapping[str, Tensor], hidden: Tensor | None) -> float:
        """What makes up for the size of the kept channels, which a norm now divides by.

        That is the root of E[ mean of x_c² over kept c / mean of x_c² over all ].
        """
        if hidden is None or not self.needs_statistics:
            return 1.0
        return float((sums[name][hidden].mean() / sums["tokens"]).sqrt())

    @torch.no_grad()
    def apply(self, block: Block, plan: Plan) -> list[RefitReport]:
        """Cut a block in place, and refit what is left; one that goes is left alone."""
        kept = plan.kept(block.index)
        if kept is None or self.parts is None:
            return []
        head_dim = self.shape.head_dim
        places = places_of(self.parts, kept, head_dim)
        weights = {name: block.module.get_parameter(f"{name}.weight").data for name in places}
        cut(block.module, self.parts, kept, head_dim)
        for name, factor in plan.gains[block.index].items():
            block.module.get_parameter(f"{name}.weight").data.mul_(factor)
        reports = []
        for stats in block.inputs:
            for name in stats.linears:
                rows, columns = places[name]
                if columns is None:
                    continue
                found = refit(
                    take(weights[name], rows),
                    columns.to(stats.second_moment.device),
                    stats.second_moment,
                    self.config.damping,
                )
                block.module.get_parameter(f"{name}.weight").data.copy_(found.weight)
                errors = (found.error, found.cut_error, found.damping)
                reports.append(RefitReport(block.full_name(name), *errors))
        return reports

    def state(self) -> None:
        """Nothing is carried from block to block."""

    def restore(self, state: Any) -> None:
        """Nothing to take over."""


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the highest scores, ascending, int64 [count]; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
