"""What stands beside the weights in an output folder.

config.json     the original's, with the format's `quantization_config` and the stored dtype
tokenizer       the original's files, byte for byte
compress.json   recipe, versions, calibration fingerprint, error of each layer, sizes
run.json        times and host: what may differ between two equal runs
README.md       a model card
report.html     all of this for people; `compress eval` adds what it measures
"""

import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import compress
from compress.core.own_class import only_here
from compress.core.shards import BESIDE
from compress.core.source import ModelSource, public_name
from compress.recipe import LOSSES
from compress.report import mean_bits, spread

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
# by format, and what inputs are rounded to
FORMAT_NAMES = {
    ("compressed-tensors", None): "compressed-tensors `pack-quantized`",
    ("compressed-tensors", "int8"): "compressed-tensors `int-quantized`",
    ("compressed-tensors", "fp8"): "compressed-tensors `float-quantized`",
    ("gptq", None): "GPTQ",
    ("awq", None): "AWQ (AutoAWQ `gemm`)",
    ("bitsandbytes", "int8"): "bitsandbytes int8",
}

# packages that transformers loads a format with
NEEDS = {"gptq": "gptqmodel optimum", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes"}


def write_side_files(
    folder: Path,
    source: ModelSource,
    dtype: torch.dtype,
    config: dict[str, Any],
    report: dict[str, Any],
    times: dict[str, float],
    card: str,
) -> None:
    """Write everything but the weights, which are there already, into an output folder.

    config  what config.json says but for the stored dtype
    """
    write_config(folder, dtype, config)
    report, card = with_own_class(config, report, card)
    for path in carried_files(source.folder):
        shutil.copyfile(path, folder / path.name)
    _write_json(folder / "compress.json", report)
    _write_json(folder / "run.json", {**times, **_host_facts()})
    (folder / "README.md").write_text(card, encoding="utf-8")


def with_own_class(
    config: Mapping[str, Any], report: dict[str, Any], card: str
) -> tuple[dict[str, Any], str]:
    """The report and the card, which say who loads a model whose class is one of compress's own."""
    if not (reason := only_here(config)):
        return report, card
    brings = "import compress.core.cross_layer  # brings the class; transformers has none\n"
    told = f"{reason[0].upper()}{reason[1:]}.\n\n"
    card = card.replace("library_name: transformers", "library_name: compress-llm", 1)
    card = card.replace("```python\n", f"{told}```python\n{brings}", 1)
    return report | {"loads_in": reason}, card


def write_config(folder: Path, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Write config.json with the stored dtype."""
    told = {key: value for key, value in config.items() if key != "torch_dtype"}
    told["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", told)


def carried_files(folder: Path) -> list[Path]:
    """The files of a model folder that go into the output as they are."""
    found = (path for pattern in CARRIED for path in sorted(folder.glob(pattern)))
    return [path for path in found if path.is_file()]


def report_of(folder: Path) -> dict[str, Any] | None:
    """The compress.json of a checkpoint that this toolkit made, or None."""
    path = folder / "compress.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def versions() -> dict[str, str]:
    """The versions of what a checkpoint depends on, for compress.json."""
    return {
        name: _version(name)
        for name in ("compress-llm", "torch", "transformers", "compressed-tensors")
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return compress.__version__ if package == "compress-llm" else "absent"


def _host_facts() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


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
    symmetric = stage.get("symmetric", True)  # methods that round inputs know nothing else
    grid = "symmetric" if symmetric else "asymmetric"
    inputs = quantized[0].get("inputs") if quantized else None
    lines = [
        *_front_matter(ref, [stage["format"], stage["method"], *widths]),
        f"# {Path(ref).name}, {stage['method']} {' and '.join(widths)}".rstrip(),
        "",
        f"Made from `{ref}` with compress {report['versions']['compress-llm']}: "
        f"`{stage['method']}`, {bits or 'no linear quantized'}; {grid}; {groups or 'no groups'}; "
        f"in the {FORMAT_NAMES.get((stage['format'], inputs), stage['format'])} format.",
        "",
        *_inputs_lines(stage["format"], inputs),
        *_loading_lines(recipe["out"], stage["format"], symmetric),
        *_size_table(sizes, len(quantized)),
        *(f"| {count} x | {note} |" for note, count in sorted(left.items())),
        "",
    ]
    if report["calibration_sha256"]:
        data = recipe["calibration"]
        lines += [
            f"Calibrated on {data['samples']} sequences of {data['seq_len']} tokens from "
            f"`{public_name(data['source'])}` (seed {data['seed']}).",
            "",
        ]
    lines += _cache_lines(recipe)
    lines += ["`report.html` shows the error of each layer, `compress.json` holds it.", ""]
    return "\n".join(lines)


def distill_card(report: dict[str, Any]) -> str:
    """The model card of a model that was distilled."""
    recipe, training = report["recipe"], report["training"]
    (stage,) = recipe["stages"]
    student, teacher = recipe["model"], stage.get("teacher")
    weights = {name: stage["loss"][name] for name in LOSSES if stage["loss"].get(name)}
    losses = ", ".join(f"{weight:g} x {name}" for name, weight in weights.items())
    of_teacher = f" from `{teacher}`" if teacher else ""
    lora = stage.get("lora")
    how = f", adapters of rank {lora['rank']}, merged" if lora else ""
    lines = [
        *_front_matter(student, ["distillation"]),
        f"# {Path(student).name}, distilled",
        "",
        f"`{student}`, trained{of_teacher} with compress {report['versions']['compress-llm']} on "
        f"{training['tokens']:,} tokens of `{Path(stage['data']['source']).name}`: {losses}{how}.",
        "",
        *_plain_loading(recipe["out"]),
    ]
    if evaluations := training["evaluations"]:
        lines += [
            f"Loss on {training['sequences_held_out']} sequences that were not trained on: "
            f"{evaluations[0]['loss']:.4f} before, {evaluations[-1]['loss']:.4f} after.",
            "",
        ]
    lines += ["`losses.jsonl` has each step, `compress.json` the settings.", ""]
    return "\n".join(lines)


def prune_card(report: dict[str, Any]) -> str:
    """The model card of a model that was pruned."""
    recipe, sizes, pruning = report["recipe"], report["sizes"], report["pruning"]
    model, before, after = recipe["model"], pruning["original_shape"], pruning["shape"]
    changed = [f"{key} {before[key]} to {after[key]}" for key in after if before[key] != after[key]]
    lines = [
        *_front_matter(model, ["pruning"]),
        f"# {Path(model).name}, pruned",
        "",
        f"`{model}` with compress {report['versions']['compress-llm']}: {', '.join(changed)}; "
        f"{sizes['parameters']:,} parameters of {sizes['original_parameters']:,}. It was not "
        "trained after that: `compress distill` does.",
        "",
        *_plain_loading(recipe["out"]),
        "`compress.json` has what was kept, and how much each refitted linear lost.",
        "",
    ]
    return "\n".join(lines)


def convert_card(report: dict[str, Any]) -> str:
    """The model card of a model whose attention was converted."""
    recipe, conversion = report["recipe"], report["conversion"]
    model, blocks = recipe["model"], conversion["blocks"]
    notes = dict.fromkeys(block["note"] for block in blocks if block["note"])
    changes = (f"{name} {was} to {now}" for name, (was, now) in conversion["changes"].items())
    lines = [
        *_front_matter(model, ["attention-conversion", conversion["to"]]),
        f"# {Path(model).name}, converted to {conversion['words']}",
        "",
        f"`{model}` with compress {report['versions']['compress-llm']}: {', '.join(changes)}; "
        f"{conversion['kv_values']:,} numbers of KV cache a token in place of "
        f"{conversion['original_kv_values']:,}. It was not trained after that: `compress distill` "
        "does.",
        "",
        *(f"Note: {note}." for note in notes),
        *_plain_loading(recipe["out"]),
        "`compress.json` has what each block lost.",
        "",
    ]
    return "\n".join(lines)


def chain_card(report: dict[str, Any]) -> str:
    """The model card of a model that went through several stages."""
    recipe, measured = report["recipe"], report.get("eval")
    model, stages = recipe["model"], recipe["stages"]
    methods = [stage["method"] for stage in stages]
    lines = [
        *_front_matter(model, list(dict.fromkeys(methods))),
        f"# {Path(model).name}: {', '.join(methods)}",
        "",
        f"Made from `{model}` with compress {report['versions']['compress-llm']} in "
        f"{len(stages)} stages, one after another.",
        "",
        *_stage_table(report),
        "",
    ]
    if measured:
        text = recipe["eval"]["text"]
        of = "that the original wrote" if text == "self" else f"of `{text}`"
        lines += [
            f"On {measured['windows']} windows of {measured['seq_len']} tokens {of}; KL in nats a "
            "token.",
            "",
        ]
    lines += _draft_lines(report)
    last = stages[-1]
    if "format" in last:
        inputs = next((layer.get("inputs") for layer in report["layers"] if layer["method"]), None)
        lines += _inputs_lines(last["format"], inputs)
        lines += _cache_lines(recipe)
        lines += _loading_lines(recipe["out"], last["format"], last.get("symmetric", True))
    else:
        lines += _plain_loading(recipe["out"])
    lines += ["`report.html` shows each stage, `compress.json` has the settings.", ""]
    return "\n".join(lines)


def _draft_lines(report: dict[str, Any]) -> list[str]:
    """What a card says of a draft that comes with a model."""
    if not (draft := report.get("draft")):
        return []
    agrees = ""
    if "top1_agreement" in draft:
        agrees = f", its first choice this model's {draft['top1_agreement']:.1%} of times"
    return [
        f"The folder `draft` has a model of {draft['parameters']:,} parameters that proposes tokens"
        f"{agrees}. `compress serve {report['recipe']['out']}` uses it (speculative decoding).",
        "",
    ]


def _stage_table(report: dict[str, Any]) -> list[str]:
    """Parameters, size and loss after each stage, the original first."""
    sizes, measured = report["sizes"], report.get("eval")
    original = ("original", sizes["original_parameters"], sizes["original_bytes"])
    after = [(row["method"], row["parameters"], row["bytes"]) for row in report["stages"]]
    start, *rows = (
        f"| {name} | {parameters:,} | {size / 1e6:.1f} MB |"
        for name, parameters, size in (original, *after)
    )
    head = "| after | parameters | size |"
    if not measured:
        return [head, "|---|---|---|", start, *rows]
    losses = (
        f" {row['perplexity']:.5g} | {row['kl_mean']:.4f} | {row['kl_added']:+.4f} |"
        for row in report["stages"]
    )
    return [
        f"{head} perplexity | KL from the original | of it added here |",
        "|---|---|---|---|---|---|",
        f"{start} {measured['perplexity_original']:.5g} | | |",
        *(row + loss for row, loss in zip(rows, losses, strict=True)),
    ]


def export_card(ref: str, report: dict[str, Any]) -> str:
    """The model card of a checkpoint that was re-packed."""
    name, layers = report["format"], report["layers"]
    bits = sorted({layer["bits"] for layer in layers})
    rounded = report["scales"]["rounded"]
    same = "the same codes and scales" if not rounded else "the same codes"
    lines = [
        *_front_matter(ref, [name, *(f"{count}-bit" for count in bits)]),
        f"# {Path(ref).name}, {name}",
        "",
        f"Re-packed from `{ref}` ({report['from']}) with compress "
        f"{report['versions']['compress-llm']} in the {FORMAT_NAMES[name, None]} format: {same}.",
        "",
        *_loading_lines(report["out"], name, all(layer["symmetric"] for layer in layers)),
        *_size_table(report["sizes"], len(layers)),
        "",
    ]
    if rounded:
        change = report["scales"]["largest_relative_change"]
        lines += [f"{rounded:,} scales changed in float16, by {change:.1e} at most.", ""]
    return "\n".join(lines)


def _front_matter(ref: str, tags: Sequence[str]) -> list[str]:
    is_hub_id = ref.count("/") == 1 and not ref.startswith((".", "/", "~"))
    return [
        "---",
        "library_name: transformers",
        *([f"base_model: {ref}"] if is_hub_id else []),
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(dict.fromkeys(tags))}]",
        "---",
        "",
    ]


def _size_table(sizes: dict[str, Any], linears: int) -> list[str]:
    return [
        "| | |",
        "|---|---|",
        f"| size | {sizes['bytes'] / 1e6:.1f} MB "
        f"(original {sizes['original_bytes'] / 1e6:.1f} MB) |",
        f"| quantized linears | {linears}, {sizes['quantized_weights']:,} weights of "
        f"{sizes['parameters']:,} parameters |",
    ]


def _plain_loading(out: str) -> list[str]:
    load = f'model = AutoModelForCausalLM.from_pretrained("{out}")'
    return ["```python", "from transformers import AutoModelForCausalLM", load, "```", ""]


def _inputs_lines(format_name: str, inputs: str | None) -> list[str]:
    """What a card says of activations that are rounded."""
    if inputs is None:
        return []
    said = f"Activations are rounded to {inputs} as well, with one scale a token, at run time."
    if format_name == "bitsandbytes":
        said += (
            f" Outlier columns found in calibration are kept as they were in `{BESIDE}/`, which "
            "compress reads; bitsandbytes finds its own at run time, with weights from the codes."
        )
    return [said, ""]


def _cache_lines(recipe: dict[str, Any]) -> list[str]:
    """What a card says of keys and values."""
    if not (kind := recipe.get("kv_cache")):
        return []
    return [f"With calibrated scales of keys and values in {kind}, one of each a layer.", ""]


def _loading_lines(out: str, format_name: str, symmetric: bool) -> list[str]:
    load = f'model = AutoModelForCausalLM.from_pretrained("{out}")'
    needs = NEEDS.get(format_name)
    if needs:
        code = [f"from transformers import AutoModelForCausalLM  # pip install {needs}", load]
    elif symmetric:
        code = ["from transformers import AutoModelForCausalLM  # pip install compressed-tensors"]
        code.append(load)
    else:
        code = [
            "# compressed-tensors 0.18 to 0.20 needs `dequantize` to load zero points",
            "from transformers import AutoModelForCausalLM, CompressedTensorsConfig",
            "config = CompressedTensorsConfig(dequantize=True)",
            f'model = AutoModelForCausalLM.from_pretrained("{out}", quantization_config=config)',
        ]
    check = f"`compress inspect {out} --target vllm` (or sglang) says whether that loader takes it."
    return ["```python", *code, "```", "", check, ""]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
