"""Groups of layers, and how many blocks a sequence takes of them."""

import pytest

from compress.runtime.cache_layout import CacheLayout


@pytest.mark.parametrize(
    ("windows", "groups", "width"),
    [
        ([None] * 30, (None,), 30),
        ([64] * 30, (64,), 30),
        (([64] * 4 + [None]) * 6, (None, 64, 64, 64, 64), 6),
        (([64] * 3 + [None]) * 7 + [64, 64], (None, 64, 64, 64, 64), 7),  # 23 in room for 28
        ([None] + [64] * 5, (None, *[64] * 5), 1),
        ([16, 64, 64, 16], (64, 16), 2),
        ([64, None], (None, 64), 1),
    ],
)
def test_layers_are_grouped_by_window(windows, groups, width):
    layout = CacheLayout.of(windows, 16)
    assert layout.windows == groups
    assert layout.width == width
    assert [layout.windows[group] for group in layout.groups] == windows
    places = list(zip(layout.groups, layout.places, strict=True))
    assert len(set(places)) == len(windows), "two layers of a group in one place of a block"
    assert max(layout.places) < width


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 9, 13])
@pytest.mark.parametrize("together", [1, 2, 3, 4, 9])
def test_what_is_needed_is_the_most_that_is_ever_held(window, together):
    """Against walking every step of every beginning, position by position."""
    size, most = 4, 0
    layout = CacheLayout.of([window], size)
    for computed in range(60):
        kept = {  # a block whose last place, written or not, is seen by the next token
            block
            for block in range(-(-computed // size))
            if block * size + size - 1 > computed - window
        }
        written = {place // size for place in range(computed, computed + together)}
        assert len(kept) == layout.blocks_held(computed)
        if kept:
            assert min(kept) == layout.first_seen(window, computed)
        most = max(most, len(kept | written))
    assert layout.needed(60 + together, together) == [most]
    assert layout.needed(size, together) == [1], "no more than its tokens fill"


def test_the_room_of_a_lone_sequence():
    layout = CacheLayout.of([None, 8], 4)  # at most 3 blocks of the second
    assert [layout.blocks_for(tokens) for tokens in (1, 4, 5, 12, 13, 100)] == [2, 2, 4, 6, 7, 28]
    assert layout.most_tokens(7, 1000) == 16
    assert layout.most_tokens(1000, 50) == 50
    assert layout.most_tokens(1, 50) == 0
    assert CacheLayout.of([8], 4).most_tokens(3, 10_000) == 10_000
    assert CacheLayout.of([8], 4).most_tokens(2, 10_000) == 8
