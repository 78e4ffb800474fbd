"""What goes wrong with an endpoint, and when: stragglers, drift, crashes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planner.domain.errors import InvalidInput
from planner.domain.fleet import Fleet

__all__ = ["Disturbance", "uneven"]

_RAMP_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """One fault of one endpoint.

    Parameters
    ----------
    endpoint
        Its id.
    kind
        ``slow``: step times are ``factor`` times longer from ``from_s`` to ``to_s``.
        ``ramp``: the factor grows from 1 to ``factor`` between them, in 20 steps, and stays.
        ``crash``: it is gone from ``from_s`` on, its calls fail; at ``to_s`` it is back, cold.
    from_s, to_s
        0 <= from_s < to_s; ``to_s`` may be infinite, but not of a ramp.
    factor
        > 0; several that overlap multiply.
    """

    endpoint: str
    kind: Literal["slow", "ramp", "crash"]
    from_s: float = 0.0
    to_s: float = math.inf
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("slow", "ramp", "crash"):
            raise InvalidInput(
                f"unknown kind {self.kind!r}", where="disturbance", remedy="use slow, ramp or crash"
            )
        if not 0 <= self.from_s < self.to_s or (self.kind == "ramp" and math.isinf(self.to_s)):
            raise InvalidInput(
                f"{self.kind} of {self.endpoint!r} from {self.from_s!r} to {self.to_s!r} s",
                where="disturbance",
                remedy="use 0 <= from_s < to_s, and an end for a ramp",
            )
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise InvalidInput(
                f"factor {self.factor!r}", where="disturbance", remedy="use a number > 0"
            )

    def factors(self) -> list[tuple[float, float]]:
        """Return (instant, factor from then on) in order of time; nothing for a crash."""
        if self.kind == "slow":
            ending = [] if math.isinf(self.to_s) else [(self.to_s, 1.0)]
            return [(self.from_s, self.factor), *ending]
        if self.kind == "ramp":
            length_s = self.to_s - self.from_s
            return [
                (
                    self.from_s + length_s * step / _RAMP_STEPS,
                    1.0 + (self.factor - 1.0) * step / _RAMP_STEPS,
                )
                for step in range(1, _RAMP_STEPS + 1)
            ]
        return []


def uneven(fleet: Fleet, cv: float, rng: np.random.Generator) -> list[Disturbance]:
    """Return a lasting factor per endpoint, lognormal with mean 1 and coefficient of variation cv.

    Endpoints of one type differ by 5 % or so (``cv`` 0.05) in practice.
    """
    if not cv >= 0:
        raise InvalidInput(f"cv {cv!r}", where="uneven", remedy="use a number >= 0")
    variance = math.log1p(cv * cv)
    draws = rng.standard_normal(len(fleet.endpoints))
    return [
        Disturbance(
            endpoint=endpoint.id,
            kind="slow",
            factor=math.exp(math.sqrt(variance) * float(draw) - variance / 2),
        )
        for endpoint, draw in zip(fleet.endpoints, draws, strict=True)
    ]
