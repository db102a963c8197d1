"""`losses.jsonl`: one JSON object a step and one an evaluation, as they come.

    {"step": 1, "tokens": 4096, "loss": 2.31, "parts": {...}, "learning_rate": 1e-05,
     "gradient_norm": 0.8, "seconds": 3.1}
    {"step": 1, "tokens": 4096, "evaluation": {"loss": 2.4, "parts": {...}}, "seconds": 3.4}

`step` counts the steps done, `tokens` those trained on, `seconds` from the start of training,
of a run that was broken off less what was lost.  Losses are means over predicted tokens.
"""

import json
from pathlib import Path
from typing import Any

from compress.core.files import write_text
from compress.core.processes import processes

Row = dict[str, Any]


class RunLog:
    """The rows of a run; the first process writes them, the others only keep them."""

    def __init__(self, path: Path, done: int) -> None:
        """Go on after `done` steps: rows of later ones, which will be done again, are dropped."""
        self.path = path
        self.rows: list[Row] = []
        if done and path.exists():
            rows = (json.loads(line) for line in _whole_lines(path))
            self.rows = [row for row in rows if row["step"] <= done]
        processes().wait()  # all have read
        if processes().is_first:
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: Row) -> None:
        """Append a row."""
        self.rows.append(row)
        if processes().is_first:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    @property
    def seconds(self) -> float:
        """Of the last row."""
        return self.rows[-1]["seconds"] if self.rows else 0.0

    @property
    def steps(self) -> list[Row]:
        """The rows of steps."""
        return [row for row in self.rows if "evaluation" not in row]

    @property
    def evaluations(self) -> list[Row]:
        """The rows of evaluations."""
        return [row for row in self.rows if "evaluation" in row]


def _whole_lines(path: Path) -> list[str]:
    """Lines that were written to their end: a kill can cut the last one off."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]
