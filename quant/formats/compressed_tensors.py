"""The compressed-tensors `pack-quantized` checkpoint format.

Each quantized linear is stored as

    weight_packed      int32 [out, ceil(in * b / 32)], codes + 2^(b-1), dense, least significant
                       bits first; code k of a row starts at bit k*b of that row
    weight_scale       [out, in / group_size], the model's dtype ([out, 1] per channel)
    weight_shape       int64 [2], (out, in)
    weight_zero_point  only if asymmetric: the same packing along dim 0,
                       int32 [ceil(out * b / 32), in / group_size]

and config.json describes them under `quantization_config`.  Definition: the compressed-tensors
library, https://github.com/vllm-project/compressed-tensors.  vLLM, SGLang and transformers load it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.quant.config import Grid
from compress.quant.weight import QuantizedWeight

FORMAT = "pack-quantized"


def refusal(grid: Grid, shape: tuple[int, int]) -> str | None:
    """Why a linear [out, in] on this grid cannot be packed: never the case here."""
    return None


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales in a checkpoint that stores floats in `dtype`: the same."""
    return dtype


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors that stand for a linear's `weight`, by suffix."""
    packed = {
        "weight_packed": pack_int32(weight.codes, weight.bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        transposed = pack_int32(weight.zero_point.T.contiguous(), weight.bits)
        packed["weight_zero_point"] = transposed.T.contiguous()
    return packed


def unpack_weight(tensors: Mapping[str, Tensor], bits: int) -> QuantizedWeight:
    """The inverse of `pack_weight`."""
    rows, columns = tensors["weight_shape"].tolist()
    scale = tensors["weight_scale"]
    zero_point = None
    if "weight_zero_point" in tensors:
        zero_point = unpack_int32(tensors["weight_zero_point"].T.contiguous(), bits, rows)
        zero_point = zero_point.T.contiguous()
    codes = unpack_int32(tensors["weight_packed"], bits, columns)
    return QuantizedWeight(codes, scale, zero_point, bits, columns // scale.shape[1])


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes, int8 [rows, n], densely along the last dimension.

    Returns int32 [rows, ceil(n * bits / 32)].  Any width from 1 to 8 bits; codes of 3, 5, 6 and
    7 bits cross word boundaries.
    """
    rows, n = codes.shape
    words = -(-n * bits // 32)
    start = torch.arange(n, device=codes.device) * bits
    word, shift = start // 32, start % 32
    unsigned = codes.to(torch.int64) + (1 << (bits - 1))
    shifted = unsigned << shift  # up to 40 bits: what passes bit 32 belongs to the next word
    packed = torch.zeros(rows, words + 1, dtype=torch.int64, device=codes.device)
    packed.index_add_(1, word, shifted & 0xFFFFFFFF)
    packed.index_add_(1, word + 1, shifted >> 32)
    packed = packed[:, :words]
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack_int32(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_int32`: int32 [rows, words] -> signed codes int8 [rows, n]."""
    words = torch.nn.functional.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    start = torch.arange(n, device=packed.device) * bits
    word, shift = start // 32, start % 32
    pairs = words[:, word] | (words[:, word + 1] << 32)
    unsigned = (pairs >> shift) & ((1 << bits) - 1)
    return (unsigned - (1 << (bits - 1))).to(torch.int8)


def quantization_config(grids: Mapping[str, Grid], unquantized: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json for linears on these grids, by full name.

    `unquantized` must name every other linear of the model.  With one grid the single group targets
    the class `Linear`; with several each group lists its linears, so that none is named twice.
    """
    members: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        members.setdefault(grid, []).append(name)
    groups = {
        f"group_{number}": _config_group(grid, names if len(members) > 1 else ["Linear"])
        for number, (grid, names) in enumerate(members.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(unquantized),
        "kv_cache_scheme": None,
    }


def _config_group(grid: Grid, targets: Sequence[str]) -> dict[str, Any]:
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group" if grid.group_size else "channel",
        "group_size": grid.group_size,
        "dynamic": False,
    }
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
