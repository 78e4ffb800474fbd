"""Which prompt prefixes endpoints are believed to hold, for one endpoint and for all at once.

A prompt's fingerprint is a chain: equal items mean equal text up to and including them. So it is
enough to keep a few items of each chain, its *anchors*: the first 16, then eight per doubling of
the depth, and the last one. A prompt that goes on from an earlier one is matched exactly (it meets
the earlier one's last item); one that branches off in between is matched to within an eighth of
the depth, never too far. A prompt of 500 items has 56 anchors.

Each endpoint forgets by least recent use, tail before head, so that presence along the anchors of
a chain is monotone. The directory has for each item the set of endpoints that hold it, as the bits
of one integer; a walk down a chain's anchors then finds the matches of all endpoints together.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import takewhile
from operator import itemgetter
from typing import TypeAlias

__all__ = ["Holders", "News", "PrefixIndex", "concerns", "levels"]

News: TypeAlias = list[tuple[int, int]]
"""What is new at an endpoint: for each change a depth and the item there, see `Holders.changed`."""

_DENSE = 16
_PER_OCTAVE = 8


def _anchor_depths() -> tuple[int, ...]:
    depths = list(range(1, _DENSE + 1))
    while depths[-1] < 1 << 24:
        octave = 1 << (depths[-1].bit_length() - 1)
        depths.append(depths[-1] + octave // _PER_OCTAVE)
    return tuple(depths)


_DEPTHS = _anchor_depths()
"""Anchored depths: the number of leading items that each anchor stands for."""
_PLACES = tuple(depth - 1 for depth in _DEPTHS)
"""Where the anchors are in a chain."""

_TAIL = 32
"""Last items of a prompt that are looked through for the end of the one it goes on from."""

_NEWS = 64
"""Changes of an endpoint that are told apart."""

_FORKS = 1024
"""Beginnings whose forks are kept."""

_TAKE = tuple(itemgetter(*_PLACES[: max(2, n)]) for n in range(len(_DEPTHS)))
"""By number of anchors (two at least): takes the anchors out of a chain."""


class Holders(dict[int, int]):
    """For each item the endpoints that hold it: bit i is set for endpoint i.

    Parameters
    ----------
    version
        Number of the first change.

    Attributes
    ----------
    version
        Number of the last change.
    """

    __slots__ = ("_news", "version")

    def __init__(self, version: int = 0) -> None:
        super().__init__()
        self.version = version
        # By the bit of an endpoint: numbers of its last changes, rising, and what was new.
        self._news: dict[int, deque[tuple[int, tuple[int, int]]]] = {}

    def changed(self, bit: int, depth: int = 0, item: int = 0) -> None:
        """Note a change of what an endpoint holds.

        Parameters
        ----------
        bit
            The endpoint.
        depth, item
            The first new item of a chain that is held deeper than before, and how many items of the
            chain there are up to it; all else must be as before. A depth of 0: any change.
        """
        self.version += 1
        news = self._news.get(bit)
        if news is None:
            news = self._news[bit] = deque(maxlen=_NEWS)
        news.append((self.version, (depth, item)))

    def since(self, version: int) -> dict[int, News]:
        """Return what has changed since a version, by the endpoint's bit; see `concerns`."""
        found: dict[int, News] = {}
        for bit, news in self._news.items():
            if news[-1][0] > version:
                fresh = [new for _, new in takewhile(lambda one: one[0] > version, reversed(news))]
                found[bit] = fresh if len(fresh) < _NEWS else [(0, 0)]
        return found


def concerns(news: News, prefix: Sequence[int]) -> bool:
    """Return whether changes may make a difference to how deep a chain is held.

    What is new in another chain does so only if this one has its first new item, too: equal items
    mean that all before is equal.
    """
    size = len(prefix)
    for depth, item in news:  # noqa: SIM110 - half the time of any()
        if not depth or (depth <= size and prefix[depth - 1] == item):
            return True
    return False


def _anchors(prefix: Sequence[int]) -> tuple[int, ...]:
    count = bisect_right(_DEPTHS, len(prefix))
    return _TAKE[count](prefix) if count > 1 else tuple(prefix[:count])


def levels(prefix: Sequence[int], holders: Holders, forks: dict[int, int]) -> list[tuple[int, int]]:
    """Return how deep a chain is held, and by whom.

    Parameters
    ----------
    holders
        Who holds each item.
    forks
        By first item, the anchor at which the last chain left what others share; a guess, kept
        here. Chains that begin alike tend to part at the same place: at the end of a system prompt.

    Returns
    -------
    list of (int, int)
        Depths, rising, with the bits of the endpoints that hold at least so many leading items; a
        depth for each endpoint that holds no more than that.
    """
    if not prefix:
        return []
    get, places, first = holders.get, _PLACES, prefix[0]
    who = get(first, 0)
    if not who:
        return []
    found: list[tuple[int, int]] = []
    size = len(prefix)
    count = bisect_left(places, size)
    # Most prompts go on from an earlier one: who holds all of that is found from the end.
    tail = prefix[: -_TAIL - 1 : -1]
    deepest = next(filter(holders.__contains__, tail), None)
    ends = ends_at = 0
    if deepest is not None:
        ends = holders[deepest] & who
        ends_at = size - tail.index(deepest)
    who ^= ends
    next_, fork = 1, forks.get(first, 0)
    while who:
        # All in `who` hold the anchor before `next_`; find the first one that not all of them hold.
        end, deeper, guess = count, 0, fork
        while next_ < end:
            middle = guess if next_ <= guess < end else (next_ + end) >> 1
            guess = fork - 1 if middle == fork else 0  # is it held by all? then `fork` is it
            here = get(prefix[places[middle]], 0) & who
            if here == who:
                next_ = middle + 1
            else:
                end, deeper = middle, here
        if not found and next_ != fork:
            if len(forks) >= _FORKS:
                forks.clear()
            forks[first] = next_
        # Past their last anchor they may hold the last item of an earlier prompt.
        stay, reached = who ^ deeper, deeper | ends
        top = places[next_ - 1] + 1
        gap = prefix[(places[next_] if next_ < count else size) - 1 : top - 1 : -1]
        below: list[tuple[int, int]] = []
        for item in filter(holders.__contains__, gap):
            here = holders[item] & stay
            if here:
                reached |= here
                below.append((prefix.index(item, top) + 1, reached))
                stay ^= here
                if not stay:
                    break
        if stay:
            found.append((top, who | ends))
        if below:
            found.extend(reversed(below))
        who = deeper
        next_ += 1
    if ends:
        found.append((ends_at, ends))
    return found


class PrefixIndex:
    """The prefixes one endpoint is believed to hold: an LRU set of anchors.

    Parameters
    ----------
    capacity_tokens
        KV cache of the endpoint in tokens; beyond it the least recently used items go.
    """

    __slots__ = ("_asked", "_bit", "_held", "_holders", "_items", "_matched", "capacity_tokens")

    def __init__(self, capacity_tokens: float) -> None:
        self.capacity_tokens = capacity_tokens
        self._items: OrderedDict[int, float] = OrderedDict()
        self._held = 0.0
        # A decision asks for a prompt, and then notes that it was sent.
        self._asked: Sequence[int] | None = None
        self._matched = 0
        self._holders = Holders()
        self._bit = 1

    def join(self, holders: Holders, bit: int) -> None:
        """Note what is held, now and from now on, in a directory of many endpoints."""
        self._holders, self._bit = holders, bit
        holders.changed(bit)
        for item in self._items:
            holders[item] = holders.get(item, 0) | bit

    def match(self, prefix: Sequence[int]) -> int:
        """Return how many leading items of ``prefix`` are held."""
        if prefix is not self._asked:
            self._asked, self._matched = prefix, self._match(prefix)
        return self._matched

    def _match(self, prefix: Sequence[int]) -> int:
        items = self._items
        if not prefix or prefix[0] not in items:
            return 0
        size = len(prefix)
        low, high = 0, bisect_right(_DEPTHS, size)  # anchor low is held, anchor high is not
        while high - low > 1:
            middle = (low + high) >> 1
            if prefix[_DEPTHS[middle] - 1] in items:
                low = middle
            else:
                high = middle
        top = _DEPTHS[low]
        gap = prefix[min(_DEPTHS[low + 1] - 1, size) - 1 : top - 1 : -1]
        item = next(filter(items.__contains__, gap), None)
        return top if item is None else prefix.index(item, top) + 1

    def record(self, prefix: Sequence[int], item_tokens: float) -> None:
        """Note that a prompt with this chain was sent there."""
        if not prefix:
            return
        items, holders, bit = self._items, self._holders, self._bit
        anchors = _anchors(prefix)
        count, size, before = len(anchors), len(prefix), len(items)
        matched = self.match(prefix)
        self._asked = None
        old = bisect_right(_DEPTHS, matched, hi=count)
        last, top = prefix[-1], _DEPTHS[count - 1]
        # What the last item of an earlier prompt stands for is handed on to the next one after it.
        if old and matched > _DEPTHS[old - 1] and matched < size:
            earlier = prefix[matched - 1]
            self._held -= items[earlier]
            items[earlier] = 0.0
        if last in items:
            items.move_to_end(last)
        elif size > top:
            items[last] = (size - top) * item_tokens
            self._held += items[last]
            holders[last] = holders.get(last, 0) | bit
        gap, tokens = 0, 0.0
        for place in range(count - 1, old - 1, -1):
            between = _DEPTHS[place] - (_DEPTHS[place - 1] if place else 0)
            if between != gap:  # most are the same, and so is the number that is kept of them
                gap, tokens = between, between * item_tokens
            anchor = anchors[place]
            # None of these is held, unless the chain was made up.
            self._held += tokens - items.pop(anchor, 0.0)
            items[anchor] = tokens
            holders[anchor] = holders.get(anchor, 0) | bit
        added, usual = len(items) - before, True
        try:
            deque(map(items.move_to_end, anchors[:old][::-1]), maxlen=0)
        except KeyError:  # the chain was made up: not all of them are held
            usual = False
            held = filter(items.__contains__, anchors[:old][::-1])
            deque(map(items.move_to_end, held), maxlen=0)
        while self._held > self.capacity_tokens and items:
            usual = False
            self._forget(*items.popitem(last=False))
        if not usual or added not in (count - old, count - old + 1):
            holders.changed(bit)
        elif old < count:
            holders.changed(bit, _DEPTHS[old], anchors[old])
        elif added:
            holders.changed(bit, size, last)

    def _forget(self, item: int, tokens: float) -> None:
        self._held -= tokens
        rest = self._holders[item] & ~self._bit
        if rest:
            self._holders[item] = rest
        else:
            del self._holders[item]

    def clear(self) -> None:
        """Forget everything (the endpoint restarted)."""
        self._holders.changed(self._bit)
        self._asked = None
        for item, tokens in self._items.items():
            self._forget(item, tokens)
        self._items.clear()
        self._held = 0.0

    def newest(self, most: int) -> list[tuple[int, float]]:
        """Return up to ``most`` items with their tokens, the least recently used first."""
        items = list(self._items.items())
        return items[max(0, len(items) - most) :]

    def restore(self, items: Iterable[tuple[int, float]]) -> None:
        """Take up what `newest` returned, in its order."""
        self._holders.changed(self._bit)
        self._asked = None
        for item, tokens in items:
            self._held += tokens - self._items.pop(item, 0.0)
            self._items[item] = tokens
            self._holders[item] = self._holders.get(item, 0) | self._bit
        while self._held > self.capacity_tokens and self._items:
            self._forget(*self._items.popitem(last=False))

    @property
    def held_tokens(self) -> float:
        """Tokens believed to be cached."""
        return self._held
