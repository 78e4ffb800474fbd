"""A bound on placements with pairwise costs: each endpoint takes one set of calls.

    cost = sum over endpoints i, calls c on i of alone[c, i] + sum over pairs on i of pair[c, d, i]

Give each call a price that is paid once, whichever endpoint takes it. Then endpoints choose apart,
each the set whose cost less prices is least, and the prices plus these minima are a bound, valid
for any prices (Lagrangian relaxation of "each call in one set"). Subgradient steps raise the price
of calls that nobody took, and lower that of calls taken twice.

Sets of up to k calls are enumerated, k as large as the number of calls allows. A larger set of n
calls costs at least

    min over sets T of k calls of n / k * alone(T) + n (n - 1) / (k (k - 1)) * pairs(T):

averaged over all T in it, that is its cost exactly. In n this is a parabola, so the best n is
known for each T.

References
----------
Held, Wolfe, Crowder, Validation of subgradient optimization, Mathematical Programming 1974.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from planner.solve.arrays import Floats, Ints

__all__ = ["SetBound", "set_bound"]

_TRUST = 1e-9
_MOST_SETS = 120_000
"""Sets times endpoints that are enumerated at most; but pairs always are."""
_LARGEST = 4
_STALE = 4
"""Steps without a better bound after which their length is halved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetBound:
    """A bound and what it was found with.

    Parameters
    ----------
    value
        A cost that no placement is below.
    prices
        Price of each call; shape (C,).
    use, both
        How much of call c endpoint i takes, how much of c and d together, in the mean over the
        later steps; shapes (C, I) and (C, C, I).
    """

    value: float
    prices: Floats
    use: Floats
    both: Floats


def set_bound(
    alone: Floats, pair: Floats, prices: Floats, *, target: float, steps: int
) -> SetBound:
    """Return a bound on the cost of any placement.

    Parameters
    ----------
    alone
        Cost of a call on an endpoint, infinite where it may not go; shape (C, I).
    pair
        Cost of two calls on one endpoint, below zero if they profit; symmetric, shape (C, C, I).
    prices
        Prices to start from; shape (C,).
    target
        The cost of some placement: what the steps aim at.
    steps
        Subgradient steps, >= 1.
    """
    calls, endpoints = alone.shape
    sets = _sets(calls, endpoints)
    # Endpoints first: a row is then what one endpoint chooses from.
    by_endpoint = np.ascontiguousarray(alone.T)
    of_pair = np.ascontiguousarray(pair.transpose(2, 0, 1))
    costs = [by_endpoint[:, one.T].sum(axis=1) for one in sets]
    pairs = [
        sum(
            (of_pair[:, one[:, x], one[:, y]] for x, y in itertools.combinations(range(size), 2)),
            start=np.zeros((endpoints, len(one))),
        )
        for size, one in enumerate(sets, start=1)
    ]
    totals = [cost + shared for cost, shared in zip(costs, pairs, strict=True)]
    use, both = np.zeros_like(alone), np.zeros_like(pair)
    best, best_prices = -math.inf, prices
    length, stale = 1.0, 0
    for step in range(steps):
        value = np.zeros(endpoints)
        chosen: list[tuple[Ints, float]] = [(np.zeros(0, dtype=np.int64), 0.0)] * endpoints
        for members, total in zip(sets, totals, strict=True):
            paid = prices[members.T].sum(axis=0)
            least = total - paid
            for i, row in enumerate(least.argmin(axis=1).tolist()):
                if least[i, row] < value[i]:
                    value[i], chosen[i] = least[i, row], (members[row], float(members.shape[1]))
        if 1 < len(sets) < calls:
            for i in range(endpoints):
                found = _larger(costs[-1][i] - paid, pairs[-1][i], len(sets), calls)
                if found is not None and found[0] < value[i]:
                    value[i], chosen[i] = found[0], (sets[-1][found[1]], found[2])
        bound = float(prices.sum() + value.sum())
        taken = np.zeros(calls)
        late = 2 * step >= steps
        for i, (members, number) in enumerate(chosen):
            if not len(members):
                continue
            scale = number / len(members)
            taken[members] += scale
            if late:
                use[members, i] += scale
                size = len(members)
                each = number * (number - 1) / (size * (size - 1)) if size > 1 else 0.0
                both[members[:, None], members, i] += each
        stale += 1
        if bound > best:
            best, best_prices, stale = bound, prices, 0
        elif stale > _STALE:
            prices, length, stale = best_prices, length / 2, 0
            continue
        missing = 1.0 - taken
        square = float(missing @ missing)
        if square <= 0:
            break
        prices = prices + length * max(target - bound, 0.0) / square * missing
    # Calls taken too often or too seldom are scaled to once.
    amount = np.maximum(use.sum(axis=1), 1e-12)
    use /= amount[:, None]
    both /= np.sqrt(amount[:, None] * amount[None])[:, :, None]
    return SetBound(
        value=best - _TRUST * (abs(best) + abs(target)), prices=best_prices, use=use, both=both
    )


@functools.lru_cache(maxsize=8)
def _sets(calls: int, endpoints: int) -> tuple[Ints, ...]:
    """Return all sets of one call, two, and so on, an array (n, size) for each size.

    Kept, since the turns of one window ask for the same ones; nobody writes to them.
    """
    out: list[Ints] = []
    for size in range(1, min(calls, _LARGEST) + 1):
        if size > 2 and math.comb(calls, size) * endpoints > _MOST_SETS:
            break
        out.append(np.array(list(itertools.combinations(range(calls), size)), dtype=np.int64))
    return tuple(out)


def _larger(base: Floats, shared: Floats, size: int, most: int) -> tuple[float, int, float] | None:
    """Return least cost, row and number of calls over sets of more than ``size`` calls.

    ``base`` and ``shared`` are costs less prices and pair costs of all sets of ``size`` calls.
    None if no such set costs less than nothing.
    """
    rows = np.flatnonzero((base < 0) | ((shared < 0) & (base < np.inf)))
    if not len(rows):
        return None
    one = base[rows] / size
    two = shared[rows] / (size * (size - 1))
    peak = np.where(two > 0, 0.5 - one / (2 * np.where(two > 0, two, 1.0)), most)
    low = np.floor(np.clip(peak, size + 1, most))
    # Of a parabola that opens downwards one of the ends is least.
    high = np.where(two > 0, np.minimum(low + 1, most), size + 1)
    values = np.stack([n * one + n * (n - 1) * two for n in (low, high)])
    side, row = np.unravel_index(int(values.argmin()), values.shape)
    number = float((low, high)[int(side)][row])
    return float(values[side, row]), int(rows[row]), number
