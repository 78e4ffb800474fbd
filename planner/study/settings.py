"""A setting of a study: fleet, work, load and forecasts, and the world and runs made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planner.dispatch.forecast import Forecaster
from planner.domain.errors import InvalidInput
from planner.domain.fleet import Fleet
from planner.domain.run import RunSpec
from planner.sim.experiment import World
from planner.study.fleets import KV, make_fleet
from planner.study.forecasts import estimates_of
from planner.study.loads import arrival_times, capacity_rps, closed_loop
from planner.study.mixes import Mix, make_mix

__all__ = ["Setting", "make_world", "workload"]

_NOISE_CV = 0.02
_DISPATCH_S = 0.0005


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One point of a study.

    Parameters
    ----------
    fleet, kv, slots
        See `planner.study.fleets.make_fleet`.
    mix
        Name in `planner.study.mixes.MIXES`.
    load
        Arrival rate over capacity, (0, 1.2]; for ``closed``, clients per slot.
    fixed_rps
        Runs per second in place of ``load`` times capacity, > 0, or None.
    arrivals, cv
        See `planner.study.loads.arrival_times`.
    forecasts
        Quality, see `planner.study.forecasts`.
    """

    fleet: str = "h02"
    kv: KV = "ample"
    slots: int = 16
    mix: str = "agents"
    load: float = 0.85
    fixed_rps: float | None = None
    arrivals: str = "poisson"
    cv: float = 3.0
    forecasts: str = "learned"

    def __post_init__(self) -> None:
        if not 0 < self.load <= 1.2:
            raise InvalidInput(
                f"{self.load!r}", where="load", remedy="use a number in (0, 1.2]: 1 is capacity"
            )
        if self.fixed_rps is not None and not self.fixed_rps > 0:
            raise InvalidInput(f"{self.fixed_rps!r}", where="fixed_rps", remedy="use a number > 0")

    @property
    def name(self) -> str:
        """Short and unique, for tables, files and ``--settings``."""
        arrivals = f"{self.arrivals}{self.cv:g}" if self.arrivals == "gamma" else self.arrivals
        load = f"{self.load:g}" if self.fixed_rps is None else f"{self.fixed_rps:g}rps"
        return f"{self.fleet}-{self.kv}-{self.slots}/{self.mix}/{arrivals}/{load}/{self.forecasts}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    def make_fleet(self) -> Fleet:
        """Return its fleet."""
        return make_fleet(self.fleet, kv=self.kv, slots=self.slots)

    def make_mix(self) -> Mix:
        """Return its mix."""
        return make_mix(self.mix)

    @property
    def rate_rps(self) -> float:
        """Runs per second."""
        if self.fixed_rps is not None:
            return self.fixed_rps
        return self.load * capacity_rps(self.make_fleet(), self.make_mix())

    def world(self, folder: Path | None = None) -> World:
        """Return what is the same for every policy; learned forecasts are kept in ``folder``."""
        fleet, mix = self.make_fleet(), self.make_mix()
        estimates = estimates_of(self.forecasts, mix, fleet, folder)
        return World(
            fleet=fleet,
            forecaster=Forecaster(estimates, mix.workflows),
            noise_cv=_NOISE_CV,
            dispatch_s=_DISPATCH_S,
            clients=closed_loop(fleet, self.load) if self.arrivals == "closed" else None,
        )


def make_world(folder: Path | None = None, **fields: Any) -> tuple[World, float]:
    """Return the world of a setting given by its fields, and its rate in runs per second."""
    setting = Setting(**fields)
    return setting.world(folder), setting.rate_rps


def workload(
    setting: Setting, seed: int, runs: int, *, data: Path | None = None
) -> tuple[RunSpec, ...]:
    """Return the runs of one seed, the same for every policy.

    The runs of a seed do not depend on the load, only the times between them do.
    """
    rng = np.random.default_rng([seed, 0])
    times = arrival_times(setting.arrivals, setting.rate_rps, runs, rng, cv=setting.cv, data=data)
    return setting.make_mix().runs(times, seed=seed)
