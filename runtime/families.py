"""The model classes that the runtime serves, and what it needs to know of a config.

They share one computation: RMSNorm, rotary attention, a gated SiLU network.  Attention is that of
grouped queries, or on latents (`Architecture.latent`); a layer may use the keys and values of
another (`Architecture.sources`).
Biases, and norms on queries and keys, are there where transformers' class has parameters for them;
which layers see a sliding window is the one thing that differs by class, and `FAMILIES` says how.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import InputError, shown
from compress.kernels.latent_attention import LatentShape

Windows = Callable[[Any], list[int | None]]
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies do not depend on the length


@dataclass(frozen=True)
class Architecture:
    """The numbers of a decoder.

    windows       of each layer: tokens that a query sees, itself included; None for all
    inv_freq      float32 [rotary_dim / 2], radians a position
    rope_scaling  factor on cosines and sines
    latent        sizes of attention on latents, whose cache has one head; None for grouped queries
    sources       of each layer: the one whose keys and values it uses, mostly itself
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
    sources: list[int]
    latent: LatentShape | None = None


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
    windows = _checked_windows(FAMILIES[name](config), ref)
    sources = _sources(config, windows, ref)
    if hasattr(config, "kv_lora_rank"):
        latent = _latent(skeleton, ref)
        kv_heads, head_dim, turned = 1, latent.query_dim, latent.rope_dim
    else:
        latent, kv_heads = None, config.num_key_value_heads
        head_dim = turned = _head_dim(config, ref)
    inv_freq, rope_scaling = _rotary(skeleton, turned, ref)
    return Architecture(
        heads=config.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=config.rms_norm_eps,
        max_context=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        windows=windows,
        inv_freq=inv_freq,
        rope_scaling=rope_scaling,
        sources=sources,
        latent=latent,
    )


def _sources(config: Any, windows: list[int | None], ref: str) -> list[int]:
    """Whose keys and values each layer uses; a layer sees as far as those are kept."""
    from compress.core.cross_layer import kv_sources

    sources = kv_sources(config.num_hidden_layers, getattr(config, "kv_share", 1))
    if any(windows[source] != window for source, window in zip(sources, windows, strict=True)):
        found = f"has layers that share keys and values (kv_share = {config.kv_share}), and"
        raise _refusal(
            ref, f"{found} windows that differ", "one window, or none, for each such run"
        )
    return sources


def _head_dim(config: Any, ref: str) -> int:
    """Dimensions of a head of grouped queries."""
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // config.num_attention_heads
    if config.num_attention_heads % config.num_key_value_heads:
        heads = f"{config.num_attention_heads} heads on {config.num_key_value_heads} KV heads"
        raise _refusal(ref, f"has {heads}", "a whole number of heads for each KV head")
    return head_dim


def _latent(skeleton: Any, ref: str) -> LatentShape:
    """Sizes of attention on latents, and its softmax scale, by transformers' own code."""
    config = skeleton.config
    if any(hasattr(layer.mlp, "experts") for layer in skeleton.model.layers):
        found = f"first_k_dense_replace = {shown(config.first_k_dense_replace)}"
        allowed = f"dense layers, all {config.num_hidden_layers} of them"
        raise _refusal(ref, f"has layers with experts ({found})", allowed)
    if config.num_key_value_heads != config.num_attention_heads:
        heads = f"{config.num_attention_heads} heads on {config.num_key_value_heads} KV heads"
        raise _refusal(ref, f"has {heads}", "as many of both on latents")
    if config.qk_rope_head_dim < 2 or config.qk_nope_head_dim < 1:
        sizes = f"{config.qk_rope_head_dim} turned dimensions and {config.qk_nope_head_dim} others"
        raise _refusal(ref, f"has heads of {sizes}", "at least 2 and 1")
    return LatentShape(
        heads=config.num_attention_heads,
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        value_dim=config.v_head_dim,
        rank=config.kv_lora_rank,
        scale=float(skeleton.model.layers[0].self_attn.scaling),
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
    "LlamaClaForCausalLM": _no_windows,
    "MistralClaForCausalLM": _one_window,
    "Qwen2ClaForCausalLM": _windows_by_layer,
    "Qwen3ClaForCausalLM": _windows_by_layer,
    "DeepseekV3ForCausalLM": _no_windows,
    "YoutuForCausalLM": _no_windows,
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
    settings = skeleton.config.rope_parameters
    kind = settings["rope_type"]
    constant = kind == "longrope" and settings["short_factor"] == settings["long_factor"]
    if kind not in ROPE_TYPES and not constant:
        allowed = f"{', '.join(ROPE_TYPES)}, and longrope with short_factor equal to long_factor"
        raise _refusal(ref, f"has rope_type = {shown(kind)}", allowed)
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
