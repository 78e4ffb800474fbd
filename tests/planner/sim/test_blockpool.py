"""The block pool: what is found, what is evicted, and in which order."""

from planner.sim.blockpool import BlockPool


def cached(pool: BlockPool, *contents: int) -> None:
    """Leave blocks with these hashes in the cache, unused."""
    pool.take(len(contents))
    pool.release(pool.label(contents), 0)


def test_lookup_stops_at_the_first_gap() -> None:
    """A prefix is a run of leading blocks; what lies behind a gap does not count."""
    pool = BlockPool(8)
    cached(pool, 1, 2, 4)
    assert [block.content for block in pool.lookup((1, 2, 3, 4), 4)] == [1, 2]


def test_lookup_obeys_the_cap() -> None:
    """At most as many blocks are found as asked for."""
    pool = BlockPool(8)
    cached(pool, 1, 2, 3)
    assert [block.content for block in pool.lookup((1, 2, 3), 2)] == [1, 2]


def test_cached_blocks_count_as_free() -> None:
    """A block that nobody uses is free although its content can still be found."""
    pool = BlockPool(4)
    cached(pool, 1, 2)
    assert (pool.free, pool.idle) == (4, 2)
    assert len(pool.lookup((1, 2), 2)) == 2


def test_blank_blocks_go_first() -> None:
    """Nothing is evicted while blank blocks are left."""
    pool = BlockPool(4)
    cached(pool, 1, 2)
    pool.take(2)
    assert len(pool.lookup((1, 2), 2)) == 2


def test_the_tail_of_a_prefix_is_evicted_first() -> None:
    """A request's blocks return last first, so its prefix outlives its tail."""
    pool = BlockPool(3)
    cached(pool, 1, 2, 3)
    pool.take(1)
    assert [block.content for block in pool.lookup((1, 2, 3), 3)] == [1, 2]


def test_the_least_recently_freed_is_evicted_first() -> None:
    """Using a cached block and freeing it again makes it the youngest."""
    pool = BlockPool(2)
    cached(pool, 1)
    cached(pool, 2)
    hits = pool.lookup((1,), 1)
    pool.acquire(hits)
    pool.release(hits, 0)
    pool.take(1)
    assert pool.lookup((2,), 1) == []
    assert len(pool.lookup((1,), 1)) == 1


def test_a_block_in_use_is_never_evicted() -> None:
    """A hit leaves the free queue, and comes back when its last user is gone."""
    pool = BlockPool(2)
    cached(pool, 1)
    hits = pool.lookup((1,), 1)
    pool.acquire(hits)
    pool.acquire(hits)
    assert pool.free == 1
    pool.take(1)
    assert len(pool.lookup((1,), 1)) == 1
    pool.release(hits, 0)
    assert pool.free == 0
    pool.release(hits, 0)
    assert pool.free == 1


def test_duplicates_coexist_until_both_are_evicted() -> None:
    """Two blocks with one content are two blocks; the older is found, then the other."""
    pool = BlockPool(3)
    pool.take(2)
    first, second = pool.label((7,)), pool.label((7,))
    assert pool.lookup((7,), 1) == first
    pool.release(first, 0)
    pool.take(2)
    assert pool.lookup((7,), 1) == second
    pool.release(second, 2)
    pool.take(3)
    assert pool.lookup((7,), 1) == []


def test_a_later_duplicate_can_be_evicted_first() -> None:
    """Evicting the second of three equal blocks leaves the chain of the others whole."""
    pool = BlockPool(4)
    pool.take(3)
    first, second, third = (pool.label((7,)) for _ in range(3))
    for blocks in (second, first, third):
        pool.release(blocks, 0)
    pool.take(2)
    assert pool.lookup((7,), 1) == first
    pool.take(1)
    assert pool.lookup((7,), 1) == third


def test_clear_is_refused_while_blocks_are_in_use() -> None:
    """The cache is only forgotten when no request holds a block."""
    pool = BlockPool(2)
    cached(pool, 1)
    pool.take(1)
    assert not pool.clear()
    pool.release((), 1)
    assert pool.clear()
    assert pool.lookup((1,), 1) == []
    assert pool.free == 2


def test_the_queue_stays_in_proportion_to_the_pool() -> None:
    """Prefixes that are used again and again leave no trail behind, and keep their order."""
    pool = BlockPool(4)
    cached(pool, 3)
    cached(pool, 1, 2)
    for _ in range(100):
        hits = pool.lookup((1, 2), 2)
        pool.acquire(hits)
        pool.release(hits, 0)
    assert len(pool._queue) <= 2 * pool.total
    pool.take(2)
    assert pool.lookup((3,), 1) == []
    assert len(pool.lookup((1, 2), 2)) == 2
