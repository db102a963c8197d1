"""Data of the local tasks: JSON lines with `query`, `choices` (texts) and `gold` (index).

The harness calls `load` with the YAML's `dataset_kwargs` and with the task's metadata.
"""

import json
import os
from pathlib import Path

import datasets

FOLDER_VARIABLE = "COMPRESS_EVAL_DATA"
DEFAULT_FOLDER = "data"


def load(name: str, **metadata: object) -> dict[str, datasets.Dataset]:
    """Read `<folder>/<name>.jsonl` as the split `test`.

    The folder is $COMPRESS_EVAL_DATA, or `data` in the current one.
    `metadata` (version, and the model's arguments under lm-eval's own command) does not matter
    to the data; the harness insists on passing it.  Raises FileNotFoundError when the file is
    not there.
    """
    folder = Path(os.environ.get(FOLDER_VARIABLE, DEFAULT_FOLDER))
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; set {FOLDER_VARIABLE} to the folder that holds {path.name}"
        )
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return {"test": datasets.Dataset.from_list(rows)}
