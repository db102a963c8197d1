"""Blocks of the key-value cache: who uses which, and what full blocks hold for other requests.

At any time `total = free + cached + in use`.  A block is in use while a block table names it, as
often as its reference count says.  A full block can be *published*: found by later requests under
what it holds.  A published block that nobody uses is cached, and is reused least recently used
first when no free block is left.

A sequence has a table for each group of layers (compress.runtime.cache_layout), all of one length;
NONE stands in a table where a block was given back, since no token to come sees it.

**Verified, not trusted.**  What blocks hold is a *run*: some tokens, after another run.  It is
found under the pair (identity of the run before it, its tokens): by hash, then by comparing all of
the pair.  Identities are numbers given out once, not block numbers, which come back with other
contents.  So a prefix is equal from its first token on or it is no hit, whatever the hashes are.  A
run lives as long as a block holds it, or a run after it, or a sequence goes on from it; so behind a
window, where the blocks of the first runs are long gone, the later ones are still found.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from weakref import WeakValueDictionary

from compress.runtime.cache_layout import CacheLayout

NONE = -1  # no block

Key = tuple[int, bytes]  # (identity of the run before, the tokens' bytes)


class Run:
    """What was computed for `block_size` tokens after all that come before them.

    blocks  of each group of layers: the block that others may find it in, or NONE
    """

    __slots__ = ("__weakref__", "before", "blocks", "identity", "key")

    def __init__(self, identity: int, before: Run | None, key: Key | None, groups: int) -> None:
        self.identity = identity
        self.before = before
        self.key = key
        self.blocks = [NONE] * groups

    def chain(self) -> Iterator[Run]:
        """This run and all before it, last first."""
        run: Run | None = self
        while run is not None:
            yield run
            run = run.before


class BlockPool:
    """Accounts for `num_blocks` blocks of the layout's tokens and layers; holds no tensors."""

    def __init__(self, num_blocks: int, layout: CacheLayout, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.layout = layout
        self.block_size = layout.block_size
        self.prefix_caching = prefix_caching
        self.groups = len(layout.windows)
        self.root = Run(0, None, None, self.groups)  # what comes before a sequence's first block
        self._users = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # the last is taken first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._published: WeakValueDictionary[Key, Run] = WeakValueDictionary()
        self._holds: list[tuple[Run, int] | None] = [None] * num_blocks  # published: what, group
        self._next_identity = 1

    @property
    def free(self) -> int:
        """Blocks that hold nothing of worth."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Published blocks that nobody uses."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    @property
    def in_use(self) -> int:
        """Blocks that some block table names."""
        return self.num_blocks - self.available

    def allocate(self) -> int:
        """Return a block with one user.  There must be one available."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._withdraw(block)
        self._users[block] = 1
        return block

    def share(self, table: Iterable[int]) -> None:
        """Add a user to each block of a table."""
        for block in table:
            if block == NONE:
                continue
            if not self._users[block]:
                del self._cached[block]
            self._users[block] += 1

    def release_all(self, tables: list[array[int]]) -> None:
        """Take a user from each block of a sequence, whose tables have one length."""
        for blocks in reversed(list(zip(*tables, strict=True))):
            self.release(blocks)

    def release(self, table: Sequence[int]) -> None:
        """Take a user from each block of a table.

        The last goes first, so that a prefix outlives what was built upon it.
        """
        for block in reversed(table):
            if block == NONE:
                continue
            self._users[block] -= 1
            if self._users[block]:
                continue
            if self._holds[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def is_shared(self, block: int) -> bool:
        """Whether writing to the block would change what another user reads."""
        return self._users[block] > 1

    def idle(self, tables: Iterable[array[int]]) -> int:
        """How many blocks are cached, so that using them takes them from those available."""
        users = self._users
        return sum(block != NONE and not users[block] for table in tables for block in table)

    def match(self, tokens: array[int]) -> tuple[list[array[int]], Run]:
        """Return the published blocks that `tokens` (int64) begin with, and the last run.

        A table for each group, all of one length, with blocks for all that a token after them
        sees.  At least one token is left over, since something must be computed to go on from.
        The blocks are not the caller's before `share`.
        """
        runs, size = [self.root], self.block_size
        first_present = [0] * self.groups  # of the unbroken row of blocks up to the last run
        length, firsts = 0, first_present[:]
        for start in range(0, len(tokens) - size, size):
            run = self._published.get(self.key(runs[-1].identity, tokens, start))
            if run is None:
                break
            runs.append(run)
            for group, block in enumerate(run.blocks):
                if block == NONE:
                    first_present[group] = len(runs) - 1
            seen = self._first_seen((len(runs) - 1) * size)
            if all(have <= need for have, need in zip(first_present, seen, strict=True)):
                length, firsts = len(runs) - 1, seen
        tables = [
            array("i", [NONE] * first + [run.blocks[group] for run in runs[1 + first : 1 + length]])
            for group, first in enumerate(firsts)
        ]
        return tables, runs[length]

    def publish(self, blocks: list[int], before: Run, tokens: array[int], start: int) -> Run:
        """Offer full blocks in use, which hold `tokens[start:start + block_size]`, to others.

        `blocks` are one for each group, or NONE.  Return the run after which the next one is
        published.  Where another block holds it already, this one stays its user's own.
        """
        if not self.prefix_caching:
            return self.root
        key = self.key(before.identity, tokens, start)
        run = self._published.get(key)
        if run is None:
            run = Run(self._next_identity, before, key, self.groups)
            self._published[key] = run
            self._next_identity += 1
        for group, block in enumerate(blocks):
            if block != NONE and run.blocks[group] == NONE and self._holds[block] is None:
                run.blocks[group] = block
                self._holds[block] = (run, group)
        return run

    def clear(self) -> None:
        """Forget what cached blocks hold."""
        for block in self._cached:
            self._withdraw(block)
        self._free.extend(self._cached)
        self._cached.clear()

    def withdraw(self, run: Run) -> None:
        """Offer a run and all before it to other requests no longer, whoever holds them.

        What was built upon them can be found no more, since nothing leads to it.
        """
        for one in run.chain():
            if one.key is not None:
                self._published.pop(one.key, None)
            for block in one.blocks:
                if block == NONE:
                    continue
                self._withdraw(block)
                if block in self._cached:
                    del self._cached[block]
                    self._free.append(block)

    def key(self, before: int, tokens: array[int], start: int) -> Key:
        """What the run of `tokens[start:start + block_size]` is published under."""
        return before, tokens[start : start + self.block_size].tobytes()

    def check(self, tables: Iterable[array[int]]) -> None:
        """Recompute every count from all block tables; AssertionError where one is wrong."""
        users = Counter(block for table in tables for block in table if block != NONE)
        free, cached = set(self._free), set(self._cached)
        published = {block for block in range(self.num_blocks) if self._holds[block] is not None}
        found = {
            (block, group): run
            for run in self._published.values()
            for group, block in enumerate(run.blocks)
            if block != NONE
        }
        assert self._users == [users[block] for block in range(self.num_blocks)], "lost a user"
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "free and cached"
        assert not (free | cached) & users.keys(), "free or cached, but in use"
        assert len(free) + len(cached) + len(users) == self.num_blocks, "lost a block"
        assert cached <= published, "cached, but cannot be found"
        assert not free & published, "free, but can be found"
        assert published == {block for block, _ in found}, "published under no key"
        assert len(found) == len(published), "a block is published twice"
        assert all(self._holds[block] == (run, group) for (block, group), run in found.items())
        assert all(run.key == key for key, run in self._published.items())
        assert self.in_use == len(users), "miscounted"

    def _first_seen(self, computed: int) -> list[int]:
        """Of each group: the first block that token number `computed` sees."""
        return [
            0 if window is None else self.layout.first_seen(window, computed)
            for window in self.layout.windows
        ]

    def _withdraw(self, block: int) -> None:
        """Let the block be found no longer."""
        held = self._holds[block]
        assert held is not None
        run, group = held
        run.blocks[group] = NONE
        self._holds[block] = None
