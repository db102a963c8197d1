"""The shape of a model from its config.json alone; no weights are read.

transformers' own config class fills in what the file leaves out, so a default is the class's.
"""

from collections.abc import Callable, Mapping
from typing import Any

from compress.core.errors import InputError, reason_of, shown
from compress.core.source import read_config
from compress.model_shape import Mla, ModelShape

MOST_LAYERS = 10_000
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a config.json describes.

    Raises InputError for a model that is not modelled (experts, state spaces, encoders, images).
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise _refusal(name, f"is of type {shown(kind)}")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise InputError(f"'{name}' has {layers} layers; at most {MOST_LAYERS} are possible")
    full = _filled(config, kind, name)
    return FAMILIES[kind](full, name)


def _filled(config: Mapping[str, Any], kind: str, name: str) -> Any:
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind].from_dict(dict(config))
    except Exception as error:  # a broken config.json can fail anywhere inside transformers
        raise InputError(
            f"transformers cannot read config.json of '{name}': {reason_of(error)}; correct it"
        ) from None


def _refusal(name: str, what: str) -> InputError:
    return InputError(
        f"'{name}' {what}, which plan does not model; it does dense decoders of the types "
        + ", ".join(FAMILIES)
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _base(config: Any, name: str, **more: Any) -> ModelShape:
    head_dim = getattr(config, "head_dim", None)
    fields: dict[str, Any] = {
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head_dim or config.hidden_size // config.num_attention_heads,
        "layers": config.num_hidden_layers,
        "vocab": config.vocab_size,
        "tied": bool(config.tie_word_embeddings),
        "max_context": config.max_position_embeddings,
        "windows": _windows(config),
    }
    return ModelShape(name, **(fields | more))


def _llama(config: Any, name: str) -> ModelShape:
    bias = bool(getattr(config, "attention_bias", False))
    mlp = bool(getattr(config, "mlp_bias", False))
    return _base(config, name, qkv_bias=bias, out_bias=bias, mlp_bias=mlp)


def _no_windows(config: Any, name: str) -> ModelShape:
    return _llama(config, name)


FAMILIES: Mapping[str, Callable[[Any, str], ModelShape]] = {
    "llama": _llama,
    "mistral": _llama,
}
