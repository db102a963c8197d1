"""Which layers share a block table, and what a sequence holds of each.

Layers of one window see the same positions, so a block that one of them can see no more none of
them can.  Layers are put into *groups* of one window and of at most `width` layers; a block holds
keys and values of `width` layers, whichever group takes it, and a sequence has a table for each
group.  So one pool serves all, nothing is set apart for one kind of layer, and a block that
left a window is at once there for whoever needs one.  A model whose layers all see alike has one
group, and a block then holds all layers.

    layers  0 1 2 3 4 5 6 7 8     2 and 5 and 8 see all, the others the last w
    group   1 1 0 2 2 0 3 3 0     width 3; of groups 1 to 3 a sequence holds ceil((w - 1) / 16) + 1

A layer that uses the keys and values of another has that one's group and place, and takes no room.
The last group of a kind may have fewer layers than a block has room for.  `width` is the largest
that leaves little of the room to that: the fewer tables, the less there is to keep.

Source: vLLM's hybrid KV cache manager groups layers alike (its design document of that name).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

# Of the room in blocks: by the layers that see most, whose blocks stay, and by the others.
MOST_UNUSED, MOST_UNUSED_IN_WINDOWS = 0.1, 0.25

Window = int | None  # tokens that a query sees, itself included; None for all


@dataclass(frozen=True)
class CacheLayout:
    """Groups of layers.

    block_size  tokens a block holds
    windows     of each group, those without a window first
    groups      of each layer: its group
    places      of each layer: which of a block's places is its own
    """

    block_size: int
    windows: tuple[Window, ...]
    groups: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(
        cls, windows: Sequence[Window], block_size: int, sources: Sequence[int] | None = None
    ) -> CacheLayout:
        """The layout for layers of these windows.

        `sources` are of each layer the one whose keys and values it uses: by default itself.
        """
        if sources is not None:
            owners = sorted(set(sources))
            layout = cls.of([windows[owner] for owner in owners], block_size)
            numbers = [owners.index(source) for source in sources]
            groups, places = (
                tuple(of[n] for n in numbers) for of in (layout.groups, layout.places)
            )
            return cls(block_size, layout.windows, groups, places)
        kinds = sorted(Counter(windows).items(), key=_reach)
        width = max(width for width in range(1, len(windows) + 1) if _wastes_little(kinds, width))
        firsts, group_windows = {}, []
        for window, count in kinds:
            firsts[window] = len(group_windows)
            group_windows += [window] * -(-count // width)
        seen: Counter[Window] = Counter()
        groups, places = [], []
        for window in windows:
            groups.append(firsts[window] + seen[window] // width)
            places.append(seen[window] % width)
            seen[window] += 1
        return cls(block_size, tuple(group_windows), tuple(groups), tuple(places))

    @cached_property
    def width(self) -> int:
        """Layers of which a block holds keys and values."""
        return 1 + max(self.places)

    @cached_property
    def windowed(self) -> tuple[tuple[int, int], ...]:
        """(group, window) of the groups that see only so much."""
        return tuple(
            (group, window) for group, window in enumerate(self.windows) if window is not None
        )

    @property
    def kinds(self) -> list[tuple[Window, int]]:
        """Windows, and how many layers with keys and values of their own have each."""
        own = set(zip(self.groups, self.places, strict=True))
        return sorted(Counter(self.windows[group] for group, _ in own).items(), key=_reach)

    def first_seen(self, window: int, computed: int) -> int:
        """Number of the first block of a sequence that its token number `computed` or one after it
        sees.
        """
        return max(0, computed - window + 1) // self.block_size

    def needed(self, tokens: int, together: int = 1) -> list[int]:
        """Blocks of each group that a sequence has at most, on its way to `tokens` in the cache.

        `together` of them are computed in a step: keys and values of all of these are written
        before any is given back.
        """
        size = self.block_size
        whole = -(-tokens // size)
        return [
            whole if window is None else min(whole, 1 - (2 - window - together) // size)
            for window in self.windows
        ]

    def blocks_for(self, tokens: int, together: int = 1) -> int:
        """`needed`, of all groups."""
        return sum(self.needed(tokens, together))

    def blocks_held(self, tokens: int) -> int:
        """Blocks of a sequence between two steps, with `tokens` in the cache."""
        whole = -(-tokens // self.block_size)
        return sum(
            whole - (0 if window is None else self.first_seen(window, tokens))
            for window in self.windows
        )

    def most_tokens(self, num_blocks: int, context: int) -> int:
        """Tokens, up to `context`, that a lone sequence can have in a cache of `num_blocks`."""
        low, high = 0, context
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self.blocks_for(middle) <= num_blocks else (low, middle - 1)
            )
        return low


def _reach(kind: tuple[Window, int]) -> float:
    """For an order in which who sees more comes first."""
    window, _ = kind
    return float("-inf") if window is None else -window


def _wastes_little(kinds: Sequence[tuple[Window, int]], width: int) -> bool:
    allowed = [MOST_UNUSED, *[MOST_UNUSED_IN_WINDOWS] * (len(kinds) - 1)]
    unused = [1 - count / (-(-count // width) * width) for _, count in kinds]
    return all(share <= most for share, most in zip(unused, allowed, strict=True))
