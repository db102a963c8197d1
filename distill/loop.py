"""The one training loop: distillation and quantization-aware training both use it.

It knows nothing of teachers or grids: it trains a module whose forward takes a batch (data.py) and
returns a `Loss`.  What a step computes is in training.py.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from compress.core.processes import processes
from compress.core.progress import say, track
from compress.distill.config import TrainConfig
from compress.distill.data import PackedData
from compress.distill.plot import write_plot
from compress.distill.preparation import check
from compress.distill.run_log import Row, RunLog
from compress.distill.training import ParameterGroups, Training, decay_matrices

PARTS = 10  # of all steps, at least a tenth lies between two evaluations or checkpoints by default
EVALUATING = 0.1  # of the time of training, about what evaluations take by default at most
PASSES = 3  # forward passes that training on a token costs
SECONDS = 60  # between two checkpoints by default, at least


@dataclass(frozen=True)
class TrainResult:
    """What came of a run.

    steps, tokens  done in all, before and after it was broken off
    seconds        of training and evaluation
    loss           of the last step, mean over its predicted tokens
    evaluations    rows of the held-out sequences, first to last (run_log.py)
    """

    steps: int
    tokens: int
    seconds: float
    loss: float
    evaluations: list[Row]


def train(
    student: nn.Module,
    data: PackedData,
    config: TrainConfig,
    folder: Path,
    *,
    parameter_groups: ParameterGroups = decay_matrices,
) -> TrainResult:
    """Train `student` in place and return what came of it.

    student           `forward(input_ids, position_ids, labels, index) -> Loss`; those of its
                      parameters that require a gradient are trained, in float32
    folder            gets losses.jsonl, loss.png (with matplotlib), trackers/ and checkpoints/.
                      A run that was broken off goes on from there when it is started again
    parameter_groups  AdamW's groups of the student's parameters; each may have a peak rate `lr`
                      and a `weight_decay` of its own

    Raises InputError when nothing is trainable, sequences cannot be shared out evenly over the
    processes, the folder has checkpoints of another run, or a loss or gradient is not finite; the
    last checkpoints stay then.
    """
    check(student, data, config)
    training = Training(student, data, config, folder, parameter_groups)
    done = training.go_on()
    log = RunLog(folder / "losses.jsonl", done)
    started = time.monotonic() - log.seconds

    def add(row: Row) -> None:
        log.add(row | {"seconds": round(time.monotonic() - started, 3)})
        training.show_trackers(row)

    if done:
        say(f"Going on after step {done} of {config.steps}")
    elif data.held_out:
        add(training.evaluation(0))
    evaluate_every = config.evaluate_every or _steps_between_evaluations(config, data)
    save_every = config.save_every or -(-config.steps // PARTS)
    saved = time.monotonic()
    for step in track(range(done, config.steps), _Description(log), config.steps, done):
        add(training.step(step))
        done = step + 1
        if data.held_out and (done % evaluate_every == 0 or done == config.steps):
            add(training.evaluation(done))
        due = done % save_every == 0 and (config.save_every or _passed(SECONDS, saved, training))
        if due or done == config.steps:
            training.save(done)
            saved = time.monotonic()
            if processes().is_first:
                write_plot(folder / "loss.png", log.steps, log.evaluations)
    if processes().is_first:  # a run may have been broken off between a checkpoint and its plot
        write_plot(folder / "loss.png", log.steps, log.evaluations)
    training.finish()
    last = log.steps[-1]
    return TrainResult(done, last["tokens"], log.seconds, last["loss"], log.evaluations)


def _steps_between_evaluations(config: TrainConfig, data: PackedData) -> int:
    """So many that evaluations take a small part of the time: few tokens are evaluated seldom."""
    affordable = EVALUATING * PASSES * config.tokens / max(data.held_out * config.seq_len, 1)
    return -(-config.steps // min(max(int(affordable), 1), PARTS))


def _passed(seconds: float, since: float, training: Training) -> bool:
    """Whether so much time has passed, in one of the processes at least: all save, or none."""
    passed = torch.tensor(float(time.monotonic() - since >= seconds), device=training.device)
    processes().largest(passed)
    return bool(passed)


class _Description:
    """The text of the progress bar: the last loss, and tokens a second since it was made."""

    def __init__(self, log: RunLog) -> None:
        self.log = log
        self.before = len(log.rows)
        self.started = time.monotonic()

    def __call__(self) -> str:
        steps = [row for row in self.log.rows[self.before :] if "loss" in row]
        if not steps:
            return "Training"
        tokens = len(steps) * steps[0]["tokens"] / steps[0]["step"]
        rate = tokens / (time.monotonic() - self.started)
        return f"Training, loss {steps[-1]['loss']:.4f}, {rate:,.0f} tokens/s"
