"""Intervals of means, shares and paired differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from planner.domain.errors import InvalidInput
from planner.whatif.figures import difference, mean_figure, share_figure, student_t


@pytest.mark.parametrize(
    ("level", "degrees", "known"),
    [(0.95, 1, 12.706), (0.95, 4, 2.776), (0.99, 9, 3.250), (0.9, 30, 1.697)],
)
def test_student_t_is_that_of_the_tables(level: float, degrees: int, known: float) -> None:
    """Quantiles are those printed in statistical tables."""
    assert student_t(level, degrees) == pytest.approx(known, abs=6e-4)


def test_mean_interval_by_hand() -> None:
    """Of 9, 10 and 11: mean 10, standard error 1/sqrt(3), t = 4.303, laid in logarithms."""
    found = mean_figure([9.0, 10.0, 11.0])
    half = 4.30265 / math.sqrt(3) / 10
    assert found.value == pytest.approx(10.0)
    assert found.low == pytest.approx(10 * math.exp(-half), rel=1e-4)
    assert found.high == pytest.approx(10 * math.exp(half), rel=1e-4)


def test_intervals_cover_as_they_say() -> None:
    """The 95 % interval of six lognormal seeds holds the true mean about 95 % of the time."""
    rng = np.random.default_rng(1)
    samples = rng.lognormal(0.0, 0.4, size=(400, 6))
    inside = sum(mean_figure(row.tolist()).covers(math.exp(0.08)) for row in samples)
    assert 0.91 <= inside / 400 <= 0.98


def test_one_seed_claims_nothing() -> None:
    """A single value has no bounded interval, and none at all is refused."""
    assert not math.isfinite(mean_figure([3.0]).high)
    assert mean_figure([3.0]).to_json() == {"value": 3.0, "low": 0.0, "high": None}
    with pytest.raises(InvalidInput, match="at least one seed"):
        mean_figure([])


def test_a_share_that_was_always_met_is_not_certain() -> None:
    """Of 300 runs all in time, about one in a hundred may still be late (rule of three)."""
    found = share_figure([1.0, 1.0, 1.0], 300)
    assert found.value == found.high == 1.0
    assert found.low == pytest.approx(1 - 3 / 300, abs=1e-3)


def test_paired_difference_needs_no_luck() -> None:
    """Seeds that all change by the same factor have that change for an interval."""
    before = [5.0, 9.0, 14.0]
    found = difference(before, [0.9 * value for value in before])
    assert (found.value, found.low, found.high) == pytest.approx((-0.1, -0.1, -0.1))
    with pytest.raises(InvalidInput, match="positive mean"):
        difference([1.0], [1.0, 2.0])
