"""How long to solve."""

from __future__ import annotations

from dataclasses import dataclass

from ortools.sat.python import cp_model

from planner.domain.errors import InvalidInput

__all__ = ["Budget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long to solve.

    Parameters
    ----------
    wall_s
        Wall-clock limit of the search in seconds, > 0, or None.
    deterministic
        Limit in the solver's deterministic time, > 0, or None.
    relative_gap
        Stop once the objective is proven to be this close to the best, >= 0.
    workers
        Threads, >= 1.
    """

    wall_s: float | None = 15.0
    deterministic: float | None = None
    relative_gap: float = 0.01
    workers: int = 2

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.wall_s, self.deterministic) if limit is not None]
        if not limits or any(not limit > 0 for limit in limits):
            raise InvalidInput(
                f"limits {self.wall_s} s and {self.deterministic}",
                where="budget",
                remedy="give a positive wall-clock or deterministic limit",
            )
        if self.workers < 1 or not self.relative_gap >= 0:
            raise InvalidInput(
                f"{self.workers} workers, gap {self.relative_gap}",
                where="budget",
                remedy="use at least one worker and a gap >= 0",
            )

    @classmethod
    def reproducible(cls, deterministic: float = 20.0, relative_gap: float = 0.01) -> Budget:
        """Return a budget under which the same question gives the same plan, bit for bit."""
        return cls(wall_s=None, deterministic=deterministic, relative_gap=relative_gap, workers=1)

    def apply(self, solver: cp_model.CpSolver, seed: int) -> None:
        """Set limits, gap, workers and seed of a solver."""
        parameters = solver.parameters
        parameters.num_workers = self.workers
        parameters.random_seed = seed
        parameters.relative_gap_limit = self.relative_gap
        if self.wall_s is not None:
            parameters.max_time_in_seconds = self.wall_s
        if self.deterministic is not None:
            parameters.max_deterministic_time = self.deterministic
