"""Converting the attention from checkpoint to checkpoint: fewer bytes of KV cache a token.

    calibrate ─> walk 1: look at the attention ─> walk 2: convert, refit, write

What comes out is a stock class of transformers, in the original's dtype.  One block at a time is
in memory, and a run that is broken off goes on after the last block that was committed.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from compress import calibration, checkpoint
from compress.convert_preflight import ConvertJob, needs_of, preflight
from compress.core.commits import numbered
from compress.core.outfolder import OutputFolder
from compress.core.own_class import only_here
from compress.core.processes import processes
from compress.core.shards import ShardWriter, in_stored_dtype
from compress.core.stage import Block
from compress.inspection import inspect_folder
from compress.pipeline import broken_off, identity, made_once, outer_tensors
from compress.preflight import check_resources, kept_in_memory
from compress.recipe import CalibrationConfig, ConvertRecipe, described
from compress.report import write_report
from compress.walk import Clock, Walk


def run_conversion(
    recipe: ConvertRecipe,
    overwrite: bool = False,
    restart: bool = False,
    activation_memory: int | None = None,
) -> dict[str, Any]:
    """Carry out a recipe and return its report, as written to compress.json with times added.

    A broken-off run towards the same output goes on where it was, unless `restart`.
    `activation_memory` is as in `compress.pipeline.run_recipe`.

    Raises InputError before any long work when the model cannot be converted so, or the
    calibration source, the machine or the output folder will not do.
    """
    clock = Clock()
    folder = OutputFolder(recipe.out, overwrite)
    first = processes().first
    first(folder.check)
    job = preflight(recipe)
    memory = kept_in_memory(activation_memory)
    with ExitStack() as stack:
        needs = needs_of(job, memory)
        first(lambda: check_resources(needs, folder, job.model, job.text))
        first(lambda: stack.enter_context(folder))
        found = partial(identity, described(recipe), recipe.calibration, job.model, job.dtype)
        first(lambda: folder.begin(found(), restart))
        with broken_off(folder):
            walk = Walk(job, folder.commits, folder.activations, memory, clock)
            return _convert(walk, folder)


@dataclass(frozen=True)
class Made:
    """What a run has made, for the report.

    tokens      that were calibrated on, int64 [samples, seq_len]
    calibrated  seconds until these were there
    plans       of the blocks
    reports     of the blocks
    """

    tokens: Tensor | None
    calibrated: float
    plans: Sequence[Any]
    reports: Sequence[dict[str, Any]]


def _convert(walk: Walk[ConvertJob], folder: OutputFolder) -> dict[str, Any]:
    """Do what preflight found possible; returns the report, with the times."""
    job, stage = walk.job, walk.job.stage
    tokens = made_once(walk, partial(_tokens, job, job.text)) if job.text else None
    calibrated = walk.clock.seconds
    if tokens is not None and stage.observes:
        walk.tokens, walk.observe = processes().share(tokens), stage.observe
    walk.title = "Looking at attention"
    plans = stage.decide(walk.visit_all("collect", stage.collect, propagate=False))
    writer = ShardWriter(folder.output)
    walk.tokens, walk.observe = None, None
    if tokens is not None and stage.compared:
        walk.tokens = processes().share(tokens[: stage.compared])
        walk.observe = partial(stage.compare, plans)
    walk.title = "Converting blocks"
    processes().first(lambda: _write_outer(walk, writer))
    reports = walk.visit_all("apply", partial(_apply, job, writer, plans), propagate=False)

    def finish() -> dict[str, Any]:
        return _finish(walk, folder, writer, Made(tokens, calibrated, plans, reports))

    return processes().first(finish) or {}


def _tokens(job: ConvertJob, data: CalibrationConfig) -> Tensor:
    """Token ids to calibrate on."""
    vocabulary = job.model.config.get_text_config().vocab_size
    return calibration.calibration_tokens(data, job.model.source, vocabulary, job.device)


def _write_outer(walk: Walk[ConvertJob], writer: ShardWriter) -> None:
    if walk.commits.get("outer") is None:
        writer.write("outer", outer_tensors(walk.job.model, walk.job.dtype))
        walk.commits.put("outer", True)


def _apply(
    job: ConvertJob, writer: ShardWriter, plans: Sequence[Any], block: Block
) -> dict[str, Any]:
    """Convert a block and write it; returns what is reported of it."""
    tensors, report = job.stage.apply(block, plans)
    part = {
        job.model.stored_name(block.full_name(name)): tensor for name, tensor in tensors.items()
    }
    part = {name: in_stored_dtype(name, value, block.dtype) for name, value in part.items()}
    writer.write(numbered("block", block.index), part)
    return asdict(report)  # type: ignore[call-overload]


def _finish(
    walk: Walk[ConvertJob],
    folder: OutputFolder,
    writer: ShardWriter,
    made: Made,
) -> dict[str, Any]:
    """Write what stands beside the weights; can be broken off and done again."""
    job, source = walk.job, walk.job.model.source
    parts = [numbered("block", number) for number in range(job.model.num_blocks)]
    report = _report(job, made, writer.finish(["outer", *parts]))
    times = {"calibration_seconds": made.calibrated, "seconds": walk.clock.seconds}
    times = {name: round(value, 1) for name, value in times.items()}
    card = checkpoint.convert_card(report)
    config = job.stage.config_json(made.plans)
    checkpoint.write_side_files(folder.output, source, job.dtype, config, report, times, card)
    write_report(folder.output)
    told = {"loads_in": only_here(config), "out": str(job.recipe.out)}
    return {**report, **times, **told}


def _report(job: ConvertJob, made: Made, total: int) -> dict[str, Any]:
    """What compress.json says; nothing in it depends on the clock or the host."""
    model, told = job.model, described(job.recipe)
    about = asdict(job.stage.describe())
    was, now = about.pop("kv_values")
    return {
        "recipe": told,
        "versions": checkpoint.versions(),
        "calibration_sha256": None if made.tokens is None else calibration.fingerprint(made.tokens),
        "compute_dtype": str(model.compute_dtype).removeprefix("torch."),
        "dtype": str(job.dtype).removeprefix("torch."),
        "sizes": {
            "original_bytes": model.reader.total_bytes,
            "original_bytes_by_part": inspect_folder(model.source.folder)["bytes_by_part"],
            "bytes": total,
            "quantized_weights": 0,
            "original_parameters": model.num_parameters,
            "parameters": job.parameters,
        },
        "layers": [],
        "conversion": {
            "to": told["stages"][0]["to"],
            **about,
            "original_kv_values": was,
            "kv_values": now,
            "original_kv_bytes": was * model.stored_dtype.itemsize,
            "kv_bytes": now * job.dtype.itemsize,
            "blocks": list(made.reports),
        },
    }
