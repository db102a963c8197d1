"""Recipes: what to do to which model, from flags or from YAML, as frozen dataclasses.

A recipe file holds the fields of `Recipe`, or of `DistillRecipe` or `PruneRecipe` where the method
is `distill` or `prune`; each stage is a method's name and its settings:

    model: smollm2
    out: smollm2-awq-w4
    calibration: {source: self, samples: 64, seq_len: 512}
    stages:
      - {method: awq, bits: 4, group_size: 64, symmetric: true}
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from compress.core.config import build
from compress.core.errors import InputError, nearest, shown
from compress.distill.config import TrainConfig
from compress.distill.lora import LoraConfig
from compress.distill.objective import AGAINST_TEACHER, LossConfig
from compress.prune.config import PruneConfig
from compress.quant.config import WeightOnlyConfig
from compress.quant.methods import METHODS

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DISTILL, PRUNE = "distill", "prune"  # the methods that are no quantization
PRUNE_SAMPLES = 1024  # as in Minitron's papers
LOSSES = (*AGAINST_TEACHER, "cross_entropy")
LONGEST_NAME = 240  # bytes; file systems take 255, and partial output needs a longer name
LONGEST_PATH = 4000  # bytes; Linux takes 4,095


def _usable_output(out: Path) -> Path:
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

    source   `self` (sampled from the model), a .txt, .jsonl or .parquet file, token ids as
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
    """

    model: Annotated[str, Field(min_length=1)]
    out: Annotated[Path, AfterValidator(_usable_output)]
    stages: tuple[WeightOnlyConfig, ...]
    calibration: CalibrationConfig = CalibrationConfig()
    dtype: DTypeName = "auto"
    compute_dtype: DTypeName = "auto"
    propagate_error: bool = True


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


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DistillRecipe:
    """One student through one distillation; `model` is the student."""

    model: Annotated[str, Field(min_length=1)]
    out: Annotated[Path, AfterValidator(_usable_output)]
    stages: tuple[DistillConfig]
    dtype: DTypeName = "auto"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PruneRecipe:
    """One model through one pruning (fields as `Recipe` has them)."""

    model: Annotated[str, Field(min_length=1)]
    out: Annotated[Path, AfterValidator(_usable_output)]
    stages: tuple[PruneConfig]
    calibration: CalibrationConfig = CalibrationConfig(samples=PRUNE_SAMPLES)
    dtype: DTypeName = "auto"
    compute_dtype: DTypeName = "auto"


AnyRecipe = Recipe | DistillRecipe | PruneRecipe


def build_stage(method: str, settings: Mapping[str, Any]) -> WeightOnlyConfig:
    """Return the configuration of a method by its name, or raise InputError."""
    if method in (DISTILL, PRUNE):
        raise InputError(
            f"method '{method}' is the command compress {method}, or a recipe's one stage"
        )
    if not isinstance(method, str) or method not in METHODS:
        known = (*METHODS, DISTILL, PRUNE)
        raise InputError(
            f"unknown method {shown(method)}; allowed: {', '.join(known)}"
            f"{nearest(str(method), known)}"
        )
    return build(METHODS[method], settings, f"method {method}")


def method_of(stage: WeightOnlyConfig | DistillConfig | PruneConfig) -> str:
    """The name under which a stage's configuration is registered."""
    if isinstance(stage, DistillConfig):
        return DISTILL
    if isinstance(stage, PruneConfig):
        return PRUNE
    return next(name for name, cls in METHODS.items() if type(stage) is cls)


def build_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Return a recipe from a mapping as read from YAML, or raise InputError."""
    values = dict(values)
    stages = values.get("stages")
    if not isinstance(stages, list | tuple) or not stages:
        raise InputError(f"{where}: 'stages' must list at least one method, e.g. - method: awq")
    if len(stages) > 1:
        raise InputError(f"{where}: {len(stages)} stages given; one stage a recipe is supported")
    built = []
    for stage in stages:
        if not isinstance(stage, Mapping) or "method" not in stage:
            raise InputError(
                f"{where}: stage {shown(stage)} has no 'method'; allowed: {', '.join(METHODS)}"
            )
        built.append(
            build_stage(stage["method"], {k: v for k, v in stage.items() if k != "method"})
        )
    values["stages"] = tuple(built)
    calibration = values.get("calibration", {})
    if not isinstance(calibration, Mapping):
        raise InputError(
            f"{where}: 'calibration' is {shown(calibration)}; it must hold keys and values"
        )
    values["calibration"] = build(CalibrationConfig, calibration, f"{where}: calibration")
    for key in ("model", "out"):
        if key not in values:
            raise InputError(f"{where}: '{key}' is missing")
    return build(Recipe, values, where)


def build_distillation(values: Mapping[str, Any], where: str = "recipe") -> DistillRecipe:
    """Return a recipe whose one stage is `method: distill`, or raise InputError.

    Of the losses, those that are not named have no weight as soon as one is named.
    """
    values = dict(values)
    (stage,) = values["stages"]
    stage = {key: value for key, value in stage.items() if key != "method"}
    parts = {"data": TrainingData, "loss": LossConfig, "train": TrainConfig, "lora": LoraConfig}
    for key, cls in parts.items():
        given = stage.get(key)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise InputError(f"{where}: '{key}' is {shown(given)}; it must hold keys and values")
        if cls is LossConfig and any(name in LOSSES for name in given):
            given = {"forward_kl": 0.0} | dict(given)
        stage[key] = build(cls, given, f"{where}: {key}")
    values["stages"] = (build(DistillConfig, stage, f"{where}: {DISTILL}"),)
    for key in ("model", "out"):
        if key not in values:
            raise InputError(f"{where}: '{key}' is missing")
    return build(DistillRecipe, values, where)


def build_pruning(values: Mapping[str, Any], where: str = "recipe") -> PruneRecipe:
    """Return a recipe whose one stage is `method: prune`, or raise InputError."""
    values = dict(values)
    (stage,) = values["stages"]
    stage = {key: value for key, value in stage.items() if key != "method"}
    values["stages"] = (build(PruneConfig, stage, f"{where}: {PRUNE}"),)
    calibration = values.get("calibration", {})
    if not isinstance(calibration, Mapping):
        raise InputError(
            f"{where}: 'calibration' is {shown(calibration)}; it must hold keys and values"
        )
    calibration = {"samples": PRUNE_SAMPLES} | dict(calibration)
    values["calibration"] = build(CalibrationConfig, calibration, f"{where}: calibration")
    for key in ("model", "out"):
        if key not in values:
            raise InputError(f"{where}: '{key}' is missing")
    return build(PruneRecipe, values, where)


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> AnyRecipe:
    """Read a YAML recipe; `overrides` replace its top-level keys.  Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"recipe '{path}' does not exist; check the path") from None
    except (OSError, ValueError) as error:  # not UTF-8, or a NUL in the name
        raise InputError(f"recipe '{path}' cannot be read: {error}") from None
    values = parse_yaml(text, f"recipe '{path}'")
    if not isinstance(values, dict):
        raise InputError(f"recipe '{path}' must hold keys and values, not {type(values).__name__}")
    values, where = {**values, **(overrides or {})}, f"recipe '{path}'"
    match values.get("stages"):
        case [{"method": "distill"}]:
            return build_distillation(values, where)
        case [{"method": "prune"}]:
            return build_pruning(values, where)
    return build_recipe(values, where)


def parse_yaml(text: str, where: str) -> Any:
    """Return the one value of a YAML text, of plain types.

    Raises InputError when it is not YAML, and for what would be lost or blow up in silence: a key
    given twice, and aliases, with which a kilobyte of text can stand for gigabytes.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not readable YAML: {error}") from None
    except RecursionError:
        raise InputError(f"{where} is not readable YAML: it is nested too deeply") from None
    except (ValueError, KeyError, AttributeError) as error:
        # PyYAML's constructors on scalars that only look like a date, a number or a tag's type
        raise InputError(
            f"{where} is not readable YAML: a value cannot be what it looks like or is tagged as "
            f"({error}); put text in quotes"
        ) from None


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which knows plain types only, without aliases and duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise ComposerError(
                None, None, "aliases are not supported, write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, Any]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ConstructorError(
                        None, None, f"key {shown(key.value)} is given twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)
