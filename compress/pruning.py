"""Pruning from checkpoint to checkpoint: fewer blocks, heads, neurons and hidden channels.

    calibrate ─> walk 1: what runs through every block ─> a plan ─> walk 2: cut, refit, write

What comes out is a stock class of transformers, in the original's dtype.  One block at a time is
in memory, and a run that is broken off goes on after the last block that was committed.
"""

from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor

from compress import calibration, checkpoint
from compress.core.commits import numbered
from compress.core.outfolder import OutputFolder
from compress.core.processes import processes
from compress.core.shards import ShardWriter, in_stored_dtype
from compress.core.stage import Block
from compress.inspection import inspect_folder
from compress.pipeline import broken_off, identity, made_once, outer_tensors
from compress.preflight import kept_in_memory
from compress.prune.stage import Plan
from compress.prune.stock import config_entries
from compress.prune_preflight import PruneJob, check_resources, preflight
from compress.recipe import PruneRecipe, described
from compress.report import write_report
from compress.walk import Clock, Walk


def run_pruning(
    recipe: PruneRecipe,
    overwrite: bool = False,
    restart: bool = False,
    activation_memory: int | None = None,
) -> dict[str, Any]:
    """Carry out a recipe and return its report, as written to compress.json with times added.

    A broken-off run towards the same output goes on where it was, unless `restart`.
    `activation_memory` is as in `compress.pipeline.run_recipe`.

    Raises InputError before any long work when the model cannot have the shape asked for, or the
    calibration source, the machine or the output folder will not do.
    """
    clock = Clock()
    folder = OutputFolder(recipe.out, overwrite)
    first = processes().first
    first(folder.check)
    job = preflight(recipe)
    memory = kept_in_memory(activation_memory)
    with ExitStack() as stack:
        first(lambda: check_resources(job, memory, folder))
        first(lambda: stack.enter_context(folder))
        found = partial(identity, described(recipe), recipe.calibration, job.model, job.dtype)
        first(lambda: folder.begin(found(), restart))
        with broken_off(folder):
            walk = Walk(job, folder.commits, folder.activations, memory, clock)
            return _prune(walk, folder)


def _prune(walk: Walk[PruneJob], folder: OutputFolder) -> dict[str, Any]:
    """Do what preflight found possible; returns the report, with the times."""
    job, stage, first = walk.job, walk.job.stage, processes().first
    tokens = made_once(walk, partial(_tokens, job)) if stage.observes else None
    calibrated = walk.clock.seconds
    plan = _plan(walk, tokens)
    writer = ShardWriter(folder.output)
    if walk.commits.get("outer") is None:
        outer = partial(_outer_rows, plan=plan, width=stage.shape.hidden)
        first(lambda: writer.write("outer", outer_tensors(job.model, job.dtype, outer)))
        first(lambda: walk.commits.put("outer", True))
    walk.observe, walk.title, walk.tokens = None, "Pruning blocks", None
    if tokens is not None and stage.needs_statistics:
        walk.tokens = processes().share(tokens[: job.config.refit_samples])
    visit = partial(_cut_and_write, job, plan, writer)
    layers = chain.from_iterable(walk.visit_all("apply", visit, propagate=False))
    made = {"layers": list(layers), "tokens": tokens, "calibration_seconds": calibrated}
    return first(lambda: _finish(walk, folder, writer, plan, made)) or {}


def _tokens(job: PruneJob) -> Tensor:
    vocabulary = job.model.config.get_text_config().vocab_size
    source = job.model.source
    return calibration.calibration_tokens(job.recipe.calibration, source, vocabulary, job.device)


def _plan(walk: Walk[PruneJob], tokens: Tensor | None) -> Plan:
    """What is kept, decided once."""
    stage, commits = walk.job.stage, walk.commits
    if commits.get("plan") is None:
        walk.tokens = None if tokens is None else processes().share(tokens)
        walk.observe, walk.title = stage.observe, "Scoring blocks"
        summaries = walk.visit_all("collect", stage.collect, propagate=False)
        processes().first(lambda: commits.put("plan", stage.decide(summaries)))
    return Plan(**commits.get("plan"))


def _outer_rows(rows: Tensor, plan: Plan, width: int) -> Tensor:
    """Of a tensor outside the blocks what is kept, where it ends in the hidden channels."""
    if plan.hidden is None or rows.shape[-1] != width:
        return rows
    kept = rows.index_select(-1, plan.hidden.to(rows.device))
    return kept * plan.final_gain if rows.dim() == 1 else kept


def _cut_and_write(
    job: PruneJob, plan: Plan, writer: ShardWriter, block: Block
) -> list[dict[str, Any]]:
    """Prune a block, and write it under its new number; returns what was refitted."""
    refitted = job.stage.apply(block, plan)
    if block.index in plan.layers:
        number = plan.layers.index(block.index)
        place = job.model.block_name(number)
        values = {f"{place}.{name}": value for name, value in block.module.state_dict().items()}
        part = {
            job.model.stored_name(name): in_stored_dtype(name, value, block.dtype)
            for name, value in values.items()
        }
        writer.write(numbered("block", number), part)
    return [asdict(linear) for linear in refitted]


def _finish(
    walk: Walk[PruneJob], folder: OutputFolder, writer: ShardWriter, plan: Plan, made: Any
) -> dict[str, Any]:
    """Name the shards and write what stands beside them; can be broken off and done again."""
    job, source = walk.job, walk.job.model.source
    parts = [numbered("block", number) for number in range(len(plan.layers))]
    total = writer.finish(["outer", *parts])
    entries = config_entries(job.model.config, job.stage.target, plan.layers)
    report = _report(job, plan, made, total)
    times = {"calibration_seconds": made["calibration_seconds"], "seconds": walk.clock.seconds}
    times = {name: round(value, 1) for name, value in times.items()}
    card = checkpoint.prune_card(report)
    checkpoint.write_side_files(folder.output, source, job.dtype, entries, report, times, card)
    write_report(folder.output)
    return {**report, **times, "out": str(job.recipe.out)}


def _report(job: PruneJob, plan: Plan, made: Any, total: int) -> dict[str, Any]:
    """What compress.json says: nothing in it depends on the clock or the host."""
    model, stage, tokens = job.model, job.stage, made["tokens"]
    blocks = [
        {
            "block": index,
            "heads": _ranges(plan.heads[index]),
            "kv_heads": _ranges(plan.kv_heads[index]),
            "ffn": _ranges(plan.ffn[index]),
        }
        for index in plan.layers
    ]
    return {
        "recipe": described(job.recipe),
        "versions": checkpoint.versions(),
        "calibration_sha256": None if tokens is None else calibration.fingerprint(tokens),
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
        "pruning": {
            "original_shape": asdict(stage.shape),
            "shape": asdict(stage.target),
            "removed_blocks": sorted(set(range(stage.shape.depth)) - set(plan.layers)),
            "depth_scores": plan.depth_scores,
            "hidden": _ranges(plan.hidden),
            "blocks": blocks,
            "refitted": made["layers"],
        },
    }


def _ranges(indices: Tensor | None) -> str:
    """Ascending indices as `0-3,5,8-9`; `all` for None."""
    if indices is None:
        return "all"
    runs: list[list[int]] = []
    for index in indices.tolist():
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in runs)
