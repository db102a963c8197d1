"""The folder in which the stages of a chain are made, one after another."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress import calibration, checkpoint
from compress.chain_eval import Comparison
from compress.chain_recipe import (
    DRAFT,
    ORIGINAL,
    RESULT,
    SHARED,
    STAGES,
    ChainRecipe,
    Draft,
    described_chain,
)
from compress.comparing.comparison import Comparison as Timing
from compress.comparing.comparison import Entry, Measures
from compress.core.blocks import BlockModel
from compress.core.commits import IDENTITY, Commits
from compress.core.device import default_device
from compress.core.errors import InputError
from compress.core.outfolder import WorkFolder
from compress.core.shards import hashed_file
from compress.core.source import ModelSource, resolve_model
from compress.distillation import files_of
from compress.recipe import AnyRecipe, DistillRecipe, method_of

Identity = dict[str, Any]
COMMITS = "commits"
MADE, MEASURED = "made", "measured"  # commits of a stage


@dataclass(frozen=True)
class StageResult:
    """What a finished stage says of itself: compress.json, run.json, and what was measured."""

    report: dict[str, Any]
    run: dict[str, Any]
    measured: dict[str, Any] | None


class StagesFolder(WorkFolder):
    """`with StagesFolder(recipe, overwrite) as folder:` begin, then carry out stage after stage.

        .NAME.stages/1-prune/commits           what the stage is of, and what came of it
        .NAME.stages/1-prune/.model.progress   while it is made (outfolder.py)
        .NAME.stages/1-prune/model             its result
        .NAME.stages/eval                      the text that results are measured on
        .NAME.stages/speed                     what was timed (comparing/comparison.py)
        .NAME.stages/draft/commits             of a draft, the same
        .NAME.stages/draft/.draft.stages       its stages while they are made, in a folder like this
        .NAME.stages/draft/draft               its result
        .NAME.stages/lock

    The result of the last stage gets the name of the output at the end, and all else goes.
    """

    def __init__(self, recipe: ChainRecipe, overwrite: bool) -> None:
        super().__init__(recipe.out, overwrite, STAGES)
        self.kept_words = f"Finished stages are in {self.progress}"
        self.recipe = recipe
        self.output = recipe.stages[-1].out
        self.commits = [Commits(stage.out.parent / COMMITS) for stage in recipe.stages]
        self.eval = Commits(self.progress / "eval")
        self.draft = Commits(self.progress / DRAFT / COMMITS)
        self._identities: Sequence[Identity] = ()

    @property
    def has_kept(self) -> bool:
        return any(_has_kept(folder) for _, folder in self._begun())

    def begin(self, identities: Sequence[Identity], restart: bool = False) -> None:
        """Go on with the stages that were begun, or with none.

        identities  of each stage what it is of, beside the stages before it

        Raises InputError that names the first difference where a stage is of something else, unless
        `restart`, which drops them all.
        """
        self._identities = identities
        if restart:
            self.eval.clear()
        keep, kept = not restart, 0
        for expected, (number, folder) in enumerate(self._begun(), start=1):
            keep = keep and number == expected and _has_kept(folder)
            if not keep:  # nor what was made from it
                shutil.rmtree(folder)
            elif difference := self._difference(number, folder):
                raise InputError(
                    f"output '{self.out}' has unfinished stages, and stage {number} is with "
                    f"another {difference}; to drop it and what follows remove '{folder}', to drop "
                    "all pass --restart, or give another name"
                )
            kept += keep
        self._begin_draft(kept, restart)

    def _begin_draft(self, kept: int, restart: bool) -> None:
        """Keep a draft that was made from one of so many stages; InputError for another draft."""
        folder = self.progress / DRAFT
        if not folder.is_dir() or self.recipe.draft is None:
            return
        begun = (self.draft.folder / IDENTITY).is_file() and not restart
        if not begun or self.recipe.draft.start > kept:
            shutil.rmtree(folder)
        elif difference := self.draft.difference(self._draft_identity(self.recipe.draft)):
            raise InputError(
                f"output '{self.out}' has a draft with another {difference}; to drop it remove "
                f"'{folder}', to drop all pass --restart, or give another name"
            )

    def start(self, index: int) -> None:
        """Write down what a stage is of, unless it is begun already."""
        self.commits[index].go_on(self._identities[index])

    def keep(self, index: int) -> None:
        """Commit what a finished stage says of itself: the last one's files are written anew."""
        commits, made = self.commits[index], self.recipe.stages[index].out
        if commits.get(MADE) is None:
            files = (made / name for name in ("compress.json", "run.json"))
            commits.put(MADE, [json.loads(file.read_text(encoding="utf-8")) for file in files])

    def measure(self, index: int, original: BlockModel) -> None:
        """Measure what a finished stage gave against the original, unless that is done."""
        self._measure(self.commits[index], _source(self.recipe.stages[index].out), original)

    def start_draft(self, draft: Draft) -> None:
        """Write down what the draft is of, unless it is begun already."""
        self.draft.go_on(self._draft_identity(draft))

    def _draft_identity(self, draft: Draft) -> Identity:
        """What a draft must have been of: the original too, from which it may start."""
        stages = _stage_identities(draft.recipe)
        return {"start": draft.start, "stages": stages, "model": self._identities[0]["model"]}

    def measure_draft(self, draft: Draft, original: BlockModel) -> None:
        """Measure a finished draft against the result that it proposes tokens for."""
        result = _source(self.recipe.stages[-1].out)
        self._measure(self.draft, _source(draft.recipe.out), original, result)

    def _measure(
        self,
        commits: Commits,
        model: ModelSource,
        original: BlockModel,
        against: ModelSource | None = None,
    ) -> None:
        if self.recipe.eval is None:
            return
        identity = self._identities[0]["model"]
        comparison = Comparison(self.recipe.eval, original, self.eval, identity)
        settings = comparison.settings()
        if against is not None:
            shards = sorted(against.folder.glob("*.safetensors"))
            settings["against"] = {path.name: hashed_file(path) for path in shards}
        if (commits.get(MEASURED) or {}).get("settings") != settings:
            found = comparison.measure(model, against)
            commits.put(MEASURED, {"settings": settings, "found": found})

    def results(self) -> list[StageResult]:
        """Of all stages, when they are done."""
        found = []
        for commits in self.commits:
            report, run = commits.get(MADE)
            measured = self.recipe.eval and commits.get(MEASURED)["found"]
            found.append(StageResult(report, run, measured))
        return found

    def draft_result(self) -> StageResult | None:
        """Of the draft, when it is done; None without one."""
        if self.recipe.draft is None:
            return None
        made = self.recipe.draft.recipe.out
        files = (made / name for name in ("compress.json", "run.json"))
        report, run = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        measured = self.recipe.eval and self.draft.get(MEASURED)["found"]
        return StageResult(report, run, measured)

    def timing(self, original: BlockModel) -> Timing:
        """Of the original and what the stages gave; goes on where a run was broken off."""
        entries = [Entry(ORIGINAL, _source(original.source.folder))]
        for number, stage in enumerate(self.recipe.stages, start=1):
            entries.append(Entry(f"{number}. {method_of(stage.stages[0])}", _source(stage.out)))
        return Timing(entries, Measures(speed=self.recipe.speed), self.progress / "speed")

    def _difference(self, number: int, folder: Path) -> str | None:
        if number > len(self._identities):
            return f"number of stages ({number} or more, now {len(self._identities)})"
        return Commits(folder / COMMITS).difference(self._identities[number - 1])

    def _begun(self) -> list[tuple[int, Path]]:
        """Numbers and folders of stages, in order."""
        found = ((folder.name.partition("-")[0], folder) for folder in self.progress.glob("*-*"))
        return sorted((int(number), folder) for number, folder in found if number.isdecimal())


def _has_kept(folder: Path) -> bool:
    """Whether a stage is done, or has got so far that it can go on."""
    begun = any(folder.glob(f".{RESULT}.progress/commits/*.pt"))
    return (folder / COMMITS / IDENTITY).is_file() and (begun or (folder / RESULT).is_dir())


def identities(recipe: ChainRecipe, original: BlockModel) -> list[Identity]:
    """Of each stage what it must have been of, for a chain to go on from it.

    Reads all weights of the original and of other teachers once, and refuses those with a NaN or
    an infinity.
    """
    found = _stage_identities(recipe)
    found[0]["model"] = files_of(original)
    return found


def _stage_identities(recipe: ChainRecipe) -> list[Identity]:
    told = described_chain(recipe)
    made = {recipe.model, *(str(stage.out) for stage in recipe.stages)}
    found: list[Identity] = []
    for stage, settings in zip(recipe.stages, told["stages"], strict=True):
        own = {key: told[key] for key in SHARED if key in told and hasattr(stage, key)}
        identity = {"recipe": settings | own, "versions": checkpoint.versions()}
        text = Path(_text_of(stage))
        identity["text file"] = hashed_file(text) if text.is_file() else None
        data = getattr(stage, "calibration", None)
        if data is not None and data.writer not in (None, recipe.model):  # which is hashed as such
            identity["text model"] = calibration.writer_files(data)
        if isinstance(stage, DistillRecipe) and (teacher := stage.stages[0].teacher) not in made:
            identity["teacher"] = teacher and files_of(_opened(teacher))
        found.append(identity)
    return found


def _text_of(stage: AnyRecipe) -> str:
    """Where the text of a stage comes from."""
    data = stage.stages[0].data if isinstance(stage, DistillRecipe) else stage.calibration
    return data.source


def _source(folder: Path) -> ModelSource:
    return ModelSource(str(folder), folder)


def _opened(ref: str) -> BlockModel:
    return BlockModel(resolve_model(ref), default_device(), torch.float32)
