"""A model of a dozen tokens whose logits depend on the whole output, and a grammar for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.runtime.batch import Batch
from compress.runtime.cache_layout import CacheLayout

from .distribution import LENGTH, Outcome, Rule

PROMPT = [1, 3]
FIRST = 0  # the output's first token, which is certain; those after it are speculated
BEGIN = len(PROMPT) + 1  # the position after it
BLOCK = 4  # so that some of what is drafted goes into a new block


def tables(vocab: int, seed: int, spread: float = 1.5) -> list[np.ndarray]:
    """Random logits after FIRST and 0, 1, 2, 3 tokens more: float32 [V] * tokens + [V]."""
    source = np.random.default_rng([seed, vocab])
    return [
        source.normal(0, spread, (vocab,) * (length + 1)).astype(np.float32)
        for length in range(LENGTH + 1)
    ]


class TinyModel:
    """Keeps tokens in its cache where others keep keys and values, and reads prefixes from it."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.vocab_size, self.max_context, self.block_size = vocab, 64, BLOCK
        self.layout = CacheLayout.of([None], BLOCK)
        self.bytes_per_block = 8 * BLOCK
        self.use(tables(vocab, seed))
        self._places = vocab ** np.arange(LENGTH)[::-1]
        self._certain = np.zeros(vocab, np.float32)
        self._certain[FIRST] = 300  # beyond what any penalty or filter could make up for

    def use(self, logits: list[np.ndarray]) -> None:
        """Let these be the logits after FIRST and 0, 1, 2, 3 tokens more."""
        self.tables = logits
        flat = [table.reshape(-1, self.vocab_size) for table in logits]
        self._rows = np.concatenate(flat)
        self._begins = np.cumsum([0, *(len(table) for table in flat)])

    def logits_of(self, known: Outcome) -> np.ndarray:
        """float32 [V] after FIRST and `known`."""
        return self.tables[len(known)][known]

    def allocate(self, num_blocks: int) -> None:
        self._cache = np.full((num_blocks, BLOCK), -1)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs:
            self._cache[target] = self._cache[source]

    def forward(self, batch: Batch) -> Tensor:
        self._cache.reshape(-1)[batch.slots[0].numpy()] = batch.tokens.numpy()
        rows = batch.rows.numpy()
        lengths = batch.positions.numpy()[rows] + 1 - BEGIN  # tokens after FIRST
        places = batch.starts.numpy().searchsorted(rows, side="right") - 1
        read = self._cache[batch.block_tables[0].numpy()[places]].reshape(len(rows), -1)
        read = np.pad(read, ((0, 0), (0, BEGIN + LENGTH)))[:, BEGIN : BEGIN + LENGTH]
        out = np.empty((len(rows), self.vocab_size), np.float32)
        out[lengths < 0] = self._certain
        for length in range(LENGTH + 1):
            chosen = lengths == length
            codes = read[chosen, :length] @ self._places[LENGTH - length :]
            out[chosen] = self._rows[self._begins[length] + codes]
        return torch.from_numpy(out)


class TinyMatcher:
    """A grammar: what a rule lets follow an output (compress.runtime.grammar.Matcher)."""

    def __init__(self, rule: Rule, vocab: int, output: Outcome = ()) -> None:
        self._rule, self._vocab = rule, vocab
        self._go_to(output)

    def _go_to(self, output: Outcome) -> None:
        self._output = output
        self.allowed = np.zeros(self._vocab, bool)
        self.allowed[self._rule(output)] = True
        self.may_end = self.complete = not self.allowed.any()

    def copy(self) -> TinyMatcher:
        return TinyMatcher(self._rule, self._vocab, self._output)

    def accept(self, token: int) -> None:
        assert self.allowed[token], "the grammar was given a token that it forbids"
        self._go_to((*self._output, token))
