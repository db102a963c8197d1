"""Packed sequences: documents one after another in a stream of tokens, cut into equal windows.

    stream       a0 a1 a2 b0 b1 b2 b3 b4 c0 ...       documents a, b, c; windows of S = 4
    input_ids    a0 a1 a2 b0 | b1 b2 b3 b4
    position_ids  0  1  2  0 |  0  1  2  3            begin anew with a document, and a window
    labels       a1 a2  - b1 | b2 b3 b4  -            the next token; -100 after a document's last

No token attends to another document: transformers makes its attention mask block-diagonal where
`position_ids` do not count up and no mask and no cache are given.

The stream is a file of int32: a token's id, or its bitwise complement (negative) where a document
begins.  It is read through a memory map, so data larger than memory will do.  The first
`held_out` windows are for evaluation and never trained on.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.core.files import replacing

IGNORED = -100  # the label of a position where nothing is predicted, as in transformers
DOCUMENT_BEGINS = ~0  # stands after the last document
LARGE_ODD = 0x9E3779B97F4A7C15  # spreads the numbers of passes over seeds


def pack(documents: Iterable[Sequence[int]], path: Path, tokens: int | None = None) -> None:
    """Write documents, each a sequence of token ids, as a stream; whole or not at all.

    At least `tokens` are taken, in whole documents, or all that there are.
    """
    taken = 0
    with replacing(path) as partial, partial.open("wb") as file:
        for document in documents:
            if len(document) == 0:
                continue
            ids = np.array(document, dtype=np.int32)
            ids[0] = ~ids[0]
            ids.tofile(file)
            taken += len(ids)
            if tokens is not None and taken >= tokens:
                break


class PackedData:
    """Windows of `seq_len` tokens, by number: first the held-out ones, then those to train on.

    stream    int32 [tokens], as above
    held_out  windows for evaluation

    Raises InputError when nothing is left to train on.
    """

    def __init__(self, stream: Tensor, seq_len: int, held_out: int = 0) -> None:
        self.seq_len = seq_len
        self.held_out = held_out
        self.sequences = len(stream) // seq_len
        if self.sequences <= held_out:
            evaluated = f" after {held_out} for evaluation" if held_out else ""
            raise InputError(
                f"the data has {len(stream)} tokens, not one sequence of {seq_len} to train "
                f"on{evaluated}; give more text, a smaller --seq-len, or less to evaluate on"
            )
        self._stream = stream

    @classmethod
    def read(cls, path: Path, seq_len: int, held_out: int = 0) -> "PackedData":
        """The stream that `pack` wrote."""
        size = path.stat().st_size // 4
        if size == 0:
            raise InputError("the data has no text: every document is empty; give other data")
        stream = torch.from_file(str(path), shared=False, size=size, dtype=torch.int32)
        return cls(stream, seq_len, held_out)

    @classmethod
    def of_rows(cls, rows: Tensor, held_out: int = 0) -> "PackedData":
        """One window for each row of token ids, integers [N, S], a document of its own."""
        stream = rows.to(torch.int32, copy=True)
        stream[:, 0] = ~stream[:, 0]
        return cls(stream.flatten(), rows.shape[1], held_out)

    def __len__(self) -> int:
        """How many windows there are, of both kinds."""
        return self.sequences

    @property
    def trained(self) -> int:
        """How many windows there are to train on."""
        return self.sequences - self.held_out

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Windows by number, int64 [B]: `input_ids`, `position_ids`, `labels`, int64 [B, S], and
        `index`, the numbers themselves.
        """
        rows = torch.stack([self._window(index) for index in indices.tolist()])  # [B, S + 1]
        begins = rows < 0
        ids = torch.where(begins, ~rows, rows).to(torch.int64)
        place = torch.arange(self.seq_len)
        begun = torch.where(begins[:, :-1], place, 0).cummax(dim=1).values
        return {
            "input_ids": ids[:, :-1].contiguous(),
            "position_ids": place - begun,
            "labels": ids[:, 1:].masked_fill(begins[:, 1:], IGNORED),
            "index": indices,
        }

    def _window(self, index: int) -> Tensor:
        """The tokens of a window and the one after it, int32 [S + 1]."""
        start = index * self.seq_len
        window = self._stream[start : start + self.seq_len + 1]
        if len(window) > self.seq_len:
            return window
        return torch.cat([window, window.new_tensor([DOCUMENT_BEGINS])])

    def fingerprint(self) -> str:
        """SHA-256 of the stream and of how it is cut."""
        digest = hashlib.sha256(f"{self.seq_len} {self.held_out} ".encode())
        digest.update(self._stream.numpy().data)
        return digest.hexdigest()

    def drawn(self, step: int, size: int, seed: int) -> Tensor:
        """The windows of an optimizer step, int64 [size]: a function of the step and the seed.

        Each pass over the data has an order of its own; a step may lie in two of them.
        """
        places = torch.arange(step * size, (step + 1) * size)
        passes = places // self.trained
        drawn = torch.empty_like(places)
        for number in passes.unique().tolist():
            here = passes == number
            order = _permutation(self.trained, seed, number)
            drawn[here] = order[places[here] % self.trained]
        return drawn + self.held_out

    def used(self, steps: int, size: int, seed: int) -> Tensor:
        """The windows that so many steps draw and those held out, each once, int64, in order."""
        drawn = [self.drawn(step, size, seed) for step in range(steps)]
        return torch.cat([torch.arange(self.held_out), *drawn]).unique()


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed + number * LARGE_ODD) % (1 << 63))
    return torch.randperm(size, generator=generator)
