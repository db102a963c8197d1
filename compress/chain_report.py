"""One report of all stages of a chain, in the place of the last stage's."""

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from compress import checkpoint
from compress.chain_eval import text_config
from compress.chain_recipe import DRAFT, ChainRecipe, Draft, described_chain
from compress.chain_stages import StageResult
from compress.core.files import write_text
from compress.core.source import SELF, read_config
from compress.distill.preparation import TRACKED
from compress.distillation import RECORDS
from compress.recipe import method_of
from compress.report import QUALITY, record_quality, write_report

PARTS = ("training", "pruning", "conversion", "allocation")  # of a stage's report, for its row
EVALUATION = (  # of what was measured, what holds for all stages
    "perplexity_original",
    "windows",
    "seq_len",
    "tokens",
    "dtype",
    "engine",
    "text_sha256",
    "windows_sha256",
)
SPEED = (
    "name",
    "kv_bytes_per_token",
    "time_to_first_token_s",
    "seconds_per_token",
    "tokens_per_s",
    "weight_bytes",
)
AGREED = "top1_agreement_interval"
MEASURED = ("perplexity", "perplexity_interval", "kl_mean", "kl_mean_interval", "top1_agreement")


def place_draft(draft: Draft, folder: Path) -> None:
    """Put a finished draft into the output, unless it is there."""
    if not (place := folder / DRAFT).is_dir():
        partial = folder / f".{DRAFT}.partial"  # removed by the next run, if this one is killed
        shutil.copytree(draft.recipe.out, partial)
        partial.rename(place)


def write_chain_report(
    recipe: ChainRecipe,
    results: Sequence[StageResult],
    draft: StageResult | None = None,
    timed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write what stands beside the weights of the last stage's result; can be done again.

    timed  `rows` of the original and all results, and `how` they were timed, in words

    Returns the report, with the times.
    """
    folder = recipe.stages[-1].out
    _carry_records(recipe, folder)
    report = chain_report(recipe, results, draft)
    seconds = [result.run["seconds"] for result in results]
    times: dict[str, Any] = {"stage_seconds": seconds}
    if draft is not None:
        times["draft_seconds"] = draft.run["seconds"]
    times = {"seconds": round(sum(seconds) + times.get("draft_seconds", 0), 1), **times}
    if timed is not None:
        times["speed"] = {"how": timed["how"], "rows": [_speed(row) for row in timed["rows"]]}
    config, card = read_config(folder), checkpoint.chain_card(report)
    report, card = checkpoint.with_own_class(config, report, card)
    write_text(folder / "compress.json", _json(report))
    host = {key: value for key, value in results[-1].run.items() if "seconds" not in key}
    write_text(folder / "run.json", _json({**times, **host}))
    write_text(folder / "README.md", card)
    (folder / QUALITY).unlink(missing_ok=True)  # of another text, before it was broken off
    measured = results[-1].measured
    if recipe.eval is not None and recipe.eval.text != SELF and measured is not None:
        seed = text_config(recipe.eval).seed
        told = {"text": recipe.eval.text, "against": recipe.model, "seed": seed}
        record_quality(folder, told | measured)
    else:
        write_report(folder)
    return {**report, **times, "out": str(recipe.out)}


def _speed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a timed model what run.json keeps; nothing of one that the runtime does not serve."""
    return {key: row[key] for key in SPEED if key in row}


def chain_report(
    recipe: ChainRecipe, results: Sequence[StageResult], draft: StageResult | None = None
) -> dict[str, Any]:
    """What compress.json says: the last stage's report, and a row for each stage.

    What training, pruning, conversion and an allocation of bits report is in the rows.  Nothing
    depends on the clock or the host.
    """
    first, last = results[0].report, results[-1].report
    before = first["sizes"]
    sizes = last["sizes"] | {
        "original_bytes": before["original_bytes"],
        "original_bytes_by_part": before["original_bytes_by_part"],
        "original_parameters": before.get("original_parameters", before["parameters"]),
    }
    report = {key: value for key, value in last.items() if key not in PARTS}
    report |= {"recipe": described_chain(recipe), "sizes": sizes}
    if measured := results[-1].measured:
        report["eval"] = {key: measured[key] for key in EVALUATION if key in measured}
    if draft is not None:
        report["draft"] = _sizes(draft)
        if draft.measured is not None:
            report["draft"] |= {key: draft.measured[key] for key in (*MEASURED, AGREED)}
    return report | {"stages": _rows(recipe, results)}


def _rows(recipe: ChainRecipe, results: Sequence[StageResult]) -> list[dict[str, Any]]:
    """For each stage its size, what was measured, and how much KL it added to the one before."""
    rows = []
    for stage, result in zip(recipe.stages, results, strict=True):
        row = {
            "method": method_of(stage.stages[0]),
            **_sizes(result),
            "calibration_sha256": result.report["calibration_sha256"],
        }
        if result.measured is not None:
            row |= {key: result.measured[key] for key in MEASURED}
        rows.append(row | {key: result.report[key] for key in PARTS if key in result.report})
    if recipe.eval is not None:
        for before, row in pairwise([{"kl_mean": 0.0}, *rows]):
            row["kl_added"] = row["kl_mean"] - before["kl_mean"]
    return rows


def _sizes(result: StageResult) -> dict[str, int]:
    return {key: result.report["sizes"][key] for key in ("parameters", "bytes")}


def _carry_records(recipe: ChainRecipe, folder: Path) -> None:
    """Copy what earlier trainings have recorded, with the number of the stage in the name."""
    for number, stage in enumerate(recipe.stages[:-1], start=1):
        for name in (*RECORDS, TRACKED):
            path = Path(name)
            place = folder / f"{path.stem}-{number}{path.suffix}"
            if (stage.out / name).is_dir():
                shutil.copytree(stage.out / name, place, dirs_exist_ok=True)
            elif (stage.out / name).is_file():
                shutil.copyfile(stage.out / name, place)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"
