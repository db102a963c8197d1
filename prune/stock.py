"""The stock class that a pruned model is saved as, so that it loads without this toolkit."""

from collections.abc import Sequence
from typing import Any

from compress.core.errors import InputError
from compress.prune.shape import NAMES, Shape

BY_LAYER = ("layer_types", "no_rope_layers")  # lists with one entry a layer


def config_entries(config: Any, target: Shape, layers: Sequence[int]) -> dict[str, Any]:
    """What changes in a config.json: the numbers, and the class where it has to.

    LlamaConfig refuses a hidden size that heads do not divide, though head_dim is explicit;
    MistralConfig, the same computation, takes it.

    config  the original's, as transformers reads it: which layers have a window may follow from
            other settings and a layer's number, which changes
    layers  of the original, those that are kept
    """
    entries: dict[str, Any] = {
        name: getattr(target, key) for key, name in NAMES.items() if getattr(target, key)
    }
    for key in BY_LAYER:
        if given := getattr(config, key, None):
            entries[key] = [given[index] for index in layers]
    if config.model_type == "llama" and target.hidden % target.heads:
        if config.attention_bias or config.mlp_bias:
            raise InputError(
                f"hidden = {target.hidden} is not possible with {target.heads} heads: LlamaConfig "
                "wants a multiple, and Mistral's class has no biases; choose a multiple"
            )
        entries |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        entries["sliding_window"] = None
    return entries
