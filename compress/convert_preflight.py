"""What can be known before a conversion: whether it will work, and what it will take."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compress import calibration
from compress.core.blocks import BlockModel, largest_module_list
from compress.core.errors import InputError, reason_of
from compress.core.shards import SINGLE_FILE_BYTES
from compress.core.source import read_config
from compress.preflight import INTERPRETER_BYTES, Needs, check_shares, open_model
from compress.prune.conversion_stage import ConversionStage, Original
from compress.prune.shape import shape_of
from compress.prune_preflight import check_unshared, same_parts
from compress.recipe import CalibrationConfig, ConvertRecipe
from compress.walk import probe_of

TRIED_TOKENS = 32  # that a block is tried out on


@dataclass(frozen=True)
class ConvertJob:
    """A recipe that can be carried out: its model and stage, and what `auto` became here.

    parameters  of the converted model
    """

    recipe: ConvertRecipe
    model: BlockModel
    stage: ConversionStage
    device: torch.device
    dtype: torch.dtype
    parameters: int

    @property
    def text(self) -> CalibrationConfig | None:
        """The text to calibrate on, where there is a need of it."""
        return self.recipe.calibration if self.stage.observes or self.stage.compared else None


class _Sample:
    """Runs modules like a model's first block on a few tokens; what enters them is found once."""

    def __init__(self, model: BlockModel) -> None:
        self.model = model

    @cached_property
    def _run(self) -> Any:
        vocabulary = self.model.config.get_text_config().vocab_size
        tokens = torch.arange(TRIED_TOKENS)[None] % vocabulary
        ((states, kwargs),) = self.model.capture_inputs([tokens])
        return probe_of(states, kwargs[0], self.model.device)

    def __call__(self, module: nn.Module) -> Tensor:
        return self._run(module)


def preflight(recipe: ConvertRecipe) -> ConvertJob:
    """Everything that can be refused in the first second; InputError then."""
    model, dtype = open_model(recipe)
    check_unshared(model)
    original = Original(
        ref=model.source.ref,
        raw=read_config(model.source.folder),
        config=model.config,
        shape=shape_of(model.config),
        parts=same_parts(model),
        skeleton=model.skeleton,
        device=model.device,
        dtype=dtype,
        block=lambda: model.load_block(0),
        probe=_Sample(model),
        calibration_length=recipe.calibration.seq_len,
    )
    stage = recipe.stages[0].plan(original)
    stage.stock, parameters = _stock_blocks(model, stage)
    job = ConvertJob(recipe, model, stage, model.device, dtype, parameters)
    if job.text is not None:
        calibration.check_source(job.text)
        calibration.check_writer(job.text, model)
        check_shares(job.text)
    return job


def _stock_blocks(model: BlockModel, stage: ConversionStage) -> tuple[Sequence[nn.Module], int]:
    """The blocks of the class that comes out, without weights, and its parameters.

    Raises InputError when transformers refuses the config, or its class takes other tensors
    outside the blocks than the model has.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    raw, words = stage.config_json(None), stage.describe().words
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a config class may refuse by any exception
        raise InputError(
            f"'{model.source.ref}' cannot be given {words}: {reason_of(error)}"
        ) from None
    found = largest_module_list(built)
    assert found is not None
    tied = set(getattr(built, "all_tied_weights_keys", None) or ())
    _check_outside(model, built, found[0], tied)
    count = sum(p.numel() for name, p in built.named_parameters() if name not in tied)
    return list(found[1]), count


def _check_outside(model: BlockModel, built: nn.Module, blocks: str, tied: Collection[str]) -> None:
    """Raise InputError unless both models have the same tensors outside their blocks."""

    def outside(
        names: Mapping[str, Any], blocks: str, tied: Collection[str]
    ) -> dict[str, list[int]]:
        return {
            name: list(value.shape)
            for name, value in names.items()
            if not name.startswith(f"{blocks}.") and name not in tied
        }

    own = outside(model.skeleton.state_dict(), model.blocks_name, model.tied_names)
    theirs = outside(built.state_dict(), blocks, tied)
    if own != theirs:
        name = sorted(name for name in own | theirs if own.get(name) != theirs.get(name))[0]
        raise InputError(
            f"'{model.source.ref}' cannot become a {type(built).__name__}: {name} is "
            f"{own.get(name, 'not there')}, and that class takes {theirs.get(name, 'none')}"
        )


def needs_of(job: ConvertJob, activation_memory: int) -> Needs:
    """What a run will take, from shapes."""
    model, data = job.model, job.text
    output = job.parameters * job.dtype.itemsize
    merged = output if output <= SINGLE_FILE_BYTES else 0
    states = working = 0
    if data is not None:
        hidden = model.config.get_text_config().hidden_size
        numbers = data.samples * data.seq_len * (hidden + job.stage.carried)
        states = numbers * model.compute_dtype.itemsize
        working = job.stage.workspace
    working += 3 * 4 * sum(parameter.numel() for parameter in model.meta_block(0).parameters())
    on_gpu = job.device.type != "cpu"
    host = INTERPRETER_BYTES + min(states, activation_memory) + (0 if on_gpu else working)
    return Needs(output, output + merged + 2 * states, states, host, working if on_gpu else 0)
