"""What can be known before a chain: whether its stages, their teachers and its text will do."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from compress import (
    calibration,
    checkpoint,
    convert_preflight,
    distill_preflight,
    preflight,
    prune_preflight,
)
from compress.chain_eval import sampling_config, text_config
from compress.chain_recipe import DRAFT, ORIGINAL, ChainRecipe, EvalConfig
from compress.comparing.comparison import Entry, check_speed
from compress.core.blocks import BlockModel
from compress.core.device import default_device
from compress.core.errors import InputError, naming
from compress.core.hollow import write_hollow
from compress.core.progress import without_bars
from compress.core.source import SELF, read_config, resolve_model
from compress.evaluate import check_models, check_text
from compress.preflight import Needs
from compress.recipe import (
    CONVERT,
    DISTILL,
    PRUNE,
    AnyRecipe,
    ConvertRecipe,
    DistillRecipe,
    PruneRecipe,
    Recipe,
    method_of,
)


@dataclass(frozen=True)
class Expected:
    """What a stage will give and take, by shapes alone.

    Where a shape is looked for, numbers are the most there could be; of the stages after it nothing
    is known.
    """

    method: str
    parameters: int | None = None
    needs: Needs | None = None


@dataclass(frozen=True)
class Outlook:
    """What a chain will do, as far as its recipe tells: of each stage, and of each of the draft."""

    original: BlockModel
    stages: Sequence[Expected]
    draft: Sequence[Expected] = ()


def look_ahead(recipe: ChainRecipe, activation_memory: int | None = None) -> Outlook:
    """Everything that can be refused before the first stage begins.

    What each stage gives is written as a folder of shapes (core/hollow.py), from which the next is
    checked.  After a stage that looks for a shape the rest is checked as far as it goes without.

    Raises InputError that names the stage.
    """
    original = BlockModel(resolve_model(recipe.model), default_device(), torch.float32)
    memory = preflight.kept_in_memory(activation_memory)
    with TemporaryDirectory() as folder:
        ahead = _Ahead(Path(folder), recipe, memory)
        stages = ahead.check(recipe)
        if recipe.eval is not None:
            with naming("eval"):
                _check_eval(recipe.eval, original)
        if recipe.speed is not None:
            with naming("speed"):
                check_speed(Entry(ORIGINAL, original.source), recipe.speed)
        if recipe.draft is None:
            return Outlook(original, stages)
        with naming(DRAFT):
            return Outlook(original, stages, ahead.check(recipe.draft.recipe))


class _Ahead:
    """Stages as they will be, one after another, on folders of shapes.

    folder  of these folders
    memory  bytes of hidden states to keep in it
    """

    def __init__(self, folder: Path, recipe: ChainRecipe, memory: int) -> None:
        self.folder, self.memory = folder, memory
        self.original = recipe.model
        self._given: dict[str, str | None] = {}  # what a stage gives -> its shapes, if known

    def check(self, recipe: ChainRecipe) -> list[Expected]:
        """Check the stages of a recipe."""
        found = []
        for name, stage in zip(recipe.names, recipe.stages, strict=True):
            with naming(name), self._called(), without_bars():  # the stage itself says it all
                if isinstance(stage, DistillRecipe):
                    found.append(self._distillation(stage))
                elif (model := self._shapes_of(stage.model)) is None:
                    found.append(self._unknown(stage))
                elif isinstance(stage, PruneRecipe):
                    found.append(self._pruning(stage, model))
                elif isinstance(stage, ConvertRecipe):
                    found.append(self._conversion(stage, model))
                else:
                    found.append(self._quantization(stage, model))
        return found

    def _shapes_of(self, model: str) -> str | None:
        """The folder to look at in the place of a model; None where that is not known."""
        return self._given.get(model, model)

    def _give(
        self, stage: AnyRecipe, config: dict[str, Any], model: BlockModel, dtype: Any
    ) -> None:
        """Write the shapes of what a stage gives."""
        place = self.folder / str(len(self._given))
        write_hollow(place, config, dtype, checkpoint.carried_files(model.source.folder))
        self._given[str(stage.out)] = str(place)

    @contextmanager
    def _called(self) -> Iterator[None]:
        """Have messages speak of a stage's model in the place of a folder of shapes."""
        try:
            yield
        except InputError as error:
            folders = rf"'{re.escape(str(self.folder))}/\d+'"
            raise InputError(re.sub(folders, "its model", str(error))) from error

    def _unknown(self, stage: PruneRecipe | ConvertRecipe | Recipe) -> Expected:
        """A stage after one that looks for a shape."""
        self._given[str(stage.out)] = None
        if isinstance(stage, Recipe):
            preflight.check_settings(stage, preflight.stage_of(stage, {}))
        else:
            calibration.check_source(stage.calibration)
            preflight.check_shares(stage.calibration)
        return Expected(method_of(stage.stages[0]))

    def _distillation(self, stage: DistillRecipe) -> Expected:
        """Where shapes are not known as of the original, whose vocabulary and context all have."""
        (config,) = stage.stages
        model = self._shapes_of(stage.model)
        self._given[str(stage.out)] = model
        if config.teacher is not None:
            teacher = self._shapes_of(config.teacher) or self.original
            resolve_model(teacher)
            config = replace(config, teacher=teacher)
        as_if = replace(stage, model=model or self.original, stages=(config,))
        job = distill_preflight.preflight(as_if)
        if model is None:
            return Expected(DISTILL)
        student = job.student
        if job.dtype != student.stored_dtype:
            self._give(stage, read_config(student.source.folder), student, job.dtype)
        return Expected(DISTILL, student.num_parameters, distill_preflight.needs_of(job))

    def _pruning(self, stage: PruneRecipe, model: str) -> Expected:
        job = prune_preflight.preflight(replace(stage, model=model))
        if job.space:
            self._given[str(stage.out)] = None
        else:
            config = prune_preflight.stock_entries(job.model, job.stage.target)
            self._give(stage, config, job.model, job.dtype)
        return Expected(PRUNE, job.parameters, prune_preflight.needs_of(job, self.memory))

    def _conversion(self, stage: ConvertRecipe, model: str) -> Expected:
        job = convert_preflight.preflight(replace(stage, model=model))
        self._give(stage, job.stage.config_json(None), job.model, job.dtype)
        return Expected(CONVERT, job.parameters, convert_preflight.needs_of(job, self.memory))

    def _quantization(self, stage: Recipe, model: str) -> Expected:
        job = preflight.preflight(replace(stage, model=model))
        needs = preflight.needs_of(job, self.memory)
        return Expected(method_of(stage.stages[0]), job.model.num_parameters, needs)


def _check_eval(config: EvalConfig, original: BlockModel) -> None:
    if config.text != SELF:
        check_text(original.source, text_config(config))
        return
    check_models([original.source.folder], config.seq_len)
    preflight.check_sampling(sampling_config(config), original, original.device)
