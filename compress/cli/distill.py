"""`compress distill`: a student learns from its teacher, from flags."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from compress.cli.options import DRY_RUN, JSON, OVERWRITE, RESTART, carry_out, given
from compress.core.errors import InputError


@click.command("distill")
@click.option("--student", required=True, help="The model to train: an id, a folder, an alias.")
@click.option("--teacher", help="The model to learn from; not needed for cross_entropy alone.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output folder.")
@click.option(
    "--data",
    help="self (sampled from the teacher), a .txt, .jsonl or .parquet file, or a data set "
    "id[:config[:split]].  [default: self]",
)
@click.option("--held-out", type=int, help="Sequences to evaluate on.  [default: 16]")
@click.option("--tokens", help="Tokens to train on: 200k, 2M, 1.5B.  [default: 2M]")
@click.option(
    "--loss",
    "losses",
    metavar="NAME=WEIGHT,...",
    help="forward_kl, reverse_kl, jsd, cross_entropy, hidden_mse, hidden_cosine, attention_mse, "
    "attention_error.  "
    "[default: forward_kl=1]",
)
@click.option(
    "--topk",
    type=int,
    help="Keep this many of the teacher's likeliest tokens on disk; it runs once.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Folder for what --topk keeps, which later runs on the same data find.",
)
@click.option("--lora", type=int, metavar="RANK", help="Train adapters of this rank, and merge.")
@click.option("--learning-rate", type=float, help="At its peak.  [default: 1e-4]")
@click.option("--seq-len", type=int, help="Tokens a sequence.  [default: 512]")
@click.option("--batch-size", type=int, help="Sequences a step.  [default: 2 to 8, for 200 steps]")
@click.option(
    "--micro-batch", type=int, help="Sequences a forward pass in a process.  [default: 4]"
)
@click.option("--seed", type=int, help="Of the order of sequences.  [default: 0]")
@click.option(
    "--tracker", "trackers", multiple=True, help="tensorboard, trackio, wandb, ... Repeatable."
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="[PART:]KEY=VALUE",
    help="A setting of the loop (schedule=wsd), or of a part of the recipe (loss:temperature=2, "
    "lora:alpha=8, data:seed=1). Several as KEY=VALUE,KEY=VALUE. Repeatable.",
)
@click.option(
    "--dtype", help="Of the weights written: auto, float32, bfloat16, float16.  [default: auto]"
)
@OVERWRITE
@RESTART
@DRY_RUN
@JSON
def distill_command(
    student: str,
    teacher: str | None,
    out: Path,
    data: str | None,
    held_out: int | None,
    losses: str | None,
    topk: int | None,
    cache: Path | None,
    lora: int | None,
    trackers: tuple[str, ...],
    changes: tuple[str, ...],
    dtype: str | None,
    overwrite: bool,
    restart: bool,
    dry_run: bool,
    as_json: bool,
    **loop: Any,
) -> None:
    """Train a student on what its teacher predicts, and write a checkpoint like the student's.

    \b
    Examples:
      compress distill --teacher smollm2 --student ./smollm2-24 --data c4.jsonl --tokens 2M \\
          --out smollm2-24-healed
      compress distill --teacher Qwen/Qwen3-1.7B --student Qwen/Qwen3-0.6B --tokens 10M \\
          --data HuggingFaceFW/fineweb-edu:sample-10BT --topk 64 --out qwen3-distilled
      compress distill --teacher smollm2 --student ./pruned --tokens 200k --lora 16 --out healed
      compress distill --student smollm2 --loss cross_entropy=1 --data text.txt --out tuned
      accelerate launch --multi_gpu --num_processes 4 -m compress distill ...

    A run that was interrupted or killed goes on when the same command is given again.
    """
    from compress.recipe import build_distillation

    parts: dict[str, dict[str, Any]] = {
        "train": given(trackers=trackers or None, **loop),
        "data": given(source=data, held_out=held_out),
        "loss": {**_weights(losses), **given(topk=topk)},
        "lora": given(rank=lora),
    }
    for part, key, value in _changes(changes, parts):
        parts[part][key] = value
    stage = {name: values for name, values in parts.items() if values}
    recipe = build_distillation(
        {
            "model": student,
            "out": out,
            "stages": [{**given(teacher=teacher, cache=cache), **stage}],
            **given(dtype=dtype),
        },
        "distill",
    )
    carry_out(recipe, overwrite, restart, None, dry_run, as_json)


def _weights(losses: str | None) -> dict[str, Any]:
    """The weights in `--loss`."""
    pairs = [part.partition("=") for part in (losses or "").split(",") if part]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise InputError(
                f"--loss '{losses}' is not NAME=WEIGHT,..., e.g. forward_kl=1,cross_entropy=0.5"
            )
    return {key.strip(): value for key, _, value in pairs}


def _changes(changes: Sequence[str], parts: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Part, key and value of each setting in `--set`."""
    from compress.strict_yaml import parse_yaml

    found = []
    for change in changes:
        first = change.partition("=")[0]
        part, colon, _ = first.rpartition(":")
        pairs = [pair.partition("=") for pair in change[len(part + colon) :].split(",")]
        part = part or "train"
        if part not in parts or not all(key and equals and value for key, equals, value in pairs):
            raise InputError(
                f"--set '{change}' is not [PART:]KEY=VALUE[,KEY=VALUE], e.g. schedule=wsd or "
                f"loss:temperature=2; parts are {', '.join(parts)}"
            )
        found += [(part, key, parse_yaml(value, f"--set {key}")) for key, _, value in pairs]
    return found
