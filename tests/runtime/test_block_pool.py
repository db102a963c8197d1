"""Reference counts, eviction, and a prefix cache that hashes cannot fool."""

from array import array

import pytest

from compress.runtime.block_pool import ROOT, BlockPool


def publish(pool, tokens):
    """Take blocks for `tokens`, publish the full ones; return the table."""
    table, identity = array("i"), ROOT
    for start in range(0, len(tokens), pool.block_size):
        table.append(pool.allocate())
        if start + pool.block_size <= len(tokens):
            identity = pool.publish(table[-1], identity, array("q", tokens), start)
    return table


def hit(pool, tokens):
    return pool.match(array("q", tokens))[0].tolist()


def test_a_hit_is_the_longest_prefix_and_leaves_a_token():
    pool = BlockPool(8, 2)
    table = publish(pool, [1, 2, 3, 4, 5])
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
    pool = BlockPool(12, 2)
    first, second = publish(pool, [1, 2, 3, 4, 0]), publish(pool, [5, 6, 3, 4, 0])
    assert hash(pool._keys[first[0]]) == hash(pool._keys[second[0]])
    assert hit(pool, [1, 2, 3, 4, 0]) == first[:2].tolist()
    assert hit(pool, [5, 6, 3, 4, 0]) == second[:2].tolist()
    assert hit(pool, [7, 8, 3, 4, 0]) == []


def test_a_block_number_that_comes_back_is_not_the_same_parent():
    pool = BlockPool(4, 2)
    parent, child = publish(pool, [1, 2, 3, 4])
    pool.release(array("i", [child]))
    pool.release(array("i", [parent]))
    pool.share([child])  # someone holds the child, so that only the parent can be evicted
    taken = [pool.allocate() for _ in range(3)]
    assert parent in taken
    tokens = array("q", [9, 9])
    pool.publish(parent, ROOT, tokens, 0)
    assert hit(pool, [9, 9, 3, 4, 5]) == [parent], "the child was computed after other tokens"


def test_the_least_recently_used_goes_first_and_tails_before_heads():
    pool = BlockPool(5, 1)
    a, b = publish(pool, [1, 2]), publish(pool, [3, 4])
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
    pool = BlockPool(8, 2)
    first, second = publish(pool, [1, 2, 3, 4]), publish(pool, [1, 2, 3, 4, 5, 6])
    assert hit(pool, [1, 2, 3, 4, 5, 6, 7]) == [*first, second[2]]
    pool.release(second)
    assert pool.cached == 1
    pool.check([first])


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(4, 2, prefix_caching=False)
    table = publish(pool, [1, 2, 3, 4])
    assert hit(pool, [1, 2, 3, 4, 5]) == []
    pool.release(table)
    assert pool.free == 4


@pytest.mark.parametrize("harm", ["user", "free", "cached", "published"])
def test_the_check_can_fail(harm):
    pool = BlockPool(4, 1)
    table = publish(pool, [1, 2])
    pool.check([table])
    if harm == "user":
        pool.share(table)
    elif harm == "free":
        pool._free.pop()
    elif harm == "cached":
        pool._cached[table[0]] = None
    else:
        pool._published.clear()
    with pytest.raises(AssertionError):
        pool.check([table])
