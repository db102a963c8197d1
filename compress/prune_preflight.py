"""What can be known before a pruning: whether it will work, and what it will take."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from compress import calibration
from compress.core.blocks import BlockModel
from compress.core.errors import InputError, reason_of
from compress.core.outfolder import OutputFolder
from compress.core.resources import free_memory, in_words
from compress.core.shards import SINGLE_FILE_BYTES
from compress.core.source import read_config
from compress.preflight import INTERPRETER_BYTES, check_sampling, check_shares, open_model
from compress.prune.config import PruneConfig
from compress.prune.parts import Parts, check_norms, parts_of
from compress.prune.shape import Shape, pruned_shape, shape_of
from compress.prune.stage import PruneStage
from compress.prune.stock import config_entries
from compress.prune.surgery import Kept, cut
from compress.recipe import PruneRecipe

UNITS = ("hidden", "ffn", "heads", "kv_heads")


@dataclass(frozen=True)
class PruneJob:
    """A recipe that can be carried out: its model and stage, and what `auto` became here.

    parameters  of the pruned model
    """

    recipe: PruneRecipe
    model: BlockModel
    stage: PruneStage
    device: torch.device
    dtype: torch.dtype
    parameters: int

    @property
    def config(self) -> PruneConfig:
        """Of the one stage."""
        return self.recipe.stages[0]


def preflight(recipe: PruneRecipe) -> PruneJob:
    """Everything that can be refused in the first second; InputError then."""
    model, dtype = open_model(recipe)
    config = recipe.stages[0]
    shape = shape_of(model.config)
    target = pruned_shape(shape, config)
    parts = _parts(model, shape, target) if target.is_narrower_than(shape) else None
    parameters = _check_class(model, parts, shape, target)
    stage = PruneStage(config, shape, target, parts)
    if stage.observes:
        calibration.check_source(recipe.calibration)
        check_shares(recipe.calibration)
    return PruneJob(recipe, model, stage, model.device, dtype, parameters)


def _parts(model: BlockModel, shape: Shape, target: Shape) -> Parts:
    """The parts of the blocks, which are alike.  Raises InputError where they cannot be cut so."""
    ref = model.source.ref
    parts = parts_of(model.meta_block(0), ref)
    for index in range(1, model.num_blocks):
        if parts_of(model.meta_block(index), ref) != parts:
            raise InputError(f"blocks 0 and {index} of '{ref}' have different parts; not supported")
    if target.hidden < shape.hidden:
        check_norms(model.load_block(0), parts, ref)
    return parts


def _check_class(model: BlockModel, parts: Parts | None, shape: Shape, target: Shape) -> int:
    """Build the stock class of the target without weights; returns its parameters.

    Raises InputError when transformers refuses the config, or it asks for other shapes than the
    tensors outside the blocks and those of a block will have.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    raw = read_config(model.source.folder)
    layers = list(range(target.depth))
    wanted: dict[str, Any] = raw | config_entries(model.config, target, layers)
    try:
        config = CONFIG_MAPPING[wanted["model_type"]].from_dict(wanted)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a config class may refuse by any exception
        raise InputError(
            f"'{model.source.ref}' cannot be made {target}: {reason_of(error)}"
        ) from None
    block = copy.deepcopy(model.meta_block(0))
    if parts is not None:
        firsts = {key: torch.arange(getattr(target, key)) for key in UNITS}
        cut(block, parts, Kept(**firsts), shape.head_dim)
    place = f"{model.block_name(0)}."
    ours = {place + name: tuple(value.shape) for name, value in block.state_dict().items()}
    for name in model.outer_names():
        *rows, width = model.reader.shapes[name]
        ours[name] = (*rows, target.hidden if width == shape.hidden else width)
    theirs = {model.stored_name(name): value.shape for name, value in built.state_dict().items()}
    for name, found in ours.items():
        stored = model.stored_name(name)
        if stored not in theirs or tuple(theirs[stored]) != found:
            wanted_shape = list(theirs[stored]) if stored in theirs else "nothing"
            raise InputError(
                f"'{model.source.ref}' cannot be made {target}: {name} would be {list(found)}, "
                f"and {type(built).__name__} takes {wanted_shape}"
            )
    tied = set(getattr(built, "all_tied_weights_keys", None) or ())
    return sum(p.numel() for name, p in built.named_parameters() if name not in tied)


def check_resources(job: PruneJob, activation_memory: int, folder: OutputFolder) -> None:
    """Raise InputError where disk or memory will not do."""
    model, data = job.model, job.recipe.calibration
    output = job.parameters * job.dtype.itemsize
    merged = output if output <= SINGLE_FILE_BYTES else 0
    states = 0
    block = model.meta_block(0)
    weights = 4 * sum(parameter.numel() for parameter in block.parameters())
    moments = 0
    if job.stage.observes:
        width = job.stage.shape.hidden * model.compute_dtype.itemsize
        states = data.samples * data.seq_len * width
        widths = (job.stage.shape.ffn, job.stage.shape.hidden)
        moments = 4 * job.stage.workspace * max(widths) ** 2
    folder.check_disk(output + merged + 2 * states)
    if job.stage.observes:
        check_sampling(data, model, job.device)
    on_gpu = job.device.type != "cpu"
    memory = INTERPRETER_BYTES + min(states, activation_memory)
    memory += 0 if on_gpu else 2 * weights + moments
    if memory > (free := free_memory()):
        raise InputError(
            f"this run takes about {in_words(memory)} of memory, and {in_words(free)} are free; "
            "close something, or lower --activation-memory"
        )
