"""Recipes of one stage: what to do to which model, from flags or YAML, as frozen dataclasses.

A recipe file (recipe_file.py; with several stages, chain_recipe.py) holds the fields of `Recipe`,
or of `DistillRecipe`, `PruneRecipe` or `ConvertRecipe` where the method is `distill`, `prune` or
`convert`; a stage is a method's name and its settings:

    model: smollm2
    out: smollm2-awq-w4
    calibration: {source: self, samples: 64, seq_len: 512}
    stages:
      - {method: awq, bits: 4, group_size: 64, symmetric: true}
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.core.config import build
from compress.core.errors import InputError, naming, nearest, shown
from compress.core.source import SELF
from compress.distill.config import TrainConfig
from compress.distill.lora import LoraConfig
from compress.distill.objective import AGAINST_TEACHER, LossConfig
from compress.prune.config import PruneConfig
from compress.prune.conversion_stage import ConversionConfig
from compress.prune.conversions import CONVERSIONS
from compress.quant.config import QuantizationConfig, WeightOnlyConfig
from compress.quant.methods import METHODS

T = TypeVar("T")

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DISTILL, PRUNE, CONVERT = "distill", "prune", "convert"
OTHERS = (DISTILL, PRUNE, CONVERT)  # the methods that are no quantization
PRUNE_SAMPLES = 1024  # as in Minitron's papers
CONVERT_SAMPLES = 128
FIXED = ("bits", "group_size")  # settings of a method in whose place target_bits chooses
CHOSEN = ("choose_bits", "choose_group_sizes")  # settings that narrow that choice
LOSSES = (*AGAINST_TEACHER, "cross_entropy")
LONGEST_NAME = 240  # bytes; file systems take 255, and partial output needs a longer name
LONGEST_PATH = 4000  # bytes; Linux takes 4,095


def usable_output(out: Path) -> Path:
    """The path, if it can be an output folder's, for pydantic; ValueError else."""
    if out.name in ("", ".."):
        raise ValueError("not a folder name; give one, such as ./out")
    sizes = [len(os.fsencode(part)) for part in out.parts]
    if max(sizes) > LONGEST_NAME or sum(sizes) + len(sizes) > LONGEST_PATH:
        raise ValueError(
            f"longer than {LONGEST_NAME} bytes a name or {LONGEST_PATH} in all; give a shorter one"
        )
    return out


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CalibrationConfig:
    """The sample data that statistics are collected on.

    source   `self` (sampled from the model), `self:MODEL` (from another of its vocabulary, such as
             the original of a pruned one), a .txt, .jsonl or .parquet file, token ids as
             `input_ids` in a .safetensors file, or a Hugging Face data set as ID, ID:CONFIG or
             ID:CONFIG:SPLIT
    samples  number of sequences
    seq_len  tokens in each
    seed     which windows of the text are taken; for `self`, what is sampled
    """

    source: str = Field(default="self", min_length=1)
    samples: int = Field(default=64, ge=1, le=1 << 20)
    seq_len: int = Field(default=512, ge=2, le=1 << 20)
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    @property
    def is_sampled(self) -> bool:
        """Whether a model writes the text."""
        return self.source.partition(":")[0] == SELF

    @property
    def writer(self) -> str | None:
        """Which model writes it; None for the one that is calibrated."""
        return self.source.partition(":")[2] if self.is_sampled and ":" in self.source else None


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recipe:
    """One model through one or more stages.

    model            a reference that `resolve_model` understands
    out              the output folder
    stages           methods with their settings, in order
    dtype            dtype of what stays in floating point; `auto` keeps the checkpoint's
    compute_dtype    dtype of calibration forwards; `auto` takes bfloat16 where the processor
                     multiplies it natively, else float32
    propagate_error  calibrate each block on the outputs of the already compressed ones before it
    kv_cache         measure keys and values, and store scales with which a runtime keeps them in
                     int8 or fp8, one of keys and one of values in each block
    """

    model: Annotated[str, Field(min_length=1)]
    out: Annotated[Path, AfterValidator(usable_output)]
    stages: tuple[QuantizationConfig, ...]
    calibration: CalibrationConfig = CalibrationConfig()
    dtype: DTypeName = "auto"
    compute_dtype: DTypeName = "auto"
    propagate_error: bool = True
    kv_cache: Literal["int8", "fp8"] | None = None


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainingData:
    """The text that a model is trained on.

    source    `self` (sampled from the teacher), a .txt, .jsonl or .parquet file, or a Hugging Face
              data set as ID, ID:CONFIG or ID:CONFIG:SPLIT, read as far as it is needed
    held_out  sequences that are evaluated on and never trained on
    seed      of what is sampled, for `self`
    """

    source: str = Field(default="self", min_length=1)
    held_out: int = Field(default=16, ge=0, le=1 << 20)
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    def __post_init__(self) -> None:
        if self.source.startswith(f"{SELF}:"):
            raise ValueError(
                f"source = '{self.source}': the teacher writes the text to train on; give "
                f"'{SELF}', and the model that is to write as teacher"
            )


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DistillConfig:
    """Training a model, the student, on what another, the teacher, predicts.

    teacher  a reference that `resolve_model` understands; not needed for cross_entropy alone
    data     the text
    loss     what is minimized
    train    the loop
    lora     train adapters of low rank instead of all weights, and merge them at the end
    cache    folder for the teacher's likeliest tokens, with `topk`, where later runs on the same
             data find them; without one they go when the run is done
    """

    teacher: Annotated[str, Field(min_length=1)] | None = None
    data: TrainingData = TrainingData()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig | None = None
    cache: Path | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss compares with a teacher, or the text comes from one."""
        return self.loss.needs_teacher or self.data.source == "self"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DistillRecipe:
    """One student through one distillation; `model` is the student."""

    model: Annotated[str, Field(min_length=1)]
    out: Annotated[Path, AfterValidator(usable_output)]
    stages: tuple[DistillConfig]
    dtype: DTypeName = "auto"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PruneRecipe:
    """One model through one pruning (fields as `Recipe` has them)."""

    model: Annotated[str, Field(min_length=1)]
    out: Annotated[Path, AfterValidator(usable_output)]
    stages: tuple[PruneConfig]
    calibration: CalibrationConfig = CalibrationConfig(samples=PRUNE_SAMPLES)
    dtype: DTypeName = "auto"
    compute_dtype: DTypeName = "auto"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ConvertRecipe:
    """One model through one conversion of its attention (fields as `Recipe` has them)."""

    model: Annotated[str, Field(min_length=1)]
    out: Annotated[Path, AfterValidator(usable_output)]
    stages: tuple[ConversionConfig]
    calibration: CalibrationConfig = CalibrationConfig(samples=CONVERT_SAMPLES)
    dtype: DTypeName = "auto"
    compute_dtype: DTypeName = "auto"


AnyRecipe = Recipe | DistillRecipe | PruneRecipe | ConvertRecipe


def build_stage(
    method: Any, settings: Mapping[str, Any], where: str | None = None
) -> QuantizationConfig:
    """Return the configuration of a method of quantization by its name, or raise InputError."""
    if method in OTHERS:
        raise InputError(
            f"method '{method}' is the command compress {method}, or a stage of a recipe file"
        )
    _check_method(method)
    of = f"{where}: method {method}" if where else f"method {method}"
    _check_target(settings, of)
    return build(METHODS[method], settings, of)


def _check_target(settings: Mapping[str, Any], where: str) -> None:
    """Raise InputError for settings that a target of bits decides, and for choices without one."""
    has_target = settings.get("target_bits") is not None
    for key, narrower in zip(FIXED, CHOSEN, strict=True):
        if has_target and settings.get(key) is not None:
            raise InputError(
                f"{where}: {key} {shown(settings[key])} beside target_bits, which chooses it; "
                f"leave it out, or narrow the choice by {narrower}"
            )
        if not has_target and settings.get(narrower) is not None:
            raise InputError(
                f"{where}: {narrower} {shown(settings[narrower])} narrows what target_bits chooses "
                "from, and there is none; give target_bits, or leave it out"
            )


def _check_method(method: Any) -> None:
    known = (*METHODS, *OTHERS)
    if not isinstance(method, str) or method not in known:
        hint = nearest(str(method), known)
        raise InputError(f"unknown method {shown(method)}; allowed: {', '.join(known)}{hint}")


def method_of(
    stage: QuantizationConfig | DistillConfig | PruneConfig | ConversionConfig,
) -> str:
    """The name under which a stage's configuration is registered."""
    if isinstance(stage, DistillConfig):
        return DISTILL
    if isinstance(stage, PruneConfig):
        return PRUNE
    if isinstance(stage, ConversionConfig):
        return CONVERT
    return next(name for name, cls in METHODS.items() if type(stage) is cls)


def described(recipe: AnyRecipe) -> dict[str, Any]:
    """The recipe for compress.json: of the output's place, only its name."""
    (stage,) = recipe.stages
    settings = {"method": method_of(stage), **asdict(stage)}
    if settings["method"] == CONVERT:
        to = next(name for name, cls in CONVERSIONS.items() if type(stage) is cls)
        settings = {"method": CONVERT, "to": to, **asdict(stage)}
    if isinstance(stage, DistillConfig):
        # where a cache is changes nothing, and what is not trained is not told
        settings = {k: v for k, v in settings.items() if k != "cache" and v is not None}
    elif isinstance(stage, WeightOnlyConfig):
        unused = FIXED if stage.target_bits is not None else ("target_bits",)
        unused += tuple(key for key in CHOSEN if settings[key] is None)
        settings = {k: v for k, v in settings.items() if k not in unused}
    return asdict(recipe) | {"out": recipe.out.name, "stages": [settings]}


def build_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Return a recipe from a mapping as read from YAML, or raise InputError."""
    stages = stages_in(values, where)
    if len(stages) > 1:
        raise InputError(f"{where}: {len(stages)} stages given; several are for build_chain")
    method = method_in(stages[0], where)
    config = build_stage(method, without(stages[0], "method"), where)
    return _build_one(Recipe, values, config, where)


def build_distillation(values: Mapping[str, Any], where: str = "recipe") -> DistillRecipe:
    """Return a recipe whose one stage is `method: distill`, or raise InputError.

    Of the losses, those that are not named have no weight as soon as one is named.
    """
    (stage,) = values["stages"]
    stage = without(stage, "method")
    parts = {"data": TrainingData, "loss": LossConfig, "train": TrainConfig, "lora": LoraConfig}
    for key, cls in parts.items():
        if stage.get(key) is None:
            continue
        given = mapping_in(stage, key, where)
        if cls is LossConfig and any(name in LOSSES for name in given):
            given = {"forward_kl": 0.0, **given}
        stage[key] = build(cls, given, f"{where}: {key}")
    config = build(DistillConfig, stage, f"{where}: {DISTILL}")
    return _build_one(DistillRecipe, values, config, where)


def build_pruning(values: Mapping[str, Any], where: str = "recipe") -> PruneRecipe:
    """Return a recipe whose one stage is `method: prune`, or raise InputError."""
    (stage,) = values["stages"]
    config = build(PruneConfig, without(stage, "method"), f"{where}: {PRUNE}")
    calibration = {"samples": PRUNE_SAMPLES, **mapping_in(values, "calibration", where)}
    return _build_one(PruneRecipe, {**values, "calibration": calibration}, config, where)


def build_conversion(values: Mapping[str, Any], where: str = "recipe") -> ConvertRecipe:
    """Return a recipe whose one stage is `method: convert`, or raise InputError."""
    (stage,) = values["stages"]
    to = stage.get("to")
    if not isinstance(to, str) or to not in CONVERSIONS:
        found = "is missing" if to is None else f"= {shown(to)} is unknown"
        raise InputError(
            f"{where}: 'to' {found}; allowed: {', '.join(CONVERSIONS)}"
            f"{nearest(str(to), CONVERSIONS)}"
        )
    settings = without(without(stage, "method"), "to")
    _check_owners(settings, to, where)
    config = build(CONVERSIONS[to], settings, f"{where}: to {to}")
    calibration = {"samples": CONVERT_SAMPLES, **mapping_in(values, "calibration", where)}
    return _build_one(ConvertRecipe, {**values, "calibration": calibration}, config, where)


def _check_owners(settings: Mapping[str, Any], to: str, where: str) -> None:
    """Raise InputError for a setting that another conversion has, and this one does not."""
    known = {name: [field.name for field in fields(cls)] for name, cls in CONVERSIONS.items()}
    for key in settings:
        owners = [name for name, keys in known.items() if key in keys]
        if owners and to not in owners:
            raise InputError(
                f"{where}: {key} is a setting of 'to: {owners[0]}', not of 'to: {to}', whose are "
                f"{', '.join(known[to])}; leave it out"
            )


def _build_one(cls: type[T], values: Mapping[str, Any], stage: Any, where: str) -> T:
    """A recipe of one stage, whose configuration is built already."""
    values = {**values, "stages": (stage,)}
    if "calibration" in values:
        given = mapping_in(values, "calibration", where)
        values["calibration"] = build(CalibrationConfig, given, f"{where}: calibration")
    check_named(values, where)
    return build(cls, values, where)


def check_named(values: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a recipe without model or output."""
    for key in ("model", "out"):
        if key not in values:
            raise InputError(f"{where}: '{key}' is missing")


def stages_in(values: Mapping[str, Any], where: str) -> Sequence[Any]:
    """The stages of a recipe, at least one; InputError else."""
    stages = values.get("stages")
    if not isinstance(stages, list | tuple) or not stages:
        raise InputError(f"{where}: 'stages' must list at least one method, e.g. - method: awq")
    return stages


def method_in(stage: Any, where: str) -> str:
    """The method that a stage names; InputError where it names none."""
    if not isinstance(stage, Mapping) or "method" not in stage:
        known = ", ".join((*METHODS, *OTHERS))
        raise InputError(f"{where}: stage {shown(stage)} has no 'method'; allowed: {known}")
    with naming(where):
        _check_method(stage["method"])
    return stage["method"]


def mapping_in(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """What stands under a key, nothing by default; InputError where it is no mapping."""
    given = values.get(key, {})
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: '{key}' is {shown(given)}; it must hold keys and values")
    return given


def without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A mapping but for one key."""
    return {name: value for name, value in values.items() if name != key}
