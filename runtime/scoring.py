"""Scoring given sequences: how likely is each token, after all that come before it?

No scheduler: all sequences are known, and each token is read once.  They are packed into flat
batches one after another, a long one over several batches.  A sequence that begins as the one
before it does takes over its whole blocks of that beginning, in the same batch too, since a layer
writes the keys and values of all tokens before any of them attends.  So the answers of a
multiple-choice question cost one question.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.runtime.batch import Model
from compress.runtime.batch_builder import build_batch
from compress.runtime.block_pool import BlockPool
from compress.runtime.surplus import say_surplus

MOST_TOKENS = 512  # of one batch
MOST_SEQUENCES = 64  # in one batch: each may waste most of a block
LOGIT_BYTES = 1 << 27  # of one batch: 682 rows of a vocabulary of 49,152


@dataclass(frozen=True)
class Span:
    """A sequence whose tokens from `first` on are predicted, each from all tokens before it."""

    tokens: np.ndarray  # int64 [n]
    first: int  # 1 <= first < n


@dataclass(frozen=True)
class Piece:
    """Predictions for the tokens `first`, `first + 1`, ... of the span with number `index`."""

    index: int
    first: int
    logits: Tensor  # [r, V], float32 from the runtime


@dataclass(frozen=True)
class Scores:
    """Of a span's predicted tokens."""

    log_probabilities: np.ndarray  # float32 [n - first]
    likeliest: np.ndarray  # bool [n - first], whether the model puts this token first


def score(
    model: Model, spans: Items[Span], most_tokens: int = MOST_TOKENS
) -> Iterator[tuple[int, Scores]]:
    """Yield (number of a span, its scores), spans that begin alike one after another."""
    order = sorted(range(len(spans)), key=lambda index: spans[index].tokens.tolist())
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    done = 0
    for piece in logits(model, [spans[index] for index in order], most_tokens):
        span = spans[order[piece.index]]
        end = piece.first + len(piece.logits)
        targets = torch.from_numpy(span.tokens[piece.first : end]).to(piece.logits.device)
        chosen = piece.logits.gather(1, targets[:, None])[:, 0]
        parts.append(
            (
                (chosen - piece.logits.logsumexp(dim=1)).cpu().numpy(),
                (piece.logits.argmax(dim=1) == targets).cpu().numpy(),
            )
        )
        if end == len(span.tokens):
            log_probabilities, likeliest = zip(*parts, strict=True)
            yield order[done], Scores(np.concatenate(log_probabilities), np.concatenate(likeliest))
            parts, done = [], done + 1


def logits(model: Model, spans: Items[Span], most_tokens: int = MOST_TOKENS) -> Iterator[Piece]:
    """Yield the logits of all predicted tokens, spans in their order and each from its start on.

    The model's cache is made anew.  Of two models with one vocabulary the pieces are cut alike.
    """
    size = model.block_size
    longest = max((len(span.tokens) for span in spans), default=0)
    blocks = -(-longest // size) + -(-most_tokens // size) + MOST_SEQUENCES
    num_blocks = blocks * len(model.layout.windows)
    model.allocate(num_blocks)
    pool = BlockPool(num_blocks, model.layout, prefix_caching=False)
    most_rows = max(1, LOGIT_BYTES // (4 * model.vocab_size))
    for step in _steps(spans, pool, most_tokens, most_rows):
        rows = model.forward(build_batch(step, size))
        for reading in step:
            wanted = reading.rows()
            if wanted:
                yield Piece(reading.index, wanted.start + 1, rows[: len(wanted)])
                rows = rows[len(wanted) :]
    say_surplus(model)


class _Reading:
    """A span on its way through the model, as `build_batch` wants it; the last token is not read.

    It takes over the blocks in which it equals `before`, as far as none of their rows is wanted.
    """

    def __init__(self, index: int, span: Span, before: _Reading | None, pool: BlockPool) -> None:
        self.index = index
        self.tokens = span.tokens[:-1]
        self.first_row = span.first - 1
        self.count = 0  # tokens in the step under way
        self.tables = [array("i") for _ in range(pool.groups)]
        if before is not None:
            same = _common_prefix(before.tokens, self.tokens[: self.first_row])
            self.tables = [table[: same // pool.block_size] for table in before.tables]
            for table in self.tables:
                pool.share(table)
        self.computed = len(self.tables[0]) * pool.block_size

    @property
    def remaining(self) -> int:
        """Tokens not yet read."""
        return len(self.tokens) - self.computed

    def rows(self) -> range:
        """Positions of this step whose logits are wanted."""
        end = self.computed + self.count
        return range(max(self.computed, self.first_row), end)

    def more_rows(self) -> range:
        """The same without the last token's, which `build_batch` adds itself."""
        wanted = self.rows()
        return range(wanted.start, min(wanted.stop, len(self.tokens) - 1))

    def plan(self, most_tokens: int, most_rows: int, pool: BlockPool) -> None:
        """Settle how many tokens the next step reads, and have blocks for them."""
        silent = max(0, self.first_row - self.computed)
        self.count = min(self.remaining, most_tokens, silent + most_rows)
        needed = -(-(self.computed + self.count) // pool.block_size)
        for table in self.tables:
            while len(table) < needed:
                table.append(pool.allocate())


def _steps(
    spans: Items[Span], pool: BlockPool, most_tokens: int, most_rows: int
) -> Iterator[list[_Reading]]:
    """Yield which spans a batch reads, and how much of each.

    The last of a batch keeps its blocks: it goes on in the next, or the next begins as it did.
    """
    waiting = iter(enumerate(spans))
    last: _Reading | None = None
    while True:
        step, before, tokens, rows = [], last, most_tokens, most_rows
        while tokens and rows and len(step) < MOST_SEQUENCES:
            if last is None or last.count == last.remaining:
                entry = next(waiting, None)
                if entry is None:
                    break
                last = _Reading(*entry, last, pool)
            last.plan(tokens, rows, pool)
            step.append(last)
            tokens -= last.count
            rows -= len(last.rows())
        if not step:
            return
        yield step
        for reading in step:
            reading.computed += reading.count
            reading.count = 0
        for reading in dict.fromkeys([before, *step]):
            if reading is not None and reading is not last:
                pool.release_all(reading.tables)


def _common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(first), len(second))
    differ = first[:length] != second[:length]
    return int(differ.argmax()) if differ.any() else length
