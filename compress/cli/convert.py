"""`compress convert`: attention with a smaller KV cache, from flags."""

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


@click.command("convert")
@click.argument("model")
@click.option(
    "--to",
    required=True,
    help="gqa: fewer KV heads; mla: latents; windows: sliding windows; cla: layers that share "
    "keys and values, which compress alone loads.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output folder.")
@click.option("--kv-heads", type=int, help="gqa: KV heads to make; divides the number there is.")
@click.option(
    "--merge",
    help="gqa: of keys and values, pca, the best linear map, or mean.  [default: pca]",
)
@click.option(
    "--regroup/--no-regroup",
    default=None,
    help="gqa: put alike heads together, or neighbours.  [default: regroup]",
)
@click.option("--kv-rank", type=int, help="mla: numbers of a token's latent.")
@click.option("--rope-dim", type=int, help="mla: channels of the shared key, under RoPE; even.")
@click.option("--q-rank", type=int, help="mla: numbers that queries are made from.  [default: all]")
@click.option(
    "--basis",
    help="mla: principal components of activations, or plain SVD of weights.  "
    "[default: activations]",
)
@click.option(
    "--refit/--no-refit",
    default=None,
    help="Solve for the output projection.  [default: refit]",
)
@click.option("--window", type=int, help="windows: tokens that a layer with one sees.")
@click.option(
    "--global-every",
    type=int,
    help="windows: one layer in so many sees the whole text; 0 for none.  [default: 4]",
)
@click.option(
    "--global-by",
    help="windows: which ones; place, the last of each so many; mass, those with the most "
    "attention beyond the window; error, those whose output loses most.  [default: place]",
)
@click.option(
    "--share", type=int, help="cla: neighbouring layers that use the first one's keys and values."
)
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Another setting. Repeatable."
)
@calibration_options(samples=128)
@run_options
def convert_command(
    model: str,
    out: Path,
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
    **stage: Any,
) -> None:
    """Give MODEL an attention whose KV cache takes fewer bytes a token.

    What comes out is a stock model, but with `--to cla`: no stock class holds a Llama, Mistral or
    Qwen whose layers share keys and values, so only compress loads that.  MODEL is a Hugging Face
    id, a folder, a .gguf file, or the alias smollm2.  Nothing is trained: `compress distill` heals
    what comes out.

    \b
    Examples:
      compress convert smollm2 --to gqa --kv-heads 1 --calibration c4.txt --out smollm2-mqa
      compress convert meta-llama/Llama-2-7b-hf --to gqa --kv-heads 8 --out llama2-gqa8
      compress convert smollm2 --to gqa --kv-heads 1 --merge mean --no-refit --out baseline
      compress convert smollm2 --to mla --kv-rank 192 --rope-dim 64 --samples 32 \\
          --seq-len 2048 --out smollm2-mla
      compress convert smollm2 --to windows --window 512 --global-every 5 --out smollm2-windows
      compress convert smollm2 --to cla --share 2 --calibration c4.txt --out smollm2-cla

    A run that was interrupted or killed goes on when the same command is given again.
    """
    from compress.recipe import build_conversion

    recipe = build_conversion(
        {
            "model": model,
            "out": out,
            "stages": [given(**stage) | settings_in(changes)],
            "calibration": given(source=calibration, samples=samples, seq_len=seq_len, seed=seed),
            **given(dtype=dtype, compute_dtype=compute_dtype),
        },
        "convert",
    )
    carry_out(recipe, overwrite, restart, activation_memory, dry_run, as_json)
