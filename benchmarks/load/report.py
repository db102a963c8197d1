"""The record of a load test: a line while it runs, and the tables."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.core.resources import in_words

MOST_FAULTS = 50  # in the table
LEFT = "left before any text", "left mid-stream"


def line(found: dict[str, Any]) -> str:
    """A round in one line."""
    outcomes = ", ".join(f"{number} {name}" for name, number in sorted(found["outcomes"].items()))
    return (
        f"round {found['round']}: {outcomes}, {found['malformed']} malformed, "
        f"{found['seconds']:.0f} s, {in_words(found['memory'])}, {len(found['faults'])} faults"
    )


def write(folder: Path, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write serve-load.md and serve-load.json, and print the former."""
    parts = _head(options, result), _rounds(result), _endings(result), _faults(result)
    text = "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serve-load.md").write_text(text, encoding="utf-8")
    (folder / "serve-load.json").write_text(json.dumps(result, indent=2) + "\n")
    print(text)


def _head(options: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    flags = " ".join(f"--{name.replace('_', '-')} {result[name]}" for name in ("streams", "slots"))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "fastapi", "uvicorn"))
    return [
        "# `compress serve` under load",
        "",
        f"    python benchmarks/serve_load.py {result['model']} WORK_FOLDER {flags} ...",
        "",
        f"{result['model']}, {versions}, Python {sys.version.split()[0]}. Room for "
        f"{options.streams} requests, of which {options.slots} run; keys and values in "
        f"{options.kv_cache_memory}; answers of up to {options.max_tokens} tokens. What is asked "
        "stands in the docstring of the script; a fault is whatever differs from that: an answer "
        "that is not the right one to the last token, a wrong refusal, a block still in use.",
    ]


def _rounds(result: dict[str, Any]) -> list[str]:
    first = result["rounds"][0]["memory"]

    def left(found: dict[str, Any]) -> str:
        return " + ".join(str(found["outcomes"].get(name, 0)) for name in LEFT)

    rows = {
        "requests at once": lambda found: f"{found['requests']}",
        "answered": lambda found: f"{found['outcomes'].get('answered', 0)}",
        "client left before any text + mid-stream": left,
        "refused with 429 and Retry-After": lambda found: (
            f"{found['outcomes'].get('refused, 429', 0)}"
        ),
        "malformed": lambda found: f"{found['malformed']}",
        "most outputs running, requests waiting": lambda found: (
            f"{found['peak_running']:g}, {found['peak_waiting']:g}"
        ),
        "largest share of the cache in use": lambda found: f"{found['peak_kv_cache_usage']:.0%}",
        "preemptions": lambda found: f"{found['preemptions']:g}",
        "new tokens, seconds": lambda found: (
            f"{found['generation_tokens']:,.0f}, {found['seconds']:.0f}"
        ),
        "afterwards: blocks in use, cached, free": lambda found: ", ".join(
            f"{found['blocks'][name]:,}" for name in ("in_use", "cached", "free")
        ),
        "the engine's recount of its blocks": lambda found: (
            "right" if found["books_right"] else "WRONG"
        ),
        "memory (RssAnon)": lambda found: in_words(found["memory"]),
        "above the first round": lambda found: f"{(found['memory'] - first) / 2**20:+.1f} MiB",
        "open files, threads": lambda found: f"{found['open_files']}, {found['threads']}",
        "faults": lambda found: f"{len(found['faults'])}",
    }
    rounds = result["rounds"]
    return [
        "| round | " + " | ".join(str(found["round"]) for found in rounds) + " |",
        "|---" * (1 + len(rounds)) + "|",
        *(
            f"| {name} | " + " | ".join(cell(found) for found in rounds) + " |"
            for name, cell in rows.items()
        ),
    ]


def _endings(result: dict[str, Any]) -> list[str]:
    lines = [
        "| SIGTERM, seconds to finish | unfinished then | outcomes | asked afterwards | "
        "ended after | exit code | faults |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in result["endings"]:
        outcomes, late = (
            ", ".join(f"{number} {name}" for name, number in sorted(found[key].items()))
            for key in ("outcomes", "afterwards")
        )
        cells = [
            f"{found['drain_seconds']}",
            f"{found['unfinished_at_term']:g} of {found['requests']}",
            outcomes,
            late,
            f"{found['seconds']:.0f} s",
            f"{found['exit_code']}",
            f"{len(found['faults'])}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _faults(result: dict[str, Any]) -> list[str]:
    parts = [*result["rounds"], *result["endings"]]
    return [f"- {fault}" for part in parts for fault in part["faults"]][:MOST_FAULTS]
