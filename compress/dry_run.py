"""`--dry-run`: what a recipe would take, without writing anything."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from compress import calibration, convert_preflight, distill_preflight, probe, prune_preflight
from compress.chain_preflight import Expected, look_ahead
from compress.chain_recipe import ChainRecipe
from compress.core.blocks import BlockModel, linears_of
from compress.core.commits import Commits
from compress.core.errors import InputError
from compress.core.outfolder import OutputFolder
from compress.core.processes import processes
from compress.core.resources import free_disk, free_memory
from compress.core.stage import Block
from compress.preflight import (
    Job,
    Needs,
    check_resources,
    kept_in_memory,
    needed_text,
    needs_of,
    preflight,
    qat_config,
)
from compress.quant.formats import FORMATS
from compress.recipe import ConvertRecipe, DistillRecipe, PruneRecipe, Recipe, method_of
from compress.walk import TOKENS_PER_BATCH, Clock, Walk

FORWARDS = 4  # the original's forward pass, the student's, and a backward pass as long as two
PROBE_FORWARDS = 3  # forward, and again on the way back with gradients of inputs alone


def plan_recipe(
    recipe: Recipe, overwrite: bool = False, activation_memory: int | None = None
) -> dict[str, Any]:
    """What a recipe would take, from shapes and from timing two blocks; writes no output.

    Raises InputError where `run_recipe` would, but for what only reading weights and text shows.
    """
    folder = _unwritten(recipe.out, overwrite)
    job = preflight(recipe)
    memory = kept_in_memory(activation_memory)
    needs, text = needs_of(job, memory), needed_text(job)
    check_resources(needs, folder, job.model, text)
    sampling = 0.0
    if text and text.is_sampled:
        sampling = calibration.sampling_seconds(text, job.model.source, job.device)
    in_float = [name for name in linears_of(job.model.skeleton) if name not in job.grids]
    return {
        "model": recipe.model,
        "blocks": job.model.num_blocks,
        "parameters": job.model.num_parameters,
        "method": method_of(recipe.stages[0]),
        "device": str(job.device),
        "compute_dtype": str(job.model.compute_dtype).removeprefix("torch."),
        "linears": len(job.grids),
        "left_in_float": in_float,
        "output_note": _output_note(job),
        **_taken(recipe.out, job.model, needs, memory),
        "sampling_seconds": sampling,
        "seconds": sampling + _timed(job),
    }


def _output_note(job: Job) -> str | None:
    """What the size of the output is, where that is not known to the byte."""
    if job.choices is not None:
        return "at most"
    beside = FORMATS[job.recipe.stages[0].format].BESIDE
    return "outlier columns not counted" if beside and job.stage.needs_statistics else None


def plan_pruning(
    recipe: PruneRecipe, overwrite: bool = False, activation_memory: int | None = None
) -> dict[str, Any]:
    """What a pruning would take, from shapes; writes no output, and foretells no time.

    Where a shape is looked for, `shape` is None, and sizes are those of the largest there could be.

    Raises InputError where `run_pruning` would, but for what only reading weights and text shows.
    """
    folder = _unwritten(recipe.out, overwrite)
    job = prune_preflight.preflight(recipe)
    memory = kept_in_memory(activation_memory)
    needs = prune_preflight.needs_of(job, memory)
    check_resources(needs, folder, job.model, job.text)
    return {
        "model": recipe.model,
        "blocks": job.model.num_blocks,
        "parameters": job.model.num_parameters,
        "original_shape": asdict(job.stage.shape),
        "shape": None if job.space else asdict(job.stage.target),
        "output_parameters": job.parameters,
        "device": str(job.device),
        "compute_dtype": str(job.model.compute_dtype).removeprefix("torch."),
        **_taken(recipe.out, job.model, needs, memory),
    }


def plan_conversion(
    recipe: ConvertRecipe, overwrite: bool = False, activation_memory: int | None = None
) -> dict[str, Any]:
    """What a conversion would take, from shapes; writes no output, and foretells no time.

    Raises InputError where `run_conversion` would, but for what only reading weights and text
    shows.
    """
    folder = _unwritten(recipe.out, overwrite)
    job = convert_preflight.preflight(recipe)
    memory = kept_in_memory(activation_memory)
    needs = convert_preflight.needs_of(job, memory)
    check_resources(needs, folder, job.model, job.text)
    about = asdict(job.stage.describe())
    return {
        "model": recipe.model,
        "blocks": job.model.num_blocks,
        "parameters": job.model.num_parameters,
        "conversion": {key: about[key] for key in ("words", "changes", "kv_values")},
        "output_parameters": job.parameters,
        "device": str(job.device),
        "compute_dtype": str(job.model.compute_dtype).removeprefix("torch."),
        **_taken(recipe.out, job.model, needs, memory),
    }


def plan_distillation(recipe: DistillRecipe, overwrite: bool = False) -> dict[str, Any]:
    """What a distillation would take, from shapes; writes no output, and foretells no time.

    Raises InputError where `run_distillation` would, but for what only reading weights and text
    shows.
    """
    folder = _unwritten(recipe.out, overwrite)
    job = distill_preflight.preflight(recipe)
    distill_preflight.check_resources(job, folder)
    student, train = job.student, job.config.train
    return {
        "model": recipe.model,
        "blocks": student.num_blocks,
        "parameters": student.num_parameters,
        "teacher": job.config.teacher,
        "steps": train.steps,
        "tokens": train.steps * train.step_sequences * train.seq_len,
        "device": str(job.device),
        "compute_dtype": job.precision,
        **_taken(recipe.out, student, distill_preflight.needs_of(job), 0),
    }


def plan_chain(
    recipe: ChainRecipe, overwrite: bool = False, activation_memory: int | None = None
) -> dict[str, Any]:
    """What a recipe of several stages would take, from shapes; writes no output, and foretells no
    time.  What is not known before a shape was found is None.

    Disk is at most: what stages gave stays until the end.  Raises InputError where `run_chain`
    would, but for what only reading weights and text shows.
    """
    folder = _unwritten(recipe.out, overwrite)
    outlook = look_ahead(recipe, activation_memory)
    expected = [*outlook.stages, *outlook.draft]
    needs = [stage.needs for stage in expected if stage.needs is not None]
    disk = sum(one.output for one in needs) + max((one.disk for one in needs), default=0)
    folder.check_disk(disk)
    return {
        "model": recipe.model,
        "blocks": outlook.original.num_blocks,
        "parameters": outlook.original.num_parameters,
        "out": str(recipe.out),
        "original_bytes": outlook.original.reader.total_bytes,
        "stages": [_expected(stage) for stage in outlook.stages],
        "draft": [_expected(stage) for stage in outlook.draft],
        "disk_bytes": disk,
        "disk_free_bytes": free_disk(recipe.out.absolute().parent),
        "memory_bytes": max((one.host for one in needs), default=0),
        "memory_free_bytes": free_memory(),
        "gpu_memory_bytes": max((one.device for one in needs), default=0),
    }


def _expected(stage: Expected) -> dict[str, Any]:
    """A row of a chain's plan."""
    needs = stage.needs
    return {
        "method": stage.method,
        "parameters": stage.parameters,
        "bytes": needs and needs.output,
        "memory_bytes": needs and needs.host,
        "gpu_memory_bytes": needs and needs.device,
    }


def _unwritten(out: Path, overwrite: bool) -> OutputFolder:
    """The output folder, which is only looked at."""
    if processes().count > 1:
        raise InputError("a dry run takes one process; run it without accelerate launch")
    folder = OutputFolder(out, overwrite)
    folder.check()
    return folder


def _taken(out: Path, model: BlockModel, needs: Needs, memory: int) -> dict[str, Any]:
    """What a run takes and what there is, for a plan."""
    return {
        "out": str(out),
        "original_bytes": model.reader.total_bytes,
        "output_bytes": needs.output,
        "disk_bytes": needs.disk,
        "disk_free_bytes": free_disk(out.absolute().parent),
        "memory_bytes": needs.host,
        "gpu_memory_bytes": needs.device,
        "memory_free_bytes": free_memory(),
        "activation_bytes": needs.activations,
        "activation_memory_bytes": memory,
    }


def _timed(job: Job) -> float:
    """Seconds for all blocks, by those of the second one (the first warms up) on one batch.

    What a method does to a block takes as long for any number of tokens, but for training it;
    running it does not.  The two runs of a batch are taken for two forward passes, and a step of
    training the whole model for FORWARDS of them.
    """
    data, stage = job.recipe.calibration, job.stage
    size = min(data.samples, max(1, TOKENS_PER_BATCH // data.seq_len))
    stop = min(2, job.model.num_blocks)
    visits: list[float] = []

    def visit(block: Block) -> None:
        started = time.monotonic()
        job.stage.apply(block, None)
        visits.append(time.monotonic() - started)

    with TemporaryDirectory() as folder:
        commits = Commits(Path(folder) / "commits")
        commits.begin({})
        walk = Walk(job, commits, Path(folder) / "activations", 0, Clock())
        walk.title = "Timing two blocks"
        if needed_text(job):
            vocabulary = job.model.config.get_text_config().vocab_size
            walk.tokens = torch.randint(0, vocabulary, (size, data.seq_len))
        reference = job.stage.needs_reference or job.stage.trains_blocks
        walk.visit_all("timing", visit, job.recipe.propagate_error, reference, stop)
        ends = [0.0, *(commit["seconds"] for commit in commits.series("timing"))]
    batches = math.ceil(data.samples / size) if job.stage.needs_statistics else 1
    running = ends[-1] - ends[-2] - visits[-1]
    seconds = visits[-1] + running * batches
    if job.choices is not None:
        seconds += running / 2 * PROBE_FORWARDS * probe.TOKENS / (size * data.seq_len)
    if stage.trains_blocks:
        seconds += visits[-1] * (batches - 1)
    if stage.trains_model:
        seconds += running / 2 * FORWARDS * qat_config(job).tokens / (size * data.seq_len)
    return job.model.num_blocks * seconds
