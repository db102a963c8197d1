"""The shape of a model from its config.json alone; no weights are read.

transformers' own config class fills in what a file leaves out, so that a default is the class's.
What the class does with its fields is said once a family, in FAMILIES.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from compress.core.errors import InputError, nearest, reason_of, shown
from compress.core.own_class import CROSS_LAYER
from compress.core.source import ALIASES, gguf_file, hub_config, read_config, read_config_file
from compress.model_shape import Mla, ModelShape

MOST_LAYERS = 10_000  # transformers makes lists of that length
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
KNOWN = Path(__file__).with_name("known_shapes.json")


@dataclass(frozen=True)
class Family:
    """How the numbers of a config are used.

    windows        which layers have `sliding_window`: none, all, or those of `layer_types`
    qkv_bias, ...  whether there is one, or the config's switch for it
    ffn            the config's name for F; 4 D where it has none
    grouped        whether there may be fewer KV heads than heads
    positions      whether they are learned, one row for each
    """

    windows: Literal["none", "all", "by layer"] = "none"
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: Literal["none", "head", "all"] = "none"
    norms: int = 2
    norm_bias: bool = False
    gated: bool = True
    mla: bool = False
    ffn: str = "intermediate_size"
    grouped: bool = True
    head_bias: bool = False
    positions: bool = False


BIAS, MLP_BIAS = "attention_bias", "mlp_bias"
WHOLE = Family(qkv_bias=True, out_bias=True, mlp_bias=True, norm_bias=True, gated=False)
LLAMA = Family(qkv_bias=BIAS, out_bias=BIAS, mlp_bias=MLP_BIAS)
STOCK: Mapping[str, Family] = {
    "llama": LLAMA,
    "granite": LLAMA,
    "smollm3": replace(LLAMA, windows="by layer"),
    "cwm": Family(windows="by layer", mlp_bias=MLP_BIAS),
    "mistral": Family(windows="all"),
    "ministral": Family(windows="by layer"),
    "phi3": Family(windows="all"),
    "qwen2": Family(windows="by layer", qkv_bias=True),
    "qwen3": Family(windows="by layer", qkv_bias=BIAS, out_bias=BIAS, qk_norm="head"),
    "gemma": Family(qkv_bias=BIAS, out_bias=BIAS),
    "gemma2": Family(windows="by layer", qkv_bias=BIAS, out_bias=BIAS, norms=4),
    "gemma3_text": Family(
        windows="by layer", qkv_bias=BIAS, out_bias=BIAS, norms=4, qk_norm="head"
    ),
    "olmo2": Family(qkv_bias=BIAS, out_bias=BIAS, qk_norm="all"),
    "olmo3": Family(windows="by layer", qkv_bias=BIAS, out_bias=BIAS, qk_norm="all"),
    "exaone4": Family(windows="by layer", qk_norm="head"),
    "glm4": Family(qkv_bias=BIAS, norms=4),
    "starcoder2": Family(
        windows="all",
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        norm_bias=True,
        gated=False,
    ),
    "gpt2": replace(WHOLE, ffn="n_inner", grouped=False, positions=True),
    "phi": replace(WHOLE, norms=1, head_bias=True),
    "minicpm3": replace(LLAMA, mla=True),
    "deepseek_v3": Family(qkv_bias=BIAS, out_bias=BIAS, mla=True),
    "youtu": Family(qkv_bias=BIAS, out_bias=BIAS, mla=True),
}
SHARING = ("llama", "mistral", "qwen2", "qwen3")  # with keys and values shared between layers
FAMILIES = {**STOCK, **{f"{kind}{CROSS_LAYER}": STOCK[kind] for kind in SHARING}}


def find_shape(ref: str, revision: str | None = None) -> ModelShape:
    """The shape of the model that `ref` names.

    Raises InputError when nothing is found, or it is not modelled.
    """
    return shape_of(find_config(ref, revision), ref)


def find_config(ref: str, revision: str | None = None) -> dict[str, Any]:
    """The config.json of a known model by name, of a file or its folder, a .gguf file, an alias,
    or a Hugging Face id, of which nothing else is fetched.

    Raises InputError when nothing is found.
    """
    if ref in known_models():
        return known_models()[ref]["config"]
    try:
        path = Path(ref).expanduser()
        is_file, is_folder = path.is_file(), bool(ref) and path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no permission, no such user
        raise InputError(f"model {shown(ref)} cannot be looked up: {reason_of(error)}") from None
    if file := gguf_file(ref):
        return _gguf_config(file)
    if is_file:
        return read_config_file(path)
    if is_folder:
        return read_config(path)
    near = nearest(ref, [*known_models(), *ALIASES])
    if ref.count("/") != 1 or ref.startswith((".", "/", "~")):
        raise InputError(
            f"model {shown(ref)} is no folder, config.json or .gguf file, no Hugging Face id, and "
            f"no model known by name: {', '.join(known_models())}{near}"
        )
    return read_config(hub_config(ref, revision))


@cache
def known_models() -> dict[str, Any]:
    """Models by name: `config`, the published number of `parameters`, and the `source` of both."""
    return json.loads(KNOWN.read_text(encoding="utf-8"))


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that the contents of a config.json describe.

    Raises InputError for a model that is not modelled: experts, state spaces, encoders, images.
    """
    kind = config.get("model_type")
    experts = next((key for key in EXPERTS if config.get(key)), None)
    dense = kind == "deepseek_v3" and _all_dense(config)
    if experts and not dense:
        raise _refusal(name, f"has {shown(config[experts])} experts ({experts})")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise _refusal(name, f"is of type {shown(kind)}")
    if kind == "deepseek_v3" and not dense:
        raise _refusal(name, "has layers with experts (first_k_dense_replace)")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int | float) and layers > MOST_LAYERS:
        raise InputError(
            f"'{name}' has num_hidden_layers = {shown(layers)}; at most {MOST_LAYERS} are possible"
        )
    return _shape(FAMILIES[kind], _filled(config, kind, name), name)


def _gguf_config(file: Path) -> dict[str, Any]:
    """A GGUF file's header as transformers reads it; its weights stay where they are."""
    from transformers import AutoConfig

    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"reading '{file.name}' needs gguf; run: pip install 'compress-llm[gguf]'")
    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    except Exception as error:  # a broken file can fail anywhere inside gguf and transformers
        raise InputError(f"transformers cannot read '{file}': {reason_of(error)}") from None


def _all_dense(config: Mapping[str, Any]) -> bool:
    first, layers = config.get("first_k_dense_replace"), config.get("num_hidden_layers")
    return isinstance(first, int) and isinstance(layers, int) and first >= layers


def _refusal(name: str, what: str) -> InputError:
    return InputError(
        f"'{name}' {what}, which is not modelled; give a dense decoder of type "
        + ", ".join(FAMILIES)
    )


def _filled(config: Mapping[str, Any], kind: str, name: str) -> Any:
    """config.json with the defaults of transformers' class."""
    from transformers import CONFIG_MAPPING

    import compress.core.cross_layer  # noqa: F401 (adds classes of our own)

    try:
        return CONFIG_MAPPING[kind].from_dict(dict(config))
    except Exception as error:  # a broken config.json can fail anywhere inside transformers
        raise InputError(
            f"transformers cannot read config.json of '{name}': {reason_of(error)}; correct it, "
            "or download it again"
        ) from None


def _shape(family: Family, config: Any, name: str) -> ModelShape:
    def switch(value: bool | str) -> bool:
        return bool(getattr(config, value)) if isinstance(value, str) else value

    if getattr(config, "qk_layernorm", False):
        raise _refusal(name, "has norms with biases on queries and keys (qk_layernorm)")
    heads, hidden = config.num_attention_heads, config.hidden_size
    if not (isinstance(heads, int) and isinstance(hidden, int) and heads > 0):
        raise InputError(
            f"'{name}' has {shown(heads)} heads in a width of {shown(hidden)}; give 1 or more"
        )
    if not isinstance(config.num_hidden_layers, int):
        raise InputError(
            f"'{name}' has num_hidden_layers = {shown(config.num_hidden_layers)}; give 1 or more"
        )
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    return ModelShape(
        name=name,
        hidden=hidden,
        ffn=4 * hidden if (ffn := getattr(config, family.ffn)) is None else ffn,
        heads=heads,
        kv_heads=(family.grouped and config.num_key_value_heads) or heads,
        head_dim=head_dim,
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        max_context=config.max_position_embeddings,
        windows=_windows(family, config, name),
        mla=_mla(config) if family.mla else None,
        kv_share=getattr(config, "kv_share", 1),
        gated=family.gated,
        qkv_bias=switch(family.qkv_bias),
        out_bias=switch(family.out_bias),
        mlp_bias=switch(family.mlp_bias),
        norms=family.norms,
        norm_bias=family.norm_bias,
        qk_norm=family.qk_norm,
        head_bias=family.head_bias,
        positions=config.max_position_embeddings if family.positions else 0,
    )


def _windows(family: Family, config: Any, name: str) -> tuple[int | None, ...]:
    layers = config.num_hidden_layers
    if family.windows == "none":
        return (None,) * layers
    window = config.sliding_window
    if family.windows == "all":
        return (window,) * layers
    kinds = {"full_attention": None, "sliding_attention": window}
    types = config.layer_types[:layers]
    if other := next((kind for kind in types if kind not in kinds), None):
        raise _refusal(name, f"has layers with {shown(other)}")
    return tuple(kinds[kind] for kind in types)


def _mla(config: Any) -> Mla:
    return Mla(
        kv_rank=config.kv_lora_rank,
        rope_dim=config.qk_rope_head_dim,
        nope_dim=config.qk_nope_head_dim,
        v_dim=config.v_head_dim,
        q_rank=config.q_lora_rank,
    )
