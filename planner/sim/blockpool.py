"""The KV cache of one engine: a pool of blocks with a hash-addressed prefix cache.

Blocks without content are interchangeable, so they are only counted. A block becomes an object
when its content gets a hash. That is exact, because vLLM's free queue always holds the blank
blocks before the cached ones: blank blocks return to the head, cached ones to the tail, and the
head is taken first. The queue is thus a number (the blanks) followed by a list (the cached blocks
nobody uses, least recently freed first), and a run without hashes costs a few additions.

References
----------
vllm 0.33.0: vllm/v1/core/block_pool.py, kv_cache_utils.py (``FreeKVCacheBlockQueue``).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Protocol

__all__ = ["Block", "BlockPool", "Eviction", "RankedPool", "SharedLast"]


class Block:
    """A block whose content is known by its hash.

    Attributes
    ----------
    content
        Hash of the chain up to and including this block.
    refs
        Requests that use it; 0 means it waits in the free queue and may be reused or evicted, -1
        that its content was dropped.
    twin
        A later block with the same content, or None; vLLM does not merge duplicates.
    entries
        How often it stands in the free queue. Its last entry counts, if ``refs`` is 0.
    """

    __slots__ = ("content", "entries", "refs", "twin")

    def __init__(self, content: int) -> None:
        self.content = content
        self.refs = 1
        self.entries = 0
        self.twin: Block | None = None

    def __repr__(self) -> str:
        return f"Block(content={self.content}, refs={self.refs})"


class BlockPool:
    """Blocks in use, cached and blank.

    Parameters
    ----------
    blocks
        Blocks that requests can use, >= 1; vLLM's null block is not among them.

    Attributes
    ----------
    total
        As given.
    free
        Blocks that can be taken now: blank ones and cached ones nobody uses.
    idle
        Cached blocks nobody uses.
    """

    __slots__ = ("_cached", "_queue", "free", "idle", "total")

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self.free = blocks
        self.idle = 0
        self._cached: dict[int, Block] = {}  # hash -> the first of its blocks
        # Idle blocks, oldest first. A block that is used again leaves its entry behind, which is
        # cheaper than taking it out of the middle.
        self._queue: deque[Block] = deque()

    def __repr__(self) -> str:
        return f"BlockPool(total={self.total}, free={self.free}, cached={len(self._cached)})"

    def lookup(self, hashes: Sequence[int], most: int) -> list[Block]:
        """Return the longest run of leading blocks present, at most ``most`` (>= 0)."""
        hits: list[Block] = []
        find = self._cached.get
        for content in islice(hashes, most):
            block = find(content)
            if block is None:
                break
            hits.append(block)
        return hits

    def acquire(self, hits: Sequence[Block]) -> None:
        """Use cached blocks; those nobody used leave the free queue."""
        for block in hits:
            if block.refs == 0:
                self.idle -= 1
                self.free -= 1
            block.refs += 1

    def take(self, count: int) -> None:
        """Take ``count`` blocks (0 to ``free``) and make them blank, evicting the oldest cached.

        The caller has checked ``free``: a shortage is the scheduler's business.
        """
        self.free -= count
        evictions = self.idle - self.free
        if evictions > 0:
            self.idle = self.free
            queue, cached = self._queue, self._cached
            while evictions:
                block = queue.popleft()
                block.entries -= 1
                if block.refs == 0 and block.entries == 0:
                    evictions -= 1
                    if block.twin is None and cached[block.content] is block:
                        del cached[block.content]
                    else:
                        self._forget_twin(block)

    def forget(self, contents: Sequence[int]) -> int:
        """Make the idle blocks of these contents blank, twins included; return how many."""
        dropped = 0
        for content in contents:
            block = self._cached.get(content)
            while block is not None:
                after = block.twin
                if block.refs == 0:
                    if after is None and self._cached[content] is block:
                        del self._cached[content]
                    else:
                        self._forget_twin(block)
                    block.refs = -1  # its entry in the free queue counts no more
                    dropped += 1
                block = after
        self.idle -= dropped
        return dropped

    def label(self, contents: Sequence[int]) -> list[Block]:
        """Give as many of the caller's blank blocks their hashes; they are blocks in use."""
        blocks = [Block(content) for content in contents]
        cached = self._cached
        if cached.keys().isdisjoint(contents):
            cached.update(zip(contents, blocks, strict=True))
        else:
            for block in blocks:
                first = cached.setdefault(block.content, block)
                if first is not block:
                    while first.twin is not None:
                        first = first.twin
                    first.twin = block
        return blocks

    def release(self, labelled: Sequence[Block], blank: int) -> None:
        """Give back a request's blocks, last first, so that a prefix outlives its tail.

        Parameters
        ----------
        labelled
            The request's blocks with a hash, in prompt order.
        blank
            How many more it holds.
        """
        freed = 0
        append = self._queue.append
        for block in reversed(labelled):
            block.refs -= 1
            if block.refs == 0:
                block.entries += 1
                append(block)
                freed += 1
        self.idle += freed
        self.free += freed + blank
        if len(self._queue) > 2 * self.total:
            self._tidy()

    def clear(self) -> bool:
        """Forget every cached block; refused (False) while any block is in use."""
        if self.free != self.total:
            return False
        self._cached.clear()
        self._queue.clear()
        self.idle = 0
        return True

    def _forget_twin(self, block: Block) -> None:
        """Take one of several blocks with the same content out of the map."""
        first = self._cached[block.content]
        if first is block:
            assert block.twin is not None  # noqa: S101 - a single block is forgotten elsewhere
            self._cached[block.content] = block.twin
            return
        while first.twin is not block:
            assert first.twin is not None  # noqa: S101 - every cached block is in its chain
            first = first.twin
        first.twin = block.twin

    def _tidy(self) -> None:
        """Drop the queue's dead entries, so that it stays in proportion to the pool."""
        kept: deque[Block] = deque()
        for block in self._queue:
            block.entries -= 1
            if block.refs == 0 and block.entries == 0:
                kept.append(block)
        for block in kept:
            block.entries = 1
        self._queue = kept


class Eviction(Protocol):
    """Says which idle cached blocks go first.

    Attributes
    ----------
    reads_uses
        Whether it wants to know how often content was used.
    """

    reads_uses: bool

    def ranks(self, contents: Sequence[int], uses: Mapping[int, int]) -> Sequence[float]:
        """Return the ranks of blocks that become idle; the smallest goes first, older before newer.

        Parameters
        ----------
        contents
            Hashes of their chains, in the order in which they become idle.
        uses
            How many requests have made or reused a content so far, >= 1; empty if unread.
        """


class SharedLast:
    """Content that one request only has used goes before what several share; LRU in each."""

    reads_uses = True

    def ranks(self, contents: Sequence[int], uses: Mapping[int, int]) -> Sequence[float]:
        """Return 0 for private content, 1 for shared."""
        return [1.0 if uses[content] > 1 else 0.0 for content in contents]


class RankedPool(BlockPool):
    """A pool that evicts by rank instead of age; slower, the same otherwise.

    Parameters
    ----------
    eviction
        Ranks the blocks. `Block.entries` is here the stamp of the entry that counts.
    """

    __slots__ = ("_eviction", "_heap", "_stamps", "_uses")

    def __init__(self, blocks: int, eviction: Eviction) -> None:
        super().__init__(blocks)
        self._eviction = eviction
        self._heap: list[tuple[float, int, Block]] = []
        self._stamps = 0
        self._uses: Counter[int] = Counter()

    def acquire(self, hits: Sequence[Block]) -> None:
        """Use cached blocks."""
        super().acquire(hits)
        if self._eviction.reads_uses:
            self._uses.update(block.content for block in hits)

    def label(self, contents: Sequence[int]) -> list[Block]:
        """Give blank blocks their hashes."""
        if self._eviction.reads_uses:
            self._uses.update(contents)
        return super().label(contents)

    def release(self, labelled: Sequence[Block], blank: int) -> None:
        """Give back a request's blocks, last first."""
        freed: list[Block] = []
        for block in reversed(labelled):
            block.refs -= 1
            if block.refs == 0:
                freed.append(block)
        ranks = self._eviction.ranks([block.content for block in freed], self._uses)
        heap, stamps = self._heap, self._stamps
        for rank, block in zip(ranks, freed, strict=True):
            stamps += 1
            block.entries = stamps
            heappush(heap, (rank, stamps, block))
        self._stamps = stamps
        self.idle += len(freed)
        self.free += len(freed) + blank
        if len(self._heap) > 2 * self.total:
            self._heap = [entry for entry in self._heap if self._counts(entry)]
            heapify(self._heap)

    def take(self, count: int) -> None:
        """Take ``count`` blocks, evicting the lowest ranks."""
        self.free -= count
        while self.idle > self.free:
            entry = heappop(self._heap)
            if self._counts(entry):
                block = entry[2]
                self.idle -= 1
                if block.twin is None and self._cached[block.content] is block:
                    del self._cached[block.content]
                else:
                    self._forget_twin(block)
                block.refs = -1

    def clear(self) -> bool:
        """Forget every cached block; refused (False) while any block is in use."""
        cleared = super().clear()
        if cleared:
            self._heap.clear()
        return cleared

    def _counts(self, entry: tuple[float, int, Block]) -> bool:
        _, stamp, block = entry
        return block.refs == 0 and block.entries == stamp
