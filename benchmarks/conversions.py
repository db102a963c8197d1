"""What converting the attention loses, and what training then wins back, in Markdown.

    python benchmarks/conversions.py WORK_FOLDER --model smollm2 --train c4.txt \\
        --text wikitext2_valid.txt --out FILE.md

Every run is a `compress convert` or `compress distill` in a process of its own, by its command in
the page; speeds are of `compress bench latency`.  What has scores is not run again
(benchmarks/scored.py).  `--only REGEX` picks runs by name; the page is of all that have scores.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from runtime_cpu import processor
from scored import Scored, add_options, compress

from compress.core.source import resolve_model

ONE_HEAD = ("--to", "gqa", "--kv-heads", "1")
SHARED = ("--to", "cla", "--share", "2")
LATENTS = ("--to", "mla", "--kv-rank", "128", "--rope-dim", "32")
# The words are for SmolLM2, whose 3 KV heads of 64 keep 384 numbers of a token in a layer.
CONVERSIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mean": (
        "1 of 3 KV heads (128 of 384 numbers), averaged",
        (*ONE_HEAD, "--merge", "mean", "--no-refit"),
    ),
    "mean-refit": ("1 of 3 KV heads, averaged, refitted", (*ONE_HEAD, "--merge", "mean")),
    "merged": ("1 of 3 KV heads, merged", (*ONE_HEAD, "--no-refit")),
    "merged-refit": ("1 of 3 KV heads, merged, refitted", ONE_HEAD),
    "shared": ("keys and values of 2 layers shared (192 of 384 numbers)", (*SHARED, "--no-refit")),
    "shared-refit": ("keys and values of 2 layers shared, refitted", SHARED),
    "latents-refit": ("latents (128 + 32 of 384 numbers), refitted", LATENTS),
}
HEALED = ("mean", "merged-refit", "shared-refit", "latents-refit")
TIMED = ("original", "merged-refit", "shared-refit", "latents-refit")
CONTEXTS = ("2048", "7936")  # of SmolLM2's 8,192, with room for what is decoded
SPEED = ("--dtype", "bfloat16", "--new-tokens", "128", "--json")


def main() -> None:
    options = parse()
    scores = options.scores or options.work / "scores"
    scored = Scored(options.model, options.text, options.windows, options.work, scores)
    for name in CONVERSIONS:
        if re.search(options.only, name) and not scored.has(name):
            scored.make(name, converting(options, name))
    for name in HEALED:
        healed = f"{name}-healed"
        if re.search(options.only, healed) and not scored.has(healed):
            if not (options.work / name).exists():
                compress(*converting(options, name), "--out", str(options.work / name))
            scored.make(healed, training(options, str(options.work / name)))
    for name in TIMED:
        for context in CONTEXTS:
            key = speed_key(name, context)
            if re.search(options.only, key) and not scored.has(key):
                scored.put(key, speed(options, name, context))
    text = page(options, scored)
    (options.out or options.work / "conversions.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, "conversions.md")
    parser.add_argument("--samples", default="128")
    parser.add_argument("--tokens", default="50k", help="to train on")
    return parser.parse_args()


def converting(options: argparse.Namespace, name: str) -> tuple[str, ...]:
    data = ("--calibration", options.train, "--samples", options.samples, "--seq-len", "512")
    return ("convert", options.model, *CONVERSIONS[name][1], *data)


def training(options: argparse.Namespace, student: str) -> tuple[str, ...]:
    """The command that heals a conversion, by what the original predicts."""
    data = ("--data", options.train, "--tokens", options.tokens)
    return ("distill", "--teacher", options.model, "--student", student, *data)


def speed_key(name: str, context: str) -> str:
    return f"speed-{name}-{context}"


def speed(options: argparse.Namespace, name: str, context: str) -> dict[str, Any]:
    folder = options.work / name
    if name == "original":  # its dense weights: the runtime reads a .gguf file as it is
        folder = resolve_model(options.model).folder
    found = compress("bench", "latency", str(folder), *SPEED, "--prompt-tokens", context)
    return json.loads(found) | {"model": name, "processor": processor()}


def page(options: argparse.Namespace, scored: Scored) -> str:
    """The record of runs that have scores."""
    names = [name for name in CONVERSIONS if scored.has(name)]
    lines = [
        "# What converting the attention loses, and what training wins back",
        "",
        f"{options.model}; calibrated on {options.samples} sequences of 512 tokens "
        f"of {Path(options.train).name}, scored on the first {options.windows} windows of 512 "
        f"tokens of {Path(options.text).name} in float32. KL is from the original, in nats a "
        f"token. Trained on {options.tokens} tokens of {Path(options.train).name} by forward KL.",
        "",
    ]
    if names:
        lines += ["| | perplexity | KL | perplexity, trained | KL, trained |"]
        lines += ["|---|---|---|---|---|"]
        lines.append(f"| original | {scored.get(names[0])['perplexity_original']:.2f} | 0 | | |")
        for name in names:
            healed = f"{name}-healed"
            after = cells(scored.get(healed)) if scored.has(healed) else " | "
            lines.append(f"| {CONVERSIONS[name][0]} | {cells(scored.get(name))} | {after} |")
        lines.append("")
    lines += speed_lines(scored)
    lines += ["## Commands", ""]
    for name in names:
        lines.append(command_line(options, converting(options, name), name))
        if scored.has(f"{name}-healed"):
            lines.append(command_line(options, training(options, name), f"{name}-healed"))
    return "\n".join([*lines, ""])


def cells(score: dict[str, Any]) -> str:
    return f"{score['perplexity']:.2f} | {score['kl_mean']:.4f}"


def speed_lines(scored: Scored) -> list[str]:
    """Bytes of the runtime's cache, and what it decodes with so many tokens in it."""
    names = [name for name in TIMED if all(scored.has(speed_key(name, c)) for c in CONTEXTS)]
    if not names:
        return []
    heads = [
        "",
        "bytes a token",
        *(f"tokens/s, {int(context):,} in the cache" for context in CONTEXTS),
    ]
    lines = ["## Cache, and decoding at batch 1 in bfloat16", ""]
    lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name in names:
        found = [scored.get(speed_key(name, context)) for context in CONTEXTS]
        before = [scored.get(speed_key(names[0], context)) for context in CONTEXTS]
        cells = [CONVERSIONS[name][0] if name in CONVERSIONS else name]
        cells.append(f"{found[0]['kv_bytes_per_token']:,.0f}")
        for now, was in zip(found, before, strict=True):
            rate = now["decode_tokens_per_s"]
            cells.append(f"{rate:.0f} ({rate / was['decode_tokens_per_s']:.2f}x)")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def command_line(options: argparse.Namespace, command: tuple[str, ...], name: str) -> str:
    words = (Path(word).name if word == options.train else word for word in command)
    return f"    compress {' '.join(words)} --out {name}"


if __name__ == "__main__":
    main()
