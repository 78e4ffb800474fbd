"""Load balancers that know nothing of workflows: round robin, random, least load, two choices."""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter

import numpy as np

from planner.dispatch.policies.base import Choice, Ready, least

__all__ = ["LeastLoad", "PowerOfTwo", "RandomChoice", "RoundRobin"]


class RoundRobin:
    """Each endpoint in turn."""

    name = "round_robin"

    def __init__(self) -> None:
        self._next = 0

    def choose(self, ready: Ready) -> Choice:
        """Return the next candidate in fleet order."""
        candidates = ready.candidates
        # The turn goes by fleet position, so that an excluded endpoint does not shift the others.
        place = bisect_left(candidates, self._next, key=attrgetter("index"))
        chosen = candidates[place if place < len(candidates) else 0].index
        self._next = (chosen + 1) % len(ready.fleet.states)
        return Choice(chosen, "turn")


class RandomChoice:
    """Any endpoint, with equal probability.

    Parameters
    ----------
    seed
        Of the random stream.
    """

    name = "random"

    def __init__(self, *, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def choose(self, ready: Ready) -> Choice:
        """Return a random candidate."""
        drawn = int(self._rng.integers(len(ready.candidates)))
        return Choice(ready.candidates[drawn].index, "random")


class LeastLoad:
    """The endpoint with the fewest calls in flight; the first in fleet order wins ties."""

    name = "least_load"

    def choose(self, ready: Ready) -> Choice:
        """Return the candidate with the fewest calls in flight."""
        position = least([float(state.in_flight) for state in ready.candidates])
        return Choice(ready.candidates[position].index, "load")


class PowerOfTwo:
    """The less loaded of two endpoints drawn at random, as in Ray Serve and SGLang.

    Parameters
    ----------
    seed
        Of the random stream.

    References
    ----------
    Mitzenmacher, The power of two choices in randomized load balancing, IEEE TPDS 2001.
    """

    name = "power_of_two"

    def __init__(self, *, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def choose(self, ready: Ready) -> Choice:
        """Return the better of two random candidates."""
        candidates = ready.candidates
        if len(candidates) == 1:
            return Choice(candidates[0].index, "load")
        first, second = self._rng.choice(len(candidates), size=2, replace=False)
        one, two = candidates[int(first)], candidates[int(second)]
        return Choice((one if one.in_flight <= two.in_flight else two).index, "load")
