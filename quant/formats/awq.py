"""The AWQ checkpoint format, of AutoAWQ's `gemm` version: 4 bits, one group size for all linears.

Each quantized linear is stored as

    qweight  int32 [in, out / 8], codes + 8, packed along dim 1
    qzeros   int32 [groups, out / 8], zero points + 8, packed the same way
    scales   float16 [groups, out]

    W[o, i] = scales[i // group_size, o] * (q[i, o] - z[i // group_size, o])     q, z unsigned

Nibble k of word c, least significant first, holds output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[k].  The
format always has zero points: a symmetric weight is written with 8, and read back as symmetric
where every zero point is 8.  Linears left in float are in `modules_to_not_convert`.

Definition: AutoAWQ, awq/modules/linear/gemm.py and awq/utils/packing_utils.py,
https://github.com/casper-hansen/AutoAWQ.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.core.config import build
from compress.quant.config import Grid
from compress.quant.formats.packing import pack_int32, unpack_int32
from compress.quant.weight import QuantizedWeight

SUFFIXES = ("qweight", "qzeros", "scales")
BESIDE = ()
ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


def refusal(
    grids: Mapping[str, Grid],
    shapes: Mapping[str, tuple[int, int]],
    reordered: Collection[str] = (),
) -> str | None:
    """Why these linears cannot be packed on these grids, or None (see Format)."""
    first = next(iter(grids), "")
    for name, grid in grids.items():
        if grid.bits != 4:
            return f"{name}: AWQ has 4 bits, not {grid.bits}; use gptq or compressed-tensors"
        if grid.group_size != grids[first].group_size:
            return (
                f"{name}: its group size is {grid.group_size or 'channel'} and that of {first} "
                f"{grids[first].group_size or 'channel'}, but AWQ has one for all; choose a "
                "group size that divides every width"
            )
        if shapes[name][0] % 8:
            return (
                f"{name}: {shapes[name][0]} outputs are no multiple of 8; "
                "leave it in float (ignore) or use compressed-tensors"
            )
        if name in reordered:
            return (
                f"{name}: its columns are grouped in activation order (g_idx), which AWQ has no "
                "place for; use gptq"
            )
    return None


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales: float16, whatever `dtype` the checkpoint's floats are stored in."""
    return torch.float16


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors that stand for a linear's `weight`, by suffix."""
    assert weight.offset is None
    assert weight.group_of is None
    assert weight.scale.dtype == torch.float16
    zero_point = weight.zero_point
    if zero_point is None:
        zero_point = torch.zeros_like(weight.scale, dtype=torch.int8)
    return {
        "qweight": _pack(weight.codes.T),
        "qzeros": _pack(zero_point.T),
        "scales": weight.scale.T.contiguous(),
    }


def unpack_weight(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
) -> QuantizedWeight:
    """The inverse of `pack_weight`; `config` is the `quantization_config`."""
    codes = _unpack(tensors["qweight"])
    zero_point = _unpack(tensors["qzeros"])
    group_size = grid_of(config, name).group_size or codes.shape[1]
    return QuantizedWeight(
        codes,
        tensors["scales"].T.contiguous(),
        zero_point if zero_point.any() else None,
        4,
        group_size,
    )


def _pack(codes: Tensor) -> Tensor:
    """Signed codes [n, out] -> int32 [n, out / 8]."""
    n, out = codes.shape
    return pack_int32(codes.reshape(n, out // 8, 8)[..., ORDER].reshape(n, out), 4)


def _unpack(packed: Tensor) -> Tensor:
    """The inverse of `_pack`, transposed: int32 [n, out / 8] -> signed codes [out, n]."""
    n, words = packed.shape
    codes = unpack_int32(packed, 4, words * 8).view(n, words, 8)
    return codes[..., ORDER.argsort()].reshape(n, words * 8).T.contiguous()


def grid_of(config: Mapping[str, Any], name: str) -> Grid:
    """The grid that a `quantization_config` states: the same for every linear."""
    return build(
        Grid,
        {
            "bits": config.get("bits", config.get("w_bit")),
            "group_size": config.get("group_size", config.get("q_group_size")),
            "symmetric": False,
        },
        "quantization_config",
    )


def quantization_config(
    grids: Mapping[str, Grid], unquantized: Sequence[str], reordered: Collection[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of config.json for linears on these grids (see Format)."""
    grid = next(iter(grids.values()), Grid())
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": grid.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(unquantized),
    }


def foreign(config: Mapping[str, Any]) -> str | None:
    """What makes a checkpoint of this quant_method another layout than the one above, or None."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        return f"version {version}"
    return None if config.get("zero_point", True) else "zero_point false"
