"""The device to run on, the dtypes that models run in, and what is rounded as they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compress.core.errors import InputError, nearest

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
"""What keys and values may be stored as; auto is as the checkpoint says, else the dtype of
activations."""
LM_HEAD_BITS = (None, 8)
"""What the output layer may be rounded to, one scale a row; None leaves it as it is stored."""


def default_device() -> torch.device:
    """The GPU when there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def fastest_dtype(device: torch.device) -> str:
    """What `auto` means: bfloat16 where the device multiplies it natively, else float32."""
    return "bfloat16" if native_bfloat16(device) else "float32"


def check_dtype(dtype: str) -> None:
    """Raise InputError for a dtype that models cannot be loaded in."""
    if dtype not in DTYPES:
        raise InputError(
            f"dtype '{dtype}' is unknown; allowed are {', '.join(DTYPES)}{nearest(dtype, DTYPES)}"
        )


def check_kv_cache_dtype(name: str) -> None:
    """Raise InputError for what keys and values cannot be stored as."""
    if name not in KV_CACHE_DTYPES:
        raise InputError(
            f"kv_cache_dtype '{name}' is unknown; allowed are {', '.join(KV_CACHE_DTYPES)}"
            f"{nearest(name, KV_CACHE_DTYPES)}"
        )


def check_lm_head_bits(bits: int | None) -> None:
    """Raise InputError for what the output layer cannot be rounded to."""
    if bits not in LM_HEAD_BITS:
        raise InputError(f"lm_head_bits = {bits} is not possible; give 8, or leave it out")


@dataclass(frozen=True)
class ServedAs:
    """What the runtime rounds of a model that it loads, beside what its checkpoint has rounded.

    kv_cache_dtype  one of KV_CACHE_DTYPES
    lm_head_bits    one of LM_HEAD_BITS
    """

    kv_cache_dtype: str = "auto"
    lm_head_bits: int | None = None

    def __post_init__(self) -> None:
        check_kv_cache_dtype(self.kv_cache_dtype)
        check_lm_head_bits(self.lm_head_bits)

    @property
    def told(self) -> dict[str, Any]:
        """What is not as the checkpoint says, by name, for a result."""
        return {k: v for k, v in asdict(self).items() if v != getattr(AS_STORED, k)}


AS_STORED = ServedAs()
TOLD = {"kv_cache_dtype": "keys and values {}", "lm_head_bits": "output layer in {} bits"}


def told_of(result: Mapping[str, Any]) -> str:
    """What of `ServedAs.told` a result holds, in words to go behind others."""
    return "".join(f", {words.format(result[key])}" for key, words in TOLD.items() if key in result)
