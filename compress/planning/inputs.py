"""What `compress plan` is told: a model's config.json or a shape in words, a draft, a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.core.errors import InputError, nearest, shown
from compress.precision import GROUP
from compress.roofline import Mla, ModelShape

TRUTHS = {"yes": True, "true": True, "no": False, "false": False}
LARGEST = 10**9  # of any number of a shape
MOST_LAYERS = 10_000


def shape_of_text(text: str) -> tuple[ModelShape, list[str]]:
    """A hypothetical model from `hidden=4096,layers=32,...`, and what was taken for granted.

    hidden and layers are required.  The rest follows Llama: heads of 128 (64 under a width of
    2,048), as many KV heads, a gated network of 8/3 of the width, rounded up to 256s.
    mla=R+P is a latent of R numbers and P rotary ones a token; window=W is every layer's.
    """
    given = _pairs(text)
    notes: list[str] = []

    def number(key: str, default: int | None = None, why: str = "") -> int:
        if key not in given:
            if default is None:
                raise InputError(f"--shape needs {key}=N, for example hidden=4096,layers=32")
            notes.append(f"{key}={default} ({why})")
            return default
        value = given[key]
        if not value.isdecimal() or not 1 <= int(value) <= LARGEST:
            raise InputError(f"--shape {key}={shown(value)}: give a number from 1 to {LARGEST:,}")
        return int(value)

    hidden, layers = number("hidden"), number("layers")
    if layers > MOST_LAYERS:
        raise InputError(f"--shape layers={layers}: at most {MOST_LAYERS:,} are possible")
    if "heads" in given and "head-dim" not in given:
        heads = number("heads")
        if hidden % heads:
            raise InputError(
                f"--shape hidden={hidden} does not divide by heads={heads}; give head-dim too"
            )
        head_dim = number("head-dim", hidden // heads, "hidden / heads")
    else:
        usual = 128 if hidden >= 2048 else 64
        head_dim = number("head-dim", min(usual, hidden), "usual for this width")
        heads = number("heads", max(1, hidden // head_dim), "hidden / head-dim")
    kv_heads = number("kv-heads", heads, "as many as heads: no grouping")
    if heads % kv_heads:
        raise InputError(f"--shape heads={heads} is no multiple of kv-heads={kv_heads}")
    ffn = number("ffn", -(-8 * hidden // 3 // 256) * 256, "8/3 of hidden, rounded up to 256s")
    vocab = number("vocab", 32_000, "Llama 2's")
    context = number("max-context") if "max-context" in given else LARGEST
    window = number("window") if "window" in given else None
    shape = ModelShape(
        name=text,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        layers=layers,
        vocab=vocab,
        tied=_truth(given, "tied", notes),
        max_context=context,
        windows=(window,) * layers,
        mla=_mla(given["mla"], head_dim) if "mla" in given else None,
        kv_share=number("kv-share") if "kv-share" in given else 1,
    )
    return shape, notes


KEYS = (
    "hidden", "layers", "heads", "kv-heads", "head-dim", "ffn", "vocab", "tied", "max-context",
    "window", "mla", "kv-share",
)  # fmt: skip


def _pairs(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise InputError(f"--shape: {shown(part)} is not KEY=VALUE; keys: {', '.join(KEYS)}")
        if key not in KEYS:
            raise InputError(
                f"--shape: unknown key {shown(key)}; allowed: {', '.join(KEYS)}{nearest(key, KEYS)}"
            )
        if key in found:
            raise InputError(f"--shape gives {key} twice")
        found[key] = value
    return found


def _truth(given: Mapping[str, str], key: str, notes: list[str]) -> bool:
    if key not in given:
        notes.append(f"{key}=no (a head of its own)")
        return False
    if given[key] not in TRUTHS:
        raise InputError(f"--shape {key}={shown(given[key])}: give yes or no")
    return TRUTHS[given[key]]


def _mla(text: str, head_dim: int) -> Mla:
    rank, plus, rope = text.partition("+")
    if not plus or not rank.isdecimal() or not rope.isdecimal() or not 0 < int(rank) <= LARGEST:
        raise InputError(f"--shape mla={shown(text)}: give the latent and its rotary part, 512+64")
    return Mla(int(rank), min(int(rope), LARGEST), head_dim, head_dim, None)


MIXED = "the checkpoint mixes several grids; say --weights for what a plan should count"
KV_TYPES = {"int": "int8", "float": "fp8"}  # of kv_cache_scheme


def stored_kv(config: Mapping[str, Any]) -> str | None:
    """What a checkpoint's `kv_cache_scheme` has keys and values in, or None."""
    scheme = config.get("quantization_config")
    cache = scheme.get("kv_cache_scheme") if isinstance(scheme, Mapping) else None
    if not isinstance(cache, Mapping) or cache.get("num_bits") != 8:
        return None
    return KV_TYPES.get(str(cache.get("type")))


def stored_weights(config: Mapping[str, Any]) -> str | None:
    """The precision that a quantized checkpoint's config.json states, or None for one in floats.

    Raises InputError for a scheme whose bits it does not find.
    """
    scheme = config.get("quantization_config")
    if scheme is None:
        return None
    if not isinstance(scheme, Mapping):
        raise InputError(f"quantization_config in config.json is {shown(scheme)}, not an object")
    if scheme.get("quant_method") == "fp8":
        return "fp8"
    if scheme.get("load_in_8bit"):
        return "w8a8"
    dynamic = scheme.get("dynamic")  # GPTQ's settings of some linears
    changes = dynamic.values() if isinstance(dynamic, Mapping) else ()
    if any(isinstance(one, Mapping) and {"bits", "group_size"} & one.keys() for one in changes):
        raise InputError(MIXED)
    bits, group = scheme.get("bits"), scheme.get("group_size")
    groups = scheme.get("config_groups")
    if isinstance(groups, Mapping) and groups:
        weights = [one.get("weights") for one in groups.values() if isinstance(one, Mapping)]
        found = {
            (one.get("num_bits"), one.get("group_size"), one.get("type"))
            for one in weights
            if isinstance(one, Mapping)
        }
        if len(found) > 1:
            raise InputError(MIXED)
        if found:
            bits, group, kind = found.pop()
            if kind == "float" and bits == 8:
                return "fp8"
            if bits == 8 and all(
                isinstance(one, Mapping) and one.get("input_activations") for one in groups.values()
            ):
                return "w8a8"
    if bits not in (2, 3, 4, 8):
        raise InputError(
            f"the checkpoint is quantized with {shown(scheme.get('quant_method'))}, in which no "
            "bits of 2, 3, 4 or 8 were found; say --weights"
        )
    width = config.get("hidden_size")
    if not isinstance(group, int) or group < 1:  # one scale a row
        group = width if isinstance(width, int) and width > 0 else GROUP
    return f"int{bits}-g{group}"


@dataclass(frozen=True)
class Sweep:
    """One quantity over several values: `batch=1,2,4`."""

    key: str
    values: tuple[Any, ...]


SWEPT = ("batch", "context", "new-tokens", "weights", "kv", "draft-tokens", "tensor-parallel")
IN_WORDS = ("weights", "kv")
MOST_VALUES = 64


def sweep_of_text(text: str) -> Sweep:
    """`batch=1,2,4`: one of SWEPT, and its values.  Raises InputError."""
    key, equals, rest = text.partition("=")
    if key not in SWEPT or not equals:
        raise InputError(
            f"--sweep {shown(text)}: give KEY=VALUE,VALUE with a key of {', '.join(SWEPT)}"
            f"{nearest(key, SWEPT)}"
        )
    values = [value.strip() for value in rest.split(",")]
    if not all(values) or len(values) > MOST_VALUES:
        raise InputError(f"--sweep {shown(text)}: give 1 to {MOST_VALUES} values")
    if key in IN_WORDS:
        return Sweep(key, tuple(values))
    least = 0 if key in ("new-tokens", "draft-tokens") else 1
    for value in values:
        if not value.isdecimal() or not least <= int(value) <= LARGEST:
            raise InputError(
                f"--sweep {key}: {shown(value)} is no whole number from {least} to {LARGEST:,}"
            )
    return Sweep(key, tuple(int(value) for value in values))
