"""The model classes that the runtime serves, and what it needs to know of a config.

They share one computation: RMSNorm, rotary attention with grouped queries, a gated SiLU network.
Biases, and norms on queries and keys, are there where transformers' class has parameters for them;
which layers see a sliding window is the one thing that differs by class, and `FAMILIES` says how.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import InputError, shown

Windows = Callable[[Any], list[int | None]]
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies do not depend on the length


@dataclass(frozen=True)
class Architecture:
    """The numbers of a decoder.

    windows       of each layer: tokens that a query sees, itself included; None for all
    inv_freq      float32 [rotary_dim / 2], radians a position
    rope_scaling  factor on cosines and sines
    """

    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_context: int
    vocab_size: int
    windows: list[int | None]
    inv_freq: Tensor
    rope_scaling: float


def architecture_of(skeleton: Any, ref: str) -> Architecture:
    """What the runtime needs to know of a model, from transformers' tree without weights.

    Raises InputError for a class, an activation, a rotary embedding or windows that it would not
    compute as transformers does.
    """
    name, config = type(skeleton).__name__, skeleton.config
    if name not in FAMILIES:
        raise _refusal(ref, f"is a {name}", f"classes {', '.join(FAMILIES)}")
    if config.hidden_act != "silu":
        raise _refusal(ref, f"has hidden_act = {shown(config.hidden_act)}", "silu")
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // config.num_attention_heads
    if config.num_attention_heads % config.num_key_value_heads:
        heads = f"{config.num_attention_heads} heads on {config.num_key_value_heads} KV heads"
        raise _refusal(ref, f"has {heads}", "a whole number of heads for each KV head")
    inv_freq, rope_scaling = _rotary(skeleton, head_dim, ref)
    return Architecture(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        norm_eps=config.rms_norm_eps,
        max_context=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        windows=_checked_windows(FAMILIES[name](config), ref),
        inv_freq=inv_freq,
        rope_scaling=rope_scaling,
    )


def _no_windows(config: Any) -> list[int | None]:
    return [None] * config.num_hidden_layers


def _one_window(config: Any) -> list[int | None]:
    return [config.sliding_window] * config.num_hidden_layers


def _windows_by_layer(config: Any) -> list[int | None]:
    """From layer_types, which transformers fills from use_sliding_window and max_window_layers.

    A type other than full_attention counts as windowed, which is refused where no window is set.
    """
    kinds = {"full_attention": None, "sliding_attention": config.sliding_window or 0}
    return [kinds.get(kind, 0) for kind in config.layer_types[: config.num_hidden_layers]]


FAMILIES: Mapping[str, Windows] = {
    "CwmForCausalLM": _windows_by_layer,
    "LlamaForCausalLM": _no_windows,
    "MistralForCausalLM": _one_window,
    "Qwen2ForCausalLM": _windows_by_layer,
    "Qwen3ForCausalLM": _windows_by_layer,
}


def _checked_windows(windows: list[int | None], ref: str) -> list[int | None]:
    if any(window is not None and window < 1 for window in windows):
        raise _refusal(
            ref,
            "has layers with attention of another kind, or with a window of no size",
            "full_attention, and sliding_attention with a sliding_window",
        )
    return windows


def _rotary(skeleton: Any, head_dim: int, ref: str) -> tuple[Tensor, float]:
    """Inverse frequencies and the factor on cosines and sines, by transformers' own code."""
    kind = skeleton.config.rope_parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise _refusal(ref, f"has rope_type = {shown(kind)}", ", ".join(ROPE_TYPES))
    with torch.device("cpu"):
        rotary = type(skeleton.model.rotary_emb)(skeleton.config)
    inv_freq = rotary.inv_freq.float()
    if 2 * len(inv_freq) != head_dim:
        part = f"{2 * len(inv_freq)} of {head_dim} dimensions of a head"
        raise _refusal(ref, f"rotates {part}", "all of them")
    return inv_freq, float(rotary.attention_scaling)


def _refusal(ref: str, found: str, allowed: str) -> InputError:
    return InputError(
        f"'{ref}' {found}; the runtime serves {allowed}; for others use "
        "compress eval --engine transformers"
    )
