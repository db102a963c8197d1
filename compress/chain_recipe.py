"""Recipes of several stages, each of them a recipe of its own that starts from the one before.

    model: smollm2
    out: smollm2-24-w4
    calibration: {source: self, seq_len: 512}
    eval: {text: self, windows: 32}
    stages:
      - {method: prune, layers_out: 6}
      - {method: distill, train: {tokens: 200k}}
      - {method: gptq, bits: 4, calibration: {samples: 128}}

`calibration`, `dtype`, `compute_dtype`, `propagate_error` and `kv_cache` hold for every stage that
has them; a stage's own `calibration` is laid over the recipe's, and its text `self` is what
the original writes, in every stage.  A distillation without a teacher learns from `model`;
`teacher: stage 1` is what stage 1 gave.  Its own text `self` is what its teacher writes.

    speed: {rounds: 3}
    draft:
      start: stage 2
      stages:
        - {method: prune, depth: 10}
        - {method: distill, train: {tokens: 200k}}

`speed` times the original and what each stage gives, in turn.  `draft` is a smaller model that
proposes tokens for the result (speculative decoding), made from what a stage gave, and taught by
it unless a teacher is named; it becomes the folder `draft` of the output, where the runtime finds
it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.comparing.comparison import SpeedConfig
from compress.core.config import build, check_keys
from compress.core.errors import InputError, shown
from compress.core.source import SELF, public_name
from compress.quant.methods import METHODS
from compress.recipe import (
    CONVERT,
    DISTILL,
    PRUNE,
    AnyRecipe,
    ConvertRecipe,
    DistillRecipe,
    PruneRecipe,
    Recipe,
    build_conversion,
    build_distillation,
    build_pruning,
    build_recipe,
    check_named,
    described,
    mapping_in,
    method_in,
    method_of,
    stages_in,
    usable_output,
    without,
)

KINDS = {
    CONVERT: (ConvertRecipe, build_conversion),
    DISTILL: (DistillRecipe, build_distillation),
    PRUNE: (PruneRecipe, build_pruning),
}
SHARED = ("calibration", "dtype", "compute_dtype", "propagate_error", "kv_cache")
STAGES = "stages"  # .NAME.stages beside the output NAME: the stages' folders
RESULT = "model"  # in the folder of a stage: what it gave
DRAFT = "draft"  # the folder of a draft, beside those of stages and in the output
ORIGINAL = "original"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class EvalConfig:
    """What the original and the result of each stage are measured on.

    text     `self` (sampled from the original), or a UTF-8 text file
    windows  number of windows, from the start of the text
    seq_len  tokens in each
    dtype    of weights and activations
    seed     of what is sampled, for `self`
    """

    text: str = Field(default="self", min_length=1)
    windows: int = Field(default=32, ge=2, le=1 << 20)
    seq_len: int = Field(default=512, ge=2, le=1 << 20)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = Field(default=1, ge=0, lt=1 << 63)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ChainRecipe:
    """One model through several stages (chain.py).

    model   the original
    out     the output folder
    stages  recipes of one stage each; the first starts from the original, and the others from what
            the one before gives
    eval    what is measured after each stage; None for nothing
    speed   how the original and what the stages give are timed; None for not at all
    draft   a smaller model that is made from what one of the stages gives
    called  what reports call `model`, where the name of its folder says nothing
    """

    model: Annotated[str, Field(min_length=1)]
    out: Annotated[Path, AfterValidator(usable_output)]
    stages: tuple[AnyRecipe, ...] = ()
    eval: EvalConfig | None = EvalConfig()
    speed: SpeedConfig | None = None
    draft: Draft | None = None
    called: str | None = None

    @property
    def names(self) -> list[str]:
        """Of the stages, as messages give them: `stage 2 (distill)`."""
        methods = (method_of(stage.stages[0]) for stage in self.stages)
        return [named(number, method) for number, method in enumerate(methods, start=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Draft:
    """The stages of a draft, and the number of the stage whose result they start from, 0 for the
    original."""

    start: int
    recipe: ChainRecipe


def named(number: int, method: str) -> str:
    """A stage, counted from 1, in words."""
    return f"stage {number} ({method})"


def described_chain(recipe: ChainRecipe) -> dict[str, Any]:
    """The recipe for compress.json, as a recipe file holds it; of all places only the names."""
    results = {str(stage.out): f"stage {n}" for n, stage in enumerate(recipe.stages, start=1)}
    if recipe.called:
        results[recipe.model] = recipe.called
    shared: dict[str, Any] = {}
    stages = []
    for stage in recipe.stages:
        told = described(stage)
        (settings,) = told["stages"]
        if teacher := settings.get("teacher"):
            settings["teacher"] = results.get(teacher) or public_name(teacher)
        if "calibration" in told:
            settings["calibration"] = told["calibration"]
        for part in ("calibration", "data"):
            if part in settings:
                source = settings[part]["source"]
                own = source == f"{SELF}:{recipe.model}"
                settings[part]["source"] = SELF if own else public_name(source)
        shared |= {key: told[key] for key in SHARED if key in told and key != "calibration"}
        stages.append(settings)
    measured = recipe.eval and asdict(recipe.eval) | {"text": public_name(recipe.eval.text)}
    names = {"model": recipe.called or public_name(recipe.model), "out": recipe.out.name}
    told = {**names, **shared, "eval": measured, "stages": stages}
    if recipe.speed:
        told["speed"] = asdict(recipe.speed)
    if draft := recipe.draft:
        stages = described_chain(draft.recipe)["stages"]
        writer = public_name(f"{SELF}:{recipe.model}")
        for settings in stages:
            if (data := settings.get("calibration")) and data["source"] == writer:
                data["source"] = SELF
            if draft.recipe.called and settings.get("teacher") == draft.recipe.called:
                settings["teacher"] = None  # who teaches unless another is named
        told["draft"] = {"start": _stage_name(draft.start), "stages": stages}
    return told


def build_chain(
    values: Mapping[str, Any], where: str = "recipe", writer: str | None = None
) -> ChainRecipe:
    """Return a recipe of several stages from a mapping as read from YAML, or raise InputError.

    Text `self` is what `writer` writes, by default the recipe's model.
    """
    own = [field.name for field in fields(ChainRecipe) if field.name != "called"]
    check_keys(values, [*own, *SHARED], where)
    check_named(values, where)
    chain = build(ChainRecipe, {key: values[key] for key in ("model", "out")}, where)
    config = None
    if values.get("eval", {}) is not None:
        config = build(EvalConfig, mapping_in(values, "eval", where), f"{where}: eval")
    speed = None
    if values.get("speed") is not None:
        speed = build(SpeedConfig, mapping_in(values, "speed", where), f"{where}: speed")
    mapping_in(values, "calibration", where)
    shared = {key: values[key] for key in SHARED if key in values}
    stages = stages_in(values, where)
    methods = [method_in(stage, f"{where}: stage {n}") for n, stage in enumerate(stages, start=1)]
    built: list[AnyRecipe] = []
    for number, (method, stage) in enumerate(zip(methods, stages, strict=True), start=1):
        at = f"{where}: {named(number, method)}"
        if method in METHODS and number < len(stages):
            raise InputError(f"{at}: what is quantized goes through no other stage; make it last")
        built.append(_build_stage(chain, built, stage, shared, writer or chain.model, at))
    for key in shared:
        if not any(hasattr(stage, key) for stage in built):
            raise InputError(f"{where}: no stage has '{key}'; leave it out")
    chain = replace(chain, stages=tuple(built), eval=config, speed=speed)
    _check_seeds(chain.eval, chain, where)
    if values.get("draft") is not None:
        draft = _build_draft(chain, mapping_in(values, "draft", where), shared, f"{where}: draft")
        _check_seeds(chain.eval, draft.recipe, f"{where}: draft")
        chain = replace(chain, draft=draft)
    return chain


def _build_stage(
    chain: ChainRecipe,
    before: Sequence[AnyRecipe],
    stage: Mapping[str, Any],
    shared: Mapping[str, Any],
    writer: str,
    where: str,
) -> AnyRecipe:
    """The recipe of the stage that comes after those `before`; `writer` writes text `self`."""
    cls, builder = KINDS.get(stage["method"], (Recipe, build_recipe))
    known = {field.name for field in fields(cls)}
    values = {key: value for key, value in shared.items() if key in known}
    if "calibration" in known:
        own = mapping_in(stage, "calibration", where)
        values["calibration"] = {**values.get("calibration", {}), **own}
        stage = without(stage, "calibration")
    values["model"] = str(before[-1].out) if before else chain.model
    folder = f"{len(before) + 1}-{stage['method']}"
    values["out"] = chain.out.with_name(f".{chain.out.name}.{STAGES}") / folder / RESULT
    recipe = builder({**values, "stages": [stage]}, where)
    of_another = recipe.model != writer
    if of_another and "calibration" in known and recipe.calibration.source == SELF:
        written = replace(recipe.calibration, source=f"{SELF}:{writer}")
        return replace(recipe, calibration=written)
    return _taught(recipe, chain, before, where) if isinstance(recipe, DistillRecipe) else recipe


def _build_draft(
    chain: ChainRecipe, values: Mapping[str, Any], shared: Mapping[str, Any], where: str
) -> Draft:
    """The draft's stages as a recipe that starts from what a stage of the chain gives."""
    check_keys(values, ["start", "stages"], where)
    methods = [method_of(stage.stages[0]) for stage in chain.stages]
    dense = [n for n, method in enumerate(methods, start=1) if method not in METHODS]
    allowed = [ORIGINAL, *map(_stage_name, dense)]
    asked = values.get("start", allowed[-1])
    if asked not in allowed:
        raise InputError(
            f"{where}: start = {shown(asked)} is nothing that a draft can be made from; allowed: "
            f"{', '.join(allowed)}"
        )
    start = 0 if asked == ORIGINAL else dense[allowed.index(asked) - 1]
    stages = stages_in(values, where)
    methods = [method_in(stage, f"{where}: stage {n}") for n, stage in enumerate(stages, start=1)]
    kinds = [KINDS.get(method, (Recipe,))[0] for method in methods]
    known = {field.name for kind in kinds for field in fields(kind)}
    place = chain.out.with_name(f".{chain.out.name}.{STAGES}") / DRAFT / DRAFT
    model = str(chain.stages[start - 1].out) if start else chain.model
    of_draft = {key: value for key, value in shared.items() if key in known}
    given = {**of_draft, "model": model, "out": str(place), "eval": None, "stages": stages}
    recipe = build_chain(given, where, writer=chain.model)
    called = f"{_stage_name(start)} of {chain.out.name}" if start else None
    return Draft(start, replace(recipe, called=called))


def _stage_name(number: int) -> str:
    """What a recipe file calls a stage's result."""
    return f"stage {number}" if number else ORIGINAL


def _taught(
    recipe: DistillRecipe, chain: ChainRecipe, before: Sequence[AnyRecipe], where: str
) -> DistillRecipe:
    """A distillation with the teacher that is meant."""
    (config,) = recipe.stages
    teacher = config.teacher
    if teacher is None:
        teacher = chain.model if config.needs_teacher else None
    elif found := re.fullmatch(r"stage (\d+)", teacher):
        number = int(found[1])
        if not 1 <= number <= len(before):
            allowed = ", ".join(f"stage {n + 1}" for n in range(len(before))) or "none, it is first"
            raise InputError(
                f"{where}: teacher '{teacher}' is no stage before this one; allowed: {allowed}"
            )
        teacher = str(before[number - 1].out)
    return replace(recipe, stages=(replace(config, teacher=teacher),))


def _check_seeds(config: EvalConfig | None, chain: ChainRecipe, where: str) -> None:
    """Refuse to measure on the text that a stage is calibrated on."""
    if config is None or config.text != SELF:
        return
    for name, stage in zip(chain.names, chain.stages, strict=True):
        data = getattr(stage, "calibration", None)
        if data and data.is_sampled and data.seed == config.seed:
            raise InputError(
                f"{where}: eval: seed = {data.seed} is also that of the text that {name} is "
                "calibrated on; give another"
            )
