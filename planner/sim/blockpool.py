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

from collections import OrderedDict
from collections.abc import Sequence

__all__ = ["Block", "BlockPool"]


class Block:
    """A block whose content is known by its hash.

    Attributes
    ----------
    content
        Hash of the chain up to and including this block.
    refs
        Requests that use it; 0 means it waits in the free queue and may be reused or evicted.
    twin
        A later block with the same content, or None; vLLM does not merge duplicates.
    """

    __slots__ = ("content", "refs", "twin")

    def __init__(self, content: int) -> None:
        self.content = content
        self.refs = 1
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
    """

    __slots__ = ("_cached", "_idle", "free", "total")

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self.free = blocks
        self._cached: dict[int, Block] = {}  # hash -> the first of its blocks
        self._idle: OrderedDict[Block, None] = OrderedDict()  # cached, refs 0, oldest first

    def __repr__(self) -> str:
        return f"BlockPool(total={self.total}, free={self.free}, cached={len(self._cached)})"

    @property
    def idle_cached(self) -> int:
        """Cached blocks that nobody uses; ``free`` includes them."""
        return len(self._idle)

    def lookup(self, hashes: Sequence[int], most: int) -> list[Block]:
        """Return the longest run of leading blocks present, at most ``most`` (>= 0)."""
        hits: list[Block] = []
        find = self._cached.get
        for content in hashes[:most]:
            block = find(content)
            if block is None:
                break
            hits.append(block)
        return hits

    def acquire(self, hits: Sequence[Block]) -> None:
        """Use cached blocks; those nobody used leave the free queue."""
        idle = self._idle
        for block in hits:
            if block.refs == 0:
                del idle[block]
                self.free -= 1
            block.refs += 1

    def take(self, count: int) -> None:
        """Take ``count`` blocks (0 to ``free``) and make them blank, evicting the oldest cached.

        The caller has checked ``free``: a shortage is the scheduler's business.
        """
        self.free -= count
        evictions = len(self._idle) - self.free
        if evictions > 0:
            for _ in range(evictions):
                block, _none = self._idle.popitem(last=False)
                self._forget(block)

    def label(self, content: int) -> Block:
        """Give one of the caller's blank blocks its hash, and return it as a block in use."""
        block = Block(content)
        first = self._cached.setdefault(content, block)
        if first is not block:
            while first.twin is not None:
                first = first.twin
            first.twin = block
        return block

    def release(self, labelled: Sequence[Block], blank: int) -> None:
        """Give back a request's blocks, last first, so that a prefix outlives its tail.

        Parameters
        ----------
        labelled
            The request's blocks with a hash, in prompt order.
        blank
            How many more it holds.
        """
        freed = blank
        idle = self._idle
        for block in reversed(labelled):
            block.refs -= 1
            if block.refs == 0:
                idle[block] = None
                freed += 1
        self.free += freed

    def clear(self) -> bool:
        """Forget every cached block; refused (False) while any block is in use."""
        if self.free != self.total:
            return False
        self._cached.clear()
        self._idle.clear()
        return True

    def _forget(self, block: Block) -> None:
        first = self._cached[block.content]
        if first is block:
            if block.twin is None:
                del self._cached[block.content]
            else:
                self._cached[block.content] = block.twin
            return
        while first.twin is not block:
            assert first.twin is not None  # noqa: S101 - every labelled block is in its chain
            first = first.twin
        first.twin = block.twin
