"""What a checkpoint holds: read from its config.json and the headers of its shards alone."""

from pathlib import Path
from typing import Any

from compress.core.shards import ShardReader
from compress.core.source import read_config

QUANTIZED_SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
)


def inspect_folder(folder: Path) -> dict[str, Any]:
    """Return architecture, sizes by part and the quantization scheme of a model folder.

    Bytes are those of the tensors; `bits_per_weight` counts codes, scales and zero points over
    the weights of the quantized linears.
    """
    config = read_config(folder)
    reader = ShardReader(folder)
    parts = {"embeddings": 0, "head": 0, "quantized linears": 0, "other": 0}
    quantized_weights = 0
    quantized: list[str] = []
    for name in reader.names:
        size = reader.tensor_bytes(name)
        owner, _, leaf = name.rpartition(".")
        if leaf in QUANTIZED_SUFFIXES:
            parts["quantized linears"] += size
            if leaf == "weight_shape":
                rows, columns = reader.load(name).tolist()
                quantized_weights += rows * columns
                quantized.append(owner)
        elif "embed" in owner or owner.endswith("wte"):
            parts["embeddings"] += size
        elif owner.endswith("lm_head"):
            parts["head"] += size
        else:
            parts["other"] += size
    result: dict[str, Any] = {
        "folder": str(folder),
        "architecture": (config.get("architectures") or [config.get("model_type", "unknown")])[0],
        "layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "bytes": sum(parts.values()),
        "bytes_by_part": {part: size for part, size in parts.items() if size},
        "tensors": len(reader.names),
        "quantization": None,
    }
    scheme = config.get("quantization_config")
    if scheme:
        result["quantization"] = {
            "quant_method": scheme.get("quant_method"),
            "format": scheme.get("format"),
            "groups": {
                name: group.get("weights")
                for name, group in scheme.get("config_groups", {}).items()
            },
            "ignore": scheme.get("ignore", []),
            "quantized_linears": len(quantized),
            "quantized_weights": quantized_weights,
            "bits_per_weight": round(8 * parts["quantized linears"] / quantized_weights, 3)
            if quantized_weights
            else None,
        }
    return result
