"""The class that multi-head latent attention is saved as: DeepseekV3ForCausalLM, dense.

    kv_a_proj_with_mqa [R + d, D]     latent rows, then the shared key's, real parts first
    kv_a_layernorm     [R]            RMSNorm, epsilon 1e-6 whatever config.json says
    kv_b_proj          [N (H + H), R] for each head H rows of its key without RoPE, then its value
    q_proj             [N (H + d), D] for each head the same H channels, then the d with RoPE
    q_a_proj, q_a_layernorm, q_b_proj in the place of q_proj with a rank of queries
    o_proj             [D, N H]

The norm of a latent is taken off by making it small: rows times 1e-3 / 2^14 leave a mean square
far below epsilon, beside which it vanishes in float32, and a gain of 2^14 undoes both exactly.
Such rows are of 1e-9: bfloat16 holds them, float16 does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.prune.attention import AttentionWeights, Pairs
from compress.prune.conversion_stage import Original
from compress.prune.latent import Latent
from compress.prune.parts import ATTENTION, Parts

NORM_EPSILON = 1e-6  # DeepseekV3RMSNorm's default, which its latents have
GAIN = 2.0**14
SHRINK = NORM_EPSILON**0.5 / GAIN
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "tie_word_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Rope:
    """RoPE as a model's class computes it.

    frequencies  of the pairs that are turned, in radians a token
    stretch      what cosines and sines are multiplied by
    scale        of the logits of what the projections give, `stretch` squared included
    """

    frequencies: list[float]
    stretch: float
    scale: float


@dataclass(frozen=True)
class Sizes:
    """Of a converted attention: R, d, the rank of queries, and H."""

    kv_rank: int
    rope_dim: int
    q_rank: int | None
    head_dim: int


def is_biased(original: Original) -> bool:
    """Whether a linear of the attention has a bias: the class then has all that it can."""
    leaves = tuple(f"{leaf}.bias" for leaf in ATTENTION)
    return any(name.endswith(leaves) for name, _ in original.skeleton.named_parameters())


def config_json(original: Original, sizes: Sizes, frequencies: Sequence[float]) -> dict[str, Any]:
    """The whole config.json of the converted model."""
    config = original.config
    return {name: getattr(config, name) for name in KEPT if hasattr(config, name)} | {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": config.num_attention_heads,
        "first_k_dense_replace": config.num_hidden_layers,
        "num_nextn_predict_layers": 0,
        "kv_lora_rank": sizes.kv_rank,
        "q_lora_rank": sizes.q_rank,
        "qk_rope_head_dim": sizes.rope_dim,
        "qk_nope_head_dim": sizes.head_dim,
        "v_head_dim": sizes.head_dim,
        "attention_bias": is_biased(original),
        "rope_interleave": False,
        "rope_parameters": rope_parameters(config, sizes.rope_dim, frequencies),
    }


def rope_parameters(config: Any, dim: int, frequencies: Sequence[float]) -> dict[str, Any]:
    """`longrope` with one factor for each frequency, whatever the length.

    transformers computes 1 / (factor base^(2 i / dim)) in float32.
    """
    base = float(config.rope_parameters["rope_theta"])
    powers = base ** (torch.arange(0, dim, 2).float() / dim)
    pairs = zip(frequencies, powers.tolist(), strict=True)
    factors = [1.0 / (frequency * power) for frequency, power in pairs]
    return {
        "rope_type": "longrope",
        "rope_theta": base,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
        "short_factor": factors,
        "long_factor": factors,
    }


@dataclass(frozen=True)
class Converted:
    """What decides about a block's new weights; J components keep RoPE.

    pairs    of a head's channels
    slots    int64 [J], the pair of each component that keeps RoPE
    key_in   complex128 [J, K], the component of the heads' keys
    key_out  complex128 [J, K], and back
    constant complex128 [N, P], what stands for RoPE in the other keys
    latent   of keys and values
    queries  float64 [r, N H] and [N H, r], to fewer numbers and back; None: as they are
    scale    that queries are multiplied by, for the class's own scale of logits
    """

    pairs: Pairs
    slots: Tensor
    key_in: Tensor
    key_out: Tensor
    constant: Tensor
    latent: Latent
    queries: tuple[Tensor, Tensor] | None
    scale: float


def tensors(
    weights: AttentionWeights, made: Converted, parts: Parts, biased: bool
) -> dict[str, Tensor]:
    """The attention's parameters by name in the block, float32."""
    heads, head_dim, _ = weights.q.shape
    group = heads // len(weights.k)
    found: dict[str, Tensor] = {}
    if made.queries is None:
        found["q_proj.weight"] = _queries(weights.q[..., :-1], made).flatten(0, 1)
    else:
        fewer, back = made.queries
        rows = SHRINK * (fewer @ weights.q.flatten(0, 1))
        found["q_a_proj.weight"], found["q_a_proj.bias"] = rows[:, :-1], rows[:, -1]
        found["q_a_layernorm.weight"] = torch.full((len(fewer),), GAIN)
        split = back.unflatten(0, (heads, head_dim))
        found["q_b_proj.weight"] = _queries(split, made).flatten(0, 1)
    keys = made.pairs.to_complex(weights.k)[:, made.slots]  # [K, J, D + 1]
    shared = torch.einsum("sj,jsx->sx", made.key_in, keys)
    stacked = torch.cat([weights.k, weights.v]).flatten(0, 1)
    rows = torch.cat([SHRINK * (made.latent.of_x @ stacked), shared.real, shared.imag])
    name = "kv_a_proj_with_mqa"
    found[f"{name}.weight"], found[f"{name}.bias"] = rows[:, :-1], rows[:, -1]
    found["kv_a_layernorm.weight"] = torch.full((len(made.latent.of_x),), GAIN)
    both = torch.cat([made.latent.keys, made.latent.values], 1).repeat_interleave(group, 0)
    found["kv_b_proj.weight"] = both.flatten(0, 1)
    found["o_proj.weight"] = weights.o.transpose(0, 1).flatten(1)
    found["o_proj.bias"] = torch.zeros(len(weights.o[0]))
    if weights.o_bias is not None:
        found["o_proj.bias"] = weights.o_bias
    return {
        f"{parts.attention}.{name}": tensor.float().contiguous()
        for name, tensor in found.items()
        if biased or not name.endswith(".bias")
    }


def _queries(q: Tensor, made: Converted) -> Tensor:
    """Of each head the channels without RoPE, then those with: [N, H, X] to [N, H + d, X]."""
    group = len(q) // made.key_out.shape[1]
    found = made.pairs.to_complex(q)
    still = made.pairs.to_real(found * made.constant.conj()[..., None])
    factor = made.key_out.conj().T.repeat_interleave(group, 0)  # [N, J]
    turned = found[:, made.slots] * factor[..., None]
    return made.scale * torch.cat([still, turned.real, turned.imag], 1)
