"""What each way of making a model smaller costs and gives: the table of docs/choosing.md.

    python benchmarks/choosing.py WORK_FOLDER --model smollm2 --text wikitext2_valid.txt \\
        --scores RESULTS_FOLDER --out FILE.md [--only REGEX]

Every checkpoint is made by the command in its row, in a process of its own and from nothing but the
model, which writes the text to calibrate and train on; `compress compare` then measures all that
are there alike, speed in rounds in turn.  What is made stays in the work folder, where a run that
was broken off goes on, and what was measured stays beside it.  The page and the picture are of the
last measurement; README and docs/choosing.md show the picture.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_cpu import processor
from scored import compress

from compress import roofline
from compress.comparing.plot import write_plot
from compress.roofline import Precision
from compress.shapes import find_shape

RECIPES = Path(__file__).parent.parent / "recipes"
RESULT = "choosing.json"
CONTEXT = 2048  # tokens that each sequence has, where bytes moved for a token are told


@dataclass(frozen=True)
class Way:
    """A checkpoint: what it is in words, and the command that makes it.

    served  what the runtime rounds besides, as `compress compare` takes it
    """

    name: str
    words: str
    command: tuple[str, ...]
    served: tuple[str, ...] = ()

    @property
    def entry(self) -> str:
        """As `compress compare` takes it, in the work folder."""
        return "+".join((self.name, *self.served))


def quantizing(*settings: str) -> tuple[str, ...]:
    return ("quantize", "MODEL", "--method", *settings, "--dtype", "bfloat16")


def converting(*settings: str, samples: int = 64) -> tuple[str, ...]:
    return ("convert", "MODEL", "--to", *settings, "--samples", str(samples), "--dtype", "bfloat16")


FLAGS = {"int8": "--kv-cache-dtype int8", "head8": "--head-bits 8"}
W4 = quantizing("gptq", "--bits", "4", "--group-size", "64")
WINDOWS = ("windows", "--window", "512", "--global-every", "5", "--global-by", "error")
WINDOWS += ("--seq-len", "1024")  # what lies beyond the window tells
LATENTS = ("mla", "--kv-rank", "192", "--rope-dim", "64")
WAYS = (
    Way("fp8", "weights and inputs in fp8", quantizing("fp8")),
    Way("llm-int8", "weights and inputs in int8, outliers in 16 bits", quantizing("llm-int8")),
    Way("w8", "weights in 8 bits", quantizing("rtn", "--bits", "8", "--group-size", "64")),
    Way("w4", "weights in 4 bits", W4),
    Way("w4", "the same, output layer in 8", W4, ("head8",)),
    Way("w4", "the same, keys and values in 8 too", W4, ("head8", "int8")),
    Way("w4", "weights in 4 bits, keys and values in 8", W4, ("int8",)),
    Way("qat-w3", "weights in 3 bits, trained", ("run", "qat-w3.yaml")),
    Way("w3", "weights in 3 bits", quantizing("gptq", "--bits", "3", "--group-size", "64")),
    Way(
        "mla-256",
        "latent attention, 256 of 384 numbers, not trained",
        converting(*LATENTS, "--seq-len", "2048", samples=16),
    ),
    Way(
        "mla-256-near",
        "the same, calibrated on texts of 512 tokens in place of 2,048",
        converting(*LATENTS),
    ),
    Way("windows", "windows of 512 tokens in 24 of 30 blocks, not trained", converting(*WINDOWS)),
    Way(
        "cla",
        "keys and values in every other block, not trained",
        converting("cla", "--share", "2"),
    ),
    Way("pruned", "24 of 30 blocks, distilled", ("run", "minitron-depth.yaml")),
    Way("gqa", "1 of 3 KV heads, distilled", ("run", "gqa-healed.yaml")),
    Way("mla", "latent attention, 160 of 384 numbers, distilled", ("run", "mla.yaml")),
    Way("full-stack", "28 blocks, latent attention, 4 bits, distilled", ("run", "full-stack.yaml")),
    Way("full-stack", "the same, latents in 8 bits", ("run", "full-stack.yaml"), ("int8",)),
    Way(
        "full-stack",
        "the same, output layer in 8 bits too",
        ("run", "full-stack.yaml"),
        ("head8", "int8"),
    ),
)


def main() -> None:
    options = parse()
    chosen = [way for way in WAYS if re.search(options.only, way.entry)]
    for way in chosen:
        if not (options.work / way.name).exists():
            compress(*command(way, options.model), "--out", str(options.work / way.name))
    scores = options.scores or options.work
    if chosen:
        found = measure(chosen, options)
        scores.mkdir(parents=True, exist_ok=True)
        (scores / RESULT).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        # Of weights what a step reads, since the original's file may hold more than bfloat16.
        rows = [row | {"bytes": row["weight_bytes"]} for row in found["rows"]]
        write_plot(scores / "choosing.png", rows)
    text = page(json.loads((scores / RESULT).read_text(encoding="utf-8")))
    (options.out or options.work / "choosing.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True, help="a text file to score on")
    parser.add_argument("--windows", default="32")
    parser.add_argument("--tasks", help="of lm-eval, with commas between")
    parser.add_argument("--include-path", help="folder with task files")
    parser.add_argument("--limit", default="200", help="questions of each task")
    parser.add_argument("--distances", default="128,512,1536", help="of recall")
    parser.add_argument("--repeat", default="3", help="rounds of timing")
    parser.add_argument("--only", default="", help="ways whose name matches")
    parser.add_argument("--scores", type=Path, help="[default: WORK_FOLDER]")
    parser.add_argument("--out", type=Path, help="[default: choosing.md in WORK_FOLDER]")
    return parser.parse_args()


def command(way: Way, model: str) -> tuple[str, ...]:
    """What makes it, but for the output."""
    words = (model if word == "MODEL" else word for word in way.command)
    return tuple(str(RECIPES / word) if word.endswith(".yaml") else word for word in words)


def measure(chosen: Sequence[Way], options: argparse.Namespace) -> dict[str, Any]:
    """What `compress compare` says of them, with the processor, and the command of each."""
    folders = [str(options.work / way.entry) for way in chosen]
    asked = ["--text", options.text, "--windows", options.windows, "--repeat", options.repeat]
    asked += ["--recall", "--distances", options.distances]
    if options.tasks:
        asked += ["--tasks", options.tasks, "--limit", options.limit]
        asked += ["--include-path", options.include_path] if options.include_path else []
    out = str(options.work / "comparison")
    said = compress("compare", *folders, "--against", options.model, *asked, "--out", out, "--json")
    made = [
        {"entry": way.entry, "words": way.words, "command": told(way, options.model)}
        for way in chosen
    ]
    found = json.loads(said)
    for row in found["rows"]:
        row["kv_bytes_read"] = kv_bytes_read(row["model"], row["kv_bytes_per_token"])
        row["model"] = Path(row["model"]).name
    return found | {"processor": processor(), "ways": made}


def told(way: Way, model: str) -> str:
    """The command as a user writes it."""
    words = (model if word == "MODEL" else word for word in way.command)
    words = (f"recipes/{word}" if word.endswith(".yaml") else word for word in words)
    served = f", serve with {' '.join(FLAGS[mark] for mark in way.served)}" if way.served else ""
    out = () if way.command[0] == "run" else ("--out", way.name)
    return f"`{' '.join(('compress', *words, *out))}`{served}"


def page(found: dict[str, Any]) -> str:
    """The table, as docs/choosing.md has it."""
    original, *rows = ({**row, "moved": moved(row)} for row in found["rows"])
    tasks = [(task, name) for task, name in METRICS if task in original.get("tasks", {})]
    distances = [row["distance"] for row in original["recall"]["passkey"]]
    heads = ["", "weights, MB a step", "KV, bytes a token", "ms a token"]
    heads += [f"moved a token, MB, {original['batch']} x {CONTEXT:,}", "KL"]
    heads += [f"tokens/s, batch {original['batch']}", "perplexity"]
    heads += [label_of(task) for task, _ in tasks]
    heads += [f"{label}, {distance:,} back" for label in RECALL for distance in distances]
    lines = [
        "# What each way costs and gives",
        "",
        f"{original['name']} on {found['processor']}; factors are beside the original in bfloat16.",
        "",
    ]
    ways = {way["entry"]: way for way in found["ways"]}
    cells = [line("original, bfloat16", original, original, tasks, distances)]
    cells += [line(ways[row["name"]]["words"], row, original, tasks, distances) for row in rows]
    lines += [*table([row[:6] for row in (heads, *cells)])]
    lines += ["", "## All that was measured", "", *table([heads, *cells])]
    lines += ["", *found["facts"], "", "| | made by |", "|---|---|"]
    lines += [f"| {way['words']} | {way['command']} |" for way in found["ways"]]
    return "\n".join([*lines, ""])


def moved(row: dict[str, Any]) -> float:
    """Bytes that a step reads for each of `batch` sequences of CONTEXT tokens: what a token costs
    where memory bounds it."""
    return row["weight_bytes"] / row["batch"] + row["kv_bytes_read"]


def kv_bytes_read(folder: str, kv_bytes_per_token: float) -> float:
    """What a step reads of the cache for one sequence: a window's tokens, and shared keys and
    values once for each layer that uses them."""
    shape, alike = find_shape(folder), Precision()
    read = roofline.kv_read_bytes(shape, alike, CONTEXT)
    return kv_bytes_per_token * read / roofline.kv_bytes_per_token(shape, alike)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown; headings are the first row."""
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return [head, f"|{'---|' * len(rows[0])}", *rest]


RECALL = {"pass key": "passkey", "one of four pairs": "key-value"}
METRICS = (("arc_easy", "acc_norm"), ("piqa", "acc_norm"), ("boolq", "acc"))
METRICS += tuple((f"{task}_local", metric) for task, metric in METRICS)


def label_of(task: str) -> str:
    return task.removesuffix("_local")


def line(
    words: str,
    row: dict[str, Any],
    original: dict[str, Any],
    tasks: Sequence[tuple[str, str]],
    distances: Sequence[int],
) -> list[str]:
    """A row of the table; costs with the factor that they are smaller, or rates larger, by."""

    def with_factor(key: str, form: str, scale: float = 1.0, rate: bool = False) -> str:
        factor = row[key] / original[key] if rate else original[key] / row[key]
        shown = f"{row[key] * scale:{form}}"
        return shown if row is original else f"{shown} ({factor:.2f}x)"

    cells = [words, with_factor("weight_bytes", ",.0f", 1e-6)]
    cells.append(with_factor("kv_bytes_per_token", ",.0f"))
    cells.append(with_factor("seconds_per_token", ".2f", 1e3))
    cells.append(with_factor("moved", ".1f", 1e-6))
    cells.append(f"{row['kl_mean']:.3f}" if "kl_mean" in row else "0")
    cells.append(with_factor("tokens_per_s", ",.0f", rate=True))
    cells.append(f"{row['perplexity']:.2f}")
    for task, metric in tasks:
        found = row["tasks"][task]
        error = 1.96 * found[f"{metric}_stderr"]
        cells.append(f"{found[metric]:.3f} ± {error:.3f}")
    for kind in RECALL.values():
        found = {asked["distance"]: asked["found"] for asked in row["recall"][kind]}
        cells += [f"{found[distance]:.0%}" for distance in distances]
    return cells


if __name__ == "__main__":
    main()
