"""What the training loop is told."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.core.counts import parse_count

LARGEST = 1 << 50
ENOUGH_STEPS = 200
Tokens = Annotated[int, BeforeValidator(parse_count), Field(ge=1, le=LARGEST)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainConfig:
    """One run of the loop.

    tokens         how many to train on, rounded up to whole steps; data with fewer is gone
                   through several times, in another order each time
    seq_len        tokens of a packed sequence
    batch_size     sequences of an optimizer step, over all processes; by default 2 to 8, as many as
                   leave 200 steps
    micro_batch    sequences of one forward and backward pass, in one process, at most
    learning_rate  at its peak
    weight_decay   of matrices; gains, biases and other vectors do not decay
    betas          of AdamW
    schedule       `cosine` from the peak down, `wsd` (constant, and a linear decay at the end), or
                   `constant`; each after a linear warm-up
    warmup         share of the steps in which the rate rises
    decay          share of the steps in which it falls, for `wsd`
    min_ratio      the last rate, relative to the peak
    clip_norm      largest norm of the gradient; a larger one is scaled down to it
    precision      of the forward pass; `auto` is bfloat16 where the device multiplies it natively,
                   else float32.  What is trained is kept in float32 either way
    activation_checkpointing  compute activations again in the backward pass instead of keeping them
    ema            decay of an exponential moving average of what is trained, which then is what
                   is evaluated and handed back; none by default
    evaluate_every steps between two evaluations on the held-out sequences; by default a tenth
                   of all, or more where evaluations would take more than a tenth of the time
    save_every     steps between two checkpoints; by default a tenth of all, or more where that
                   is less than a minute
    trackers       names of accelerate's trackers: tensorboard, trackio, wandb, ...
    seed           of the order of sequences, and of dropout
    """

    tokens: Tokens = 2_000_000
    seq_len: int = Field(default=512, ge=2, le=1 << 20)
    batch_size: int | None = Field(default=None, ge=1, le=1 << 20)
    micro_batch: int = Field(default=4, ge=1, le=1 << 20)
    learning_rate: float = Field(default=1e-4, gt=0, lt=10)
    weight_decay: float = Field(default=0.0, ge=0, lt=10)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, le=1)
    decay: float = Field(default=0.2, ge=0, le=1)
    min_ratio: float = Field(default=0.1, ge=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    activation_checkpointing: bool = False
    ema: float | None = Field(default=None, gt=0, lt=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    save_every: int | None = Field(default=None, ge=1)
    trackers: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    @property
    def step_sequences(self) -> int:
        """Sequences of an optimizer step: what is learned from few tokens goes by the number of
        steps (benchmarks/LOG.md), and many are done soonest in large ones."""
        if self.batch_size is not None:
            return self.batch_size
        return min(max(self.tokens // (ENOUGH_STEPS * self.seq_len), 2), 8)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return -(-self.tokens // (self.step_sequences * self.seq_len))
