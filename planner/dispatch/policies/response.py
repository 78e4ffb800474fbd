"""The response ratio: what Astraea, HexAGenT and SAGA's fair share rank by.

All three divide a time that has been or will be spent by a time that would be needed, and serve
the largest quotient first. They differ in the two measures:

============ ============================================== =====================================
policy       numerator                                      denominator
============ ============================================== =====================================
astraea      wait of all segments + this segment's time     this segment's time
hexagent     time in the system + time to the call's end    the run's time on an idle fleet
fair share   work that is left of a run                     time left until its deadline
============ ============================================== =====================================

References
----------
P. Brinch Hansen, An analysis of response ratio scheduling, IFIP 1971 (highest response ratio
next); the policies' own modules name the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_S", "ResponseRatio", "ratios"]

T = TypeVar("T")
LEAST_S = 1e-6
"""A denominator below this counts as this, s."""


def ratios(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the ratios of many items at once, shape as given; see `ResponseRatio`."""
    return numerators / np.maximum(denominators, LEAST_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseRatio(Generic[T]):
    """A quotient of two measures of the same thing.

    Parameters
    ----------
    numerator, denominator
        Seconds of an item.
    """

    numerator: Callable[[T], float]
    denominator: Callable[[T], float]

    def of(self, item: T) -> float:
        """Return the ratio of an item; larger is more urgent."""
        return self.numerator(item) / max(self.denominator(item), LEAST_S)
