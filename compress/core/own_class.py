"""Models that no class of other tools holds, told by config.json alone."""

from collections.abc import Mapping
from typing import Any

CROSS_LAYER = "_cla"  # what the model types of compress.core.cross_layer end in
ONLY_HERE = (
    "no stock class holds a Llama, Mistral or Qwen whose layers share keys and values: only "
    "compress loads this model"
)


def only_here(config: Mapping[str, Any]) -> str | None:
    """A sentence for a config.json whose class is one of compress's own, else None."""
    return ONLY_HERE if str(config.get("model_type")).endswith(CROSS_LAYER) else None
