"""The decoder on a GPU: steps of decodes as CUDA graphs, all others launch by launch.

A step in which every sequence computes and draws one token is padded to one of a few sizes, and for
each of these the whole step, drawing included, is one CUDA graph.  A graph reads its inputs from
one buffer, which one copy fills; padding has context 0 and slot -1, and touches no cache.  Prompts
and what the host draws go launch by launch.  Draws stay on the device for the next launch to read
(a negative token, see compress.runtime.batch), and come back in one copy, the only one that
anybody waits for.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from compress.core.progress import track
from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.launched import DeviceBatch, Launched
from compress.kernels.paged_attention.plan import splits_of, tiles_of
from compress.kernels.sampling.triton import draw
from compress.runtime.batch import Batch, Draws
from compress.runtime.decoder import Decoder
from compress.runtime.device_queue import Download, Graph, Uploads, offsets
from compress.runtime.weights import DecoderWeights

SETTINGS = ("uniform", "temperature", "top_k", "top_p", "min_p")  # of `Draws`, but for the rows
# Sizes of decode steps that are captured; rows between two of them compute padding.
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
INTERPRETER_PROCESSORS = 4  # so that attention is split in tests


class GpuDecoder(Decoder):
    """A model on a GPU that draws its tokens itself (compress.runtime.batch.AsynchronousModel).

    `most_tokens` is the size of the largest batch that it will be given.
    """

    def __init__(
        self, weights: DecoderWeights, device: torch.device, dtype: torch.dtype, most_tokens: int
    ) -> None:
        super().__init__(weights, Launched(dtype, device), device)
        self._uploads = Uploads(device)
        self._drawn = torch.zeros(most_tokens, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, bool], _DecodeStep] = {}
        self._most_blocks = 0  # of one sequence
        self._processors = INTERPRETER_PROCESSORS
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count

    def without(self, layers: Collection[int], head: LinearWeight | None = None) -> Self:
        """This model with some layers left out, which draws beside it (see `Decoder.without`)."""
        part = super().without(layers, head)
        part._drawn = torch.zeros_like(self._drawn)
        return part

    def allocate(self, num_blocks: int) -> None:
        """Make the cache; steps captured on an earlier one are dropped."""
        self._graphs = {}
        self._most_blocks = min(num_blocks, -(-self.max_context // self.block_size))
        super().allocate(num_blocks)

    @torch.inference_mode()
    def capture(self, most_sequences: int) -> None:
        """Capture decode steps of up to `most_sequences`, with and without filters on the draws."""
        most = next((size for size in GRAPH_SIZES if size >= most_sequences), GRAPH_SIZES[-1])
        sizes = [size for size in reversed(GRAPH_SIZES) if size <= most]  # the largest memory first
        kinds = [(size, filtered) for size in sizes for filtered in (False, True)]
        on_gpu = self._device.type == "cuda"
        with self._on_device():
            pool = torch.cuda.graph_pool_handle() if on_gpu else None
            for size, filtered in track(kinds, "Capturing CUDA graphs") if on_gpu else kinds:
                self._graphs[size, filtered] = self._captured(size, filtered, pool)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """The logits of `batch.rows`, float32 [R, V]."""
        with self._on_device():
            return self._logits(batch)[0]

    @torch.inference_mode()
    def launch(self, batch: Batch, draws: Draws) -> Download:
        """Queue a step and its draws."""
        with self._on_device():
            step = self._graph_for(batch, draws)
            if step is not None:
                self._uploads.send(_padded(batch, draws, step.size), step.inputs)
                step.graph.replay()
            else:
                settings = [getattr(draws, name) for name in SETTINGS]
                logits, rows, *sent = self._logits(batch, [draws.rows, *settings])
                if len(rows):
                    self._draw(logits[rows], sent, draws.filtered)
            return Download(self._drawn[: len(draws.rows)])

    def _logits(self, batch: Batch, others: Items[np.ndarray] = ()) -> list[Tensor]:
        """The logits of a step, and `others` on the device, sent in the same copy."""
        starts = batch.starts.numpy()
        tiles = tiles_of(starts, self._shape["heads"], self._shape["kv_heads"])
        arrays = [tensor.numpy() for tensor in vars(batch).values()]
        if tiles is not None:
            others = [*others, tiles]
        sent = self._uploads.send([*arrays, *others])
        fields = dict(zip(vars(batch), sent, strict=False))
        others_sent = sent[len(arrays) :]
        on_device = others_sent.pop() if tiles is not None else None
        count = len(batch.contexts) if tiles is None else len(tiles)
        most_context = int(batch.contexts.max())
        device_batch = DeviceBatch(
            **fields, drawn=self._drawn, tiles=on_device,
            most_new=int(np.diff(starts).max()), splits=self._splits(count, most_context),
        )  # fmt: skip
        return [self._compute(device_batch), *others_sent]

    def _compute(self, batch: DeviceBatch) -> Tensor:
        self._operations.batch = batch
        return self._step(self._operations)

    def _draw(self, logits: Tensor, settings: list[Tensor], filtered: bool) -> None:
        tokens = draw(logits, *settings, filtered=filtered, workspace=self._operations.workspace)
        self._drawn[: len(tokens)] = tokens

    def _splits(self, tiles: int, most_context: int) -> int:
        return splits_of(tiles, self._shape["kv_heads"], most_context, self._processors)

    def _graph_for(self, batch: Batch, draws: Draws) -> _DecodeStep | None:
        """The captured step for a batch in which each sequence has one token and one draw."""
        count = len(batch.contexts)
        if not len(batch.tokens) == len(draws.rows) == len(batch.rows) == count:
            return None
        sizes = [size for size, filtered in self._graphs if size >= count and not filtered]
        return self._graphs[min(sizes), draws.filtered] if sizes else None

    def _captured(self, size: int, filtered: bool, pool: Any) -> _DecodeStep:
        """A decode step of `size` sequences on a buffer of inputs, which hold padding for now."""
        arrays = _padding(size, self._most_blocks)
        inputs = torch.empty(offsets(arrays)[-1], dtype=torch.uint8, device=self._device)
        *fields, tables = self._uploads.send(arrays, inputs)
        tokens, positions, slots, contexts, *settings = fields
        batch = DeviceBatch(
            tokens=tokens, positions=positions, slots=slots, contexts=contexts,
            block_tables=tables.T,
            starts=torch.arange(size + 1, dtype=torch.int32, device=self._device),
            drawn=self._drawn, rows=None, tiles=None, most_new=1,
            splits=self._splits(size, self._most_blocks * self.block_size),
        )  # fmt: skip

        def work() -> None:
            self._draw(self._compute(batch), settings, filtered)

        return _DecodeStep(size, inputs, Graph(work, self._device, pool))

    def _on_device(self) -> AbstractContextManager[Any]:
        """Kernels are launched on the current GPU, and each thread has its own."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def _padding(size: int, blocks: int) -> list[np.ndarray]:
    """The inputs of a decode step in which nobody takes part, in the order of its buffer.

    Tokens, positions, slots, contexts, the settings of `Draws`, and last the block tables, as
    [blocks, size]: a copy ends with the blocks in use.
    """
    return [
        np.zeros(size, np.int64),
        np.zeros(size, np.int64),
        np.full(size, -1, np.int64),
        np.zeros(size, np.int32),
        np.zeros(size, np.float64),
        np.zeros(size, np.float32),
        np.zeros(size, np.int32),
        np.ones(size, np.float32),
        np.zeros(size, np.float32),
        np.zeros((blocks, size), np.int32),
    ]


def _padded(batch: Batch, draws: Draws, size: int) -> list[np.ndarray]:
    """The inputs of a decode step, with padding up to `size` sequences."""
    count, blocks = batch.block_tables.shape
    arrays = _padding(size, blocks)
    given = [batch.tokens, batch.positions, batch.slots, batch.contexts]
    values = [tensor.numpy() for tensor in given] + [getattr(draws, name) for name in SETTINGS]
    for array, value in zip(arrays[:-1], values, strict=True):
        array[:count] = value
    arrays[-1][:, :count] = batch.block_tables.numpy().T
    return arrays


@dataclass(frozen=True)
class _DecodeStep:
    """A captured step and the buffer, uint8, that it reads."""

    size: int
    inputs: Tensor
    graph: Graph
