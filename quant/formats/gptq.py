"""The GPTQ checkpoint format, of AutoGPTQ and gptqmodel.

Each quantized linear is stored as

    qweight  int32 [in * b / 32, out], codes + 2^(b-1), packed along dim 0, dense, least significant
             bits first
    qzeros   int32 [groups, out * b / 32], zero points + 2^(b-1), packed the same way along dim 1
    scales   float16 [groups, out]
    g_idx    int32 [in], the group of each column

    W[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o])           q, z unsigned

At 3 bits the definition splits 32 codes over three words as 10 codes | 2 + 1 bits of the 11th |
10 codes | 1 + 2 bits of the 22nd | 10 codes, which is the same dense stream of 96 bits.

There are two versions.  v1 (`checkpoint_format: gptq`) stores z - 1, and loaders add the 1 back:
gptqmodel to whole words, so that a zero point of 0 borrows from its neighbour, kernels to each
field, where 0 comes back as 2^b.  v2 (`gptq_v2`) stores z.  Symmetric weights (z = 2^(b-1)) are
written in v1, which every loader reads; asymmetric ones, where z may be 0, in v2.

Linears whose grid differs from the most frequent one, and those left in float inside the blocks,
are in `dynamic`, {"+:REGEX": settings} and {"-:REGEX": {}}: the first regex that matches the start
of a name counts.  vLLM looks fused projections up by their fused name, so a rule that holds for all
parts is repeated for the whole.

Definition: gptqmodel, nn_modules/qlinear/torch.py, utils/model.py (versions) and
quantization/config.py (dynamic), https://github.com/ModelCloud/GPTQModel.  vLLM:
model_executor/layers/quantization/utils/gptq_utils.py.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.core.config import build
from compress.core.errors import InputError
from compress.quant.config import Grid
from compress.quant.formats.packing import pack_int32, unpack_int32
from compress.quant.weight import QuantizedWeight, code_range

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
BESIDE = ()
# What vLLM and SGLang make one linear of (packed_modules_mapping of their model classes).
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def refusal(
    grids: Mapping[str, Grid],
    shapes: Mapping[str, tuple[int, int]],
    reordered: Collection[str] = (),
) -> str | None:
    """Why these linears cannot be packed on these grids, or None (see Format)."""
    for name, grid in grids.items():
        for what, size in zip(("outputs", "inputs"), shapes[name], strict=True):
            if size * grid.bits % 32:
                return (
                    f"{name}: {size} {what} of {grid.bits} bits do not fill words of 32 bits; "
                    "leave it in float (ignore) or choose other bits"
                )
    symmetric = {grid.symmetric: name for name, grid in grids.items()}
    if len(symmetric) > 1:
        return (
            f"{symmetric[False]}: it is asymmetric and {symmetric[True]} is not, but all linears "
            "of a checkpoint are v1 or all are v2; choose one for all"
        )
    return None


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales: float16, whatever `dtype` the checkpoint's floats are stored in."""
    return torch.float16


def pack_weight(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors that stand for a linear's `weight`, by suffix."""
    assert weight.offset is None
    assert weight.scale.dtype == torch.float16
    zero_point = weight.zero_point
    if zero_point is None:  # v1: z - 1
        zero_point = torch.full_like(weight.scale, -1, dtype=torch.int8)
    group_of = weight.group_of
    if group_of is None:
        group_of = torch.arange(weight.shape[1], dtype=torch.int32) // weight.group_size
    return {
        "qweight": pack_int32(weight.codes, weight.bits).T.contiguous(),
        "qzeros": pack_int32(zero_point.T.contiguous(), weight.bits),
        "scales": weight.scale.T.contiguous(),
        "g_idx": group_of.to(torch.int32),
    }


def unpack_weight(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
) -> QuantizedWeight:
    """The inverse of `pack_weight`, for v1 and v2; `config` is the `quantization_config`.

    The weight is symmetric if the config says so and every zero point is 2^(b-1).  Raises
    InputError where a v1 checkpoint stores the z - 1 of a zero point 0.
    """
    grid = grid_of(config, name)
    bits, scale = grid.bits, tensors["scales"].T.contiguous()
    columns = tensors["qweight"].shape[0] * 32 // bits
    codes = unpack_int32(tensors["qweight"].T.contiguous(), bits, columns)
    zero_point = unpack_int32(tensors["qzeros"], bits, scale.shape[0]).T.contiguous()
    if _version(config) == "gptq":
        if (zero_point == code_range(bits)[1]).any():
            raise InputError(
                f"{name} stores zero points of 0 in GPTQ v1, on which loaders disagree; "
                "write the checkpoint again in gptq_v2"
            )
        zero_point += 1
    group_size = grid.group_size or columns
    group_of = tensors.get("g_idx")
    if group_of is not None and torch.equal(
        group_of, torch.arange(columns, dtype=group_of.dtype) // group_size
    ):
        group_of = None
    symmetric = grid.symmetric and not zero_point.any()
    return QuantizedWeight(
        codes,
        scale,
        None if symmetric else zero_point,
        bits,
        group_size,
        group_of=None if group_of is None else group_of.to(torch.int32),
    )


def grid_of(config: Mapping[str, Any], name: str) -> Grid:
    """The grid that a `quantization_config` states for the linear with this name."""
    settings = {key: config.get(key) for key in ("bits", "group_size", "sym")}
    for rule, changes in (config.get("dynamic") or {}).items():
        if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), name):
            settings |= changes
            break
    return build(
        Grid,
        {
            "bits": settings["bits"],
            "group_size": settings["group_size"],
            "symmetric": settings["sym"],
        },
        f"quantization_config for {name}",
    )


def quantization_config(
    grids: Mapping[str, Grid], unquantized: Sequence[str], reordered: Collection[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of config.json for linears on these grids (see Format)."""
    base = Counter(grids.values()).most_common(1)[0][0] if grids else Grid()
    rules: dict[str, tuple[str, dict[str, Any]]] = {
        name: ("+", _settings(grid)) for name, grid in grids.items() if grid != base
    }
    rules |= {name: ("-", {}) for name in unquantized if re.search(r"\.\d+\.", name)}
    for name in [*rules]:
        parent, _, leaf = name.rpartition(".")
        for whole, parts in FUSED.items():
            members = [f"{parent}.{part}" for part in parts]
            if leaf == parts[0] and all(rules.get(m) == rules[name] for m in members):
                rules[f"{parent}.{whole}"] = rules[name]
    return {
        "quant_method": "gptq",
        **_settings(base),
        "desc_act": bool(reordered),
        "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in grids),
        "checkpoint_format": "gptq" if base.symmetric else "gptq_v2",
        "dynamic": {
            f"{sign}:^{re.escape(name)}$": changes for name, (sign, changes) in rules.items()
        },
    }


def _settings(grid: Grid) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": grid.group_size or -1, "sym": grid.symmetric}


def _version(config: Mapping[str, Any]) -> str:
    return config.get("checkpoint_format") or config.get("format") or "gptq"


def foreign(config: Mapping[str, Any]) -> str | None:
    """What makes a checkpoint of this quant_method another layout than the one above, or None."""
    if _version(config) not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        return f"checkpoint_format {config.get('checkpoint_format', 'marlin')}"
    return None
