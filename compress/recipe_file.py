"""Recipe files: YAML that holds the fields of a recipe (recipe.py), of one stage or several."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.chain_recipe import ChainRecipe, build_chain
from compress.core.errors import InputError
from compress.recipe import (
    AnyRecipe,
    build_conversion,
    build_distillation,
    build_pruning,
    build_recipe,
)
from compress.strict_yaml import parse_yaml


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> AnyRecipe | ChainRecipe:
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
        case [_, _, *_]:
            return build_chain(values, where)
        case [{"method": "distill"}]:
            return build_distillation(values, where)
        case [{"method": "prune"}]:
            return build_pruning(values, where)
        case [{"method": "convert"}]:
            return build_conversion(values, where)
    return build_recipe(values, where)
