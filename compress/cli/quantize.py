"""`compress quantize`: one method, from flags."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from compress.cli.options import calibration_options, carry_out, given, run_options
from compress.core.errors import InputError

COMMA = re.compile(r",(?![^\[]*\])")  # not inside a list, [4,8]


@click.command("quantize")
@click.argument("model")
@click.option(
    "--method",
    required=True,
    help="rtn, awq, gptq, awq+gptq, qat; and with 8-bit activations llm-int8, smoothquant, fp8.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output folder.")
@click.option(
    "--bits",
    type=int,
    help="Bits a weight: 2, 3, 4 or 8, and always 8 with 8-bit activations.  [default: 4]",
)
@click.option("--group-size", help="Columns that share a scale, or 'channel'.  [default: 128]")
@click.option(
    "--target-bits",
    type=float,
    help="In place of --bits and --group-size: give each linear those that lose least, in so many "
    "bits a weight on average, scales included (4.75).",
)
@click.option(
    "--only-allocate",
    is_flag=True,
    help="With --target-bits: print which linears get which bits, and write no model. What was "
    "found out is kept for a run without.",
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Without or with zero points.  [default: symmetric]",
)
@click.option(
    "--format",
    help="compressed-tensors, gptq or awq; llm-int8 has bitsandbytes.  "
    "[default: compressed-tensors]",
)
@click.option(
    "--outlier-threshold",
    type=float,
    help="llm-int8: inputs of this size and above stay in 16 bits; 0 for none.  [default: 6]",
)
@click.option(
    "--ignore",
    multiple=True,
    help="Linear to leave in float: a name, its end, or re:REGEX. Repeatable.",
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="[LINEAR:]KEY=VALUE",
    help="A setting of the method (clip=false), or of some linears by name, its end or re:REGEX "
    "(down_proj:bits=8). Several as KEY=VALUE,KEY=VALUE. Repeatable.",
)
@click.option(
    "--kv-cache",
    help="Calibrate scales with which a runtime keeps keys and values in int8 or fp8.",
)
@calibration_options(samples=64)
@run_options
def quantize_command(
    model: str,
    method: str,
    out: Path,
    bits: int | None,
    group_size: str | None,
    target_bits: float | None,
    only_allocate: bool,
    symmetric: bool | None,
    format: str | None,
    outlier_threshold: float | None,
    ignore: tuple[str, ...],
    changes: tuple[str, ...],
    kv_cache: str | None,
    calibration: str | None,
    samples: int | None,
    seq_len: int | None,
    seed: int | None,
    dtype: str | None,
    compute_dtype: str | None,
    **how: Any,
) -> None:
    """Quantize MODEL and write a checkpoint.

    MODEL is a Hugging Face id, a folder, a .gguf file, or the alias smollm2.

    \b
    Examples:
      compress quantize smollm2 --method awq --bits 4 --out smollm2-w4
      compress quantize Qwen/Qwen3-0.6B --method awq --group-size 128 --out qwen3-w4 \\
          --calibration HuggingFaceFW/fineweb-edu:sample-10BT
      compress quantize smollm2 --method gptq --bits 3 --set down_proj:bits=4 --out smollm2-w3
      compress quantize smollm2 --method gptq --target-bits 4.75 --out smollm2-mixed
      compress quantize ./model --method awq --target-bits 5 --out model-w5 \\
          --set "choose_bits=[4,8]"
      compress quantize smollm2 --method qat --bits 3 --set tokens=200k --out smollm2-qat-w3
      compress quantize smollm2 --method llm-int8 --out smollm2-int8
      compress quantize ./model --method rtn --bits 8 --group-size channel --out model-w8
      compress quantize smollm2 --method awq --kv-cache int8 --out smollm2-w4-kv8
      compress quantize ./model --method gptq --calibration text.txt --out model-w4 --dry-run

    A run that was interrupted or killed goes on when the same command is given again.
    """
    from compress.recipe import build_recipe

    stage = given(
        bits=bits,
        group_size=group_size,
        target_bits=target_bits,
        symmetric=symmetric,
        format=format,
        outlier_threshold=outlier_threshold,
    )
    if ignore:
        stage["ignore"] = ignore
    stage |= _settings_of(changes)
    recipe = build_recipe(
        {
            "model": model,
            "out": out,
            "stages": [{"method": method, **stage}],
            "calibration": given(source=calibration, samples=samples, seq_len=seq_len, seed=seed),
            **given(dtype=dtype, compute_dtype=compute_dtype, kv_cache=kv_cache),
        },
        "quantize",
    )
    carry_out(recipe, only_decide=only_allocate, **how)


def _settings_of(changes: Sequence[str]) -> dict[str, Any]:
    """The method's settings, and its overrides, from `--set` arguments."""
    from compress.strict_yaml import parse_yaml

    settings: dict[str, Any] = {}
    overrides: dict[str, dict[str, Any]] = {}
    for change in changes:
        first, equals, _ = change.partition("=")
        pattern, colon, _ = first.rpartition(":")
        pairs = [pair.partition("=") for pair in COMMA.split(change[len(pattern + colon) :])]
        if not equals or not all(key and value for key, _, value in pairs):
            raise InputError(
                f"--set '{change}' is not [LINEAR:]KEY=VALUE[,KEY=VALUE], e.g. down_proj:bits=8"
            )
        target = overrides.setdefault(pattern, {}) if colon else settings
        target.update({key: parse_yaml(value, f"--set {key}") for key, _, value in pairs})
    return settings | ({"overrides": overrides} if overrides else {})
