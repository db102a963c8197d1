"""Pruning from checkpoint to checkpoint: fewer blocks, heads, neurons and hidden channels.

    calibrate ─> walk 1: what runs through every block ─> a plan ─> walk 2: cut, refit, write

What comes out is a stock class of transformers, in the original's dtype.  One block at a time is
in memory, and a run that is broken off goes on after the last block that was committed.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import calibration, checkpoint
from compress.core.blocks import largest_module_list
from compress.core.commits import numbered
from compress.core.errors import InputError
from compress.core.outfolder import OutputFolder
from compress.core.processes import processes
from compress.core.progress import track
from compress.core.shards import ShardWriter, in_stored_dtype
from compress.core.source import read_config
from compress.core.stage import Block
from compress.inspection import inspect_folder
from compress.loading import load_model
from compress.pipeline import broken_off, identity, made_once, outer_tensors
from compress.preflight import check_resources, kept_in_memory
from compress.prune.removal import loss_without
from compress.prune.shape import Shape
from compress.prune.stage import Plan, PruneStage
from compress.prune.stock import config_entries
from compress.prune_preflight import PruneJob, needs_of, preflight
from compress.prune_search import HELD_OUT, Search, ShapeSearch
from compress.recipe import PruneRecipe, described
from compress.report import write_report
from compress.walk import Clock, Walk


def run_pruning(
    recipe: PruneRecipe,
    overwrite: bool = False,
    restart: bool = False,
    activation_memory: int | None = None,
    only_rank: bool = False,
) -> dict[str, Any]:
    """Carry out a recipe and return its report, as written to compress.json with times added.

    A broken-off run towards the same output goes on where it was, unless `restart`.
    `activation_memory` is as in `compress.pipeline.run_recipe`.  With `only_rank` the search for a
    shape is carried out alone, its report returned, and what was measured kept for a run without.

    Raises InputError before any long work when the model cannot have the shape asked for, or the
    calibration source, the machine or the output folder will not do.
    """
    clock = Clock()
    folder = OutputFolder(recipe.out, overwrite)
    first = processes().first
    first(folder.check)
    job = preflight(recipe)
    if only_rank and job.space is None:
        raise InputError("only a target has a ranking; give one, such as --target-params 90M")
    memory = kept_in_memory(activation_memory)
    with ExitStack() as stack:
        first(lambda: check_resources(needs_of(job, memory), folder, job.model, job.text))
        first(lambda: stack.enter_context(folder))
        found = partial(identity, described(recipe), recipe.calibration, job.model, job.dtype)
        first(lambda: folder.begin(found(), restart))
        with broken_off(folder):
            walk = Walk(job, folder.commits, folder.activations, memory, clock)
            return _prune(walk, folder, only_rank)


def _prune(walk: Walk[PruneJob], folder: OutputFolder, only_rank: bool) -> dict[str, Any]:
    """Do what preflight found possible; returns the report, with the times."""
    job, stage, commits = walk.job, walk.job.stage, walk.commits
    finder = None
    if job.space is not None:
        finder = ShapeSearch(job, job.space, commits, folder.trials)
        finder.check()
    rows = made_once(walk, partial(_tokens, job)) if job.text else None
    calibrated = walk.clock.seconds
    tokens = None if rows is None else rows[: job.recipe.calibration.samples]
    summaries = _scored(walk, tokens if stage.observes else None)
    found = None
    if finder is not None and rows is not None:

        def make(name: str, shapes: Mapping[Path, Shape]) -> None:
            cuts = [cut_of(job, shape, summaries, place) for place, shape in shapes.items()]
            carve(walk, name, cuts, tokens)
            processes().first(lambda: [one.finish(job) for one in cuts])

        found = finder.find(make, rows[job.recipe.calibration.samples :])
    if only_rank and found is not None:
        processes().first(folder.leave)
        return {"search": found.described, "seconds": round(walk.clock.seconds, 1)}
    cut = cut_of(job, found.chosen if found else stage.target, summaries, folder.output)
    (refitted,) = carve(walk, "apply", [cut], tokens)
    made = Made(cut, refitted, tokens, calibrated, found)
    return processes().first(lambda: _finish(walk, folder, made)) or {}


def _tokens(job: PruneJob) -> Tensor:
    """Token ids to calibrate on, and where a shape is looked for HELD_OUT sequences more."""
    vocabulary, data = job.model.config.get_text_config().vocab_size, job.recipe.calibration
    data = replace(data, samples=data.samples + HELD_OUT) if job.space else data
    return calibration.calibration_tokens(data, job.model.source, vocabulary, job.device)


def _scored(walk: Walk[PruneJob], tokens: Tensor | None) -> list[dict[str, Any]]:
    """What is known of every block, by its weights and by running it on the tokens."""
    stage = walk.job.stage
    walk.tokens = None if tokens is None else processes().share(tokens)
    walk.observe, walk.title = stage.observe, "Scoring blocks"
    summaries = walk.visit_all("collect", stage.collect, propagate=False)
    if tokens is not None and stage.needs_removals:
        for summary, loss in zip(summaries, _removals(walk, tokens), strict=True):
            summary["sums"]["removal"] = loss
    return summaries


def _removals(walk: Walk[PruneJob], tokens: Tensor) -> list[Tensor]:
    """By how much the whole model's loss grows without each block, float32 []."""
    job, commits = walk.job, walk.commits
    name, device = str(job.model.compute_dtype).removeprefix("torch."), job.device

    def measure() -> None:
        done = len(commits.series("removal"))
        if done > job.model.num_blocks:
            return
        model = load_model(job.model.source.folder, name, device)
        _, blocks = largest_module_list(model) or ("", [])
        cases = [None, *blocks][done:]
        rows = tokens[: job.config.removal_samples]
        for case in track(cases, "Passing over blocks", 1 + len(blocks), done):
            commits.put(numbered("removal", done), loss_without(model, case, rows))
            done += 1

    processes().first(measure)
    whole, *without = commits.series("removal")
    return [torch.tensor(loss - whole) for loss in without]


@dataclass(frozen=True)
class Cut:
    """A pruned model in the making: what is kept of the original, and the folder it goes to."""

    stage: PruneStage
    plan: Plan
    writer: ShardWriter

    def write_outer(self, job: PruneJob) -> None:
        """Write what is outside the blocks."""
        self.writer.folder.mkdir(parents=True, exist_ok=True)
        rows = partial(_outer_rows, plan=self.plan, width=self.stage.shape.hidden)
        self.writer.write("outer", outer_tensors(job.model, job.dtype, rows))

    def apply(self, job: PruneJob, block: Block) -> list[dict[str, Any]]:
        """Prune a block, and write it under its new number; returns what was refitted."""
        refitted = self.stage.apply(block, self.plan)
        if block.index in self.plan.layers:
            number = self.plan.layers.index(block.index)
            place = job.model.block_name(number)
            values = {f"{place}.{name}": value for name, value in block.module.state_dict().items()}
            part = {
                job.model.stored_name(name): in_stored_dtype(name, value, block.dtype)
                for name, value in values.items()
            }
            self.writer.write(numbered("block", number), part)
        return [asdict(linear) for linear in refitted]

    def finish(self, job: PruneJob) -> int:
        """Name the shards, with a config beside them; returns the bytes of weights.

        Can be broken off and done again.
        """
        parts = [numbered("block", number) for number in range(len(self.plan.layers))]
        total = self.writer.finish(["outer", *parts])
        checkpoint.write_config(self.writer.folder, job.dtype, self.config_json(job))
        return total

    def config_json(self, job: PruneJob) -> dict[str, Any]:
        """The whole config.json."""
        changed = config_entries(job.model.config, self.stage.target, self.plan.layers)
        return read_config(job.model.source.folder) | changed


def _outer_rows(rows: Tensor, plan: Plan, width: int) -> Tensor:
    """Of a tensor outside the blocks what is kept, where it ends in the hidden channels."""
    if plan.hidden is None or rows.shape[-1] != width:
        return rows
    kept = rows.index_select(-1, plan.hidden.to(rows.device))
    return kept * plan.final_gain if rows.dim() == 1 else kept


def cut_of(job: PruneJob, shape: Shape, summaries: Sequence[dict[str, Any]], folder: Path) -> Cut:
    """Decide what is kept of the model to have a shape, by what is known of its blocks."""
    parts = job.stage.parts if shape.is_narrower_than(job.stage.shape) else None
    stage = PruneStage(job.config, job.stage.shape, shape, parts)
    return Cut(stage, Plan(**stage.decide(summaries)), ShardWriter(folder))


def carve(
    walk: Walk[PruneJob], name: str, cuts: Sequence[Cut], tokens: Tensor | None
) -> list[list[dict[str, Any]]]:
    """Write pruned models in one walk over the original; returns what was refitted in each.

    name    under which it is committed
    tokens  to refit on, as far as asked for
    """
    job = walk.job

    def write_outer() -> None:
        if walk.commits.get(f"{name}-outer") is None:
            for cut in cuts:
                cut.write_outer(job)
            walk.commits.put(f"{name}-outer", True)

    def visit(block: Block) -> list[list[dict[str, Any]]]:
        refitted = []
        for cut in cuts:
            module = block.module if cut is cuts[-1] else copy.deepcopy(block.module)
            refitted.append(cut.apply(job, replace(block, module=module)))
        return refitted

    processes().first(write_outer)
    walk.observe, walk.tokens = None, None
    walk.title = "Pruning blocks" if len(cuts) == 1 else f"Pruning to {len(cuts)} shapes, blocks"
    if tokens is not None and any(cut.stage.needs_statistics for cut in cuts):
        walk.tokens = processes().share(tokens[: job.config.refit_samples])
    blocks = walk.visit_all(name, visit, propagate=False)
    return [list(chain.from_iterable(of_cut)) for of_cut in zip(*blocks, strict=True)]


@dataclass(frozen=True)
class Made:
    """What a run has made, for the report.

    refitted    what each refitted linear lost
    tokens      that were calibrated on, int64 [samples, seq_len]
    calibrated  seconds until these were there
    found       the search for the shape, where there was one
    """

    cut: Cut
    refitted: Sequence[dict[str, Any]]
    tokens: Tensor | None
    calibrated: float
    found: Search | None


def _finish(walk: Walk[PruneJob], folder: OutputFolder, made: Made) -> dict[str, Any]:
    """Write what stands beside the weights; can be broken off and done again."""
    job, source = walk.job, walk.job.model.source
    report = _report(job, made, made.cut.finish(job))
    times = {"calibration_seconds": made.calibrated, "seconds": walk.clock.seconds}
    times = {name: round(value, 1) for name, value in times.items()}
    card, config = checkpoint.prune_card(report), made.cut.config_json(job)
    checkpoint.write_side_files(folder.output, source, job.dtype, config, report, times, card)
    write_report(folder.output)
    return {**report, **times, "out": str(job.recipe.out)}


def _report(job: PruneJob, made: Made, total: int) -> dict[str, Any]:
    """What compress.json says: but for a latency that was asked for, nothing in it depends on the
    clock or the host."""
    model, tokens, plan, shape = job.model, made.tokens, made.cut.plan, made.cut.stage.shape
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
            "parameters": job.parameters_of(made.cut.stage.target),
        },
        "layers": [],
        "pruning": {
            "original_shape": asdict(shape),
            "shape": asdict(made.cut.stage.target),
            "removed_blocks": sorted(set(range(shape.depth)) - set(plan.layers)),
            "depth_scores": plan.depth_scores,
            "hidden": _ranges(plan.hidden),
            "blocks": blocks,
            "refitted": made.refitted,
            **({"search": made.found.described} if made.found else {}),
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
