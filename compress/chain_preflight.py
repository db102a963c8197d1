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
from compress.chain_recipe import ChainRecipe, EvalConfig
from compress.core.blocks import BlockModel
from compress.core.device import default_device
from compress.core.errors import naming
from compress.core.progress import without_bars
from compress.core.source import resolve_model
from compress.evaluate import check_models, check_text
from compress.recipe import ConvertRecipe, DistillRecipe, PruneRecipe, Recipe


def check_chain(recipe: ChainRecipe) -> BlockModel:
    """Everything that can be refused before the first stage begins; returns the original.

    Stages are checked as if each started from the original, whose vocabulary and context none of
    them changes.  What a stage asks of the shapes of a pruned or converted model is refused when
    that stage begins.

    Raises InputError that names the stage.
    """
    original = BlockModel(resolve_model(recipe.model), default_device(), torch.float32)
    made = {str(stage.out) for stage in recipe.stages}
    changed = False
    for name, stage in zip(recipe.names, recipe.stages, strict=True):
        with naming(name):
            if isinstance(stage, DistillRecipe):
                _check_distillation(stage, recipe.model, made)
            elif isinstance(stage, PruneRecipe | ConvertRecipe):
                _check_shape(stage, recipe.model, changed)
            else:
                _check_quantization(stage, recipe.model, changed)
        changed = changed or isinstance(stage, PruneRecipe | ConvertRecipe)
    if recipe.eval is not None:
        with naming("eval"):
            _check_eval(recipe.eval, original)
    return original


def _check_distillation(stage: DistillRecipe, model: str, made: set[str]) -> None:
    """`made` are the places of what stages give, which have the original's vocabulary."""
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
