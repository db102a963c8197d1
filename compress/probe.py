"""What a rounding of each linear would cost in the model's predictions: one pass back through it.

    embeddings ─> block 0 ─> ... ─> block L-1 ─> head        forward: what enters each block is kept
                                                  │ tokens drawn from the predictions
        block 0 <─ ... <─ block L-1 <─────────────┘          back: gradients, block by block
           │                 └ how sensitive its linears are (quant/sensitivity.py), and with that
           └                   the loss of every grid that they may get

One block is in memory at a time, in float32, and a pass that is broken off goes on after the last
block.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.core.activations import Activations
from compress.core.blocks import BlockModel, call_block, linears_of
from compress.core.commits import Commits, numbered
from compress.core.errors import InputError
from compress.core.progress import track
from compress.core.shards import all_finite
from compress.quant.config import Grid
from compress.quant.sensitivity import LinearSensitivity, watching_gradients

TOKENS = 4096  # half of them rank groups as measured divergences do (benchmarks/LOG.md)
LONGEST = 256  # tokens of a sequence: the more sequences, the more kinds of text
AT_ONCE = 1024  # tokens whose gradients go through a block together
LOGITS = 4  # arrays of logits at once: themselves, log-probabilities, a copy, and gradients


def probed(rows: Tensor) -> Tensor:
    """The part of the calibration sequences, int64 [N, S], that gradients are taken on."""
    length = min(rows.shape[1], LONGEST)
    return rows[: max(1, TOKENS // length), :length]


def probe_bytes(model: BlockModel, samples: int, seq_len: int) -> tuple[int, int]:
    """Memory and disk that a probe takes, about.

    In memory: a block in float32 with the second moment of each of its linears and what a forward
    pass keeps for the backward one, or else what is outside the blocks and logits of a sequence.
    On disk: what enters each block, and gradients before and after one.
    """
    rows = probed(torch.empty(samples, seq_len, device="meta"))
    config, block_bytes = model.config.get_text_config(), 0
    for index in range(model.num_blocks):
        block = model.meta_block(index)
        linears = linears_of(block).values()
        kept = AT_ONCE * sum(linear.in_features + linear.out_features for linear in linears)
        moments = sum(linear.in_features**2 for linear in linears)
        weights = sum(parameter.numel() for parameter in block.parameters())
        block_bytes = max(block_bytes, weights + moments + kept)
    outer = sum(math.prod(model.reader.shapes[name]) for name in model.outer_names())
    outer += LOGITS * rows.shape[1] * config.vocab_size
    disk = rows.numel() * model.state_width * (model.num_blocks + 3)
    return 4 * max(block_bytes, outer), 4 * disk


class Probe:
    """A pass forward and back, committed block by block.

    model    computes in float32
    tokens   int64 [N, S]
    folder   for hidden states and gradients
    """

    def __init__(self, model: BlockModel, tokens: Tensor, commits: Commits, folder: Path) -> None:
        assert model.compute_dtype == torch.float32
        self.model, self.commits, self.folder = model, commits, folder
        self.tokens = tokens.numel()
        self.batches = tokens.split(max(1, AT_ONCE // tokens.shape[1]))
        self.kwargs: list[list[dict[str, Any]]] = []

    def losses(
        self, grids: Mapping[str, Sequence[Grid]], dtype: torch.dtype
    ) -> dict[str, list[float]]:
        """For each linear the loss that each of its grids predicts: nats a token.

        grids  by the linear's full name
        dtype  of scales

        Raises InputError for a linear that no token reaches, and gradients that are not finite.
        """
        count = self.model.num_blocks
        done = len(self.commits.series("probe"))
        if done < count:
            self._run_forward(count - done)
            if done == 0:
                self._turn_back()
        for step in track(range(done, count), "Probing blocks", count, done):
            self.commits.put(numbered("probe", step), self._visit(count - 1 - step, grids, dtype))
            self._remove(count - step)
        for index in range(count + 1):
            self._remove(index)
        found = self.commits.series("probe")
        return {name: losses for block in found for name, losses in block.items()}

    def _stored(self, what: str, index: int) -> Activations:
        """What enters block `index`, or leaves the last one (`inputs`), or its `gradients`."""
        return Activations(self.folder / numbered(f"probe-{what}", index))

    def _remove(self, index: int) -> None:
        for what in ("inputs", "gradients"):
            self._stored(what, index).remove()

    @torch.no_grad()
    def _run_forward(self, stop: int) -> None:
        """Store what enters each block up to `stop`, as far as it is not there."""

        def first_inputs() -> Iterator[Tensor]:
            for states, given in self.model.capture_inputs(self.batches):
                self.kwargs.append(given)
                yield states

        self._store("inputs", 0, first_inputs())
        for index in track(range(stop), "Running blocks"):
            if not self._stored("inputs", index + 1).folder.exists():
                block = self.model.load_block(index)
                pairs = zip(self._stored("inputs", index), self.kwargs, strict=True)
                outputs = (self.model.run_block(block, x, given[index]) for x, given in pairs)
                self._store("inputs", index + 1, outputs)

    def _store(self, what: str, index: int, batches: Iterator[Tensor]) -> None:
        Activations.store(self._stored(what, index).folder, batches, 0)

    def _turn_back(self) -> None:
        """Store the gradient of what leaves the last block, for tokens drawn from the predictions.

        Drawn, not read from the text: then the mean of squared gradients estimates the Fisher
        information.
        """
        last, device = self.model.num_blocks, self.model.device
        generator = torch.Generator(device).manual_seed(0)

        def gradient(states: Tensor) -> Tensor:
            states = states.to(device).requires_grad_()
            predicted = predict(states).float().log_softmax(dim=-1)
            drawn = torch.multinomial(predicted[0].detach().exp(), 1, generator=generator)
            return torch.autograd.grad(predicted[0].gather(1, drawn).sum(), states)[0].cpu()

        def gradients() -> Iterator[Tensor]:  # logits of one sequence at a time
            for batch in self._stored("inputs", last):
                yield torch.cat([gradient(states) for states in batch.split(1)])

        with torch.enable_grad(), self.model.predicting() as predict:
            self._store("gradients", last, gradients())

    def _visit(
        self, index: int, grids: Mapping[str, Sequence[Grid]], dtype: torch.dtype
    ) -> dict[str, list[float]]:
        """Take gradients back through a block; returns the losses of its linears' grids."""
        block, device = self.model.load_block(index), self.model.device

        def back(states: Tensor, gradient: Tensor, given: dict[str, Any]) -> Tensor:
            states = states.to(device).requires_grad_()
            output = call_block(block, states, given)
            return torch.autograd.grad(output, states, gradient.to(device))[0].cpu()

        inputs, gradients = self._stored("inputs", index), self._stored("gradients", index + 1)
        each = zip(inputs, gradients, self.kwargs, strict=True)
        with torch.enable_grad(), watching_gradients(block) as found:
            self._store("gradients", index, (back(x, g, given[index]) for x, g, given in each))
        losses = {}
        for short, linear in linears_of(block).items():
            name = f"{self.model.block_name(index)}.{short}"
            if name in grids:
                _check(name, found[short])
                weight = linear.weight.data
                losses[name] = found[short].increases(weight, grids[name], dtype, self.tokens)
        return losses


def _check(name: str, sensitivity: LinearSensitivity) -> None:
    """Raise InputError where nothing, or nothing finite, is known of a linear."""
    if not sensitivity.tokens:
        raise InputError(
            f"no token of the calibration text reaches {name}, so what its rounding loses cannot "
            "be foretold; leave it in float (ignore), or give other text (--calibration)"
        )
    if not (all_finite(sensitivity.shares) and all_finite(sensitivity.second_moment)):
        raise InputError(
            f"the gradients at {name} are NaN or infinite, in float32: the model is broken"
        )
