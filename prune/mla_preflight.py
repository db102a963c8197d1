"""Whether a model has a form with multi-head latent attention, before any long work.

What can be read off is: norms of queries and keys, RoPE, sizes.  The rest is tried out: a tiny
model of the original's class and settings, with random weights, is converted without loss, and the
class of DeepSeek-V3 must give its logits.  Windows, soft caps, scales of embeddings or logits,
norms of another kind and layers without RoPE all show.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from compress.core.blocks import largest_module_list
from compress.core.errors import InputError, reason_of
from compress.core.stage import Block
from compress.prune.attention import Pairs, find_pairs, turned_channels
from compress.prune.conversion_stage import ConversionStage, Original
from compress.prune.mla_weights import Rope, Sizes
from compress.prune.shape import shape_of

VOCABULARY = 64  # of the tiny model
# Of the largest logit: float32 gives some 1e-6, layers that compute anything else over 1e-2.
TOLERANCE = 3e-4


def check(sizes: Sizes, original: Original) -> tuple[Pairs, Rope]:
    """How a head's channels pair, and the model's RoPE; InputError where there is no such form."""
    _check_dtype(original)
    rope = _rope(original)
    _check_sizes(sizes, original, rope)
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


def _check_sizes(sizes: Sizes, original: Original, rope: Rope) -> None:
    """Raise InputError for sizes that no attention of this shape has."""
    shape = original.shape
    width = shape.kv_heads * shape.head_dim
    turned = 2 * len(rope.frequencies) * shape.kv_heads
    if sizes.rope_dim % 2 or sizes.rope_dim > turned:
        raise InputError(
            f"rope_dim = {sizes.rope_dim} is not possible: even numbers from 2 to {turned} are, "
            f"of {shape.kv_heads} KV heads with {turned // shape.kv_heads} channels that RoPE turns"
        )
    most = 2 * width - sizes.rope_dim
    if sizes.kv_rank > most:
        raise InputError(
            f"kv_rank = {sizes.kv_rank} is not possible: with rope_dim = {sizes.rope_dim} the "
            f"other keys and the values are {most} numbers a token, so give 1 to {most}"
        )
    queries = shape.heads * shape.head_dim
    if sizes.q_rank is not None and sizes.q_rank > queries:
        raise InputError(
            f"q_rank = {sizes.q_rank} is not possible: queries are {queries} numbers, so give 1 "
            f"to {queries}, or leave it out"
        )
    biased = any(name.endswith("q_proj.bias") for name, _ in original.skeleton.named_parameters())
    if biased and sizes.q_rank is None:
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


@torch.no_grad()
def check_class(original: Original, without_loss: Callable[[Original], ConversionStage]) -> None:
    """Raise InputError unless the class of DeepSeek-V3 computes what the original's does, given
    the same weights.

    without_loss  the stage that converts a model without loss
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = AutoModelForCausalLM.from_config(_tiny(original.config)).eval().float()
        for parameter in own.parameters():
            if parameter.dim() == 1:  # gains and biases start as constants
                parameter.add_(0.3 * torch.randn_like(parameter))
    found = largest_module_list(own)
    assert found is not None
    name, blocks = found
    shape = shape_of(own.config)
    model = replace(original, config=own.config, shape=shape, skeleton=own, dtype=torch.float32)
    stage = without_loss(model)
    whole = [
        Block(i, f"{name}.{i}", block, (), None, torch.float32) for i, block in enumerate(blocks)
    ]
    plans = stage.decide([stage.collect(block) for block in whole])
    state = {
        key: value for key, value in own.state_dict().items() if not key.startswith(f"{name}.")
    }
    for block in whole:
        made, _ = stage.apply(block, plans)
        state |= {block.full_name(key): value for key, value in made.items()}
    raw = stage.config_json(plans)
    other = AutoModelForCausalLM.from_config(CONFIG_MAPPING["deepseek_v3"].from_dict(raw)).eval()
    ids = torch.arange(VOCABULARY // 2)[None]
    try:
        other.float().load_state_dict(state)
        expected, logits = own(ids).logits, other(ids).logits
    except Exception as error:  # other tensors, or an architecture that fails anywhere
        raise InputError(_no_form(original, own, reason_of(error))) from None
    if (logits - expected).abs().max() > TOLERANCE * expected.abs().max():
        raise InputError(
            _no_form(
                original,
                own,
                "with the same weights it gives other logits (windows, soft "
                "caps, scales, other norms, or layers without RoPE)",
            )
        )


def _no_form(original: Original, own: Any, why: str) -> str:
    return (
        f"'{original.ref}' ({type(own).__name__}) has no form as DeepseekV3ForCausalLM: {why}; "
        "--to gqa keeps the class"
    )


def _tiny(config: Any) -> Any:
    """The settings of a class for a model of two heads, as deep, and with windows that show."""
    dim = shape_of(config).head_dim
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 2 * dim,
        "intermediate_size": dim,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if getattr(config, "head_dim", None):
        sizes["head_dim"] = dim
    if getattr(config, "sliding_window", None):
        sizes["sliding_window"] = 4
    return type(config).from_dict(config.to_dict() | sizes)
