"""Reference counts, eviction, and a prefix cache that hashes cannot fool."""

from array import array

import pytest

from compress.runtime.block_pool import NONE, BlockPool
from compress.runtime.cache_layout import CacheLayout


def pool_of(blocks, size, windows=(None,), **settings):
    return BlockPool(blocks, CacheLayout.of(windows, size), **settings)


def publish(pool, tokens):
    """Take blocks for `tokens`, publish the full ones; return the tables."""
    tables, run = [array("i") for _ in range(pool.groups)], pool.root
    for start in range(0, len(tokens), pool.block_size):
        for table in tables:
            table.append(pool.allocate())
        if start + pool.block_size <= len(tokens):
            run = pool.publish([table[-1] for table in tables], run, array("q", tokens), start)
    return tables


def published(pool, tokens):
    """The same of a pool with one group: its table."""
    (table,) = publish(pool, tokens)
    return table


def hits(pool, tokens):
    return [table.tolist() for table in pool.match(array("q", tokens))[0]]


def hit(pool, tokens):
    (table,) = hits(pool, tokens)
    return table


def test_a_hit_is_the_longest_prefix_and_leaves_a_token():
    pool = pool_of(8, 2)
    table = published(pool, [1, 2, 3, 4, 5])
    assert hit(pool, [1, 2, 3, 4, 5]) == table[:2].tolist()
    assert hit(pool, [1, 2, 3, 4]) == table[:1].tolist()
    assert hit(pool, [1, 2, 9, 4, 5]) == table[:1].tolist()
    assert hit(pool, [9, 2, 3, 4, 5]) == []
    assert hit(pool, [3, 4, 5]) == [], "the same tokens at another place"
    pool.check([table])


def test_colliding_hashes_serve_nothing_wrong(monkeypatch):
    class Colliding(tuple):
        __slots__ = ()

        def __hash__(self):
            return 1

    plain = BlockPool.key
    monkeypatch.setattr(BlockPool, "key", lambda *args: Colliding(plain(*args)))
    pool = pool_of(12, 2)
    first, second = published(pool, [1, 2, 3, 4, 0]), published(pool, [5, 6, 3, 4, 0])
    keys = [pool._holds[table[0]][0].key for table in (first, second)]
    assert hash(keys[0]) == hash(keys[1])
    assert hit(pool, [1, 2, 3, 4, 0]) == first[:2].tolist()
    assert hit(pool, [5, 6, 3, 4, 0]) == second[:2].tolist()
    assert hit(pool, [7, 8, 3, 4, 0]) == []


def test_a_block_number_that_comes_back_is_not_the_same_parent():
    pool = pool_of(4, 2)
    parent, child = published(pool, [1, 2, 3, 4])
    pool.release(array("i", [child]))
    pool.release(array("i", [parent]))
    pool.share([child])  # someone holds the child, so that only the parent can be evicted
    taken = [pool.allocate() for _ in range(3)]
    assert parent in taken
    tokens = array("q", [9, 9])
    pool.publish([parent], pool.root, tokens, 0)
    assert hit(pool, [9, 9, 3, 4, 5]) == [parent], "the child was computed after other tokens"
    assert hit(pool, [1, 2, 3, 4, 5]) == [], "the first block is gone"


def test_the_least_recently_used_goes_first_and_tails_before_heads():
    pool = pool_of(5, 1)
    a, b = published(pool, [1, 2]), published(pool, [3, 4])
    pool.release(a)
    pool.release(b)
    assert (pool.free, pool.cached, pool.in_use) == (1, 4, 0)
    taken = [pool.allocate() for _ in range(3)]
    assert taken[1:] == [a[1], a[0]]
    pool.share(b)
    pool.check([b, array("i", taken)])
    assert hit(pool, [3, 4, 0]) == b.tolist()
    assert hit(pool, [1, 2, 0]) == []


def test_equal_blocks_are_published_once_and_the_chain_goes_on():
    pool = pool_of(8, 2)
    first, second = published(pool, [1, 2, 3, 4]), published(pool, [1, 2, 3, 4, 5, 6])
    assert hit(pool, [1, 2, 3, 4, 5, 6, 7]) == [*first, second[2]]
    pool.release(second)
    assert pool.cached == 1
    pool.check([first])


def test_without_prefix_caching_nothing_is_found():
    pool = pool_of(4, 2, prefix_caching=False)
    table = published(pool, [1, 2, 3, 4])
    assert hit(pool, [1, 2, 3, 4, 5]) == []
    pool.release(table)
    assert pool.free == 4


def test_a_hit_needs_what_each_group_sees_and_no_more():
    pool = pool_of(20, 2, windows=(None, 4))
    tokens = list(range(10))
    tables = publish(pool, tokens)
    everything, windowed = (table.tolist() for table in tables)
    # token 10 sees positions 7 to 9 of the last 4: blocks 3 and 4
    assert hits(pool, [*tokens, 0]) == [everything, [NONE, NONE, NONE, *windowed[3:]]]
    pool.release_all(tables)
    # evicted first is the last block of the second group: `release_all` goes
    # from the last token to the first
    taken = [pool.allocate() for _ in range(pool.free + 1)]
    assert taken[-1] == windowed[4]
    assert hits(pool, [*tokens, 0]) == [everything[:4], [NONE, NONE, *windowed[2:4]]]
    pool.check([array("i", taken)])


def test_behind_a_window_later_runs_are_found_when_the_first_are_gone():
    pool = pool_of(6, 2, windows=(3, 3))
    tokens = list(range(8))
    (table,) = publish(pool, tokens)
    pool.release(table[:3])
    evicted = [pool.allocate() for _ in range(pool.available)]
    assert set(table[:3]) <= set(evicted)
    pool.check([table[3:], array("i", evicted)])
    assert hit(pool, [*tokens, 9]) == [NONE, NONE, NONE, table[3]]
    assert hit(pool, tokens) == [], "token 6 sees position 5, in a block that is gone"
    again = published_again(pool, table, evicted, tokens)
    assert hit(pool, tokens) == [NONE, NONE, again], "who computes it anew heals the prefix"


def published_again(pool, table, evicted, tokens):
    """Publish block 2 of `tokens` anew, in one of the blocks that were evicted."""
    run, block = pool.root, evicted[0]
    for place in range(3):
        held = [block] if place == 2 else [NONE]
        run = pool.publish(held, run, array("q", tokens), 2 * place)
    return block


def test_what_is_withdrawn_leads_nowhere():
    pool = pool_of(8, 1, windows=(2, 2))
    (table,) = publish(pool, [1, 2, 3, 4])
    pool.release(table[:2])
    assert pool.cached == 2
    run = pool.match(array("q", [1, 2, 3, 9]))[1]  # of 1, 2, 3
    pool.withdraw(run)
    assert (pool.free, pool.cached) == (6, 0)
    assert hit(pool, [1, 2, 3, 4, 9]) == []
    pool.check([table[2:]])


def test_a_long_chain_of_runs_ends_without_recursion():
    pool = pool_of(2, 1, windows=(1, 1))
    run, tokens = pool.root, array("q", range(100_000))
    for start in range(len(tokens)):
        run = pool.publish([NONE], run, tokens, start)
    assert len(pool._published) == len(tokens)
    del run
    assert len(pool._published) == 0


@pytest.mark.parametrize("harm", ["user", "free", "cached", "published", "group"])
def test_the_check_can_fail(harm):
    pool = pool_of(4, 1, windows=(None, 2))
    tables = publish(pool, [1, 2])
    pool.check(tables)
    if harm == "user":
        pool.share(tables[0])
    elif harm == "free":
        pool._free.append(tables[0][0])
    elif harm == "cached":
        pool._cached[tables[0][0]] = None
    elif harm == "published":
        pool._published.clear()
    else:
        run = pool._holds[tables[0][0]][0]
        run.blocks.reverse()
    with pytest.raises(AssertionError):
        pool.check(tables)
