"""What a checkpoint holds: read from its config.json and the headers of its shards alone."""

import math
from pathlib import Path
from typing import Any

from compress.core.own_class import only_here
from compress.core.shards import ShardReader
from compress.core.source import ModelSource, read_config
from compress.quant.config import RoundedGrid
from compress.quant.formats import FORMATS
from compress.quant.packed import PackedFolder


def inspect_folder(folder: Path) -> dict[str, Any]:
    """Return architecture, sizes by part and the quantization scheme of a model folder.

    Bytes are those of the tensors; `bits_per_weight` counts codes, scales and zero points over
    the weights of the quantized linears.
    """
    config = read_config(folder)
    reader = ShardReader(folder)
    packed = _packed(folder, config)
    plain = set(reader.names if packed is None else packed.others)
    beside = packed.beside if packed else None
    parts = {"embeddings": 0, "head": 0, "quantized linears": 0, "other": 0}
    for name in reader.names:
        size = reader.tensor_bytes(name)
        owner = name.rpartition(".")[0]
        if name not in plain:
            parts["quantized linears"] += size
        elif "embed" in owner or owner.endswith("wte"):
            parts["embeddings"] += size
        elif owner.endswith("lm_head"):
            parts["head"] += size
        else:
            parts["other"] += size
    if beside is not None:
        parts["quantized linears"] += sum(map(beside.tensor_bytes, beside.names))
    result: dict[str, Any] = {
        "folder": str(folder),
        "architecture": (config.get("architectures") or [config.get("model_type", "unknown")])[0],
        "layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "bytes": sum(parts.values()),
        "bytes_by_part": {part: size for part, size in parts.items() if size},
        "tensors": len(reader.names),
        "loads_in": only_here(config),
        "quantization": None,
    }
    scheme = config.get("quantization_config")
    if scheme:
        layout = scheme.get("format") or scheme.get("checkpoint_format") or scheme.get("version")
        if scheme.get("load_in_8bit"):
            layout = "int8"
        groups = scheme.get("config_groups", {})
        result["quantization"] = {
            "quant_method": scheme.get("quant_method"),
            "format": layout,
            "groups": {name: group.get("weights") for name, group in groups.items()},
            "ignore": scheme.get("ignore", []),
            "quantized_linears": 0,
            "quantized_weights": 0,
            "bits_per_weight": None,
            "kv_cache": scheme.get("kv_cache_scheme"),
        }
    if packed:
        result["quantization"] |= _packed_facts(packed, parts["quantized linears"])
    return result


def _packed(folder: Path, config: dict[str, Any]) -> PackedFolder | None:
    """The folder's packed linears, if it is quantized in a layout that is read here."""
    scheme = config.get("quantization_config") or {}
    method = FORMATS.get(str(scheme.get("quant_method")))
    if method is None or method.foreign(scheme):
        return None
    return PackedFolder(ModelSource(str(folder), folder))


def _packed_facts(packed: PackedFolder, size: int) -> dict[str, Any]:
    """Grids and counts of the packed linears, whose tensors have `size` bytes in all."""
    weights = sum(math.prod(packed.shape(name)) for name in packed.linears)
    grids = list(dict.fromkeys(packed.grid(name) for name in packed.linears))
    return {
        "groups": {
            f"group_{number}": {
                "num_bits": grid.bits,
                "group_size": grid.group_size,
                "symmetric": grid.symmetric,
                "inputs": grid.inputs if isinstance(grid, RoundedGrid) else None,
            }
            for number, grid in enumerate(grids)
        },
        "ignore": packed.float_linears(),
        "quantized_linears": len(packed.linears),
        "quantized_weights": weights,
        "bits_per_weight": round(8 * size / weights, 3) if weights else None,
    }
