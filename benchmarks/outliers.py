"""Methods of 8 bits on a model with planted outlier channels, and on the same model without.

    python benchmarks/outliers.py WORK_FOLDER --model smollm2 --train c4.txt \\
        --text wikitext2_valid.txt --out FILE.md

Planting multiplies a few channels of what enters the linears of each block by `--factor`, in the
norms' gains and in the rows of `up`, and divides the columns that read them: the function is the
same.  A factor that is a power of two changes no bit of any logit, which is checked.

Every run is a `compress quantize` in a process of its own, by its command in the page, scored
against the original.  What has scores is not run again (benchmarks/scored.py).  `--only REGEX`
picks runs by name, such as `planted-` or `original-llm-int8`; the page is of all that have scores.
"""

import argparse
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scored import Scored, add_options
from torch import Tensor

from compress.core.device import default_device
from compress.core.shards import ShardReader
from compress.core.source import resolve_model
from compress.loading import load_model

W8A8 = "W8A8, nothing against outliers"
# what is scored on both models: the row's name in the page, and the method with its settings
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "int8": (W8A8, ("--method", "llm-int8", "--outlier-threshold", "0")),
    "smoothquant": ("SmoothQuant W8A8", ("--method", "smoothquant")),
    "llm-int8": ("LLM.int8", ("--method", "llm-int8")),
    "llm-int8-threshold": (
        "LLM.int8, columns by the threshold alone",
        ("--method", "llm-int8", "--set", "outlier_columns=0"),
    ),
    "fp8": ("FP8", ("--method", "fp8")),
}
W4 = ("--bits", "4", "--group-size", "64")
WEIGHT_ONLY: dict[str, tuple[str, tuple[str, ...]]] = {
    "rtn-w8": (
        "RTN W8, one scale a row",
        ("--method", "rtn", "--bits", "8", "--group-size", "channel"),
    ),
    "gptq-w4": ("GPTQ W4 g64", ("--method", "gptq", *W4)),
    "awq-w4": ("AWQ W4 g64", ("--method", "awq", *W4)),
    "rtn-w4": ("RTN W4 g64", ("--method", "rtn", *W4)),
}
PLANTED, ORIGINAL = "planted", "original"
OF = {PLANTED: METHODS, ORIGINAL: METHODS | WEIGHT_ONLY}


def main() -> None:
    options = parse()
    scores = options.scores or options.work / "scores"
    scored = Scored(options.model, options.text, options.windows, options.work, scores)
    for name, command in runs_of(options):
        if not re.search(options.only, name) or scored.has(name):
            continue
        if name.startswith(PLANTED) and not scored.has(PLANTED):
            plant(options)
            scored.put(PLANTED, {"moved": largest_change(options)})
        scored.make(name, command)
    text = page(options, scored)
    (options.out or options.work / "outliers.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, "outliers.md")
    parser.add_argument("--samples", default="64")
    parser.add_argument("--factor", type=float, default=32.0)
    parser.add_argument(
        "--channels",
        type=int,
        default=6,
        help="of each input; the hidden ones "
        "are the same in all blocks, as in models that have outliers",
    )
    return parser.parse_args()


def runs_of(options: argparse.Namespace) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and command of every run, in the order of the page."""
    models = {PLANTED: str(options.work / PLANTED), ORIGINAL: options.model}
    data = ("--calibration", options.train, "--samples", options.samples)
    for kind, methods in OF.items():
        for name, (_, flags) in methods.items():
            needs_none = flags[1] in ("rtn", "fp8") or flags[-2:] == ("--outlier-threshold", "0")
            command = ("quantize", models[kind], *flags, *(() if needs_none else data))
            yield f"{kind}-{name}", command


def plant(options: argparse.Namespace) -> None:
    """Write the model with outlier channels, a Llama, to WORK_FOLDER/planted."""
    folder = options.work / PLANTED
    if folder.exists():
        return
    source = resolve_model(options.model).folder
    unfinished = folder.with_name(f".{PLANTED}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("*.safetensors*"))
    reader = ShardReader(source)
    tensors = {name: reader.load(name) for name in reader.names}
    chosen = torch.Generator().manual_seed(0)
    hidden = some(tensors["model.norm.weight"].shape[0], options.channels, chosen)
    for name in reader.names:
        if name.endswith("input_layernorm.weight"):
            block = name.removesuffix("input_layernorm.weight")
            mlp, attention = f"{block}mlp.", f"{block}self_attn."
            neurons = some(tensors[f"{mlp}up_proj.weight"].shape[0], options.channels, chosen)
            for producer, consumers, channels in (
                (name, [f"{attention}{part}_proj" for part in "qkv"], hidden),
                (
                    f"{block}post_attention_layernorm.weight",
                    [f"{mlp}gate_proj", f"{mlp}up_proj"],
                    hidden,
                ),
                (f"{mlp}up_proj.weight", [f"{mlp}down_proj"], neurons),
            ):
                tensors[producer][channels] *= options.factor
                for consumer in consumers:
                    tensors[f"{consumer}.weight"][:, channels] /= options.factor
    save_file(tensors, unfinished / "model.safetensors", {"format": "pt"})
    unfinished.rename(folder)


def some(width: int, count: int, generator: torch.Generator) -> Tensor:
    """Some channels, int64 [count]."""
    return torch.randperm(width, generator=generator)[:count]


def largest_change(options: argparse.Namespace) -> float:
    """The largest difference of the planted model's logits from the original's, for some tokens."""
    vocabulary = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 1000, (1, 64), generator=vocabulary).to(default_device())
    folders = (resolve_model(options.model).folder, options.work / PLANTED)
    with torch.inference_mode():
        before, after = (load_model(folder)(tokens).logits for folder in folders)
    return (after - before).abs().max().item()


def page(options: argparse.Namespace, scored: Scored) -> str:
    """The record of runs that have scores."""
    lines = [
        "# 8 bits for weights and activations, with and without outliers",
        "",
        f"{options.model}; calibrated on {options.samples} sequences of 512 tokens "
        f"of {Path(options.train).name}, scored on the first {options.windows} windows of 512 "
        f"tokens of {Path(options.text).name} in float32. KL is from the original, in nats a "
        "token. Intervals are 95% bootstraps over windows.",
        "",
    ]
    for kind, methods in OF.items():
        found = {
            name: scored.get(f"{kind}-{name}") for name in methods if scored.has(f"{kind}-{name}")
        }
        if not found:
            continue
        lines += [f"## The model {'with planted outliers' if kind == PLANTED else 'as it is'}", ""]
        if kind == PLANTED:
            moved = scored.get(PLANTED)["moved"]
            lines += [
                f"{options.channels} channels of the inputs of q, k and v, of gate and up, and of "
                f"down are {options.factor:g} times as large in every block, and the columns that "
                f"read them as much smaller. Logits differ from the original's by {moved:.1g} at "
                "most.",
                "",
            ]
        lines += [
            "| | bytes | perplexity | ratio to the original (95%) | KL (95%) | same top token |",
            "|---|---|---|---|---|---|",
        ]
        original = next(iter(found.values()))["perplexity_original"]
        lines.append(f"| original | | {original:.3f} | 1 | 0 | 1 |")
        lines += [row(methods[name][0], score) for name, score in found.items()]
        lines.append("")
    lines += ["## Commands", ""]
    for name, command in runs_of(options):
        if scored.has(name):
            words = (Path(w).name if w == options.train or PLANTED in w else w for w in command)
            lines.append(f"    compress {' '.join(words)} --out {name}")
    return "\n".join([*lines, ""])


def row(name: str, score: dict[str, Any]) -> str:
    ratio = " to ".join(f"{bound:.4f}" for bound in score["perplexity_ratio_interval"])
    kl = " to ".join(f"{bound:.4f}" for bound in score["kl_mean_interval"])
    return (
        f"| {name} | {score['bytes'] / 1e6:.0f} MB | {score['perplexity']:.3f} | "
        f"{score['perplexity_ratio']:.4f} ({ratio}) | {score['kl_mean']:.4f} ({kl}) | "
        f"{score['top1_agreement']:.3f} |"
    )


if __name__ == "__main__":
    main()
