"""A model through several stages: prune, distill, quantize, in one run with one report.

    model ─> stage 1 ─> .NAME.stages/1-prune/model ─> stage 2 ─> .NAME.stages/2-distill/model ─> ...
                          │ perplexity, KL from the original              │
                          └ commit                                        └ commit
    one of them ─> the stages of a draft, in the same way ─> agreement with the last
    original and all results ─> speed, in turn
    last, and the draft in it ─> the one report ─> NAME

Each stage is made by the runner that makes it alone, and goes on inside by that runner's commits.
A stage that is done is not done again, as long as it and those before it are of the same recipe.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

from compress.chain_preflight import look_ahead
from compress.chain_recipe import DRAFT, ChainRecipe, Draft
from compress.chain_report import place_draft, write_chain_report
from compress.chain_stages import StagesFolder, identities
from compress.conversion import run_conversion
from compress.core.blocks import BlockModel
from compress.core.errors import naming
from compress.core.processes import processes
from compress.core.progress import say
from compress.distillation import run_distillation
from compress.pipeline import run_recipe
from compress.pruning import run_pruning
from compress.recipe import AnyRecipe, ConvertRecipe, DistillRecipe, PruneRecipe, method_of


def run_chain(
    recipe: ChainRecipe,
    overwrite: bool = False,
    restart: bool = False,
    activation_memory: int | None = None,
) -> dict[str, Any]:
    """Carry out a recipe and return its report, as written to compress.json with times added.

    A broken-off run towards the same output goes on where it was, unless `restart`.
    `activation_memory` is as in `compress.pipeline.run_recipe`.

    Raises InputError before any long work for what can be known then (chain_preflight.py), and
    where a stage is refused when it begins, with those before it kept.
    """
    folder = StagesFolder(recipe, overwrite)
    first = processes().first
    first(folder.check)
    original = look_ahead(recipe, activation_memory).original
    with ExitStack() as stack:
        first(lambda: stack.enter_context(folder))
        first(lambda: folder.begin(identities(recipe, original), restart))
        for index, name in enumerate(recipe.names):
            with naming(name):
                first(partial(folder.start, index))
                _carry_out(recipe, index, activation_memory)
                first(partial(folder.keep, index))
                first(partial(folder.measure, index, original))
        if recipe.draft is not None:
            with naming(DRAFT):
                first(partial(folder.start_draft, recipe.draft))
                _make_draft(recipe.draft, activation_memory)
                first(partial(folder.measure_draft, recipe.draft, original))
        return first(lambda: _finished(recipe, folder, original)) or {}


def _finished(recipe: ChainRecipe, folder: StagesFolder, original: BlockModel) -> dict[str, Any]:
    """Time what was made, and put all of it into the output."""
    timed = None
    if recipe.speed is not None:
        timing = folder.timing(original)
        timing.check()
        timing.measure()
        timed = {"how": timing.measures.words[0], "rows": timing.rows()}
    draft = folder.draft_result()
    if recipe.draft is not None:
        place_draft(recipe.draft, recipe.stages[-1].out)
    return write_chain_report(recipe, folder.results(), draft, timed)


def _carry_out(recipe: ChainRecipe, index: int, activation_memory: int | None) -> None:
    """Do a stage that is not done, and wait until its result is there for all processes."""
    stage = recipe.stages[index]
    done = ", done before" if stage.out.is_dir() else ""
    say(f"Stage {index + 1} of {len(recipe.stages)}: {method_of(stage.stages[0])}{done}")
    if not done:
        _run(stage, activation_memory)
    processes().wait()


def _make_draft(draft: Draft, activation_memory: int | None) -> None:
    """Make a draft that is not made, and wait until it is there for all processes."""
    done = ", done before" if draft.recipe.out.is_dir() else ""
    say(f"A draft for it, of {len(draft.recipe.stages)} stages{done}")
    if not done:
        run_chain(draft.recipe, activation_memory=activation_memory)
    processes().wait()


def _run(stage: AnyRecipe, activation_memory: int | None) -> None:
    if isinstance(stage, DistillRecipe):
        run_distillation(stage)
    elif isinstance(stage, PruneRecipe):
        run_pruning(stage, activation_memory=activation_memory)
    elif isinstance(stage, ConvertRecipe):
        run_conversion(stage, activation_memory=activation_memory)
    else:
        run_recipe(stage, activation_memory=activation_memory)
