"""The compressed-tensors formats `pack-quantized`, `int-quantized` and `float-quantized`.

In `pack-quantized` each quantized linear is stored as

    weight_packed      int32 [out, ceil(in * b / 32)], codes + 2^(b-1), dense, least significant
                       bits first; code k of a row starts at bit k*b of that row
    weight_scale       [out, in / group_size], the model's dtype ([out, 1] per channel)
    weight_shape       int64 [2], (out, in)
    weight_zero_point  only if asymmetric: the same packing along dim 0,
                       int32 [ceil(out * b / 32), in / group_size]
    weight_g_idx       read, not written: int32 [in], the group of each column (`actorder: group`,
                       which compressed-tensors 0.20 has removed)

and in `int-quantized` and `float-quantized`, whose codes are not packed, as

    weight             int8 or float8_e4m3fn [out, in], codes
    weight_scale       [out, in / group_size], the model's dtype
    weight_zero_point  read, not written; only if asymmetric: int8, as weight_scale

These two are written for linears whose inputs are rounded too (8 bits, one scale a row; inputs one
scale a token, computed at run time), and `int-quantized` is read for weights alone as well.
config.json describes them under `quantization_config`.  Definition: the compressed-tensors
library, https://github.com/vllm-project/compressed-tensors.  vLLM, SGLang and transformers load it.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.core.config import build
from compress.core.errors import InputError
from compress.quant.config import Grid, RoundedGrid
from compress.quant.formats.packing import pack_int32, unpack_int32
from compress.quant.input_rounding import rounding_of
from compress.quant.weight import QuantizedWeight

PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
BESIDE = ()
KV_TYPES = {"int8": "int", "fp8": "float"}
SUFFIXES = (
    "weight_scale",
    "weight_packed",
    "weight",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
)


def refusal(
    grids: Mapping[str, Grid],
    shapes: Mapping[str, tuple[int, int]],
    reordered: Collection[str] = (),
) -> str | None:
    """Why these linears cannot be packed on these grids, or None (see Format)."""
    for name, grid in grids.items():
        if shapes[name][1] % (grid.group_size or 1):
            return f"{name}: group size {grid.group_size} does not divide {shapes[name][1]} inputs"
        if name in reordered:
            return (
                f"{name}: its columns are grouped in activation order (g_idx), which "
                "compressed-tensors 0.20 has removed; use gptq"
            )
    return None


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales in a checkpoint that stores floats in `dtype`: the same."""
    return dtype


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors that stand for a linear's `weight`, by suffix."""
    assert weight.offset is None
    assert weight.group_of is None
    if weight.inputs is not None:
        return {"weight": weight.codes, "weight_scale": weight.scale}
    packed = {
        "weight_packed": pack_int32(weight.codes, weight.bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        transposed = pack_int32(weight.zero_point.T.contiguous(), weight.bits)
        packed["weight_zero_point"] = transposed.T.contiguous()
    return packed


def unpack_weight(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
) -> QuantizedWeight:
    """The inverse of `pack_weight`; `config` is the `quantization_config`.

    Raises InputError for 3 bits as they were packed before 2026, 32 // 3 = 10 codes a word.
    """
    grid = grid_of(config, name)
    bits = grid.bits
    if "weight_packed" not in tensors:
        return _of_plain_codes(tensors, grid)
    rows, columns = tensors["weight_shape"].tolist()
    words, found = -(-columns * bits // 32), tensors["weight_packed"].shape[1]
    if words != found:
        raise InputError(
            f"{name} has {found} words a row, not {words}: its {bits} bits are packed as by a "
            "compressed-tensors of before 2026; write the checkpoint again"
        )
    scale = tensors["weight_scale"]
    zero_point = None
    if "weight_zero_point" in tensors:
        zero_point = unpack_int32(tensors["weight_zero_point"].T.contiguous(), bits, rows)
        zero_point = zero_point.T.contiguous()
    return QuantizedWeight(
        unpack_int32(tensors["weight_packed"], bits, columns),
        scale,
        zero_point,
        bits,
        columns // scale.shape[1],
        group_of=tensors.get("weight_g_idx"),
    )


def _of_plain_codes(tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
    """A linear of `int-quantized` or `float-quantized`."""
    codes, scale = tensors["weight"], tensors["weight_scale"]
    inputs = rounding_of(grid) if isinstance(grid, RoundedGrid) else None
    dtype = torch.float8_e4m3fn if inputs and inputs.kind == "fp8" else torch.int8
    if codes.dtype != dtype:
        raise RuntimeError(f"codes are {codes.dtype}, not {dtype}")
    group_size = codes.shape[1] // scale.shape[1]
    zero_point = tensors.get("weight_zero_point")
    return QuantizedWeight(codes, scale, zero_point, grid.bits, group_size, inputs=inputs)


def grid_of(config: Mapping[str, Any], name: str) -> Grid:
    """The grid that a `quantization_config` states for the linear with this name.

    A group's targets are full names, `re:REGEX` or names of module classes; a name counts before a
    regex and a regex before a class, as in compressed-tensors.  Raises InputError for a linear that
    no group names, or on a grid that is not of this module's kind.
    """
    rank_of_found, found = 0, {}
    for group in config.get("config_groups", {}).values():
        for target in group["targets"]:
            if target == name:
                rank = 3
            elif target.startswith("re:"):
                rank = 2 if re.match(target[3:], name) else 0
            else:
                rank = int(target == "Linear")
            if rank > rank_of_found:
                rank_of_found, found = rank, group
    if not rank_of_found:
        raise InputError(f"config_groups in config.json names no scheme for {name}")
    weights = found["weights"] or {}
    if found.get("input_activations"):
        return RoundedGrid(inputs="fp8" if weights.get("type") == "float" else "int8")
    return build(
        Grid,
        {
            "bits": weights.get("num_bits"),
            "group_size": weights.get("group_size"),
            "symmetric": weights.get("symmetric", True),
        },
        f"config_groups for {name}",
    )


def quantization_config(
    grids: Mapping[str, Grid], unquantized: Sequence[str], reordered: Collection[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of config.json for linears on these grids (see Format).

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
        "format": layout_of(next(iter(members), Grid())),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(unquantized),
        "kv_cache_scheme": None,
    }


def layout_of(grid: Grid) -> str:
    """The format in which linears on this grid are written."""
    if not isinstance(grid, RoundedGrid):
        return PACKED
    return FLOATS if grid.inputs == "fp8" else INTEGERS


def _config_group(grid: Grid, targets: Sequence[str]) -> dict[str, Any]:
    kind = "float" if isinstance(grid, RoundedGrid) and grid.inputs == "fp8" else "int"
    weights = {
        "num_bits": grid.bits,
        "type": kind,
        "symmetric": grid.symmetric,
        "strategy": "group" if grid.group_size else "channel",
        "group_size": grid.group_size,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": inputs if isinstance(grid, RoundedGrid) else None,
        "output_activations": None,
        "format": layout_of(grid),
    }


def kv_cache_scheme(kind: str) -> dict[str, Any]:
    """What `kv_cache_dtype` reads as int8 or fp8."""
    return {
        "num_bits": 8,
        "type": KV_TYPES[kind],
        "symmetric": True,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
    }


def kv_cache_dtype(config: Mapping[str, Any]) -> str | None:
    """What `kv_cache_scheme` stores keys and values as, int8 or fp8; None where there is none.

    Its scales are `self_attn.k_scale` and `self_attn.v_scale`, a number each, with which codes are
    multiplied (strategy `tensor`).  Raises InputError for any other scheme.
    """
    scheme = config.get("kv_cache_scheme")
    if not scheme:
        return None
    kinds = {(8, name): kind for kind, name in KV_TYPES.items()}
    kind = kinds.get((scheme.get("num_bits"), scheme.get("type")))
    strategy, dynamic = scheme.get("strategy"), scheme.get("dynamic")
    if kind is None or strategy != "tensor" or dynamic or not scheme.get("symmetric", True):
        raise InputError(
            f"kv_cache_scheme in config.json has {scheme.get('num_bits')} bits of type "
            f"{scheme.get('type')}, strategy {strategy}; read are 8 bits of type int or float, "
            "symmetric, strategy tensor, not dynamic; remove it and its scales to store keys and "
            "values by --kv-cache-dtype"
        )
    return kind


def foreign(config: Mapping[str, Any]) -> str | None:
    """What makes a checkpoint of this quant_method another layout than the ones above, or None."""
    groups = config.get("config_groups", {}).values()
    named = {config.get("format"), *(group.get("format") for group in groups)}
    if others := named - {PACKED, INTEGERS, FLOATS, None}:
        return f"format {others.pop()}"
    if any(not _is_read(group) for group in groups):
        return (
            "quantized activations other than 8 bits, symmetric, one scale a token at run time, "
            "with weights of the same kind and one scale a row"
        )
    if FLOATS in named and not all(group.get("input_activations") for group in groups):
        return "fp8 weights without quantized activations"
    if (config.get("transform_config") or {}).get("config_groups"):
        return "rotated weights (transform_config)"
    return None


def _is_read(group: Mapping[str, Any]) -> bool:
    """Whether what a group says of activations is none, or as `_config_group` writes it."""
    if group.get("output_activations"):
        return False
    inputs, weights = group.get("input_activations"), group.get("weights") or {}
    if not inputs:
        return True
    wanted = {"num_bits": 8, "symmetric": True, "type": weights.get("type")}
    both = ({**wanted, "strategy": "token", "dynamic": True}, {**wanted, "strategy": "channel"})
    return all(
        all(found.get(key) == value for key, value in asked.items())
        for found, asked in zip((inputs, weights), both, strict=True)
    )
