"""Recipes: what to do to which model, from flags or from YAML, as frozen dataclasses.

A recipe file holds the fields of `Recipe`; each stage is a method's name and its settings:

    model: smollm2
    out: smollm2-awq-w4
    calibration: {source: self, samples: 64, seq_len: 512}
    stages:
      - {method: awq, bits: 4, group_size: 64, symmetric: true}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.core.config import build
from compress.core.errors import InputError, nearest
from compress.quant.config import WeightOnlyConfig
from compress.quant.methods import METHODS

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


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

    source: str = "self"
    samples: int = Field(default=64, ge=1)
    seq_len: int = Field(default=512, ge=2)
    seed: int = Field(default=0, ge=0)


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

    model: str
    out: Path
    stages: tuple[WeightOnlyConfig, ...]
    calibration: CalibrationConfig = CalibrationConfig()
    dtype: DTypeName = "auto"
    compute_dtype: DTypeName = "auto"
    propagate_error: bool = True


def build_stage(method: str, settings: Mapping[str, Any]) -> WeightOnlyConfig:
    """Return the configuration of a method by its name, or raise InputError."""
    if method not in METHODS:
        raise InputError(
            f"unknown method '{method}'; allowed: {', '.join(METHODS)}{nearest(method, METHODS)}"
        )
    return build(METHODS[method], settings, f"method {method}")


def method_of(stage: WeightOnlyConfig) -> str:
    """The name under which a stage's configuration is registered."""
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
                f"{where}: stage {stage!r} has no 'method'; allowed: {', '.join(METHODS)}"
            )
        built.append(
            build_stage(stage["method"], {k: v for k, v in stage.items() if k != "method"})
        )
    values["stages"] = tuple(built)
    calibration = values.get("calibration", {})
    if not isinstance(calibration, Mapping):
        raise InputError(f"{where}: 'calibration' is {calibration!r}; it must hold keys and values")
    values["calibration"] = build(CalibrationConfig, calibration, f"{where}: calibration")
    for key in ("model", "out"):
        if key not in values:
            raise InputError(f"{where}: '{key}' is missing")
    return build(Recipe, values, where)


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a YAML recipe; `overrides` replace its top-level keys.  Raises InputError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"recipe '{path}' does not exist; check the path") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"recipe '{path}' is not readable YAML: {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"recipe '{path}' must hold keys and values, not {type(values).__name__}")
    return build_recipe({**values, **(overrides or {})}, f"recipe '{path}'")
