"""Tokens a second of the training loop beside transformers' Trainer, on the same work.

    python benchmarks/training_speed.py [MODEL] [--seq-len 512] [--batch-size 8] [--micro-batch 4]

Both minimize cross-entropy on the same packed sequences in the same order, with the same
micro-batches, precision (bfloat16 where the processor multiplies it natively), fused AdamW and
clipping.  They run in turn, a few steps at a time, so that the machine's drift hits both; the first
step of a turn is not counted.  Speeds are printed only if the losses of the first turn agree.
"""

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.state import AcceleratorState

from compress.core.device import default_device, native_bfloat16
from compress.core.source import resolve_model
from compress.core.tokenizer import load_tokenizer
from compress.distill.config import TrainConfig
from compress.distill.data import PackedData, pack
from compress.distill.loop import train
from compress.distill.objective import LossConfig, Objective, Student
from compress.loading import load_model

RATE = 1e-5
# two ways to sum a loss over bfloat16 logits: relative difference of a step's loss
TOLERANCE = 0.01
SAMPLE = "The quick brown fox jumps over the lazy dog, and then it does so again. "


def main() -> None:
    """Run both in turn and print a table."""
    options = _options()
    source = resolve_model(options.model)
    tokenizer = load_tokenizer(source.folder)
    text = options.text.read_text(encoding="utf-8") if options.text else SAMPLE * 5000
    lines = (line for line in text.split("\n") if line.strip())
    end = [tokenizer.eos_token_id]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokens"
        pack((tokenizer(line, verbose=False).input_ids + end for line in lines), path)
        data = PackedData.read(path, options.seq_len)
        config = TrainConfig(
            tokens=options.steps * options.batch_size * options.seq_len,
            seq_len=options.seq_len,
            batch_size=options.batch_size,
            micro_batch=options.micro_batch,
            learning_rate=RATE,
            schedule="constant",
            warmup=0.0,
            save_every=1 << 30,
        )
        ours, theirs = [], []
        for turn in range(options.turns):
            place = Path(folder) / str(turn)
            ours.append(_ours(source.folder, data, config, place))
            theirs.append(_trainer(source.folder, data, config, place))
            AcceleratorState._reset_state(True)  # the Trainer's, of which a process has one
    _print(config, ours, theirs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The training loop beside transformers' Trainer.")
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--text", type=Path, help="a text file, a document a line")
    for name, default in (("seq-len", 512), ("batch-size", 8), ("micro-batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    return parser.parse_args()


Turn = tuple[list[float], list[float]]  # seconds of each step but the first, losses of all


def _ours(folder: Path, data: PackedData, config: TrainConfig, place: Path) -> Turn:
    model = load_model(folder, "float32")
    objective = Objective(LossConfig(forward_kl=0.0, cross_entropy=1.0), model)
    place.mkdir()
    train(Student(model.requires_grad_(True), objective), data, config, place)
    rows = [json.loads(line) for line in (place / "losses.jsonl").read_text().splitlines()]
    ends = [row["seconds"] for row in rows]
    return [b - a for a, b in pairwise(ends)], [row["loss"] for row in rows]


def _trainer(folder: Path, data: PackedData, config: TrainConfig, place: Path) -> Turn:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends, losses = [], []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.monotonic())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    device = default_device()
    model = load_model(folder, "float32", device).requires_grad_(True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(place / "trainer"),
            per_device_train_batch_size=config.micro_batch,
            gradient_accumulation_steps=config.step_sequences // config.micro_batch,
            max_steps=config.steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            max_grad_norm=config.clip_norm,
            use_cpu=device.type == "cpu",
            bf16=native_bfloat16(device),
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
        ),
        train_dataset=_Drawn(data, config),
        callbacks=[Watch()],
    )
    trainer.train()
    return [b - a for a, b in pairwise(ends)], losses


class _Drawn(torch.utils.data.Dataset):
    """The sequences in the order in which the loop draws them, labelled as the Trainer wants."""

    def __init__(self, data: PackedData, config: TrainConfig) -> None:
        count = config.step_sequences
        drawn = [data.drawn(step, count, config.seed) for step in range(config.steps)]
        self.order, self.data = torch.cat(drawn), data

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        batch = {n: v[0] for n, v in self.data.batch(self.order[place : place + 1]).items()}
        ids, predicted = batch["input_ids"], batch["labels"]
        # the model shifts labels itself, and nothing predicts the first token of a sequence
        labels = torch.cat([predicted.new_tensor([-100]), predicted[:-1]])
        return {"input_ids": ids, "position_ids": batch["position_ids"], "labels": labels}


def _print(config: TrainConfig, ours: list[Turn], theirs: list[Turn]) -> None:
    losses = [
        (a, b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one[1], other[1], strict=True)
    ]
    worst = max(abs(a - b) / b for a, b in losses)
    print(f"losses: {losses[0][0]:.4f} and {losses[0][1]:.4f}, apart by {worst:.2%} at most")
    if worst > TOLERANCE:
        raise SystemExit("the two do not do the same work: no speeds")
    tokens = config.step_sequences * config.seq_len
    speeds = []
    for name, turns in (("compress", ours), ("transformers' Trainer", theirs)):
        seconds = [second for turn in turns for second in turn[0]]
        speeds.append(tokens / statistics.median(seconds))
        print(
            f"{name:24} {speeds[-1]:8.1f} tokens/s   "
            f"steps of {min(seconds):.2f} to {max(seconds):.2f} s"
        )
    print(f"ratio {speeds[0] / speeds[1]:.3f}")


if __name__ == "__main__":
    main()
