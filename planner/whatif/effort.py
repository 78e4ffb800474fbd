"""How much is simulated for an answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.domain.errors import InvalidInput
from planner.whatif.figures import LEVEL
from planner.whatif.question import Metric, Target

__all__ = ["Effort", "bounded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is simulated.

    Parameters
    ----------
    seeds
        Replications, >= 2: intervals come from their spread.
    runs
        Runs of each, warm-up included, >= 20.
    bounds
        Metrics to bound; empty leaves bounds out.
    level
        Coverage of the intervals, in (0, 1).
    first_seed
        Seeds count from here, >= 0: other seeds are other runs.
    """

    seeds: int = 6
    runs: int = 150
    bounds: tuple[Metric, ...] = ("mean_s", "p95_s")
    level: float = LEVEL
    first_seed: int = 0

    @property
    def all_seeds(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def __post_init__(self) -> None:
        for value, least, name in (
            (self.seeds, 2, "seeds"),
            (self.runs, 20, "runs"),
            (self.first_seed, 0, "first seed"),
        ):
            if value < least:
                raise InvalidInput(f"{value}", where=name, remedy=f"use at least {least}")
        if not 0 < self.level < 1:
            raise InvalidInput(f"{self.level!r}", where="level", remedy="use a number in (0, 1)")


def bounded(effort: Effort, target: Target | None) -> Effort:
    """Return the effort with the target's metric among those that are bounded."""
    if target is None or target.least or target.metric in effort.bounds or not effort.bounds:
        return effort
    return replace(effort, bounds=(*effort.bounds, target.metric))
