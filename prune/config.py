"""The settings of pruning."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.core.counts import parse_count
from compress.core.errors import InputError
from compress.core.resources import parse_size

Count = int | None


def _bytes(value: Any) -> Any:
    """For pydantic: a size as people write it."""
    try:
        return parse_size(value)
    except InputError as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PruneConfig:
    """What a model is to keep (see prune/shape.py), and how that is chosen (prune/scores.py).

    depth          blocks
    layers_out     blocks to remove, in place of `depth`
    hidden         channels of the hidden states
    ffn            neurons of each block's MLP
    heads          query heads of each block, the same number on each KV head
    kv_heads       of each block; by default as many as before, or one a head where it was so
    target_params  parameters that it may have, in place of numbers; numbers that are given stay
    target_memory  bytes that its weights may take
    target_latency milliseconds that a token may take to decode, on this machine
    finalists      shapes that are made and measured to meet a target
    score          of heads, neurons and channels: `contribution`, Minitron's `activation`,
                   `magnitude` of weights, or `random`
    depth_score    of blocks: `influence`, `removal`, `magnitude` or `random`
    removal_samples  calibration sequences that losses without a block are taken on, the first
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
    target_params: Annotated[int, BeforeValidator(parse_count), Field(ge=1)] | None = None
    target_memory: Annotated[int, BeforeValidator(_bytes), Field(ge=1)] | None = None
    target_latency: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    finalists: int = Field(default=3, ge=1, le=100)
    score: Literal["contribution", "activation", "magnitude", "random"] = "contribution"
    depth_score: Literal["influence", "removal", "magnitude", "random"] = "influence"
    removal_samples: int = Field(default=8, ge=1, le=1 << 20)
    refit: bool = True
    refit_samples: int = Field(default=128, ge=1, le=1 << 20)
    damping: float = Field(default=0.01, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    @property
    def target(self) -> tuple[str, float] | None:
        """The name of the target that is given, `target_params` and so on, and its number.

        Raises InputError where there are several.
        """
        names = ("target_params", "target_memory", "target_latency")
        given = [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(name for name, _ in given)} are given; give one")
        return given[0] if given else None
