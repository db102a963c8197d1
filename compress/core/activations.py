"""The hidden states of all calibration sequences between two blocks, on disk and partly in memory.

They are written for every block, since a killed run goes on from them; those that fit in a budget
are kept in memory too, and the rest is read back batch by batch.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from compress.core.shards import write_file

NAME = "hidden_states"


class Activations:
    """Batches of hidden states, [B, S, D] each, on the CPU, in the order that they were stored in.

    `folder` holds one safetensors file a batch.
    """

    def __init__(self, folder: Path) -> None:
        """Open what `store` has written."""
        self.folder = folder
        self._kept: dict[int, Tensor] = {}

    @classmethod
    def store(cls, folder: Path, batches: Iterable[Tensor], memory: int) -> "Activations":
        """Write batches as they come, and keep up to `memory` bytes of them in memory too.

        The folder has its name only when it is complete.  Raises OSError, for a full disk.
        """
        stored = cls(folder)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for index, batch in enumerate(batches):
            batch = batch.contiguous()
            write_file(partial / f"{index:05d}.safetensors", {NAME: batch})
            memory -= batch.nbytes
            if memory >= 0:
                stored._kept[index] = batch
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        return stored

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(len(self)):
            yield self[index]

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.iterdir())

    def __getitem__(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        # A copy, since what is mapped from a file begins anywhere in memory, and a product's last
        # bits may depend on where its factors begin.
        return load_file(self.folder / f"{index:05d}.safetensors")[NAME].clone()

    def drain(self) -> Iterator[Tensor]:
        """Iterate, letting go of each batch in memory as it is handed out."""
        for index in range(len(self)):
            batch = self[index]
            self._kept.pop(index, None)
            yield batch

    def remove(self) -> None:
        """Delete the files."""
        self._kept.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
