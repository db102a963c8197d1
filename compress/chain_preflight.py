"""What can be known before a chain: whether its stages, their teachers and its text will do."""

from dataclasses import replace

import torch

from compress import (
    calibration,
    convert_preflight,
    distill_preflight,
    preflight,
    prune_preflight,
)
from compress.chain_eval import SELF, sampling_config, text_config
from compress.chain_recipe import DRAFT, ORIGINAL, ChainRecipe, EvalConfig
from compress.comparing.comparison import Entry, check_speed
from compress.core.blocks import BlockModel
from compress.core.device import default_device
from compress.core.errors import naming
from compress.core.progress import without_bars
from compress.core.source import resolve_model
from compress.evaluate import check_models, check_text
from compress.recipe import AnyRecipe, ConvertRecipe, DistillRecipe, PruneRecipe, Recipe


def check_chain(recipe: ChainRecipe) -> BlockModel:
    """Everything that can be refused before the first stage begins; returns the original.

    Stages are checked as if each started from the original, whose vocabulary and context none of
    them changes.  What a stage asks of the shapes of a pruned or converted model is refused when
    that stage begins.

    Raises InputError that names the stage.
    """
    original = BlockModel(resolve_model(recipe.model), default_device(), torch.float32)
    _check_stages(recipe, recipe.model, False)
    if recipe.eval is not None:
        with naming("eval"):
            _check_eval(recipe.eval, original)
    if recipe.speed is not None:
        with naming("speed"):
            check_speed(Entry(ORIGINAL, original.source), recipe.speed)
    if recipe.draft is not None:
        before = recipe.stages[: recipe.draft.start]
        with naming(DRAFT):
            _check_stages(recipe.draft.recipe, recipe.model, any(map(_changes_shapes, before)))
    return original


def _check_stages(recipe: ChainRecipe, model: str, changed: bool) -> None:
    """Check stages as if each started from `model`, whose shapes are another's where `changed`."""
    made = {recipe.model, *(str(stage.out) for stage in recipe.stages)}
    for name, stage in zip(recipe.names, recipe.stages, strict=True):
        with naming(name):
            if isinstance(stage, DistillRecipe):
                _check_distillation(stage, model, made)
            elif isinstance(stage, PruneRecipe | ConvertRecipe):
                _check_shape(stage, model, changed)
            else:
                _check_quantization(stage, model, changed)
        changed = changed or _changes_shapes(stage)


def _changes_shapes(stage: AnyRecipe) -> bool:
    return isinstance(stage, PruneRecipe | ConvertRecipe)


def _check_distillation(stage: DistillRecipe, model: str, made: set[str]) -> None:
    """`made` are models with the vocabulary of `model`, most of which are not there yet."""
    (config,) = stage.stages
    if config.teacher in made:
        config = replace(config, teacher=model)
    if config.teacher is not None:
        resolve_model(config.teacher)
    with without_bars():  # the stage itself says what there is to say
        distill_preflight.preflight(replace(stage, model=model, stages=(config,)))


def _check_shape(stage: PruneRecipe | ConvertRecipe, model: str, changed: bool) -> None:
    if changed:
        calibration.check_source(stage.calibration)
        preflight.check_shares(stage.calibration)
        return
    with without_bars():
        if isinstance(stage, PruneRecipe):
            prune_preflight.preflight(replace(stage, model=model))
        else:
            convert_preflight.preflight(replace(stage, model=model))


def _check_quantization(stage: Recipe, model: str, changed: bool) -> None:
    if changed:
        preflight.check_settings(stage, preflight.stage_of(stage, {}))
        return
    with without_bars():
        preflight.preflight(replace(stage, model=model))


def _check_eval(config: EvalConfig, original: BlockModel) -> None:
    if config.text != SELF:
        check_text(original.source, text_config(config))
        return
    check_models([original.source.folder], config.seq_len)
    preflight.check_sampling(sampling_config(config), original, original.device)
