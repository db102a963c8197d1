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

from compress.quant.weight import QuantizedWeight

FORMAT = "pack-quantized"


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


def quantization_config(
    bits: int, group_size: int | None, symmetric: bool, ignore: Sequence[str]
) -> dict[str, Any]:
    """The `quantization_config` of config.json; `group_size` None means one scale a row.

    `ignore` must name every linear of the model that is not quantized.
    """
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }
