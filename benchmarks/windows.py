"""Sliding windows beside the original: perplexity by position, recall, cache, speed; in Markdown.

    python benchmarks/windows.py WORK_FOLDER --model smollm2 --train c4.txt \\
        --text wikitext2_valid.txt --out FILE.md

Each conversion is a `compress convert` in a process of its own, by its command in the page, and one
is healed by `compress distill`; recall is `compress eval --recall`, speed `compress bench latency`.
What a model's cache holds is read from an engine's own count while a sequence is in it.  What has
scores is not measured again (benchmarks/scored.py); `--only REGEX` picks models by name.
"""

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runtime_cpu import processor
from scored import Scored, add_options, compress

from compress.core.device import default_device
from compress.core.source import resolve_model
from compress.engines import load_predictor
from compress.evaluate import TextEvalConfig, cut_windows, score_windows
from compress.runtime.engine import Engine
from compress.runtime.loading import load_decoder
from compress.runtime.sampling_params import SamplingParams

DTYPE = "bfloat16"
EDGES = (0, 256, 512, 1024, 2048, 4096, 8192)  # of ranges of positions
CONTEXTS = (2048, 7936)  # of SmolLM2's 8,192, with room for what is decoded


def main() -> None:
    options = parse()
    scores = options.scores or options.work / "scores"
    scored = Scored(options.model, options.text, options.windows, options.work, scores)
    for name in names(options):
        if not re.search(options.only, name):
            continue
        folder = str(made(options, name))
        for kind, measure in MEASURES.items():
            if not scored.has(f"{name}-{kind}"):
                scored.put(f"{name}-{kind}", measure(options, folder))
    text = page(options, scored)
    (options.out or options.work / "windows.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, "windows.md")
    parser.set_defaults(windows="4")
    parser.add_argument("--window", default="512", help="tokens that windows have")
    parser.add_argument("--global-every", default="5")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a window of the text")
    parser.add_argument("--samples", default="16", help="to calibrate on, of twice the window")
    parser.add_argument("--distances", default="128,512,1024,2048")
    parser.add_argument("--trials", default="10")
    parser.add_argument("--tokens", default="50k", help="to train on")
    return parser.parse_args()


def conversions(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """The settings of each, by name."""
    some = ("--global-every", options.global_every)
    return {
        "all": ("--global-every", "0"),
        **{f"global-by-{by}": (*some, "--global-by", by) for by in ("place", "mass", "error")},
    }


def names(options: argparse.Namespace) -> list[str]:
    return ["original", *conversions(options), "global-by-error-healed"]


def converting(options: argparse.Namespace, name: str) -> tuple[str, ...]:
    data = ("--calibration", options.train, "--samples", options.samples)
    length = ("--seq-len", str(2 * int(options.window)))
    windows = ("--to", "windows", "--window", options.window, *conversions(options)[name])
    return ("convert", options.model, *windows, *data, *length)


def training(options: argparse.Namespace, student: str) -> tuple[str, ...]:
    """The command that heals one, on sequences longer than its window."""
    length = ("--seq-len", str(4 * int(options.window)), "--batch-size", "1")
    data = ("--data", options.train, "--tokens", options.tokens, *length)
    return ("distill", "--teacher", options.model, "--student", student, *data)


def made(options: argparse.Namespace, name: str) -> Path:
    """The checkpoint of a name, made where it is not there yet."""
    if name == "original":  # its dense weights: the runtime reads a .gguf file as it is
        return resolve_model(options.model).folder
    folder = options.work / name
    if folder.exists():
        return folder
    if name in conversions(options):
        compress(*converting(options, name), "--out", str(folder))
        return folder
    student = made(options, name.removesuffix("-healed"))
    compress(*training(options, str(student)), "--out", str(folder))
    return folder


def by_position(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Mean surprise and divergence from the original of ranges of positions, in nats a token."""
    sources = [resolve_model(name) for name in (folder, str(made(options, "original")))]
    config = TextEvalConfig(
        Path(options.text), seq_len=options.length, windows=int(options.windows), dtype=DTYPE
    )
    text = config.text.read_text(encoding="utf-8")
    windows = cut_windows([source.folder for source in sources], text, config)
    predictors = [load_predictor("runtime", source, DTYPE) for source in sources]
    scores = np.stack(list(score_windows(predictors, windows)), axis=1)  # [4, windows, tokens]
    rows = []
    for first, end in itertools.pairwise(EDGES):
        if first < scores.shape[2]:
            nll, _, kl, _ = scores[:, :, first:end].mean((1, 2))
            rows.append({"first": first, "perplexity": float(np.exp(nll)), "kl": float(kl)})
    return {"ranges": rows, "length": options.length, "windows": len(windows)}


def recall(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    asked = ("--recall", "--distances", options.distances, "--trials", options.trials)
    found = json.loads(compress("eval", folder, *asked, "--dtype", DTYPE, "--json"))
    return found | {"model": Path(folder).name}


def cache(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Bytes in the runtime's pool while a sequence decodes, and how fast it does."""
    decoder = load_decoder(resolve_model(folder), default_device(), DTYPE)
    found: dict[str, Any] = {}
    for context in CONTEXTS:
        blocks = decoder.layout.blocks_for(context + 16, 512)
        engine = Engine(decoder, blocks, max_sequences=1, prefix_caching=False)
        draw = torch.Generator().manual_seed(0)
        prompt = torch.randint(decoder.vocab_size, (context,), generator=draw).tolist()
        engine.add_request("a", prompt, SamplingParams(max_tokens=8, ignore_eos=True))
        while not engine.step():
            continue
        held = engine.statistics().cache_bytes_in_use
        speed = json.loads(
            compress(
                "bench", "latency", folder, "--dtype", DTYPE, "--prompt-tokens", str(context),
                "--new-tokens", "64", "--repeat", "1", "--json",
            )
        )  # fmt: skip
        found[str(context)] = {"bytes": held, "tokens_per_s": speed["decode_tokens_per_s"]}
    return {**found, "processor": processor()}


MEASURES = {"positions": by_position, "recall": recall, "cache": cache}


def page(options: argparse.Namespace, scored: Scored) -> str:
    """The record of models that have scores."""
    chosen = [
        name for name in names(options) if all(scored.has(f"{name}-{kind}") for kind in MEASURES)
    ]
    lines = [
        "# Sliding windows: what they lose, by position and by recall",
        "",
        f"{options.model}, {DTYPE}; windows of {options.window} tokens in all layers, or in all "
        f"but every {options.global_every}th. {options.windows} stretches of "
        f"{options.length} tokens of {Path(options.text).name}; recall with {options.trials} "
        f"trials at each distance. Calibrated and trained on {Path(options.train).name}.",
        "",
    ]
    if chosen:
        lines += tables(scored, chosen)
    lines += ["## Commands", ""]
    for name in chosen:
        if name in conversions(options):
            lines.append(f"    compress {' '.join(converting(options, name))} --out {name}")
        elif name != "original":
            student = name.removesuffix("-healed")
            lines.append(f"    compress {' '.join(training(options, student))} --out {name}")
    return "\n".join([*lines, ""]).replace(options.train, Path(options.train).name)


def tables(scored: Scored, chosen: list[str]) -> list[str]:
    ranges = scored.get(f"{chosen[0]}-positions")["ranges"]
    lines = ["## Perplexity by position (KL from the original, nats a token)", ""]
    lines += [row("", [f"from {one['first']:,}" for one in ranges]), "|---" * len(ranges) + "|---|"]
    for name in chosen:
        found = scored.get(f"{name}-positions")["ranges"]
        lines.append(row(name, [f"{one['perplexity']:.2f} ({one['kl']:.3f})" for one in found]))
    for task, asked in scored.get(f"{chosen[0]}-recall")["recall"].items():
        lines += ["", f"## Recall: {task}, found (surprise in nats), by tokens back", ""]
        lines += [row("", [f"{one['distance']:,}" for one in asked]), "|---" * len(asked) + "|---|"]
        for name in chosen:
            found = scored.get(f"{name}-recall")["recall"][task]
            lines.append(
                row(name, [f"{one['found']:.0%} ({one['surprise']:.1f})" for one in found])
            )
    on = scored.get(f"{chosen[0]}-cache")["processor"]
    lines += ["", f"## Keys and values of one sequence, and decoding at batch 1 on {on}", ""]
    heads = [f"{what} at {context:,}" for what in ("MB", "tokens/s") for context in CONTEXTS]
    lines += [row("", heads), "|---" * len(heads) + "|---|"]
    for name in chosen:
        found = [scored.get(f"{name}-cache")[str(context)] for context in CONTEXTS]
        sizes = [f"{one['bytes'] / 1e6:.1f}" for one in found]
        lines.append(row(name, [*sizes, *(f"{one['tokens_per_s']:.0f}" for one in found)]))
    return [*lines, ""]


def row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
