"""The core that response-ratio policies share."""

import numpy as np

from planner.dispatch.policies.response import LEAST_S, ResponseRatio, ratios


def test_the_ratio_divides_its_two_measures() -> None:
    """Waited 3 s for 1 s of service: ratio 4; no service counts as the least, not as infinite."""
    ratio: ResponseRatio[tuple[float, float]] = ResponseRatio(
        numerator=lambda one: one[0] + one[1], denominator=lambda one: one[1]
    )
    assert ratio.of((3.0, 1.0)) == 4.0
    assert ratio.of((3.0, 0.0)) == 3.0 / LEAST_S


def test_ratios_of_many_are_those_of_each() -> None:
    """The array form gives the same numbers."""
    top, bottom = np.array([4.0, 1.0]), np.array([2.0, 0.0])
    assert ratios(top, bottom).tolist() == [2.0, 1.0 / LEAST_S]
