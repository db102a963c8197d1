"""Mixed precision: which bits and group size each group of linears gets, to meet a target.

    calibration text ─> probe (probe.py): loss of every choice of every linear, predicted
                     ─> allocation (quant/allocation.py): the choices of least loss in the budget
                     ─> the grids, with which the run goes on as if a recipe had named them

Both are committed, so a run that is broken off does neither twice.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.core.blocks import BlockModel
from compress.core.outfolder import OutputFolder
from compress.core.processes import processes
from compress.preflight import Job, stage_of
from compress.probe import Probe, probed
from compress.quant.allocation import Allocation, Option, allocate, frontier, totals
from compress.quant.choices import Choices, Group
from compress.quant.config import Grid
from compress.quant.formats import FORMATS
from compress.walk import Walk

MOST_POINTS = 100  # of the frontier, in the report


def settle_mixed(
    walk: Walk[Job], choices: Choices, rows: Tensor, folder: OutputFolder
) -> dict[str, Any]:
    """Give the walk's job the grids that lose least within the target; returns the report on them.

    rows  token ids to calibrate on, int64 [N, S]
    """
    job, commits = walk.job, walk.commits

    def decide() -> None:
        if commits.get("allocation") is not None:
            return
        losses = _losses(walk, choices, probed(rows), folder.activations)
        found = allocate(_options(choices, losses), choices.budget)
        report = _report(choices, losses, found) | {"probed_tokens": probed(rows).numel()}
        decided = {"chosen": list(found.chosen), "report": report}
        commits.put("allocation", decided | {"seconds": walk.clock.seconds})

    processes().first(decide)
    decided = commits.get("allocation")
    walk.clock.go_on_from(decided["seconds"])
    chosen = choices.grids(decided["chosen"])
    grids = {name: chosen[name] for name in job.grids}
    walk.job = replace(job, grids=grids, stage=stage_of(job.recipe, grids))
    return decided["report"]


def _losses(
    walk: Walk[Job], choices: Choices, tokens: Tensor, folder: Path
) -> Mapping[str, Sequence[float]]:
    """The predicted loss of each linear's options, by its full name."""
    job = walk.job
    model = BlockModel(job.model.source, job.device, torch.float32)
    format = FORMATS[job.recipe.stages[0].format]
    probe = Probe(model, tokens, walk.commits, folder)
    return probe.losses(choices.by_linear, format.scale_dtype(job.dtype))


def _options(choices: Choices, losses: Mapping[str, Sequence[float]]) -> list[list[Option]]:
    """What each option of each group takes and loses: the sum over its linears."""
    return [
        [
            Option(size, sum(losses[name][number] for name in group.linears))
            for number, size in enumerate(group.bytes)
        ]
        for group in choices.groups
    ]


def _report(
    choices: Choices, losses: Mapping[str, Sequence[float]], found: Allocation
) -> dict[str, Any]:
    """What compress.json says under `allocation`."""
    options = _options(choices, losses)
    per_byte = 8 / choices.parameters

    def told(size: int, loss: float) -> dict[str, float]:
        return {"bits": size * per_byte, "predicted_kl": loss}

    def uniform(numbers: Sequence[int]) -> dict[str, Any]:
        words = _in_words(choices.grids(numbers).values())
        return {"choice": words, **told(*totals(options, numbers))}

    points = frontier(options)
    every = -(-len(points) // MOST_POINTS)
    return {
        "target_bits": choices.target_bits,
        **told(found.bytes, found.loss),
        "bytes": found.bytes,
        "budget_bytes": choices.budget,
        "parameters": choices.parameters,
        "gap": found.gap,
        "uniform": [uniform(numbers) for numbers in choices.uniform],
        "frontier": [told(*point) for point in [*points[:-1:every], points[-1]]],
        "groups": [
            _group_report(*each) for each in zip(choices.groups, options, found.chosen, strict=True)
        ],
    }


def _group_report(group: Group, options: Sequence[Option], chosen: int) -> dict[str, Any]:
    """What was chosen for a group, and from what."""
    told = [
        {
            "choice": _in_words(grids.values()),
            "bytes": option.bytes,
            "predicted_kl": option.loss,
        }
        for grids, option in zip(group.options, options, strict=True)
    ]
    return {"linears": list(group.linears), "chosen": told[chosen], "options": told}


def _in_words(grids: Iterable[Grid]) -> str:
    """Grids in words, each once: `4g64`, `4row` for one scale a row."""
    sizes = ((g.bits, f"g{g.group_size}" if g.group_size else "row") for g in grids)
    return " ".join(dict.fromkeys(f"{bits}{size}" for bits, size in sizes))
