"""Recorded arrival processes, as their publishers describe them: rates and shapes by window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from planner.domain.errors import InvalidInput

__all__ = ["ArrivalWindow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalWindow:
    """How one client sent during one window.

    Parameters
    ----------
    client
        Who.
    start_s, end_s
        The window, s.
    rate_rps
        Mean rate in it, 1/s, > 0.
    law
        Distribution of the gaps.
    shape
        Its shape parameter, > 0; below 1 the gaps come in bursts. The scale follows from the rate.
    """

    client: str
    start_s: float
    end_s: float
    rate_rps: float
    law: Literal["gamma", "weibull"]
    shape: float

    def __post_init__(self) -> None:
        if (
            not self.start_s < self.end_s
            or not 0 < self.rate_rps < math.inf
            or not 0 < self.shape < math.inf
            or self.law not in ("gamma", "weibull")
        ):
            raise InvalidInput(
                f"{self!r} is no window",
                where="arrivals",
                remedy="give start_s < end_s, a positive rate and shape, gamma or weibull",
            )
