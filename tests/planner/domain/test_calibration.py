"""Quantiles under conditions and under drift."""

import math

import numpy as np
import pytest

from planner.domain.calibration import QuantileTracker, adapted
from planner.domain.estimates import LEVELS, PRIOR_OUTPUT, Quantiles


def test_given_follows_the_samples():
    """Quantiles given k tokens are those of the longer samples, up to the grid of levels."""
    sample = np.random.default_rng(0).lognormal(5.0, 0.8, 200_000)
    quantiles = Quantiles.from_samples(sample)
    for elapsed in (50.0, 150.0, 400.0):
        longer = sample[sample > elapsed]
        found = quantiles.given(elapsed)
        for level in (0.25, 0.5, 0.75):
            assert found.at(level) == pytest.approx(np.quantile(longer, level), rel=0.12)
        assert found.mean == pytest.approx(longer.mean(), rel=0.12)


@pytest.mark.parametrize("elapsed", [0.5, 12.0, 180.0, 999.0, 1000.0, 5e4])
def test_given_is_ordered_and_never_below_what_has_passed(elapsed):
    """Each quantile is at least what has passed, and more passed never means less in total."""
    found = PRIOR_OUTPUT.given(elapsed)
    assert min(found.values) >= elapsed
    later = PRIOR_OUTPUT.given(1.1 * elapsed)
    assert all(a <= b for a, b in zip(found.values, later.values, strict=True))


def test_what_is_overdue_is_expected_to_take_longer_still():
    """Beyond the last quantile the remaining wait grows with the wait: the tail is heavy."""
    first, second = (PRIOR_OUTPUT.given(past).at(0.5) - past for past in (1000.0, 2000.0))
    assert second == pytest.approx(2 * first)


def test_constants_and_zeros_stay_what_they_are():
    """A constant has no tail, and a share of zeros is passed at once."""
    assert Quantiles.constant(5.0).given(9.0).values == (9.0,) * len(LEVELS)
    zeros = Quantiles(values=(0, 0, 0, 0, 0, 1, 2), mean=0.2)
    assert zeros.share_below(0.0) == 0.75
    assert zeros.given(0.0) is zeros
    assert min(zeros.given(0.5).values) >= 0.5


def test_at_reads_the_line_between_levels():
    """`at` is linear between the levels and flat beyond them."""
    for level in (0.0, 0.05, 0.2, 0.5, 0.93, 0.95, 1.0):
        assert PRIOR_OUTPUT.at(level) == pytest.approx(
            float(np.interp(level, LEVELS, PRIOR_OUTPUT.values))
        )


def test_coverage_holds_under_drift():
    """Forecasts that stay while lengths triple keep their promise once corrected."""
    rng = np.random.default_rng(1)
    observed = rng.lognormal(4.0, 0.6, 3000) * np.linspace(1.0, 3.0, 3000)
    raw = [Quantiles.from_samples(rng.lognormal(4.0, 0.6, 2000)).values] * 3000
    corrected = np.array(adapted(raw, observed, LEVELS))
    column = LEVELS.index(0.9)
    assert np.mean(observed[1500:] <= raw[0][column]) < 0.7
    assert np.mean(observed[1500:] <= corrected[1500:, column]) == pytest.approx(0.9, abs=0.015)
    assert (np.diff(corrected, axis=1) >= 0).all()


def test_a_value_that_is_no_value_teaches_nothing():
    """NaN, infinity and negative values leave the tracker as it was."""
    tracker = QuantileTracker(level=0.9)
    for value in (math.nan, math.inf, -1.0):
        tracker.update(10.0, value)
    assert (tracker.seen, tracker.offset) == (0, 0.0)
    assert tracker.correct(10.0) == pytest.approx(10.0)
