"""The weights of a decoder, from any checkpoint that is read, in the form its layers compute with.

q, k and v become one linear layer, and so do gate and up: fewer and larger products.  Codes and
scales stay as they are stored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.core.device import check_lm_head_bits
from compress.core.progress import say
from compress.core.source import ModelSource
from compress.kernels.latent_attention import LatentShape
from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.lowbit_matmul.weight import InputRounding
from compress.runtime.families import Architecture, architecture_of
from compress.runtime.latents import LatentLayer, latent_layer
from compress.runtime.stored import StoredModel, with_groups_of

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
CHUNK_ELEMENTS = 1 << 22  # rounded at a time, so that float32 is never a whole copy
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer.  D model, F ffn, N query heads, K KV heads, H head dim.

    input_norm, post_norm  float32 [D], gains before attention and before the feed-forward network
    source                 the layer whose keys and values these queries see, mostly itself
    qkv                    [(N + 2K) * H, D], rows of queries, keys, values; of queries alone where
                           another layer is the source
    q_norm, k_norm         float32 [H], gains of the norms on heads of queries and keys, or None
    out                    [D, N * H]
    gate_up                [2F, D], rows of gate, then of up
    down                   [D, F]
    window                 tokens that a query sees, itself included; None for all
    kv_scales              calibrated scales of keys and values in 8 bits (the source's), or None
    latent                 the rest of attention on latents (latents.py), and then `qkv` has rows of
                           queries (unless they are apart), latents and keys; None for grouped
                           queries
    """

    input_norm: Tensor
    post_norm: Tensor
    source: int
    qkv: LinearWeight
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: LinearWeight
    gate_up: LinearWeight
    down: LinearWeight
    window: int | None
    kv_scales: tuple[float, float] | None = None
    latent: LatentLayer | None = None


@dataclass(frozen=True)
class DecoderWeights:
    """A whole decoder.

    embedding     [V, D], in the dtype it is stored in (float32 from GGUF)
    final_norm    float32 [D]
    head          [V, D]
    inv_freq      float32 [rotary_dim / 2], radians a position
    rope_scaling  factor on cosines and sines
    kv_cache_dtype  what `kv_scales` of the layers are for, int8 or fp8; None where there are none
    latent        sizes of attention on latents, or None
    """

    embedding: Tensor
    layers: list[LayerWeights]
    final_norm: Tensor
    head: LinearWeight
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_context: int
    vocab_size: int
    inv_freq: Tensor
    rope_scaling: float
    kv_cache_dtype: str | None = None
    latent: LatentShape | None = None


def check_served(source: ModelSource) -> None:
    """Raise InputError for a model class or a format that is not served; reads no weights."""
    architecture_of(StoredModel(source).skeleton, source.ref)


def load_weights(source: ModelSource, lm_head_bits: int | None = None) -> DecoderWeights:
    """Read a decoder: a plain or quantized Hugging Face folder, or a .gguf file.

    Plain weights are mapped, not copied, except those that are joined.  `lm_head_bits` = 8 rounds
    a head of more bits to int8 with one scale a row, max|w| / 127; None leaves it as stored.

    Raises InputError for a model class or a format that the runtime does not serve, and for a
    checkpoint that lacks tensors, has them in a wrong shape, or holds some that nothing uses.
    """
    check_lm_head_bits(lm_head_bits)
    stored = StoredModel(source)
    facts = architecture_of(stored.skeleton, source.ref)
    embedding = stored.tensor("model.embed_tokens.weight")
    layers = [_layer(stored, index, facts) for index in range(len(facts.windows))]
    final_norm = stored.tensor("model.norm.weight", torch.float32)
    head = stored.head(embedding)
    stored.finish()
    if lm_head_bits and head.bits > lm_head_bits:
        head = rounded_by_row(head)
    return _decoder(facts, embedding, layers, final_norm, head, stored.kv_cache_dtype)


def _decoder(
    facts: Architecture,
    embedding: Tensor,
    layers: list[LayerWeights],
    final_norm: Tensor,
    head: LinearWeight,
    kv_cache_dtype: str | None,
) -> DecoderWeights:
    return DecoderWeights(
        embedding=embedding,
        layers=layers,
        final_norm=final_norm,
        head=head,
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        norm_eps=facts.norm_eps,
        max_context=facts.max_context,
        vocab_size=facts.vocab_size,
        inv_freq=facts.inv_freq,
        rope_scaling=facts.rope_scaling,
        kv_cache_dtype=kv_cache_dtype,
        latent=facts.latent,
    )


def _layer(stored: StoredModel, index: int, facts: Architecture) -> LayerWeights:
    name = f"model.layers.{index}"

    def joined(parts: Mapping[str, LinearWeight]) -> LinearWeight:
        return join(list(parts.values()), f"{name}: {' and '.join(parts)}")

    def read(names: Sequence[str]) -> dict[str, LinearWeight]:
        return {part: stored.linear(f"{name}.{part}") for part in names}

    source = facts.sources[index]
    kv_scales, latent = stored.kv_scales(f"model.layers.{source}.self_attn"), None
    if facts.latent is None:
        entering = read(QKV if source == index else QKV[:1])
    else:
        entering, latent = latent_layer(stored, f"{name}.self_attn", facts.latent)
        if _unlike(parts := list(entering.values())) or len({part.bits for part in parts}) > 1:
            first, *others = entering  # no code is widened: attention takes queries from anywhere
            latent = replace(latent, apart=entering[first])
            entering = {other: entering[other] for other in others}
        # transformers' cache holds latents in the keys' place, ours in the values'
        kv_scales = kv_scales and (kv_scales[1], kv_scales[0])
    return LayerWeights(
        input_norm=stored.tensor(f"{name}.input_layernorm.weight", torch.float32),
        post_norm=stored.tensor(f"{name}.post_attention_layernorm.weight", torch.float32),
        source=source,
        qkv=joined(entering),
        q_norm=stored.optional(f"{name}.self_attn.q_norm.weight", torch.float32),
        k_norm=stored.optional(f"{name}.self_attn.k_norm.weight", torch.float32),
        out=stored.linear(f"{name}.self_attn.o_proj"),
        gate_up=joined(read(GATE_UP)),
        down=stored.linear(f"{name}.mlp.down_proj"),
        window=facts.windows[index],
        kv_scales=kv_scales,
        latent=latent,
    )


def join(parts: Sequence[LinearWeight], name: str) -> LinearWeight:
    """One linear layer with the rows of several that read the same input.

    Quantized parts come to groups of a common divisor, with the same values.  Parts that round
    their inputs do so as one, if they do it alike: with the same kind of codes, range, threshold
    and stored outlier columns.  All others, and parts of which some are quantized and some are
    not, are de-quantized, in float32, and that is said under `name`.
    """
    bias = _joined([part.bias for part in parts], [part.shape[0] for part in parts])
    inputs = [part.inputs for part in parts if part.inputs is not None]
    dense = [part.dense for part in parts if part.dense is not None]
    if reason := _unlike(parts):
        say(f"{name} {reason}; they are de-quantized")
        dense = [part.dequantize(torch.float32) for part in parts]
    if dense:
        return LinearWeight.of_dense(torch.cat(dense), bias)
    size = math.gcd(*(part.group_size for part in parts))
    parts = [with_groups_of(part, size) for part in parts]
    return LinearWeight(
        dense=None,
        codes=torch.cat([part.codes for part in parts if part.codes is not None]),
        scale=torch.cat([part.scale for part in parts if part.scale is not None]),
        shift=_joined([part.shift for part in parts], [part.shape[0] for part in parts]),
        group_size=size,
        bits=max(part.bits for part in parts),
        bias=bias,
        inputs=_of_all(inputs) if inputs else None,
    )


def _unlike(parts: Sequence[LinearWeight]) -> str | None:
    """Why the parts cannot be one and stay quantized; None where they can."""
    inputs = [part.inputs for part in parts if part.inputs is not None]
    alike = len(inputs) == len(parts) and all(_alike(inputs[0], other) for other in inputs[1:])
    if inputs and not alike:
        return "do not all round their inputs alike"
    if len({part.dense is None for part in parts}) > 1:
        return "are not all quantized"
    return None


def _alike(one: InputRounding, other: InputRounding) -> bool:
    """Whether two linears give one input the same codes."""
    fields = ("kind", "largest", "threshold")
    if any(getattr(one, field) != getattr(other, field) for field in fields):
        return False
    if one.outlier_index is None or other.outlier_index is None:
        return one.outlier_index is other.outlier_index
    return torch.equal(one.outlier_index, other.outlier_index)


def _of_all(inputs: Sequence[InputRounding]) -> InputRounding:
    """The rounding of linears that round alike, with the outlier weights of all their rows."""
    weights = [part.outlier_weight for part in inputs if part.outlier_weight is not None]
    return replace(inputs[0], outlier_weight=torch.cat(weights) if weights else None)


def _joined(parts: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor | None:
    """Tensors one above the other, zeros for those that are None; None where all are."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    width = present[0].shape[1:]
    filled = [
        torch.zeros(count, *width) if part is None else part
        for part, count in zip(parts, rows, strict=True)
    ]
    return torch.cat(filled)


def rounded_by_row(weight: LinearWeight) -> LinearWeight:
    """A dense layer in int8, codes in [-127, 127], with one scale a row: max|w| / 127."""
    assert weight.dense is not None
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, 1)
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        run = weight.dense[start : start + step].float()
        largest = run.abs().amax(dim=1, keepdim=True) / 127
        scale[start : start + step] = torch.where(largest == 0, 1.0, largest)
        codes[start : start + step] = (run / scale[start : start + step]).round().to(torch.int8)
    return LinearWeight(None, codes, scale, None, columns, 8, weight.bias)
