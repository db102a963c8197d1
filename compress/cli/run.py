"""`compress run`: a recipe file."""

from pathlib import Path

import click

from compress.cli.output import print_report


@click.command("run")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--model", help="Use this model instead of the recipe's.")
@click.option("--out", type=click.Path(path_type=Path), help="Use this output folder instead.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def run_command(
    recipe: Path, model: str | None, out: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Carry out the YAML file RECIPE.

    \b
    Examples:
      compress run recipes/awq-w4.yaml
      compress run recipes/awq-w4.yaml --model Qwen/Qwen3-0.6B --out qwen3-w4
    """
    from compress.pipeline import run_recipe
    from compress.recipe import load_recipe

    overrides = {name: value for name, value in (("model", model), ("out", out)) if value}
    print_report(run_recipe(load_recipe(recipe, overrides), overwrite), as_json)
