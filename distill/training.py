"""One optimizer step, and what is done between steps.

For the batch of a step, shared out over P processes and cut into micro-batches m,

    gradient = (1 / T) sum_p sum_m d total(p, m) / d weights,   T = tokens predicted in all of it

so it is the same however the batch is cut and shared out.  A step is a function of the weights, the
optimizer's state and the step's number, which gives sequences, learning rate and the seed of
dropout: a run that goes on from a checkpoint repeats what it would have done, bit for bit as far as
the device's operations do.

In bfloat16 weights are cast once a step, not once a micro-batch: autocast keeps its casts until its
outermost region is left, and that spans the step.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from compress.core.errors import InputError
from compress.core.processes import processes
from compress.distill.checkpoint import Checkpoints, put_back, state_of
from compress.distill.config import TrainConfig
from compress.distill.data import IGNORED, LARGE_ODD, PackedData
from compress.distill.ema import MovingAverage
from compress.distill.loss_value import Loss
from compress.distill.preparation import (
    make_accelerator,
    prepare_student,
    settle_precision,
    settle_sharding,
)
from compress.distill.run_log import Row
from compress.distill.schedule import learning_rate_factor

ParameterGroups = Callable[[nn.Module], list[dict[str, Any]]]
Batch = dict[str, Tensor]
MOST_NAMED = 16  # sequences in a message


def decay_matrices(student: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weight decay for matrices, none for gains, biases and scalars."""
    trained = [p for p in student.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Training:
    """The student wrapped for the processes there are, its optimizer and its checkpoints."""

    def __init__(
        self,
        student: nn.Module,
        data: PackedData,
        config: TrainConfig,
        folder: Path,
        parameter_groups: ParameterGroups,
    ) -> None:
        self.data, self.config = data, config
        self.accelerator = make_accelerator(config, folder)
        self.device = self.accelerator.device
        precision = settle_precision(config, self.device)
        self.lowered = precision == "bfloat16"
        prepare_student(student, config)
        settle_sharding(self.accelerator, student, precision)
        adamw = torch.optim.AdamW(
            parameter_groups(student),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over the weights and their moments
        )
        self.model, self.optimizer = self.accelerator.prepare(student, adamw)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.average = MovingAverage(self.trained, config.ema) if config.ema else None
        self.checkpoints = Checkpoints(folder / "checkpoints")

    def go_on(self) -> int:
        """Load the newest checkpoint, if there is one; returns how many steps are done."""
        shapes = {n: list(p.shape) for n, p in self.model.named_parameters() if p.requires_grad}
        identity = {"settings": asdict(self.config), "data": self.data.fingerprint()}
        done = self.checkpoints.begin(identity | {"trained": shapes})
        if done:
            state = state_of(self.model, self.optimizer.optimizer, self.average)
            self.checkpoints.load(done, state)
            put_back(state, self.model, self.optimizer.optimizer)
        return done

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` steps."""
        self.checkpoints.save(done, state_of(self.model, self.optimizer.optimizer, self.average))

    def finish(self) -> None:
        """Leave the student as it is to be used: the moving average in it, in eval mode."""
        if self.average is not None:
            self.average.swap()
        self.model.eval()
        for tracker in self.accelerator.trackers:  # `end_training` would end the process group too
            tracker.finish()

    def show_trackers(self, row: Row) -> None:
        """Hand a row's numbers to the trackers, if there are any."""
        if not self.config.trackers:
            return
        values = {
            name: row[name] for name in ("loss", "learning_rate", "gradient_norm") if name in row
        }
        values |= {f"parts/{name}": value for name, value in row.get("parts", {}).items()}
        held_out = row.get("evaluation", {"parts": {}})
        values |= {f"evaluation/{name}": value for name, value in held_out["parts"].items()}
        if "loss" in held_out:
            values["evaluation/loss"] = held_out["loss"]
        self.accelerator.log(values, step=row["step"])

    def step(self, step: int) -> Row:
        """One optimizer step, counted from 0; returns its row (run_log.py) but for the time.

        Raises InputError when a loss or the gradient is not finite, before it changes a weight.
        """
        config = self.config
        drawn = processes().share(self.data.drawn(step, config.step_sequences, config.seed))
        batches = [self.data.batch(part) for part in drawn.split(config.micro_batch)]
        number = step * processes().count + processes().rank
        torch.manual_seed((config.seed + LARGE_ODD * number) % (1 << 63))
        self.model.train()
        losses = self._backward(batches)
        norm: Any = self.accelerator.clip_grad_norm_(self.trained, config.clip_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        factor = learning_rate_factor(step, config)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        means = self._means(losses, gradient_norm=norm)  # waits for the device, once a step
        if not all(map(math.isfinite, (means["loss"], means["gradient_norm"]))):
            self._refuse(step, batches, losses)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step)
        tokens = (step + 1) * config.step_sequences * config.seq_len
        rate = config.learning_rate * factor
        return {"step": step + 1, "tokens": tokens, **means, "learning_rate": rate}

    @torch.no_grad()
    def evaluation(self, done: int) -> Row:
        """The losses of the held-out sequences after `done` steps, with averaged weights if any."""
        self.model.eval()
        share = processes().share(torch.arange(self.data.held_out))
        with self.average.in_place() if self.average else nullcontext():
            with self._autocast():
                batches = map(self.data.batch, share.split(self.config.micro_batch))
                losses = [_detached(self.model(**self._moved(batch))) for batch in batches]
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # what the root has gathered stays for a backward pass
        tokens = done * self.config.step_sequences * self.config.seq_len
        return {"step": done, "tokens": tokens, "evaluation": self._means(losses)}

    def _backward(self, batches: Sequence[Batch]) -> list[Loss]:
        """Compute the gradient; returns the losses of the micro-batches."""
        here = sum((batch["labels"] != IGNORED).sum() for batch in batches)
        predicted: Any = self.accelerator.reduce(torch.as_tensor(here).to(self.device), "sum")
        # DDP and FSDP take the mean of the processes' gradients, hence their number
        scale = processes().count / predicted.clamp(min=1)
        losses = []
        with self._autocast():
            for number, batch in enumerate(batches, start=1):
                last = number == len(batches)
                with nullcontext() if last else self.accelerator.no_sync(self.model):
                    loss = self.model(**self._moved(batch))
                    # what autocast did forward tells backward enough; the casts are kept
                    with torch.autocast(self.device.type, enabled=False):
                        self.accelerator.backward(loss.total * scale)
                losses.append(_detached(loss))
        return losses

    def _autocast(self) -> AbstractContextManager:
        """The region of lower precision.

        FSDP's gathered weights must not be kept: they are what it is there to free.
        """
        if not self.lowered:
            return nullcontext()
        keep = self.accelerator.distributed_type != DistributedType.FSDP
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=keep)

    def _moved(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _means(self, losses: Sequence[Loss], **more: Tensor) -> dict[str, Any]:
        """Means over the predicted tokens of all processes; `more` is the same in all of them."""
        names = list(losses[0].parts)
        rows = [
            torch.stack([x.double() for x in (s.total, s.tokens, *s.parts.values())])
            for s in losses
        ]
        sums: Any = self.accelerator.reduce(torch.stack(rows).sum(0), "sum")
        found = torch.cat([sums, *(value.double().view(1) for value in more.values())]).tolist()
        total, tokens, *parts = found[: 2 + len(names)]
        count = max(tokens, 1)
        return {
            "loss": total / count,
            "parts": dict(zip(names, (part / count for part in parts), strict=True)),
            **dict(zip(more, found[2 + len(names) :], strict=True)),
        }

    def _refuse(self, step: int, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """Raise the InputError of a step whose loss or gradient is not finite, in all processes."""
        bad = [
            batch["index"]
            for batch, loss in zip(batches, losses, strict=True)
            if not math.isfinite(float(loss.total))
        ]
        found = sorted(gather_object(torch.cat(bad).tolist() if bad else []))
        named = f"{found[:MOST_NAMED]}" + (" and more" if len(found) > MOST_NAMED else "")
        what = f"the loss of sequences {named}" if found else "the gradient (the losses are finite)"
        good = self.checkpoints.newest()
        kept = f"the checkpoint of step {good} is kept" if good else "no checkpoint was written yet"
        raise InputError(
            f"training step {step + 1}: {what} is not finite; {kept} in "
            f"'{self.checkpoints.folder}'; lower the learning rate, or train in float32"
        )


def _detached(loss: Loss) -> Loss:
    parts = {name: part.detach() for name, part in loss.parts.items()}
    return Loss(loss.total.detach(), loss.tokens, parts)
