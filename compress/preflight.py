"""What can be known before the first block: whether it will work, and what it will take."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from compress import calibration
from compress.core.blocks import BlockModel, linears_of
from compress.core.device import default_device, native_bfloat16
from compress.core.errors import InputError
from compress.core.kv_sizes import attention_of, owns_cache
from compress.core.outfolder import OutputFolder
from compress.core.processes import processes
from compress.core.progress import say
from compress.core.resources import free_memory, in_words
from compress.core.shards import SINGLE_FILE_BYTES
from compress.core.source import resolve_model
from compress.core.stage import Stage
from compress.loading import LATENTS
from compress.probe import probe_bytes
from compress.quant.choices import Choices, choices_of
from compress.quant.config import Grid, RoundedGrid, WeightOnlyConfig
from compress.quant.formats import FORMATS, Format
from compress.quant.input_rounding import rounding_of
from compress.quant.qat import QatConfig
from compress.quant.weight import QuantizedWeight
from compress.recipe import CalibrationConfig, ConvertRecipe, PruneRecipe, Recipe

MOST_HELD_OUT = 16  # sequences to evaluate a training on
HELD_OUT = 16  # of so many sequences one is held out
MICRO_BATCH = 4  # sequences of one forward and backward pass
LOGIT_BYTES = 1 << 30  # what the losses hold of logits at once, about
INTERPRETER_BYTES = 500_000_000  # Python, PyTorch and transformers, imported


# Of multi-head latent attention: linears that give latents, and other rows beside them.


@dataclass(frozen=True)
class Job:
    """A recipe that can be carried out: its model and stage, and what `auto` became here.

    With `choices` the grids are stand-ins, the smallest there are, until the target is met
    (mixed.py).
    """

    recipe: Recipe
    model: BlockModel
    stage: Stage
    grids: dict[str, Grid]
    device: torch.device
    dtype: torch.dtype
    choices: Choices | None = None


@dataclass(frozen=True)
class Needs:
    """Bytes that a run takes.

    output       tensors of the output, exactly; LLM.int8's outlier columns, which only calibration
                 tells, are not in it
    disk         at once, at most
    activations  hidden states between two blocks
    host         memory of this process, about
    device       memory of the GPU, about; 0 on a CPU
    """

    output: int
    disk: int
    activations: int
    host: int
    device: int


def preflight(recipe: Recipe) -> Job:
    """Everything that can be refused in the first second; InputError then."""
    model, dtype = open_model(recipe)
    config = recipe.stages[0]
    linears = {
        f"{model.block_name(index)}.{name}": linear
        for index in range(model.num_blocks)
        for name, linear in linears_of(model.meta_block(index)).items()
    }
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    choices, remarks = None, []
    if isinstance(config, WeightOnlyConfig) and config.target_bits is not None:
        packed = partial(_packed_bytes, FORMATS[config.format], dtype=dtype)
        choices = choices_of(config, shapes, packed)
        grids = choices.grids([group.bytes.index(min(group.bytes)) for group in choices.groups])
        grids = {name: grids[name] for name in shapes if name in grids}
    else:
        grids, remarks = config.grids({n: m.in_features for n, m in linears.items()})
        remarks = [*remarks, *_about_latents(grids)]
    if reason := FORMATS[config.format].refusal(grids, shapes):
        raise InputError(f"format {config.format} cannot hold {reason}")
    _check_latents(recipe, model, grids, dtype)
    stage = stage_of(recipe, grids)
    check_settings(recipe, stage)
    if recipe.kv_cache:
        for index in range(model.num_blocks):
            attention_of(model.meta_block(index), model.block_name(index))
    for remark in remarks:
        say(remark)
    job = Job(recipe, model, stage, grids, model.device, dtype, choices)
    if (text := needed_text(job)) is not None:
        calibration.check_writer(text, model)
    return job


def _about_latents(grids: dict[str, Grid]) -> list[str]:
    """What is said where the linears around latents have few bits: two roundings in a row of what
    all heads share.  In 8 bits they win back more than half of what 4 lose, for a twentieth of
    SmolLM2's bytes (benchmarks/LOG.md)."""
    leaves = {full.rpartition(".")[2] for full, grid in grids.items() if grid.bits < 8}
    coarse = [leaf for leaf in ("kv_a_proj_with_mqa", "kv_b_proj") if leaf in leaves]
    if not coarse:
        return []
    settings = " ".join(f"--set {leaf}:bits=8" for leaf in coarse)
    return [f"Latents lose much in few bits, little in 8: {settings} (`overrides` in a recipe)"]


def _check_latents(
    recipe: Recipe, model: BlockModel, grids: dict[str, Grid], dtype: torch.dtype
) -> None:
    """Raise InputError where a format would store the scales of latents as zero: `compress convert
    --to mla` makes their rows small (prune/mla_weights.py)."""
    name = recipe.stages[0].format
    stored = FORMATS[name].scale_dtype(dtype)
    for full, size in _latent_rows(model):
        if full in grids and size / 2 ** grids[full].bits < torch.finfo(stored).tiny:
            raise InputError(
                f"format {name} keeps scales in {str(stored).removeprefix('torch.')}, too coarse "
                f"for {full}, whose rows are of {size:.0e}; give --format "
                f"compressed-tensors, or leave it in float: --ignore {full.rpartition('.')[2]}"
            )
    check_latent_dtype(model, dtype)


def check_latent_dtype(model: BlockModel, dtype: torch.dtype) -> None:
    """Raise InputError where a dtype would store the rows of latents as zero."""
    for full, size in _latent_rows(model):
        if size < torch.finfo(dtype).tiny:
            raise InputError(
                f"dtype {str(dtype).removeprefix('torch.')} does not hold {full}, whose rows are "
                f"of {size:.0e}; give --dtype bfloat16 or float32"
            )


def _latent_rows(model: BlockModel) -> Iterator[tuple[str, float]]:
    """What makes latents in the first block, and the largest weight of its middle row."""
    for leaf in linears_of(model.meta_block(0)):
        if leaf.endswith(LATENTS):
            full = f"{model.block_name(0)}.{leaf}"
            rows = model.reader.load(model.stored_name(f"{full}.weight")).abs().amax(1)
            yield full, float(rows.float().median())


def stage_of(recipe: Recipe, grids: dict[str, Grid]) -> Stage:
    """The recipe's stage on these grids."""
    stage: Stage = recipe.stages[0].stage(grids)
    if recipe.kv_cache:
        stage.needs_statistics = True  # so that the blocks are run
    return stage


def check_settings(recipe: Recipe, stage: Stage) -> None:
    """Raise InputError for what cannot be carried out on any model."""
    if recipe.kv_cache:
        _check_kv_cache(recipe, stage)
    if stage.needs_reference and not recipe.propagate_error:
        raise InputError(
            "cross_moment compares original with compressed activations, which propagate_error: "
            "false does not compute; switch one of the two off"
        )
    if stage.trains_blocks:
        _check_block_training(recipe)
    config = recipe.stages[0]
    has_target = isinstance(config, WeightOnlyConfig) and config.target_bits is not None
    if stage.needs_statistics or stage.trains_model or has_target:
        calibration.check_source(recipe.calibration)
    if stage.needs_statistics:
        check_shares(recipe.calibration)


def _check_kv_cache(recipe: Recipe, stage: Stage) -> None:
    """Refuse scales of keys and values where nothing can measure or hold them."""
    if (held := recipe.stages[0].format) != "compressed-tensors":
        raise InputError(
            f"format {held} cannot hold scales of keys and values (kv_cache: {recipe.kv_cache}); "
            "use compressed-tensors, or leave out kv_cache"
        )
    if not recipe.propagate_error:
        raise InputError(
            "kv_cache measures keys and values of the compressed blocks, which propagate_error: "
            "false does not compute; switch one of the two off"
        )
    if stage.trains_model:
        raise InputError(
            "kv_cache measures keys and values before the whole model is trained; set tokens=0, "
            "or leave out kv_cache"
        )


def open_model(
    recipe: Recipe | PruneRecipe | ConvertRecipe,
) -> tuple[BlockModel, torch.dtype]:
    """The model of a recipe, on the device it is to be computed on, and the dtype to store.

    Says what of the checkpoint will not be carried over.  Raises InputError.
    """
    device, compute = default_device(), recipe.compute_dtype
    if compute == "auto":
        compute = "bfloat16" if native_bfloat16(device) else "float32"
    model = BlockModel(resolve_model(recipe.model), device, getattr(torch, compute))
    for name in model.unknown_names():
        say(f"Not carried over: {name} is in the checkpoint, but the model class does not use it")
    return model, model.stored_dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)


def check_shares(data: CalibrationConfig) -> None:
    """Raise InputError where there are more processes than sequences."""
    if data.samples < (count := processes().count):
        raise InputError(
            f"{data.samples} samples cannot be shared out over {count} processes; give more "
            "--samples, or start fewer processes"
        )


def _check_block_training(recipe: Recipe) -> None:
    """Refuse what training block by block cannot do."""
    if not recipe.propagate_error:
        raise InputError(
            "block_epochs trains each block on what the compressed ones before it give, which "
            "propagate_error: false does not compute; switch one of the two off"
        )
    if recipe.calibration.samples < 2:
        raise InputError(
            "block_epochs holds a part of the sequences out, and there is 1; give more --samples"
        )
    if (count := processes().count) > 1:
        raise InputError(
            f"block_epochs trains in one process, and there are {count}; start one, or set "
            "block_epochs=0: training the whole model takes any number"
        )


def qat_config(job: Job) -> QatConfig:
    """The settings of a job whose stage trains the whole model."""
    config = job.recipe.stages[0]
    assert isinstance(config, QatConfig)
    return config


def needed_text(job: Job) -> CalibrationConfig | None:
    """The text that a job takes: for calibration, and for training the whole model."""
    data = job.recipe.calibration
    if job.stage.trains_model:
        taught = -(-qat_config(job).tokens // data.seq_len)
        needed = max(taught, data.samples) + held_out_of(job)
        return replace(data, samples=needed)
    return data if job.stage.needs_statistics or job.choices else None


def held_out_of(job: Job) -> int:
    """Sequences on which a training of the whole model is evaluated."""
    taught = -(-qat_config(job).tokens // job.recipe.calibration.seq_len)
    return whole_shares(min(MOST_HELD_OUT, taught // HELD_OUT))


def whole_shares(sequences: int) -> int:
    """So many sequences, or a few more, that each process has the same number, at least one."""
    count = processes().count
    return max(1, -(-sequences // count)) * count


def kept_in_memory(asked: int | None) -> int:
    """Bytes of hidden states to keep in memory: as asked, or a process's share of a quarter."""
    return free_memory() // 4 // processes().count if asked is None else asked


def needs_of(job: Job, activation_memory: int) -> Needs:
    """What a run will take, from shapes."""
    model, stage, data = job.model, job.stage, job.recipe.calibration
    output = _output_bytes(job)
    activations = working = 0
    if stage.needs_statistics:
        streams = 2 if stage.needs_reference or stage.trains_blocks else 1
        width = model.state_width * model.compute_dtype.itemsize
        activations = data.samples * data.seq_len * width * streams
    for index in range(model.num_blocks):
        block = model.meta_block(index)
        linears = linears_of(block).values()
        widths = [linear.in_features for linear in linears]
        weights = 4 * sum(parameter.numel() for parameter in block.parameters())
        moments = 4 * sum(width**2 for width in widths) if stage.needs_statistics else 0
        if (
            stage.trains_blocks
        ):  # as it was, latents, gradients, two moments, the weight on its grid
            weights *= 6
        matrices = 4 * stage.workspace * max(width**2 for width in widths)
        # A method may hold the block twice while it tries things out, and errors are computed on
        # copies of a linear.
        errors = 3 * 4 * max(linear.in_features * linear.out_features for linear in linears)
        working = max(working, weights + moments + errors + max(weights, matrices))
    on_gpu = job.device.type != "cpu"
    host = INTERPRETER_BYTES + min(activations, activation_memory) + (0 if on_gpu else working)
    merged = output if output <= SINGLE_FILE_BYTES else 0
    disk = output + merged + 2 * activations
    if job.choices is not None:
        memory, kept = probe_bytes(model, data.samples, data.seq_len)
        disk, working = max(disk, kept), max(working, memory)
        host = max(host, INTERPRETER_BYTES + (0 if on_gpu else memory))
    if stage.trains_model:
        memory, checkpoints = _training_bytes(job)
        disk = max(disk, 2 * output + merged + checkpoints)  # start and output
        working = max(working, memory)
        host = max(host, INTERPRETER_BYTES + (0 if on_gpu else memory))
    return Needs(output, disk, activations, host, working if on_gpu else 0)


def _training_bytes(job: Job) -> tuple[int, int]:
    """Memory and disk that a training of the whole model takes.

    In memory: both models; of what learns gradients and two moments, and its weights on their grid;
    what a block's forward pass keeps for the backward one, by the widths of its linears; and
    logits, a gradient and a copy of some.  On disk: the places of weights in their cells, and three
    checkpoints, one of them being written.
    """
    model, config = job.model, qat_config(job)
    learning = sum(
        math.prod(model.reader.shapes[model.stored_name(f"{n}.weight")]) for n in job.grids
    )
    width = sum(
        linear.in_features + linear.out_features
        for index in range(model.num_blocks)
        for linear in linears_of(model.meta_block(index)).values()
    )
    own = learning if config.trains == "weights+scales" else 0
    models = (4 + model.compute_dtype.itemsize) * model.num_parameters
    tokens = min(config.batch_tokens, MICRO_BATCH * job.recipe.calibration.seq_len)
    kept = tokens * width * model.compute_dtype.itemsize
    return models + 12 * own + 8 * learning + kept + LOGIT_BYTES, learning + 3 * 12 * own


def check_resources(
    needs: Needs, folder: OutputFolder, model: BlockModel, text: CalibrationConfig | None
) -> None:
    """Raise InputError where disk or memory will not do; `text` is what is calibrated on."""
    folder.check_disk(needs.disk)
    if text:
        check_sampling(text, model, model.device)
    if needs.host > (free := free_memory()):
        raise InputError(
            f"this run takes about {in_words(needs.host)} of memory, and {in_words(free)} are "
            "free; close something, or lower --activation-memory"
        )
    if needs.device and needs.device > (free := torch.cuda.mem_get_info(model.device)[0]):
        raise InputError(
            f"a block takes about {in_words(needs.device)} of GPU memory, and {in_words(free)} "
            "are free; close what else uses the GPU, or hide it with CUDA_VISIBLE_DEVICES="
        )


def check_sampling(data: CalibrationConfig, model: BlockModel, device: torch.device) -> None:
    """Raise InputError where text is to be sampled from a model that memory does not hold."""
    if not data.is_sampled or device.type != "cpu":
        return
    parameters = model.num_parameters
    if data.writer is not None:
        writer = calibration.writer_skeleton(data)
        parameters = sum(parameter.numel() for parameter in writer.parameters())
    whole = parameters * (2 if native_bfloat16(device) else 4)
    if whole > (free := free_memory()):
        raise InputError(
            f"calibration on text that a model samples loads the whole model, "
            f"{in_words(whole)}, and {in_words(free)} of memory are free; give --calibration "
            "a text file or a data set"
        )


def _output_bytes(job: Job) -> int:
    """Bytes of the tensors of the output, from shapes alone; with a target, at most."""
    model, config = job.model, job.recipe.stages[0]
    format = FORMATS[config.format]
    total = sum(_float_bytes(model, name, job.dtype) for name in model.outer_names())
    packed = {model.stored_name(f"{name}.weight") for name in job.grids}
    for index in range(model.num_blocks):
        names = model.block_names(index)
        total += sum(_float_bytes(model, n, job.dtype) for n in names if n not in packed)
    if job.choices is not None:  # at most
        return total + job.choices.budget
    shapes = model.reader.shapes
    kinds = Counter(
        (grid, shapes[model.stored_name(f"{name}.weight")]) for name, grid in job.grids.items()
    )
    for (grid, shape), count in kinds.items():
        total += count * _packed_bytes(format, grid, shape, job.dtype)
    return total + (8 * _caches(model) if job.recipe.kv_cache else 0)


def _caches(model: BlockModel) -> int:
    """Layers whose attention fills a cache."""
    blocks = (
        (model.meta_block(index), model.block_name(index)) for index in range(model.num_blocks)
    )
    return sum(owns_cache(block, attention_of(block, name)) for block, name in blocks)


def _float_bytes(model: BlockModel, name: str, dtype: torch.dtype) -> int:
    is_float = model.reader.dtypes[name][0] in "FB" and model.reader.dtypes[name] != "BOOL"
    if not is_float:
        return model.reader.tensor_bytes(name)
    return math.prod(model.reader.shapes[name]) * dtype.itemsize


def _packed_bytes(format: Format, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a linear in a format: what packing gives for tensors without data."""
    rows, columns = shape
    group = grid.group_size or columns
    groups = (rows, columns // group)
    scale = torch.empty(groups, dtype=format.scale_dtype(dtype), device="meta")
    zero = None if grid.symmetric else torch.empty(groups, dtype=torch.int8, device="meta")
    codes = torch.empty(shape, dtype=torch.int8, device="meta")
    inputs = rounding_of(grid) if isinstance(grid, RoundedGrid) else None
    weight = QuantizedWeight(codes, scale, zero, grid.bits, group, inputs=inputs)
    packed = format.pack_weight(weight)
    return sum(tensor.nbytes for tensor in packed.values())
