"""What can be known before a pruning: whether it will work, and what it will take."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress import calibration
from compress.core.blocks import BlockModel
from compress.core.errors import InputError, reason_of
from compress.core.progress import say
from compress.core.resources import in_words
from compress.core.shards import SINGLE_FILE_BYTES
from compress.core.source import read_config
from compress.preflight import INTERPRETER_BYTES, Needs, check_shares, open_model
from compress.prune.config import PruneConfig
from compress.prune.parts import Parts, check_norms, parts_of
from compress.prune.search import AXES, numbers_of, smallest
from compress.prune.shape import Shape, pruned_shape, shape_of
from compress.prune.stage import PruneStage
from compress.prune.stock import config_entries
from compress.prune.surgery import Kept, cut
from compress.recipe import CalibrationConfig, PruneRecipe

UNITS = ("hidden", "ffn", "heads", "kv_heads")


@dataclass(frozen=True)
class Space:
    """Where a shape is looked for.

    target, limit  the setting that asks for it, and its number
    start          the original's shape with the numbers that are given
    axes           those that may change
    """

    target: str
    limit: float
    start: Shape
    axes: tuple[str, ...]

    def in_words(self, number: float) -> str:
        """A number of what the target limits, for people."""
        if self.target == "target_params":
            return f"{number:,.0f} parameters"
        return f"{number:.2f} ms" if self.target == "target_latency" else in_words(number)


@dataclass(frozen=True)
class PruneJob:
    """A recipe that can be carried out: its model and stage, and what `auto` became here.

    stage       of the shape asked for; where one is looked for, of the smallest in `space`
    parameters  of the pruned model; where a shape is looked for, at most
    """

    recipe: PruneRecipe
    model: BlockModel
    stage: PruneStage
    device: torch.device
    dtype: torch.dtype
    parameters: int
    space: Space | None

    @property
    def config(self) -> PruneConfig:
        """Of the one stage."""
        return self.recipe.stages[0]

    @property
    def text(self) -> CalibrationConfig | None:
        """The text to calibrate on, where there is a need of it."""
        return self.recipe.calibration if self.stage.observes or self.space else None

    @property
    def unit(self) -> int | None:
        """What a parameter counts towards the target; None where that is a time."""
        target = self.space.target if self.space else None
        return {"target_params": 1, "target_memory": self.dtype.itemsize}.get(target or "")

    def parameters_of(self, target: Shape) -> int:
        """The number of parameters of a shape."""
        shapes = tensor_shapes(self.model, self.stage.parts, self.stage.shape, target)
        inside = f"{self.model.block_name(0)}."
        return sum(
            math.prod(found) * (target.depth if name.startswith(inside) else 1)
            for name, found in shapes.items()
            if name not in self.model.tied_names
        )


def preflight(recipe: PruneRecipe) -> PruneJob:
    """Everything that can be refused in the first second; InputError then."""
    model, dtype = open_model(recipe)
    check_unshared(model)
    config = recipe.stages[0]
    shape = shape_of(model.config)
    target = start = pruned_shape(shape, config)
    space = None
    if config.target is not None:
        space = Space(*config.target, start, _free_axes(model, shape, config))
        target = smallest(start, space.axes)
    parts = _parts(model, shape, target) if target.is_narrower_than(shape) else None
    parameters = check_class(model, parts, shape, target)
    stage = PruneStage(config, shape, target, parts)
    job = PruneJob(recipe, model, stage, model.device, dtype, parameters, space)
    if job.text is not None:
        calibration.check_source(job.text)
        calibration.check_writer(job.text, model)
        check_shares(job.text)
    if space is None:
        return job
    job = replace(job, parameters=job.parameters_of(start))
    if (unit := job.unit) is not None:
        check_limit(space, target, unit * job.parameters, unit * parameters)
    return job


def _free_axes(model: BlockModel, shape: Shape, config: PruneConfig) -> tuple[str, ...]:
    """The axes on which no number is given, and this model can be cut.

    Raises InputError where there is none.
    """
    given = {axis for axis in AXES if getattr(config, axis) is not None}
    given |= {"depth"} if config.layers_out is not None else set()
    given |= {"heads"} if config.kv_heads is not None else set()
    free = [axis for axis in AXES if axis not in given and len(numbers_of(shape, axis)) > 1]
    refused: dict[str, list[str]] = {}
    for axis in [axis for axis in free if axis != "depth"]:
        try:
            _parts(model, shape, smallest(shape, [axis]))
        except InputError as error:
            refused.setdefault(str(error), []).append(axis)
            free.remove(axis)
    for reason, axes in refused.items():
        say(f"Leaving {', '.join(axes)} as they are: {reason}")
    if not free:
        raise InputError(
            "a target is given, and no number is left to choose; leave out one of "
            f"{', '.join(AXES)}, or the target"
        )
    return tuple(free)


def check_limit(space: Space, small: Shape, most: float, least: float) -> None:
    """Raise InputError unless the limit is between what the start and the smallest shape take."""
    asked, words = f"{space.target} = {space.in_words(space.limit)}", space.in_words
    if space.limit >= most:
        raise InputError(f"{asked} asks for nothing: {space.start} takes {words(most)}; give less")
    if space.limit < least:
        raise InputError(
            f"{asked} is not possible: the smallest shape looked at ({small}) takes "
            f"{words(least)}; give more, or numbers of your own"
        )


def _parts(model: BlockModel, shape: Shape, target: Shape) -> Parts:
    """The parts of the blocks, which are alike.  Raises InputError where they cannot be cut so."""
    parts = same_parts(model)
    if target.hidden < shape.hidden:
        check_norms(model.load_block(0), parts, model.source.ref)
    return parts


def check_unshared(model: BlockModel) -> None:
    """Raise InputError for layers that use the keys and values of another."""
    if share := getattr(model.config, "kv_share", None):
        raise InputError(
            f"'{model.source.ref}' shares keys and values between layers already (kv_share = "
            f"{share}); prune it or convert its attention before that"
        )


def same_parts(model: BlockModel) -> Parts:
    """The parts of every block; InputError where blocks differ, or have others."""
    ref = model.source.ref
    parts = parts_of(model.meta_block(0), ref)
    for index in range(1, model.num_blocks):
        if parts_of(model.meta_block(index), ref) != parts:
            raise InputError(f"blocks 0 and {index} of '{ref}' have different parts; not supported")
    return parts


def tensor_shapes(
    model: BlockModel, parts: Parts | None, shape: Shape, target: Shape
) -> dict[str, tuple[int, ...]]:
    """Of each tensor outside the blocks and of the first block, what it becomes."""
    block = copy.deepcopy(model.meta_block(0))
    if parts is not None:
        firsts = {key: torch.arange(getattr(target, key)) for key in UNITS}
        cut(block, parts, Kept(**firsts), shape.head_dim)
    place = f"{model.block_name(0)}."
    found = {place + name: tuple(value.shape) for name, value in block.state_dict().items()}
    for name in model.outer_names():
        *rows, width = model.reader.shapes[name]
        found[name] = (*rows, target.hidden if width == shape.hidden else width)
    return found


def stock_config(model: BlockModel, target: Shape) -> Any:
    """The config of transformers that holds a shape, for as many layers from the first.

    Raises InputError or what the config's class refuses it by.
    """
    from transformers import CONFIG_MAPPING

    wanted = stock_entries(model, target)
    return CONFIG_MAPPING[wanted["model_type"]].from_dict(wanted)


def stock_entries(model: BlockModel, target: Shape) -> dict[str, Any]:
    """The config.json of a shape, for as many layers from the first.  Raises InputError."""
    raw = read_config(model.source.folder)
    return raw | config_entries(model.config, target, list(range(target.depth)))


def check_class(model: BlockModel, parts: Parts | None, shape: Shape, target: Shape) -> int:
    """Build the stock class of the target without weights; returns its parameters.

    Raises InputError when transformers refuses the config, or it asks for other shapes than the
    tensors outside the blocks and those of a block will have.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(stock_config(model, target))
    except InputError:
        raise
    except Exception as error:  # a config class may refuse by any exception
        raise InputError(
            f"'{model.source.ref}' cannot be made {target}: {reason_of(error)}"
        ) from None
    theirs = {model.stored_name(name): value.shape for name, value in built.state_dict().items()}
    for name, found in tensor_shapes(model, parts, shape, target).items():
        stored = model.stored_name(name)
        if stored not in theirs or tuple(theirs[stored]) != found:
            wanted_shape = list(theirs[stored]) if stored in theirs else "nothing"
            raise InputError(
                f"'{model.source.ref}' cannot be made {target}: {name} would be {list(found)}, "
                f"and {type(built).__name__} takes {wanted_shape}"
            )
    tied = set(getattr(built, "all_tied_weights_keys", None) or ())
    return sum(p.numel() for name, p in built.named_parameters() if name not in tied)


def needs_of(job: PruneJob, activation_memory: int) -> Needs:
    """What a run will take, from shapes; where a shape is looked for, at most."""
    model, stage, data = job.model, job.stage, job.text
    output = job.parameters * job.dtype.itemsize
    merged = output if output <= SINGLE_FILE_BYTES else 0
    states = working = 0
    if data is not None:
        states = data.samples * data.seq_len * stage.shape.hidden * model.compute_dtype.itemsize
        working = 4 * stage.workspace * max(stage.shape.ffn, stage.shape.hidden) ** 2
    working += 2 * 4 * sum(parameter.numel() for parameter in model.meta_block(0).parameters())
    made = max(len(AXES), job.config.finalists) + 1 if job.space else 0  # side by side
    disk = output * (1 + made) + merged + 2 * states
    whole = 0  # bytes of models that are in memory as a whole
    if stage.needs_removals:
        whole = model.compute_dtype.itemsize * model.num_parameters
    if job.space:  # the original and a pruned one are compared
        whole = torch.float32.itemsize * (model.num_parameters + job.parameters)
    on_gpu = job.device.type != "cpu"
    host = INTERPRETER_BYTES + min(states, activation_memory)
    host = max(host + (0 if on_gpu else working), INTERPRETER_BYTES + (0 if on_gpu else whole))
    return Needs(output, disk, states, host, max(working, whole) if on_gpu else 0)
