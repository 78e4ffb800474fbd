"""The block pool: what is found, what is evicted, and in which order."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from planner.sim.blockpool import BlockPool, Holding, RankedPool, SharedLast


def labelled(pool: BlockPool, *contents: int) -> Holding:
    """Use blocks with these hashes."""
    pool.take(len(contents))
    holding = Holding()
    pool.label(holding, contents)
    return holding


def cached(pool: BlockPool, *contents: int) -> None:
    """Leave blocks with these hashes in the cache, unused."""
    pool.release(labelled(pool, *contents), 0)


def acquired(pool: BlockPool, *contents: int) -> Holding:
    """Use what is cached of a chain."""
    hits = pool.lookup(contents, len(contents))
    pool.acquire(hits)
    return hits


def found(pool: BlockPool, *contents: int) -> int:
    """Return how many leading blocks of a chain are cached."""
    return pool.lookup(contents, len(contents)).blocks


def test_lookup_stops_at_the_first_gap() -> None:
    """A prefix is a run of leading blocks; what lies behind a gap does not count."""
    pool = BlockPool(8)
    cached(pool, 1, 2, 4)
    assert found(pool, 1, 2, 3, 4) == 2


def test_lookup_obeys_the_cap() -> None:
    """At most as many blocks are found as asked for."""
    pool = BlockPool(8)
    cached(pool, 1, 2, 3)
    assert pool.lookup((1, 2, 3), 2).blocks == 2


def test_cached_blocks_count_as_free() -> None:
    """A block that nobody uses is free although its content can still be found."""
    pool = BlockPool(4)
    cached(pool, 1, 2)
    assert (pool.free, pool.idle) == (4, 2)
    assert found(pool, 1, 2) == 2


def test_blank_blocks_go_first() -> None:
    """Nothing is evicted while blank blocks are left."""
    pool = BlockPool(4)
    cached(pool, 1, 2)
    pool.take(2)
    assert found(pool, 1, 2) == 2


def test_the_tail_of_a_prefix_is_evicted_first() -> None:
    """A request's blocks return last first, so its prefix outlives its tail."""
    pool = BlockPool(3)
    cached(pool, 1, 2, 3)
    pool.take(1)
    assert found(pool, 1, 2, 3) == 2


def test_the_least_recently_freed_is_evicted_first() -> None:
    """Using a cached block and freeing it again makes it the youngest."""
    pool = BlockPool(2)
    cached(pool, 1)
    cached(pool, 2)
    pool.release(acquired(pool, 1), 0)
    pool.take(1)
    assert found(pool, 2) == 0
    assert found(pool, 1) == 1


def test_a_block_in_use_is_never_evicted() -> None:
    """A hit leaves the free queue, and comes back when its last user is gone."""
    pool = BlockPool(2)
    cached(pool, 1)
    first, second = acquired(pool, 1), acquired(pool, 1)
    assert pool.free == 1
    pool.take(1)
    assert found(pool, 1) == 1
    pool.release(first, 0)
    assert pool.free == 0
    pool.release(second, 0)
    assert pool.free == 1


def test_a_beginning_is_used_alone() -> None:
    """Of a chain in use, another request may have the beginning: each part has its own users."""
    pool = BlockPool(6)
    whole = labelled(pool, 1, 2, 3, 4)
    part = acquired(pool, 1, 2, 7)
    pool.label(whole, (5,))
    pool.take(1)
    assert (pool.free, pool.idle) == (1, 0)
    pool.release(whole, 0)
    assert (pool.free, pool.idle) == (4, 3)
    pool.take(3)
    assert found(pool, 1, 2, 3, 4, 5) == 3
    pool.release(part, 0)
    assert (pool.free, pool.idle) == (3, 3)


def test_duplicates_coexist_until_both_are_evicted() -> None:
    """Two blocks with one content are two blocks; the older is found, then the other."""
    pool = BlockPool(3)
    first, second = labelled(pool, 7), labelled(pool, 7)
    pool.release(acquired(pool, 7), 0)
    pool.release(first, 0)
    assert pool.lookup((7,), 1).idle == 1
    pool.take(2)
    assert pool.lookup((7,), 1).blocks == 1
    assert pool.lookup((7,), 1).idle == 0
    pool.release(second, 2)
    pool.take(3)
    assert found(pool, 7) == 0


def test_a_later_duplicate_can_be_evicted_first() -> None:
    """Evicting the second of three equal blocks leaves the chain of the others whole."""
    pool = BlockPool(4)
    first, second, third = (labelled(pool, 7) for _ in range(3))
    for blocks in (second, first, third):
        pool.release(blocks, 0)
    pool.take(2)
    assert pool.lookup((7,), 1).spans == first.spans
    pool.take(1)
    assert pool.lookup((7,), 1).spans == third.spans


def test_clear_is_refused_while_blocks_are_in_use() -> None:
    """The cache is only forgotten when no request holds a block."""
    pool = BlockPool(2)
    cached(pool, 1)
    pool.take(1)
    assert not pool.clear()
    pool.release(Holding(), 1)
    assert pool.clear()
    assert found(pool, 1) == 0
    assert pool.free == 2


def test_the_queue_stays_in_proportion_to_the_pool() -> None:
    """Prefixes that are used again and again leave no trail behind, and keep their order."""
    pool = BlockPool(4)
    cached(pool, 3)
    cached(pool, 1, 2)
    for _ in range(100):
        pool.release(acquired(pool, 1, 2), 0)
    assert len(pool._queue) <= 2 * pool.total
    pool.take(2)
    assert found(pool, 3) == 0
    assert found(pool, 1, 2) == 2


class _Plain:
    """The same pool with an object for each block and lists for everything: slow and obvious."""

    def __init__(self, blocks: int, *, shared_last: bool) -> None:
        self.total, self.shared_last = blocks, shared_last
        self.known: list[list[int]] = []  # [content, refs, when freed], in the order of labelling
        self.blank = blocks
        self.clock = 0
        self.uses: Counter[int] = Counter()

    @property
    def idle(self) -> int:
        return sum(not block[1] for block in self.known)

    @property
    def free(self) -> int:
        return self.blank + self.idle

    def lookup(self, chain: tuple[int, ...]) -> list[list[int]]:
        hits: list[list[int]] = []
        for content in chain:
            block = next((one for one in self.known if one[0] == content), None)
            if block is None:
                break
            hits.append(block)
        return hits

    def acquire(self, hits: list[list[int]]) -> None:
        for block in hits:
            block[1] += 1
            self.uses[block[0]] += 1

    def take(self, count: int) -> None:
        while self.blank < count:
            idle = [block for block in self.known if not block[1]]
            oldest = min(idle, key=lambda block: (block[3], block[2]))
            self.known = [block for block in self.known if block is not oldest]
            self.blank += 1
        self.blank -= count

    def label(self, contents: tuple[int, ...]) -> list[list[int]]:
        blocks = [[content, 1, 0, 0] for content in contents]
        self.uses.update(contents)
        self.known += blocks
        return blocks

    def release(self, blocks: list[list[int]], blank: int) -> None:
        for block in reversed(blocks):
            block[1] -= 1
            self.clock += 1
            block[2] = self.clock
            if not block[1]:
                block[3] = int(self.shared_last and self.uses[block[0]] > 1)
        self.blank += blank

    def forget(self, chain: tuple[int, ...]) -> int:
        gone = [block for block in self.known if not block[1] and block[0] in chain]
        self.known = [block for block in self.known if all(block is not one for one in gone)]
        self.blank += len(gone)
        return len(gone)


@pytest.mark.parametrize("shared_last", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_spans_behave_as_single_blocks(seed: int, shared_last: bool) -> None:
    """Whatever requests do, what is found, free and idle is as with an object for each block."""
    rng = random.Random(seed)
    total = rng.choice((12, 25, 60))
    pool = RankedPool(total, SharedLast()) if shared_last else BlockPool(total)
    plain = _Plain(total, shared_last=shared_last)
    texts: list[tuple[int, ...]] = [()]  # chains: nodes of a tree, by their path
    live: list[tuple[tuple[int, ...], Holding, list[list[int]], int]] = []
    for step in range(400):
        kind = rng.random()
        if kind < 0.45:
            begin = rng.choice(texts[-12:])
            begin = begin[: rng.randint(0, len(begin))]
            grown = tuple(1000 * step + 10 + k for k in range(rng.choice((0, 1, 2, 6))))
            chain = begin + grown
            most = rng.choice((len(chain), max(len(chain) - 1, 0)))
            hits, blocks = pool.lookup(chain, most), plain.lookup(chain[:most])
            assert hits.blocks == len(blocks)
            assert hits.idle == sum(not block[1] for block in blocks)
            blank = rng.randint(0, 2)
            if len(chain) - hits.blocks + hits.idle + blank > pool.free:
                continue
            pool.acquire(hits)
            plain.acquire(blocks)
            fresh = chain[hits.blocks :]
            pool.take(len(fresh) + blank)
            plain.take(len(fresh) + blank)
            pool.label(hits, fresh)
            live.append((chain, hits, blocks + plain.label(fresh), blank))
            texts.append(chain)
        elif kind < 0.65 and live:
            place = rng.randrange(len(live))
            chain, holding, blocks, blank = live[place]
            # Requests with the same text go on alike now and then: twins.
            content = hash((*chain, step if rng.random() < 0.4 else 0))
            if pool.free:
                pool.take(1)
                plain.take(1)
                pool.label(holding, (content,))
                blocks += plain.label((content,))
                live[place] = ((*chain, content), holding, blocks, blank)
                texts.append((*chain, content))
        elif kind < 0.93 and live:
            _, holding, blocks, blank = live.pop(rng.randrange(len(live)))
            pool.release(holding, blank)
            plain.release(blocks, blank)
        elif kind < 0.97 and seed % 2:
            chain = rng.choice(texts)
            start = rng.randint(0, len(chain))
            assert pool.forget(chain, start) == plain.forget(chain[start:])
        assert (pool.free, pool.idle) == (plain.free, plain.idle)
        for chain in texts[-12:]:
            assert found(pool, *chain) == len(plain.lookup(chain))
