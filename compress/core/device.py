"""The device to run on, and the dtypes that models run in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.core.errors import InputError, nearest

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
"""What keys and values may be stored as; auto is as the checkpoint says, else the dtype of
activations."""


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
