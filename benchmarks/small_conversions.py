"""Conversions of the attention of small models, before and after training, in Markdown.

    python benchmarks/small_conversions.py WORK_FOLDER build/stories260K build/babyllama \\
        --scores RESULTS_FOLDER --out FILE.md

Each is a `compress run` of a conversion and a distillation, in a process of its own: the model
writes the text that it is calibrated, trained and scored on.  What has scores is not run again;
`--only REGEX` picks runs by name, and the page is of all that have scores (benchmarks/llama2c.py
makes folders of llama2.c files).
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from scored import compress

from compress.core.source import read_config

FIGURES = ("kl_mean", "perplexity")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("models", type=Path, nargs="*", help="folders")
    parser.add_argument("--tokens", default="50k", help="to train on")
    parser.add_argument("--only", default="", help="runs whose name matches")
    parser.add_argument("--scores", type=Path, help="[default: scores in WORK_FOLDER]")
    parser.add_argument("--out", type=Path, help="[default: small-conversions.md in WORK_FOLDER]")
    options = parser.parse_args()
    scores = options.scores or options.work / "scores"
    for model in options.models:
        for number, (words, stage) in enumerate(conversions(model)):
            name = f"{model.name}-{number}"
            path = scores / f"{name}.json"
            if re.search(options.only, name) and not path.exists():
                scores.mkdir(parents=True, exist_ok=True)
                found = {"model": model.name, "words": words}
                found |= measured(options.work / name, recipe_of(model, stage, options.tokens))
                path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(scores.glob("*.json"))]
    text = page(rows)
    (options.out or options.work / "small-conversions.md").write_text(text, encoding="utf-8")
    print(text)


def conversions(model: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each is in words, and its stage."""
    config = read_config(model)
    heads, dim = config["num_key_value_heads"], config["head_dim"]
    rank, rope = heads * dim // 2, heads * dim // 4
    averaged = {"kv_heads": 1, "merge": "mean", "refit": False}
    yield f"1 of {heads} KV heads, averaged", {"to": "gqa", **averaged}
    yield f"1 of {heads} KV heads, merged, refitted", {"to": "gqa", "kv_heads": 1}
    yield "keys and values of 2 layers shared, refitted", {"to": "cla", "share": 2}
    latents = {"to": "mla", "kv_rank": rank, "rope_dim": rope}
    yield f"latents of {rank} + {rope} numbers, refitted", latents


def recipe_of(model: Path, stage: dict[str, Any], tokens: str) -> dict[str, Any]:
    """All but the output; sequences are half as long as the model's longest."""
    length = read_config(model)["max_position_embeddings"] // 2
    train = {"tokens": tokens, "seq_len": length}
    return {
        "model": str(model),
        "calibration": {"source": "self", "samples": 256, "seq_len": length},
        "eval": {"text": "self", "windows": 64, "seq_len": length},
        "stages": [
            {"method": "convert", **stage},
            {"method": "distill", "data": {"source": "self"}, "train": train},
        ],
    }


def measured(out: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Carry it out: what of all layers is kept of a token, and the figures of both stages."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe | {"out": str(out)}, sort_keys=False), encoding="utf-8")
    compress("run", str(path))
    report = json.loads((out / "compress.json").read_text(encoding="utf-8"))
    before, after = ({name: stage[name] for name in FIGURES} for stage in report["stages"])
    kept = report["stages"][0]["conversion"]
    kept = {name: kept[name] for name in ("original_kv_values", "kv_values")}
    return kept | {
        "before": before,
        "after": after,
        "train": recipe["stages"][1]["train"],
        "eval": report["eval"],
    }


def page(rows: list[dict[str, Any]]) -> str:
    """A table for each model."""
    lines = ["# Conversions of small models", ""]
    for model, group in itertools.groupby(rows, key=lambda row: row["model"]):
        found = list(group)
        train, original = found[0]["train"], found[0]["eval"]["perplexity_original"]
        lines += [
            f"## {model}",
            "",
            f"Calibrated and scored on text of its own, of perplexity {original:.2f}; trained "
            f"on {train['tokens']} tokens of it in sequences of {train['seq_len']}. KL is from the "
            "original, in nats a token; of a token all layers keep "
            f"{found[0]['original_kv_values']} numbers.",
            "",
            "| | numbers kept | KL | trained | perplexity | trained |",
            "|---|---|---|---|---|---|",
        ]
        for row in found:
            pairs = ((row["before"][name], row["after"][name]) for name in FIGURES)
            (kl, healed), (perplexity, less) = pairs
            cells = (row["words"], row["kv_values"], f"{kl:.3f}", f"{healed:.3f}")
            cells += (f"{perplexity:.2f}", f"{less:.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
