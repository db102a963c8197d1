"""Which tokens the next step computes: continuous batching with chunked prefill.

Every step, in this order, under one budget of tokens:

1. each running sequence that decodes gets its one token, so a long prompt holds nobody up;
2. and room for tokens that are proposed to it, as far as there are blocks to spare;
3. a prompt that was begun goes on;
4. waiting sequences are admitted in order of arrival, if the cache has room for what they bring;
   the last may get a part of its prompt, so only the youngest running sequence is ever in parts.

When a sequence that decodes finds no block, the youngest running sequence is preempted: it gives
up its blocks, keeps its tokens, waits at the head of the queue, and is computed again later.
Every waiting sequence is younger than every running one.
"""

from __future__ import annotations

import time
from array import array
from bisect import insort
from collections import deque
from collections.abc import Callable

from compress.core.errors import InputError
from compress.runtime.block_pool import NONE, BlockPool
from compress.runtime.sequence import Sequence

# Of the sequences that decode, and about how many tokens of prompts are to come in the same step:
# how many tokens each wants proposed.
Lookahead = Callable[[list[Sequence], int], list[int]]


class Scheduler:
    """Holds all unfinished sequences; hands out the blocks of `pool`."""

    def __init__(self, pool: BlockPool, max_tokens_per_step: int, max_sequences: int) -> None:
        if not 1 <= max_sequences <= max_tokens_per_step:
            raise InputError(
                f"max_sequences = {max_sequences} with max_tokens_per_step = {max_tokens_per_step};"
                " allowed is 1 or more, and no more sequences than tokens in a step"
            )
        self.pool = pool
        self.max_tokens_per_step = max_tokens_per_step
        self.max_sequences = max_sequences
        self.running: list[Sequence] = []  # oldest first
        self.waiting: deque[Sequence] = deque()  # oldest first
        self.copies: list[tuple[int, int]] = []  # blocks to copy before the step, in order
        self.preemptions = 0
        self.on_evict: Callable[[Sequence], None] | None = None  # told who left the cache
        self._refused: tuple[Sequence, int] | None = None  # who found no room, in how many blocks

    def schedule(self, lookahead: Lookahead | None = None) -> list[Sequence]:
        """Return the sequences of the next step, each with `count` set to its new tokens.

        A sequence's own `lookahead` is how many tokens may be proposed for it besides.
        """
        self.copies = []
        step = self._decodes()
        budget = self.max_tokens_per_step - len(step)
        if lookahead and step and budget:
            budget -= self._look_ahead(step, lookahead, budget)
        if self.running and not self.running[-1].count:
            budget = self._go_on(self.running[-1], step, budget)
        if self.waiting and budget:
            self._admissions(step, budget)
        return step

    def fork(self, sequence: Sequence, sibling: Sequence) -> None:
        """Let `sibling` run, on the blocks of `sequence`."""
        sibling.share_cache(sequence, self.pool)
        insort(self.running, sibling, key=lambda other: other.order)

    def trim(self, sequence: Sequence) -> None:
        """Release blocks that nothing known is in: room for tokens that were not accepted."""
        kept = -(-sequence.computed // self.pool.block_size)
        if kept < sequence.length:
            for table in sequence.tables:
                self.pool.release(table[kept:])
                del table[kept:]

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence that has ended, and release its blocks."""
        (self.running if sequence.tables else self.waiting).remove(sequence)
        self._evict(sequence)

    def reset(self) -> None:
        """Drop every sequence, and what is cached: a step that failed may not have filled it."""
        for sequence in self.running:
            self._evict(sequence)
        self.running.clear()
        self.waiting.clear()
        self.pool.clear()

    def _decodes(self) -> list[Sequence]:
        """One token for each sequence that needs just one; makes room by preemption."""
        step, at = [], 0
        while at < len(self.running):
            sequence = self.running[at]
            at += 1
            if sequence.remaining != 1:
                continue
            while self._missing(sequence, 1) > self.pool.available:
                if self._preempt_youngest() is sequence:
                    break
            else:
                self._add(sequence, 1, step)
        return step

    def _look_ahead(self, step: list[Sequence], lookahead: Lookahead, budget: int) -> int:
        """Room for proposed tokens; returns how many.  Nobody gives up blocks for them.

        Prompts get at least half of what the decodes left, and their blocks.
        """
        prompts, kept = self._prompts_to_come(budget)
        budget -= min(prompts, budget // 2)
        left = budget
        for sequence, wanted in zip(step, lookahead(step, prompts), strict=True):
            wanted = min(wanted, left)
            while wanted and self._missing(sequence, 1 + wanted) > self.pool.available - kept:
                wanted -= 1
            if wanted:
                self._grow(sequence, 1 + wanted)
            sequence.lookahead = wanted
            left -= wanted
        return budget - left

    def _prompts_to_come(self, budget: int) -> tuple[int, int]:
        """About how many tokens of prompts will be in the step, and the blocks to keep for them.

        One that waits needs all of its blocks at once, or it is not admitted; what of them is in
        the prefix cache is not looked up.
        """
        pool, last = self.pool, self.running[-1]
        tokens = 0 if last.count else min(budget, last.remaining)
        blocks = -(-tokens // pool.block_size) * pool.groups
        if self.waiting:
            first = self.waiting[0]
            seats = first.seats + sum(sequence.seats for sequence in self.running)
            needed = pool.layout.blocks_for(len(first.tokens))
            if seats <= self.max_sequences and blocks + needed <= pool.available:
                tokens, blocks = tokens + first.remaining, blocks + needed
        return min(tokens, budget), blocks

    def _go_on(self, sequence: Sequence, step: list[Sequence], budget: int) -> int:
        """The next chunk of what was begun, as far as there is room; returns the budget left."""
        count = min(budget, sequence.remaining, self._room(sequence))
        if count:
            self._add(sequence, count, step)
        return budget - count

    def _admissions(self, step: list[Sequence], budget: int) -> None:
        """First chunks for waiting sequences, as long as all of their tokens find room."""
        seats = sum(sequence.seats for sequence in self.running)
        while self.waiting and budget:
            sequence = self.waiting[0]
            seats += sequence.seats
            if seats > self.max_sequences or not self._find_room(sequence):
                return
            self.running.append(self.waiting.popleft())
            count = min(budget, sequence.remaining, self._room(sequence))
            self._add(sequence, count, step)
            budget -= count

    def _room(self, sequence: Sequence) -> int:
        """Tokens that there are blocks for, beyond those in the cache."""
        blocks = sequence.length + self.pool.available // self.pool.groups
        return blocks * self.pool.block_size - sequence.computed

    def _find_room(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its cached prefix, if its other tokens will find room too.

        After a refusal the prefix is looked up again only once there are more blocks available,
        since that takes time with its length.
        """
        pool = self.pool
        if self._refused and self.running:
            refused, available = self._refused
            if refused is sequence and pool.available <= available:
                return False
        if sequence.request.prompt_logprobs is None:
            tables, run = pool.match(sequence.tokens)
        else:  # wants the logits of every token
            tables, run = [array("i") for _ in range(pool.groups)], pool.root
        held = [len(table) - table.count(NONE) for table in tables]
        needed = pool.layout.needed(len(sequence.tokens))
        missing = sum(max(0, need - have) for need, have in zip(needed, held, strict=True))
        if pool.available - pool.idle(tables) < missing:
            self._refused = (sequence, pool.available)
            return False
        self._refused = None
        sequence.take_over(tables, run, pool)
        if sequence.request.started is None:
            sequence.request.started = time.monotonic()
            sequence.request.cached_tokens = sequence.computed
        return True

    def _add(self, sequence: Sequence, count: int, step: list[Sequence]) -> None:
        """Take the sequence's next tokens into the step; there must be room."""
        if self._missing(sequence, count):
            self._grow(sequence, count)
        sequence.count, sequence.lookahead = count, 0
        step.append(sequence)

    def _missing(self, sequence: Sequence, count: int) -> int:
        """Blocks to allocate before `count` more tokens can be written."""
        pool, length = self.pool, sequence.length
        first = sequence.computed // pool.block_size
        missing = -(-(sequence.computed + count) // pool.block_size) - length
        missing = max(0, missing) * pool.groups
        if first < length:
            missing += sum(pool.is_shared(table[first]) for table in sequence.tables)
        return missing

    def _grow(self, sequence: Sequence, count: int) -> None:
        """Allocate what `_missing` counts; a shared block that will be written is copied."""
        pool = self.pool
        first = sequence.computed // pool.block_size
        for table in sequence.tables:
            if first < len(table) and pool.is_shared(table[first]):
                target = pool.allocate()
                self.copies.append((table[first], target))
                pool.release(table[first : first + 1])
                table[first] = target
            while len(table) * pool.block_size < sequence.computed + count:
                table.append(pool.allocate())

    def _preempt_youngest(self) -> Sequence:
        sequence = self.running.pop()
        self._evict(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1
        return sequence

    def _evict(self, sequence: Sequence) -> None:
        self.pool.release_all(sequence.tables)
        sequence.forget()
        if self.on_evict is not None:
            self.on_evict(sequence)
