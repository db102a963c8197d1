"""The settings of pruning."""

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Count = int | None


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PruneConfig:
    """What a model is to keep (see prune/shape.py), and how that is chosen (prune/scores.py).

    depth          blocks
    layers_out     blocks to remove, in place of `depth`
    hidden         channels of the hidden states
    ffn            neurons of each block's MLP
    heads          query heads of each block, the same number on each KV head
    kv_heads       of each block; by default as many as before, or one a head where it was so
    score          of heads, neurons and channels: `contribution`, Minitron's `activation`,
                   `magnitude` of weights, or `random`
    depth_score    of blocks: `influence`, `magnitude` or `random`
    refit          solve for the weights that are kept (prune/refit.py), and set the norms' gains by
                   what the kept channels hold
    refit_samples  calibration sequences that the refit looks at, the first of those there are
    damping        share of the mean of the second moment's diagonal that is added to it
    seed           of `random`
    """

    depth: Count = None
    layers_out: Count = None
    hidden: Count = None
    ffn: Count = None
    heads: Count = None
    kv_heads: Count = None
    score: Literal["contribution", "activation", "magnitude", "random"] = "contribution"
    depth_score: Literal["influence", "magnitude", "random"] = "influence"
    refit: bool = True
    refit_samples: int = Field(default=128, ge=1, le=1 << 20)
    damping: float = Field(default=0.01, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
