"""`compress prune`: a smaller stock model, from flags."""

from pathlib import Path
from typing import Any

import click

from compress.cli.options import (
    calibration_options,
    carry_out,
    given,
    run_options,
    settings_in,
)


@click.command("prune")
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output folder.")
@click.option("--depth", type=int, help="Blocks to keep.")
@click.option("--layers-out", type=int, help="Blocks to remove, in place of --depth.")
@click.option("--hidden", type=int, help="Channels of the hidden states to keep.")
@click.option("--ffn", type=int, help="Neurons of each block's MLP to keep.")
@click.option("--heads", type=int, help="Query heads of each block to keep.")
@click.option(
    "--kv-heads",
    type=int,
    help="KV heads to keep.  [default: all, or one a head where it was so]",
)
@click.option(
    "--target-params",
    help="Look for the shape that loses least with so many parameters: 90M.  Numbers that are "
    "given stay as they are.",
)
@click.option("--target-memory", help="The same for bytes of weights: 200MB, 4GiB.")
@click.option(
    "--target-latency",
    type=float,
    help="The same for milliseconds a token takes to decode, on this machine.",
)
@click.option("--finalists", type=int, help="Shapes to make and measure for it.  [default: 3]")
@click.option(
    "--only-rank",
    is_flag=True,
    help="Print the ranking of shapes, and write no model; what was measured is kept for it.",
)
@click.option(
    "--score",
    help="Of heads, neurons and channels: contribution, activation (Minitron's), magnitude or "
    "random.  [default: contribution]",
)
@click.option(
    "--depth-score",
    help="Of blocks: influence, removal, magnitude or random.  [default: influence]",
)
@click.option(
    "--refit/--no-refit",
    default=None,
    help="Solve for the weights that are kept.  [default: refit]",
)
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Another setting. Repeatable."
)
@calibration_options(samples=1024)
@run_options
def prune_command(
    model: str,
    out: Path,
    only_rank: bool,
    layers_out: int | None,
    changes: tuple[str, ...],
    calibration: str | None,
    samples: int | None,
    seq_len: int | None,
    seed: int | None,
    dtype: str | None,
    compute_dtype: str | None,
    overwrite: bool,
    restart: bool,
    activation_memory: int | None,
    dry_run: bool,
    as_json: bool,
    **kept: Any,
) -> None:
    """Take blocks, heads, neurons or channels out of MODEL, and write a stock model.

    MODEL is a Hugging Face id, a folder, a .gguf file, or the alias smollm2.  Nothing is trained:
    `compress distill` heals what comes out.

    \b
    Examples:
      compress prune smollm2 --depth 24 --out smollm2-24
      compress prune smollm2 --ffn 1152 --heads 6 --calibration c4.txt --out smollm2-thin
      compress prune smollm2 --target-params 90M --calibration c4.txt --out smollm2-90m
      compress prune smollm2 --target-latency 8 --depth 30 --only-rank --out smollm2-fast
      compress prune Qwen/Qwen3-1.7B --layers-out 8 --hidden 1536 --out qwen3-small
      compress prune smollm2 --ffn 1152 --score magnitude --no-refit --out baseline

    A run that was interrupted or killed goes on when the same command is given again.
    """
    from compress.recipe import build_pruning

    recipe = build_pruning(
        {
            "model": model,
            "out": out,
            "stages": [given(layers_out=layers_out, **kept) | settings_in(changes)],
            "calibration": given(source=calibration, samples=samples, seq_len=seq_len, seed=seed),
            **given(dtype=dtype, compute_dtype=compute_dtype),
        },
        "prune",
    )
    carry_out(recipe, overwrite, restart, activation_memory, dry_run, as_json, only_rank)
