"""Blocks of the key-value cache: who uses which, and what full blocks hold for other requests.

At any time `total = free + cached + in use`.  A block is in use while a block table names it, as
often as its reference count says.  A full block can be *published*: found by later requests under
what it holds.  A published block that nobody uses is cached, and is reused least recently used
first when no free block is left.

**Verified, not trusted.**  A block is published under the pair (identity of the block before it,
its tokens), and a dictionary finds it: by hash, then by comparing all of the pair.  Identities
are numbers given out once, not block numbers, which come back with other contents.  So a prefix is
equal from its first token on or it is no hit, whatever the hashes are.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

ROOT = 0  # identity of what comes before a sequence's first block

Key = tuple[int, bytes]  # (identity of the block before, the tokens' bytes)


class BlockPool:
    """Accounts for `num_blocks` blocks of `block_size` tokens; holds no tensors."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._users = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # the last is taken first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._published: dict[Key, int] = {}
        self._keys: list[Key | None] = [None] * num_blocks  # of published blocks
        self._identities = [ROOT] * num_blocks  # of published blocks
        self._next_identity = ROOT + 1

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

    def share(self, blocks: Iterable[int]) -> None:
        """Add a user to each block."""
        for block in blocks:
            if not self._users[block]:
                del self._cached[block]
            self._users[block] += 1

    def release(self, blocks: array[int]) -> None:
        """Take a user from each block of a table.

        The last goes first, so that a prefix outlives what was built upon it.
        """
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def is_shared(self, block: int) -> bool:
        """Whether writing to the block would change what another user reads."""
        return self._users[block] > 1

    def is_idle(self, block: int) -> bool:
        """Whether the block is cached, so that using it takes it from those available."""
        return not self._users[block]

    def match(self, tokens: array[int]) -> tuple[array[int], int]:
        """Return the published blocks that `tokens` (int64) begin with, and the last's identity.

        At least one token is left over, since something must be computed to go on from.  The
        blocks are not the caller's before `share`.
        """
        blocks, identity = array("i"), ROOT
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            block = self._published.get(self.key(identity, tokens, start))
            if block is None:
                break
            blocks.append(block)
            identity = self._identities[block]
        return blocks, identity

    def publish(self, block: int, before: int, tokens: array[int], start: int) -> int:
        """Offer a full block in use, with `tokens[start:start + block_size]`, to other requests.

        Return the identity under which the next block is published: an equal block's, if there
        is one already; this one then stays its user's own.
        """
        if not self.prefix_caching:
            return ROOT
        key = self.key(before, tokens, start)
        present = self._published.get(key)
        if present is not None:
            return self._identities[present]
        self._published[key] = block
        self._keys[block] = key
        self._identities[block] = self._next_identity
        self._next_identity += 1
        return self._identities[block]

    def clear(self) -> None:
        """Forget what cached blocks hold."""
        for block in self._cached:
            self._withdraw(block)
        self._free.extend(self._cached)
        self._cached.clear()

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Offer these blocks in use to other requests no longer; what was built upon them neither.

        Blocks that come after them can be found no more, since none leads to them.
        """
        for block in blocks:
            if self._keys[block] is not None:
                self._withdraw(block)

    def key(self, before: int, tokens: array[int], start: int) -> Key:
        """What the block with `tokens[start:start + block_size]` is published under."""
        return before, tokens[start : start + self.block_size].tobytes()

    def check(self, tables: Iterable[array[int]]) -> None:
        """Recompute every count from all block tables; AssertionError where one is wrong."""
        users = Counter(block for table in tables for block in table)
        free, cached = set(self._free), set(self._cached)
        published = {block for block in range(self.num_blocks) if self._keys[block] is not None}
        assert self._users == [users[block] for block in range(self.num_blocks)], "lost a user"
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "free and cached"
        assert not (free | cached) & users.keys(), "free or cached, but in use"
        assert len(free) + len(cached) + len(users) == self.num_blocks, "lost a block"
        assert cached <= published, "cached, but cannot be found"
        assert not free & published, "free, but can be found"
        assert published == set(self._published.values()), "published under no key"
        assert all(self._keys[block] == key for key, block in self._published.items())
        assert self.in_use == len(users), "miscounted"

    def _withdraw(self, block: int) -> None:
        """Let the block be found no longer."""
        key = self._keys[block]
        assert key is not None
        del self._published[key]
        self._keys[block] = None
