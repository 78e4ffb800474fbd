"""The bound by sets of calls, against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from planner.solve.call_sets import set_bound


def _cost(alone: np.ndarray, pair: np.ndarray, place: tuple[int, ...]) -> float:
    total = sum(alone[c, i] for c, i in enumerate(place))
    for c, d in itertools.combinations(range(len(place)), 2):
        if place[c] == place[d]:
            total += pair[c, d, place[c]]
    return float(total)


@pytest.mark.parametrize("seed", range(20))
def test_no_placement_is_below(seed: int) -> None:
    """Seven calls, two or three endpoints, calls that cost each other or profit: always a bound."""
    rng = np.random.default_rng(seed)
    endpoints = 2 + seed % 2
    alone = rng.uniform(0, 3, (7, endpoints))
    alone[0, 0] = np.inf
    pair = rng.uniform(-0.5 * (seed % 3), 1.0, (7, 7, endpoints))
    pair = pair + pair.transpose(1, 0, 2)
    best = min(_cost(alone, pair, one) for one in itertools.product(range(endpoints), repeat=7))
    found = set_bound(alone, pair, np.zeros(7), target=best, steps=40)
    assert found.value <= best + 1e-9
    again = set_bound(alone, pair, found.prices, target=best, steps=5)
    assert found.value - 1e-6 <= again.value <= best + 1e-9


def test_sets_within_reach_are_exact() -> None:
    """Two calls of 1 that cost each other 5 on the one cheap endpoint: one pays 3 elsewhere."""
    alone = np.array([[1.0, 3.0], [1.0, 3.0]])
    pair = np.zeros((2, 2, 2))
    pair[0, 1, 0] = pair[1, 0, 0] = 5.0
    found = set_bound(alone, pair, np.full(2, 2.0), target=4.0, steps=200)
    assert found.value == pytest.approx(4.0, abs=0.02)


def test_crowds_are_bounded_too() -> None:
    """One endpoint must take all seven: 7 x 1 and 21 pairs of 0.5, beyond any set enumerated."""
    pair = np.full((7, 7, 1), 0.5)
    prices = np.full(7, 2.5)
    found = set_bound(np.ones((7, 1)), pair, prices, target=17.5, steps=100)
    assert found.value == pytest.approx(17.5, rel=0.01)
    assert found.use == pytest.approx(np.ones((7, 1)))
