"""The KV cache of one engine: a pool of blocks with a hash-addressed prefix cache.

Blocks without content are interchangeable, so they are only counted. A block gets an identity when
its content gets a hash. That is exact, because vLLM's free queue always holds the blank blocks
before the cached ones: blank blocks return to the head, cached ones to the tail, and the head is
taken first. The queue is thus a number (the blanks) followed by a list (the cached blocks nobody
uses, least recently freed first), and a run without hashes costs a few additions.

Blocks that follow one another in a chain mostly come, go and are found together, so they are kept
as *spans*, which are cut where a request ends up using only the first part of one. A request frees
its last block first, so an idle span is evicted from its end, and one place in the queue will do.

References
----------
vllm 0.33.0: vllm/v1/core/block_pool.py, kv_cache_utils.py (``FreeKVCacheBlockQueue``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol

__all__ = ["BlockPool", "Eviction", "Holding", "RankedPool", "SharedLast", "Span"]


class Span:
    """Blocks of one chain in a row, used by the same requests.

    Attributes
    ----------
    contents
        Hash of the chain up to and including each block.
    refs
        Requests that use them; 0 means they wait in the free queue and may be reused or evicted,
        -1 that their content was dropped.
    entries
        How often the span stands in the free queue. Its last entry counts, if ``refs`` is 0.
    before
        What was cut off its beginning while in use, or None: who held the span before holds both.
    paired
        Whether it is one block that has or had a twin.
    twin
        A later block with the same content, or None; vLLM does not merge duplicates.
    """

    __slots__ = ("before", "contents", "entries", "paired", "refs", "twin")

    def __init__(self, contents: list[int], refs: int, *, paired: bool = False) -> None:
        self.contents = contents
        self.refs = refs
        self.entries = 0
        self.before: Span | None = None
        self.paired = paired
        self.twin: Span | None = None

    def __repr__(self) -> str:
        return f"Span(blocks={len(self.contents)}, refs={self.refs})"


class Holding:
    """The blocks with a hash that a request has, or would have, from the first one on.

    Attributes
    ----------
    spans, sizes
        Where they are, and how many of each; what is missing in a span that was cut since is found
        by way of `Span.before`.
    blocks
        How many they are.
    idle
        Of blocks found by `BlockPool.lookup`: how many nobody uses.
    """

    __slots__ = ("blocks", "idle", "sizes", "spans")

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.sizes: list[int] = []
        self.blocks = 0
        self.idle = 0


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

    __slots__ = ("_cached", "_gaps", "_queue", "free", "idle", "total")

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self.free = blocks
        self.idle = 0
        # By the content of their first block, the spans that begin with it; if several blocks have
        # that content each is a span of its own, and this is the first.
        self._cached: dict[int, Span] = {}
        # Idle spans, oldest first. A span that is used again leaves its entry behind, which is
        # cheaper than taking it out of the middle.
        self._queue: deque[Span] = deque()
        # Whether a block may be cached without those before it in its chain. What uses a block
        # uses those too and frees them later, so they go later; unless they are forgotten.
        self._gaps = False

    def __repr__(self) -> str:
        return f"BlockPool(total={self.total}, free={self.free}, idle={self.idle})"

    def lookup(self, hashes: Sequence[int], most: int) -> Holding:
        """Return the longest run of leading blocks present, at most ``most`` (>= 0).

        It may be acquired before anything else is done to the pool.

        Parameters
        ----------
        hashes
            A chain: equal items mean equal beginnings.
        """
        found = Holding()
        most = min(most, len(hashes))
        done = 0
        while done < most:
            span = self._cached.get(hashes[done])
            if span is None:
                break
            size = self._common(span, hashes, done, most)
            found.spans.append(span)
            found.sizes.append(size)
            done += size
            if not span.refs:
                found.idle += size
        found.blocks = done
        return found

    def acquire(self, hits: Holding) -> None:
        """Use the blocks of a `lookup`; those nobody used leave the free queue."""
        self.idle -= hits.idle
        self.free -= hits.idle
        hits.idle = 0
        spans = hits.spans
        for place, size in enumerate(hits.sizes):
            span = spans[place]
            if size < len(span.contents):
                span = spans[place] = self._cut(span, size)
            span.refs += 1

    def take(self, count: int) -> None:
        """Take ``count`` blocks (0 to ``free``) and make them blank, evicting the oldest cached.

        The caller has checked ``free``: a shortage is the scheduler's business.
        """
        self.free -= count
        evictions = self.idle - self.free
        if evictions > 0:
            self.idle = self.free
            queue = self._queue
            while evictions:
                span = queue.popleft()
                span.entries -= 1
                if span.refs == 0 and span.entries == 0:
                    size = len(span.contents)
                    if size > evictions:
                        self._drop(span, evictions)
                        span.entries = 1
                        queue.appendleft(span)
                        break
                    self._drop(span, size)
                    evictions -= size

    def forget(self, chain: Sequence[int], start: int) -> int:
        """Make the idle blocks of a chain blank, twins included; return how many.

        Parameters
        ----------
        start
            Blocks at its beginning that are left alone.
        """
        self._gaps = True
        dropped = done = 0
        while done < len(chain):
            span: Span | None = self._cached.get(chain[done])
            if span is None:
                done += 1
                continue
            size = self._common(span, chain, done, len(chain))
            skipped = min(max(start - done, 0), size)
            done += size
            if span.refs == 0 and 0 < skipped < size:
                self._set_apart(span, skipped)
                size -= skipped
            elif skipped:
                continue
            if span.refs == 0 and size < len(span.contents):
                span = self._cut(span, size)
            while span is not None:
                after = span.twin
                if span.refs == 0:
                    dropped += len(span.contents)
                    self._drop(span, len(span.contents))
                    span.refs = -1  # its entry in the free queue counts no more
                span = after
        self.idle -= dropped
        return dropped

    def label(self, holding: Holding, contents: Sequence[int]) -> None:
        """Give as many blank blocks of a request their hashes, behind those that it has."""
        cached, count = self._cached, len(contents)
        if not count:
            return
        # None is in the middle of a span: who has the blocks before it has them by that span, which
        # was cut there. Without gaps, what is not cached at first is not cached later on.
        known = not cached.keys().isdisjoint(contents) if self._gaps else contents[0] in cached
        if known:
            for content in contents:
                self._label_twin(holding, content)
            return
        spans, sizes = holding.spans, holding.sizes
        span = spans[-1] if spans else None
        # Blocks that only this request uses can be one span: nobody else holds a part of it.
        if span is None or span.refs > 1 or span.paired:
            span = cached[contents[0]] = Span([], 1)
            spans.append(span)
            sizes.append(0)
        span.contents += contents
        sizes[-1] += count
        holding.blocks += count

    def release(self, holding: Holding, blank: int) -> None:
        """Give back a request's blocks, last first, so that a prefix outlives its tail.

        Parameters
        ----------
        holding
            The request's blocks with a hash.
        blank
            How many more it holds.
        """
        freed = 0
        for span in self._let_go(holding):
            span.entries += 1
            self._queue.append(span)
            freed += len(span.contents)
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

    # -- spans --------------------------------------------------------------------------------

    @staticmethod
    def _common(span: Span, chain: Sequence[int], start: int, end: int) -> int:
        """Return how many blocks of a span a chain has from ``start`` on, and before ``end``."""
        contents = span.contents
        size = min(len(contents), end - start)
        if contents[size - 1] == chain[start + size - 1]:
            return size
        # Two chains that part stay apart.
        return bisect_left(range(size), True, key=lambda k: contents[k] != chain[start + k])

    @staticmethod
    def _let_go(holding: Holding) -> list[Span]:
        """Count one user less; return the spans that nobody uses any more, last first."""
        idle: list[Span] = []
        for last, blocks in zip(reversed(holding.spans), reversed(holding.sizes), strict=True):
            span, size = last, blocks
            while True:
                size -= len(span.contents)
                span.refs -= 1
                before = span.before
                if not span.refs:
                    span.before = None
                    idle.append(span)
                if not size:
                    break
                assert before is not None  # noqa: S101 - who held the whole holds its parts
                span = before
        return idle

    def _cut(self, span: Span, size: int) -> Span:
        """Cut the first ``size`` blocks off a span and return them; they stand in no queue."""
        contents = span.contents
        head = Span(contents[:size], span.refs)
        del contents[:size]
        if span.refs:
            head.before, span.before = span.before, head
        self._cached[head.contents[0]] = head
        self._cached[contents[0]] = span
        return head

    def _set_apart(self, span: Span, size: int) -> Span:
        """Cut as `_cut` does; idle blocks take their place in the free queue."""
        head = self._cut(span, size)
        if not span.refs:
            queue = self._queue
            # Behind the entry that counts, the last one: what comes later in a chain goes first.
            place = max(k for k, one in enumerate(queue) if one is span)
            queue.insert(place + 1, head)
            head.entries = 1
        return head

    def _drop(self, span: Span, count: int) -> None:
        """Take the last ``count`` blocks of an idle span out of the map; it keeps the others."""
        if span.paired:
            self._forget_twin(span)
        elif count == len(span.contents):
            del self._cached[span.contents[0]]
        else:
            del span.contents[-count:]

    def _label_twin(self, holding: Holding, content: int) -> None:
        """Label one block, whose content others may have as well."""
        block = Span([content], 1, paired=True)
        holding.spans.append(block)
        holding.sizes.append(1)
        holding.blocks += 1
        first = self._cached.get(content)
        if first is None:
            self._cached[content] = block
            return
        if not first.paired:
            if len(first.contents) > 1:
                first = self._set_apart(first, 1)
            first.paired = True
        while first.twin is not None:
            first = first.twin
        first.twin = block

    def _forget_twin(self, block: Span) -> None:
        """Take a block whose content others may have out of the map."""
        (content,) = block.contents
        first = self._cached[content]
        if first is block:
            if block.twin is None:
                del self._cached[content]
            else:
                self._cached[content] = block.twin
            return
        while first.twin is not block:
            assert first.twin is not None  # noqa: S101 - every cached block is in its chain
            first = first.twin
        first.twin = block.twin

    def _tidy(self) -> None:
        """Drop the queue's dead entries, so that it stays in proportion to the pool."""
        kept: deque[Span] = deque()
        for span in self._queue:
            span.entries -= 1
            if span.refs == 0 and span.entries == 0:
                kept.append(span)
        for span in kept:
            span.entries = 1
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
        Ranks the blocks. `Span.entries` is here the stamp of the entry that counts.
    """

    __slots__ = ("_eviction", "_heap", "_stamps", "_uses")

    def __init__(self, blocks: int, eviction: Eviction) -> None:
        super().__init__(blocks)
        self._eviction = eviction
        self._gaps = True
        self._heap: list[tuple[float, int, Span]] = []
        self._stamps = 0
        self._uses: Counter[int] = Counter()

    def acquire(self, hits: Holding) -> None:
        """Use cached blocks."""
        super().acquire(hits)
        if self._eviction.reads_uses:
            for span in hits.spans:
                self._uses.update(span.contents)

    def label(self, holding: Holding, contents: Sequence[int]) -> None:
        """Give blank blocks their hashes."""
        if self._eviction.reads_uses:
            self._uses.update(contents)
        super().label(holding, contents)

    def release(self, holding: Holding, blank: int) -> None:
        """Give back a request's blocks, last first."""
        freed = self._let_go(holding)
        contents = [content for span in freed for content in reversed(span.contents)]
        ranks = self._eviction.ranks(contents, self._uses)
        done = 0
        for span in freed:
            size = len(span.contents)
            for rank, count in _runs(ranks[done : done + size]):
                # Each block has a stamp of its own, so that spans can be cut.
                rest = self._cut(span, size - count) if count < size else None
                self._stamp(span, rank, self._stamps + 1)
                self._stamps += count
                done += count
                size -= count
                if rest is None:
                    break
                span = rest
        self.idle += len(contents)
        self.free += len(contents) + blank
        if len(self._heap) > 2 * self.total:
            self._heap = [entry for entry in self._heap if self._counts(entry)]
            heapify(self._heap)

    def take(self, count: int) -> None:
        """Take ``count`` blocks, evicting the lowest ranks."""
        self.free -= count
        evictions = self.idle - self.free
        self.idle = min(self.idle, self.free)
        while evictions > 0:
            entry = self._heap[0]
            span = entry[2]
            size = len(span.contents)
            if not self._counts(entry):
                heappop(self._heap)
            elif size > evictions:
                self._drop(span, evictions)
                break
            else:
                heappop(self._heap)
                self._drop(span, size)
                span.refs = -1
                evictions -= size

    def clear(self) -> bool:
        """Forget every cached block; refused (False) while any block is in use."""
        cleared = super().clear()
        if cleared:
            self._heap.clear()
        return cleared

    def _set_apart(self, span: Span, size: int) -> Span:
        head = self._cut(span, size)
        if not span.refs:
            rank = next(entry[0] for entry in self._heap if entry[1] == span.entries)
            self._stamp(head, rank, span.entries + len(span.contents))
        return head

    def _stamp(self, span: Span, rank: float, stamp: int) -> None:
        """Put an idle span where its rank belongs; the stamp is that of its last block."""
        span.entries = stamp
        heappush(self._heap, (rank, stamp, span))

    def _counts(self, entry: tuple[float, int, Span]) -> bool:
        _, stamp, span = entry
        return span.refs == 0 and span.entries == stamp


def _runs(ranks: Sequence[float]) -> list[tuple[float, int]]:
    """Return equal ranks in a row, with their number."""
    found: list[tuple[float, int]] = []
    for rank in ranks:
        if found and found[-1][0] == rank:
            found[-1] = rank, found[-1][1] + 1
        else:
            found.append((rank, 1))
    return found
