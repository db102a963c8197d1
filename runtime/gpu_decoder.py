"""The decoder on a GPU: steps of decodes as CUDA graphs, all others launch by launch.

A step in which every sequence computes one token, or a few to verify a draft, is padded to one of a
few sizes, and for each of these the whole step, drawing included, is one CUDA graph
(compress.runtime.captured).  A graph reads its inputs from one buffer, which one copy fills.
Prompts and what the host draws go launch by launch.  Draws stay on the device for the next launch
to read (a negative token, see compress.runtime.batch), and come back in one copy, the only one that
anybody waits for.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from compress.core.progress import track
from compress.kernels.latent_attention.shapes import head_blocks
from compress.kernels.launched import DeviceBatch, Launched
from compress.kernels.lowbit_matmul import LinearWeight
from compress.kernels.paged_attention.cache import Codes
from compress.kernels.paged_attention.plan import splits_of, tiles_of
from compress.kernels.sampling.triton import draw
from compress.runtime.batch import Batch, Draws
from compress.runtime.captured import (
    MOST_TOKENS,
    SETTINGS,
    CapturedStep,
    Size,
    draws_at,
    padded,
    padding,
    sizes_for,
)
from compress.runtime.decoder import Decoder
from compress.runtime.device_queue import Download, Graph, Uploads, offsets
from compress.runtime.weights import DecoderWeights

INTERPRETER_PROCESSORS = 4  # so that attention is split in tests


class GpuDecoder(Decoder):
    """A model on a GPU that draws its tokens itself (compress.runtime.batch.AsynchronousModel).

    `most_tokens` is the size of the largest batch that it will be given.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        device: torch.device,
        dtype: torch.dtype,
        most_tokens: int,
        codes: Codes | None = None,
    ) -> None:
        super().__init__(weights, Launched(dtype, device, codes), device)
        # what the heads of a token are shared out to: programs of attention
        self._head_groups = self._shape["kv_heads"]
        if self._latent is not None:
            self._head_groups = head_blocks(self._latent.heads, self._latent.rank)
        self._uploads = Uploads(device)
        self._drawn = torch.zeros(max(most_tokens, MOST_TOKENS), dtype=torch.int64, device=device)
        self._captured: dict[tuple[Size, bool], CapturedStep] = {}  # by size, and whether filtered
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
        self._captured = {}
        most_tokens = self.layout.most_tokens(num_blocks, self.max_context)
        self._most_blocks = -(-most_tokens // self.block_size)
        super().allocate(num_blocks)

    @torch.inference_mode()
    def capture(self, most_sequences: int, lookahead: int = 0) -> None:
        """Capture decode steps of up to `most_sequences`, with and without filters on the draws.

        With a `lookahead`, also steps in which each has up to so many tokens besides its own.
        """
        sizes = sizes_for(most_sequences, lookahead)[::-1]  # the largest memory first
        kinds = [(size, filtered) for size in sizes for filtered in (False, True)]
        on_gpu = self._device.type == "cuda"
        with self._on_device():
            pool = torch.cuda.graph_pool_handle() if on_gpu else None
            for size, filtered in track(kinds, "Capturing CUDA graphs") if on_gpu else kinds:
                self._captured[size, filtered] = self._capture(size, filtered, pool)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """The logits of `batch.rows`, float32 [R, V]."""
        with self._on_device():
            return self._logits(batch)[0]

    @torch.inference_mode()
    def launch(self, batch: Batch, draws: Draws) -> Download:
        """Queue a step and its draws."""
        with self._on_device():
            places = draws_at(batch, draws)
            step = None if places is None else self._step_for(batch, draws.filtered)
            if step is not None and places is not None:
                self._uploads.send(padded(batch, draws, places, step.size), step.inputs)
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
        tiles = tiles_of(starts, self._shape["heads"], self._head_groups)
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

    def _draw(
        self, logits: Tensor, settings: list[Tensor], filtered: bool, order: Tensor | None = None
    ) -> None:
        """Draw from every row; `order` are the rows whose draws are kept, and where."""
        tokens = draw(logits, *settings, filtered=filtered, workspace=self._operations.workspace)
        self._drawn[: len(tokens)] = tokens if order is None else tokens[order]

    def _splits(self, tiles: int, most_context: int) -> int:
        return splits_of(tiles, self._head_groups, most_context, self._processors)

    def _step_for(self, batch: Batch, filtered: bool) -> CapturedStep | None:
        """The smallest captured step that has room for a batch."""
        sequences, tokens = len(batch.contexts), len(batch.tokens)
        if not self._captured or tokens > MOST_TOKENS:
            return None
        most_new = int(np.diff(batch.starts.numpy()).max())
        roomy = [
            size
            for size, _ in self._captured
            if size.sequences >= sequences and size.tokens >= tokens and size.most_new >= most_new
        ]
        return self._captured[min(roomy), filtered] if roomy else None

    def _capture(self, size: Size, filtered: bool, pool: Any) -> CapturedStep:
        """A step on a buffer of inputs, which hold padding for now."""
        arrays = padding(size, self._most_blocks, len(self.layout.windows))
        inputs = torch.empty(offsets(arrays)[-1], dtype=torch.uint8, device=self._device)
        sent = self._uploads.send(arrays, inputs)
        tokens, positions, slots, order, *settings, contexts, starts, tables = sent
        batch = DeviceBatch(
            tokens=tokens, positions=positions, slots=slots, starts=starts, contexts=contexts,
            block_tables=tables.permute(1, 2, 0), drawn=self._drawn, rows=None, tiles=None,
            most_new=size.most_new,
            splits=self._splits(size.sequences, self._most_blocks * self.block_size),
        )  # fmt: skip

        def work() -> None:
            self._draw(self._compute(batch), settings, filtered, order)

        return CapturedStep(size, inputs, Graph(work, self._device, pool))

    def _on_device(self) -> AbstractContextManager[Any]:
        """Kernels are launched on the current GPU, and each thread has its own."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
