"""What stands beside the weights in an output folder.

config.json     the original's, with the format's `quantization_config` and the stored dtype
tokenizer       the original's files, byte for byte
compress.json   recipe, versions, calibration fingerprint, error of each layer, sizes
run.json        times and host: what may differ between two equal runs
README.md       a model card
report.html     all of this for people; `compress eval` adds what it measures
"""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from compress.core.blocks import BlockModel
from compress.core.source import read_config
from compress.report import mean_bits, spread, write_report

# Files of a model folder that are neither weights nor written anew.
CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
)


def write_side_files(
    folder: Path,
    model: BlockModel,
    dtype: torch.dtype,
    config_entries: dict[str, Any],
    report: dict[str, Any],
    run_facts: dict[str, Any],
) -> None:
    """Write everything but the weights, which are there already, into an output folder."""
    config = read_config(model.source.folder) | config_entries
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    for pattern in CARRIED:
        for path in sorted(model.source.folder.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    _write_json(folder / "compress.json", report)
    _write_json(folder / "run.json", run_facts)
    (folder / "README.md").write_text(model_card(model.source.ref, report), encoding="utf-8")
    write_report(folder)


def model_card(ref: str, report: dict[str, Any]) -> str:
    """A Hugging Face model card that says what was done and what was left."""
    recipe, sizes, layers = report["recipe"], report["sizes"], report["layers"]
    stage = recipe["stages"][0]
    quantized = [layer for layer in layers if layer["method"]]
    left = Counter(layer["note"] for layer in layers if not layer["method"])
    widths = [f"{bits}-bit" for bits in sorted({layer["bits"] for layer in quantized})]
    bits = spread(f"{layer['bits']} bits" for layer in quantized)
    if len(widths) > 1:
        bits += f", {mean_bits(quantized):.2f} a weight on average (scales not counted)"
    groups = spread(
        f"group size {layer['group_size']}" if layer["group_size"] else "one scale a row"
        for layer in quantized
    )
    grid = "symmetric" if stage["symmetric"] else "asymmetric"
    is_hub_id = ref.count("/") == 1 and not ref.startswith((".", "/", "~"))
    lines = [
        "---",
        "library_name: transformers",
        *([f"base_model: {ref}"] if is_hub_id else []),
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(['compressed-tensors', stage['method'], *widths])}]",
        "---",
        "",
        f"# {Path(ref).name}, {stage['method']} {' and '.join(widths)}".rstrip(),
        "",
        f"Made from `{ref}` with compress {report['versions']['compress-llm']}: "
        f"`{stage['method']}`, {bits or 'no linear quantized'}; {grid}; {groups or 'no groups'}; "
        "in the compressed-tensors `pack-quantized` format.",
        "",
        "```python",
        *_loading_lines(recipe["out"], stage["symmetric"]),
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| size | {sizes['bytes'] / 1e6:.1f} MB "
        f"(original {sizes['original_bytes'] / 1e6:.1f} MB) |",
        f"| quantized linears | {len(quantized)}, {sizes['quantized_weights']:,} weights of "
        f"{sizes['parameters']:,} parameters |",
        *(f"| {count} x | {note} |" for note, count in sorted(left.items())),
        "",
    ]
    if report["calibration_sha256"]:
        data = recipe["calibration"]
        lines += [
            f"Calibrated on {data['samples']} sequences of {data['seq_len']} tokens from "
            f"`{Path(data['source']).name}` (seed {data['seed']}).",
            "",
        ]
    lines += ["`report.html` shows the error of each layer, `compress.json` holds it.", ""]
    return "\n".join(lines)


def _loading_lines(out: str, symmetric: bool) -> list[str]:
    if symmetric:
        return [
            "from transformers import AutoModelForCausalLM  # pip install compressed-tensors",
            f'model = AutoModelForCausalLM.from_pretrained("{out}")',
        ]
    return [
        "# compressed-tensors 0.18 to 0.20 needs `dequantize` to load zero points",
        "from transformers import AutoModelForCausalLM, CompressedTensorsConfig",
        "config = CompressedTensorsConfig(dequantize=True)",
        f'model = AutoModelForCausalLM.from_pretrained("{out}", quantization_config=config)',
    ]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
