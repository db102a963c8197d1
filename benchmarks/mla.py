"""What multi-head latent attention loses before training, against a plain SVD of the weights.

    python benchmarks/mla.py WORK_FOLDER --model smollm2 --train c4.txt \\
        --text wikitext2_valid.txt --out FILE.md

A sweep of (rank, RoPE channels), each pair by principal components of activations with and without
the refit, and by a plain singular value decomposition of the weights at equal bytes.  Every run is
a `compress convert` in a process of its own.  What has scores is not run again
(benchmarks/scored.py).  `--only REGEX` picks runs by name; the page is of all that have scores.
"""

import argparse
import re
from pathlib import Path

from scored import Scored, add_options

from compress.core.source import read_config, resolve_model

POINTS = ((256, 64), (192, 64), (192, 32), (144, 48), (128, 64), (144, 16), (128, 32), (96, 64),
          (112, 16), (96, 32), (64, 64), (64, 32))  # fmt: skip
WAYS: dict[str, tuple[str, ...]] = {
    "refitted": (),
    "activations": ("--no-refit",),
    "weights": ("--basis", "weights", "--no-refit"),
}


def main() -> None:
    options = parse()
    scores = options.scores or options.work / "scores"
    scored = Scored(options.model, options.text, options.windows, options.work, scores)
    for point in POINTS:
        for way in WAYS:
            name = named(point, way)
            if re.search(options.only, name) and not scored.has(name):
                scored.make(name, command(options, point, way))
    text = page(options, scored)
    (options.out or options.work / "mla.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, "mla.md")
    parser.add_argument("--samples", default="128")
    return parser.parse_args()


def named(point: tuple[int, int], way: str) -> str:
    return f"r{point[0]}-d{point[1]}-{way}"


def command(options: argparse.Namespace, point: tuple[int, int], way: str) -> tuple[str, ...]:
    sizes = ("--kv-rank", str(point[0]), "--rope-dim", str(point[1]))
    data = ("--calibration", options.train, "--samples", options.samples, "--seq-len", "512")
    return ("convert", options.model, "--to", "mla", *sizes, *WAYS[way], *data)


def page(options: argparse.Namespace, scored: Scored) -> str:
    """The record of runs that have scores."""
    config = read_config(resolve_model(options.model).folder)
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    lines = [
        "# What multi-head latent attention loses before training",
        "",
        f"{options.model}; calibrated on {options.samples} sequences of 512 tokens "
        f"of {Path(options.train).name}, scored on the first {options.windows} windows of 512 "
        f"tokens of {Path(options.text).name} in float32. KL is from the original, in nats a "
        f"token. The original keeps {2 * heads * dim} numbers of a token in each layer.",
        "",
        "| numbers a token and layer | rank + RoPE | KL, refitted | no refit | weight SVD "
        "| perplexity, refitted | no refit | weight SVD |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for point in POINTS:
        found = {way: named(point, way) for way in WAYS if scored.has(named(point, way))}
        if found:
            values = {way: scored.get(name) for way, name in found.items()}
            kl = (f"{values[w]['kl_mean']:.4f}" if w in values else "" for w in WAYS)
            perplexity = (f"{values[w]['perplexity']:.2f}" if w in values else "" for w in WAYS)
            cells = " | ".join([*kl, *perplexity])
            lines.append(f"| {sum(point)} | {point[0]} + {point[1]} | {cells} |")
    lines += ["", "## Commands", ""]
    for point in POINTS:
        for way in (way for way in WAYS if scored.has(named(point, way))):
            words = (
                Path(word).name if word == options.train else word
                for word in command(options, point, way)
            )
            lines.append(f"    compress {' '.join(words)} --out {named(point, way)}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
