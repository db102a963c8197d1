"""Whether a model has a form with multi-head latent attention, before any long work.

What can be read off is: norms of queries and keys, RoPE, sizes.  The rest is tried out: a tiny
model of the original's class and settings, with random weights, is converted without loss, and the
class of DeepSeek-V3 must give its logits.  Windows, soft caps, scales of embeddings or logits,
norms of another kind and layers without RoPE all show.
"""

from typing import TYPE_CHECKING, Any

import torch

from compress.core.errors import InputError
from compress.prune.attention import Pairs, find_pairs, turned_channels
from compress.prune.conversion_stage import Original
from compress.prune.mla_weights import Rope

if TYPE_CHECKING:
    from compress.prune.mla import MlaConfig


def check(config: "MlaConfig", original: Original) -> tuple[Pairs, Rope]:
    """How a head's channels pair, and the model's RoPE; InputError where there is no such form."""
    _check_dtype(original)
    rope = _rope(original)
    _check_sizes(config, original, rope)
    turned = turned_channels(original.config, original.shape.head_dim)
    block, dim = original.block(), original.shape.head_dim
    pairs = find_pairs(block, original.parts, dim, turned, original.probe)
    if pairs is None:
        raise InputError(
            f"the heads of '{original.ref}' cannot share one key: norms of queries and keys "
            "(qk-norm) or another step between projection and RoPE let no keys be mixed; "
            "--to gqa averages them"
        )
    return pairs, rope


def _check_dtype(original: Original) -> None:
    if original.dtype == torch.float16:
        raise InputError(
            "MLA's latents are stored in rows of about 1e-9, which float16 does not hold; give "
            "--dtype bfloat16 or float32"
        )


def _check_sizes(config: "MlaConfig", original: Original, rope: Rope) -> None:
    """Raise InputError for sizes that no attention of this shape has."""
    shape = original.shape
    width = shape.kv_heads * shape.head_dim
    turned = 2 * len(rope.frequencies) * shape.kv_heads
    if config.rope_dim % 2 or config.rope_dim > turned:
        raise InputError(
            f"rope_dim = {config.rope_dim} is not possible: even numbers from 2 to {turned} are, "
            f"of {shape.kv_heads} KV heads with {2 * len(rope.frequencies)} channels that RoPE turns"
        )
    most = 2 * width - config.rope_dim
    if config.kv_rank > most:
        raise InputError(
            f"kv_rank = {config.kv_rank} is not possible: with rope_dim = {config.rope_dim} the "
            f"other keys and the values are {most} numbers a token, so give 1 to {most}"
        )
    queries = shape.heads * shape.head_dim
    if config.q_rank is not None and config.q_rank > queries:
        raise InputError(
            f"q_rank = {config.q_rank} is not possible: queries are {queries} numbers, so give 1 "
            f"to {queries}, or leave it out"
        )
    biased = any(name.endswith("q_proj.bias") for name, _ in original.skeleton.named_parameters())
    if biased and config.q_rank is None:
        raise InputError(
            f"'{original.ref}' has biases on queries, which the class has only with a rank of "
            f"queries; give --q-rank, at most {queries}, which loses nothing"
        )


def _rope(original: Original) -> Rope:
    """The model's RoPE; InputError where its frequencies are not one list for all lengths."""
    found = [m for m in original.skeleton.modules() if hasattr(m, "inv_freq")]
    settings = getattr(original.config, "rope_parameters", None) or {}
    kind = settings.get("rope_type", "default")
    depends = kind == "dynamic" or (
        kind == "longrope" and settings["short_factor"] != settings["long_factor"]
    )
    if len(found) != 1 or depends:
        what = f"of type {kind}" if depends else f"in {len(found)} modules"
        raise InputError(
            f"RoPE of '{original.ref}' is {what}; MLA takes one list of frequencies for all layers "
            "and lengths"
        )
    module: Any = found[0]
    stretch = float(module.attention_scaling)
    attention = original.block().get_submodule(original.parts.attention)
    scale = float(getattr(attention, "scaling", original.shape.head_dim**-0.5))
    return Rope(module.inv_freq.double().tolist(), stretch, scale * stretch**2)
