"""Checkpoints made by commands of ours, each in a process of its own, and scored once.

Checkpoints stay in a work folder, where a run that was broken off goes on, and scores in another,
so that what has scores is not made again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scored:
    """Checkpoints of one model, scored on `windows` windows of 512 tokens of a text, in float32.

    work    folder of the checkpoints
    scores  folder of their scores, one JSON file each
    """

    model: str
    text: str
    windows: str
    work: Path
    scores: Path

    def make(self, name: str, command: Sequence[str]) -> None:
        """Make a checkpoint by a command, and score it, as far as that is still to be done."""
        if not (self.work / name).exists():
            compress(*command, "--out", str(self.work / name))
        self.score(name)

    def score(self, name: str) -> None:
        """Score a checkpoint that is there, with what its report says of training or pruning."""
        checkpoint = self.work / name
        scoring = ("--text", self.text, "--windows", self.windows)
        against = ("--against", self.model, "--json")
        found = json.loads(compress("eval", str(checkpoint), *scoring, *against))
        found |= {"model": name, "text": Path(self.text).name}
        if (path := checkpoint / "compress.json").is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
            training = report.get("training", {})
            found["held_out"] = [
                {"tokens": row["tokens"], "loss": row.get("kl", row.get("loss"))}
                for row in training.get("held_out_kl", training.get("evaluations", []))
            ]
            found["parameters"] = report["sizes"]["parameters"]
            found["bytes"] = report["sizes"]["bytes"]
        self.put(name, found)

    def has(self, name: str) -> bool:
        """Whether a checkpoint was scored."""
        return self._path(name).exists()

    def get(self, name: str) -> dict[str, Any]:
        """The scores of a checkpoint."""
        return json.loads(self._path(name).read_text(encoding="utf-8"))

    def put(self, name: str, found: dict[str, Any]) -> None:
        """Keep the scores of a checkpoint."""
        self.scores.mkdir(parents=True, exist_ok=True)
        self._path(name).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.scores / f"{name}.json"


def add_options(parser: argparse.ArgumentParser, page: str) -> None:
    """The options that every benchmark of scored checkpoints has; it writes `page`."""
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--train", required=True, help="a text file to calibrate and train on")
    parser.add_argument("--text", required=True, help="a text file to score on")
    parser.add_argument("--windows", default="32")
    parser.add_argument("--only", default="", help="runs whose name matches")
    parser.add_argument("--scores", type=Path, help="[default: scores in WORK_FOLDER]")
    parser.add_argument("--out", type=Path, help=f"[default: {page} in WORK_FOLDER]")


def compress(*command: str) -> str:
    """Run a command of ours; returns what it prints."""
    print(f"compress {' '.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "compress", *command], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout
