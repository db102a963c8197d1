"""What a run has finished, so that after a kill it goes on from there.

One file a commit, written whole or not at all.  `identity` says what the run is of: the recipe, a
hash of the model's weights, versions.  A run of anything else does not go on from these commits.
"""

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.core.files import replacing, write_text

IDENTITY = "identity.json"


class Commits:
    """Values by name, in a folder.

    Values are what `torch.load(weights_only=True)` reads: tensors, numbers, strings, and lists,
    tuples and dictionaries of these.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Forget everything, and write down what the commits to come are of."""
        self.clear()
        self.folder.mkdir(parents=True)
        write_text(self.folder / IDENTITY, json.dumps(identity, indent=2, default=str))

    def go_on(self, identity: Mapping[str, Any]) -> None:
        """Keep the commits there are of this identity, or begin with none."""
        if not (self.folder / IDENTITY).is_file() or self.difference(identity):
            self.begin(identity)

    def difference(self, identity: Mapping[str, Any]) -> str | None:
        """Where this identity is not that of the commits: the first place, with both values."""
        before = json.loads((self.folder / IDENTITY).read_text(encoding="utf-8"))
        return _difference(before, json.loads(json.dumps(identity, default=str)))

    @property
    def exist(self) -> bool:
        """Whether anything was committed."""
        return any(self.folder.glob("*.pt"))

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def put(self, name: str, value: Any) -> None:
        """Commit a value, on the disk when this returns."""
        buffer = io.BytesIO()  # torch.save to a full disk raises no OSError
        torch.save(value, buffer)
        with replacing(self._path(name)) as partial:
            partial.write_bytes(buffer.getbuffer())

    def get(self, name: str) -> Any:
        """A committed value, on the CPU; None where there is none."""
        path = self._path(name)
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def series(self, name: str) -> list[Any]:
        """The values committed as NAME-00000, NAME-00001, ... up to the first that is missing."""
        values: list[Any] = []
        while (value := self.get(numbered(name, len(values)))) is not None:
            values.append(value)
        return values

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"


def numbered(name: str, index: int) -> str:
    """The name of one of a series."""
    return f"{name}-{index:05d}"


def _difference(before: Any, now: Any, place: str = "") -> str | None:
    """The first place where two JSON values differ, with both, such as `bits (4, now 3)`."""
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(key, before.get(key), now.get(key)) for key in [*now, *(before.keys() - now)]]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(before, now, strict=True))]
    else:
        return None if before == now else f"{place} ({before}, now {now})"
    for key, one, two in pairs:
        if found := _difference(one, two, f"{place}.{key}" if place else key):
            return found
    return None
