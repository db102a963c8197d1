"""`compress run`: a recipe file."""

from pathlib import Path
from typing import Any

import click

from compress.cli.options import carry_out, run_options


@click.command("run")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--model", help="Use this model instead of the recipe's.")
@click.option("--out", type=click.Path(path_type=Path), help="Use this output folder instead.")
@run_options
def run_command(recipe: Path, model: str | None, out: Path | None, **how: Any) -> None:
    """Carry out the YAML file RECIPE.

    A recipe of several stages carries them out one after another, measures each against the
    original, and writes one checkpoint with one report.

    \b
    Examples:
      compress run recipes/awq-w4.yaml
      compress run recipes/prune-distill-w4.yaml
      compress run recipes/awq-w4.yaml --model Qwen/Qwen3-0.6B --out qwen3-w4
      compress run recipes/gptq-w4.yaml --dry-run

    A run that was interrupted or killed goes on when the same command is given again.  Of several
    stages those that are done are kept, also when a later one is changed in the recipe.
    """
    from compress.recipe_file import load_recipe

    overrides = {name: value for name, value in (("model", model), ("out", out)) if value}
    carry_out(load_recipe(recipe, overrides), **how)
