"""Options that the commands which write a checkpoint share, and how they carry a recipe out."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import click

from compress.cli.allocation_table import print_allocation
from compress.cli.output import (
    print_chain,
    print_chain_plan,
    print_conversion,
    print_json,
    print_plan,
    print_pruning,
    print_report,
    print_training,
)
from compress.core.errors import InputError
from compress.core.resources import parse_size

if TYPE_CHECKING:
    from compress.chain_recipe import ChainRecipe
    from compress.recipe import AnyRecipe


class Size(click.ParamType):
    """Bytes: a number with or without a unit, such as 500MB, 2GB, 1.5GiB."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return parse_size(value)
        except InputError as error:
            self.fail(str(error))


OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an existing output folder.")
DRY_RUN = click.option(
    "--dry-run",
    is_flag=True,
    help="Check all but the weights' values, print what it takes, write nothing.",
)
RESTART = click.option(
    "--restart", is_flag=True, help="Drop a broken-off run instead of going on with it."
)
JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)


ACTIVATION_MEMORY = click.option(
    "--activation-memory",
    type=Size(),
    help="Hidden states to keep in memory, beside the disk: 500MB, 2GB.  "
    "[default: a quarter of what is free]",
)


def calibration_options(samples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options of what a model is calibrated on and of dtypes; `samples` is the recipe's default."""
    options = [
        click.option(
            "--calibration",
            help="self (what the model writes), self:MODEL (what another writes), a .txt, .jsonl, "
            ".parquet or .safetensors (token ids) file, or a data set id[:config[:split]].  "
            "[default: self]",
        ),
        click.option("--samples", type=int, help=f"Calibration sequences.  [default: {samples}]"),
        click.option("--seq-len", type=int, help="Tokens a sequence.  [default: 512]"),
        click.option("--seed", type=int, help="Seed of the calibration sample.  [default: 0]"),
        click.option(
            "--dtype",
            help="Of what is in float: auto, float32, bfloat16, float16.  [default: auto]",
        ),
        click.option(
            "--compute-dtype",
            help="Of calibration forwards: auto, float32, bfloat16, float16.  [default: auto]",
        ),
    ]

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that `carry_out` takes, in the order in which --help shows them."""
    options = [
        OVERWRITE,
        RESTART,
        ACTIVATION_MEMORY,
        DRY_RUN,
        JSON,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def carry_out(
    recipe: AnyRecipe | ChainRecipe,
    overwrite: bool,
    restart: bool,
    activation_memory: int | None,
    dry_run: bool,
    as_json: bool,
    only_decide: bool = False,
) -> None:
    """Run a recipe, or only plan it, and print what came of it.

    only_decide  stop when it is decided which shape, or which bits, a target leads to
    """
    from compress.chain import run_chain
    from compress.chain_recipe import ChainRecipe
    from compress.conversion import run_conversion
    from compress.core.processes import processes
    from compress.distillation import run_distillation
    from compress.dry_run import (
        plan_chain,
        plan_conversion,
        plan_distillation,
        plan_pruning,
        plan_recipe,
    )
    from compress.pipeline import run_recipe
    from compress.pruning import run_pruning
    from compress.recipe import ConvertRecipe, DistillRecipe, PruneRecipe

    with redirect_stdout(sys.stderr):  # trackers and other libraries print
        if isinstance(recipe, ChainRecipe):
            if dry_run:
                result, show = plan_chain(recipe, overwrite, activation_memory), print_chain_plan
            else:
                result, show = run_chain(recipe, overwrite, restart, activation_memory), print_chain
        elif isinstance(recipe, DistillRecipe):
            if activation_memory is not None:
                raise InputError("a distillation takes no --activation-memory; leave it out")
            if dry_run:
                result, show = plan_distillation(recipe, overwrite), print_plan
            else:
                result, show = run_distillation(recipe, overwrite, restart), print_training
        elif isinstance(recipe, PruneRecipe):
            if dry_run:
                result = plan_pruning(recipe, overwrite, activation_memory)
            else:
                result = run_pruning(recipe, overwrite, restart, activation_memory, only_decide)
            show = print_plan if dry_run else print_pruning
        elif isinstance(recipe, ConvertRecipe):
            if dry_run:
                result = plan_conversion(recipe, overwrite, activation_memory)
            else:
                result = run_conversion(recipe, overwrite, restart, activation_memory)
            show = print_plan if dry_run else print_conversion
        elif dry_run:
            result, show = plan_recipe(recipe, overwrite, activation_memory), print_plan
        else:
            result = run_recipe(recipe, overwrite, restart, activation_memory, only_decide)
            show = print_allocation if only_decide else print_report
    atexit.register(setattr, sys, "stdout", sys.stderr)  # they do so at exit too
    if processes().is_first:
        print_json(result) if as_json else show(result)


def given(**values: Any) -> dict[str, Any]:
    """The options that were given: defaults live in the dataclasses alone."""
    return {name: value for name, value in values.items() if value is not None}


def settings_in(changes: Sequence[str]) -> dict[str, Any]:
    """The settings in `--set` arguments."""
    from compress.strict_yaml import parse_yaml

    found = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not (key and equals and value):
            raise InputError(f"--set '{change}' is not KEY=VALUE, e.g. damping=0.02")
        found[key] = parse_yaml(value, f"--set {key}")
    return found
