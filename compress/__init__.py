"""Make language models small and fast, and know what it cost.

The public names load on first use (PEP 562), so that importing any part of the package pulls in
only that part.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.chain import run_chain
    from compress.chain_recipe import ChainRecipe, build_chain
    from compress.conversion import run_conversion
    from compress.core.errors import InputError
    from compress.distillation import run_distillation
    from compress.evaluate import evaluate_text
    from compress.pipeline import run_recipe
    from compress.pruning import run_pruning
    from compress.quant.methods import METHODS
    from compress.recipe import (
        CalibrationConfig,
        ConvertRecipe,
        DistillRecipe,
        PruneRecipe,
        Recipe,
        build_conversion,
        build_distillation,
        build_pruning,
        build_recipe,
    )
    from compress.recipe_file import load_recipe
    from compress.runtime.grammar import Grammar
    from compress.runtime.llm import LLM
    from compress.runtime.sampling_params import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "METHODS": "compress.quant.methods",
    "CalibrationConfig": "compress.recipe",
    "ChainRecipe": "compress.chain_recipe",
    "ConvertRecipe": "compress.recipe",
    "DistillRecipe": "compress.recipe",
    "Grammar": "compress.runtime.grammar",
    "InputError": "compress.core.errors",
    "LLM": "compress.runtime.llm",
    "PruneRecipe": "compress.recipe",
    "Recipe": "compress.recipe",
    "SamplingParams": "compress.runtime.sampling_params",
    "build_chain": "compress.chain_recipe",
    "build_conversion": "compress.recipe",
    "build_distillation": "compress.recipe",
    "build_pruning": "compress.recipe",
    "build_recipe": "compress.recipe",
    "evaluate_text": "compress.evaluate",
    "load_recipe": "compress.recipe_file",
    "run_chain": "compress.chain",
    "run_conversion": "compress.conversion",
    "run_distillation": "compress.distillation",
    "run_pruning": "compress.pruning",
    "run_recipe": "compress.pipeline",
}

__all__ = [
    "LLM",
    "METHODS",
    "CalibrationConfig",
    "ChainRecipe",
    "ConvertRecipe",
    "DistillRecipe",
    "Grammar",
    "InputError",
    "PruneRecipe",
    "Recipe",
    "SamplingParams",
    "build_chain",
    "build_conversion",
    "build_distillation",
    "build_pruning",
    "build_recipe",
    "evaluate_text",
    "load_recipe",
    "run_chain",
    "run_conversion",
    "run_distillation",
    "run_pruning",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
