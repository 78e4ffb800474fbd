"""Paired experiments: every policy on the same runs, tuned on other runs with an equal budget.

A cell is one policy on one seed. Cells are independent, so a caller may run them in parallel; this
module only says what to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import Planned, Policy, make_policy
from planner.dispatch.table import TAIL_WEIGHT, DispatchTable, Tuning
from planner.domain.fleet import Fleet
from planner.domain.run import RunSpec
from planner.domain.trace import RunRecord, TraceRecord
from planner.sim.companions import companions_of
from planner.sim.disturbance import Disturbance
from planner.sim.grids import GRIDS
from planner.sim.horizon import Horizon, Replan, ReplanLog
from planner.sim.kernel import ClosedLoop, simulate
from planner.sim.retention import Retention

__all__ = [
    "GRIDS",
    "Cell",
    "PolicySetup",
    "Tuner",
    "World",
    "mean_latency_s",
    "run_cell",
    "run_latencies_s",
    "tune",
    "tuner",
    "tuning_score_s",
]

Tuner: TypeAlias = Generator[list["PolicySetup"], Sequence[float], "PolicySetup"]
"""Yields the setups to be scored next, takes their scores, and returns the best setup."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySetup:
    """A policy with its parameters, as it goes into an experiment.

    Parameters
    ----------
    policy
        Registered name.
    parameters
        Keyword parameters of the policy.
    table
        The dispatch table, for ``almanac``.
    """

    policy: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    table: DispatchTable | None = None

    def make(self, seed: int) -> Policy:
        """Return a fresh policy."""
        policy = make_policy(self.policy, seed=seed, **self.parameters)
        if isinstance(policy, Planned):
            policy.table = self.table
        return policy

    def with_parameters(self, parameters: Mapping[str, float]) -> PolicySetup:
        """Return a setup with some parameters changed; a table's weights count as parameters."""
        if self.table is None:
            return replace(self, parameters={**self.parameters, **parameters})
        tuning = replace(self.table.tuning, **parameters)
        return replace(self, table=replace(self.table, tuning=tuning))

    @property
    def shown_parameters(self) -> dict[str, float]:
        """Parameters for reports; those of the table included."""
        shown = dict(self.parameters)
        if self.table is not None:
            tuning: Tuning = self.table.tuning
            for name in Tuning.__dataclass_fields__:
                shown[name] = getattr(tuning, name)
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is the same for every policy of an experiment.

    Parameters
    ----------
    fleet, forecaster
        The endpoints, and what policies may believe.
    noise_cv, dispatch_s, clients, disturbances
        See `simulate`.
    retention
        See `simulate`; for policies that bring none of their own (`planner.sim.companions`).
    replan
        How the table of ``almanac`` is replaced on the way; None keeps it.
    """

    fleet: Fleet
    forecaster: Forecaster
    noise_cv: float = 0.0
    dispatch_s: float = 0.0
    clients: ClosedLoop | None = None
    disturbances: tuple[Disturbance, ...] = ()
    retention: Retention | None = None
    replan: Replan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One policy on one seed's runs."""

    setup: PolicySetup
    seed: int
    runs: Sequence[RunSpec]
    world: World


def run_cell(
    cell: Cell, timer: Callable[[], float] | None = None, log: ReplanLog | None = None
) -> list[TraceRecord]:
    """Return the records of one cell; ``log`` is told of its re-planning, if there is any."""
    world = cell.world
    policy = cell.setup.make(cell.seed)
    own = companions_of(policy)
    horizon = None
    if world.replan is not None and isinstance(policy, Planned):
        horizon = Horizon(policy, world.replan, cell.seed, log or ReplanLog())
    return simulate(
        cell.runs,
        world.fleet,
        policy,
        world.forecaster,
        seed=cell.seed,
        noise_cv=world.noise_cv,
        dispatch_s=world.dispatch_s,
        timer=timer,
        clients=world.clients,
        disturbances=world.disturbances,
        retention=own.retention or world.retention,
        eviction=own.eviction,
        horizon=horizon,
    )


def mean_latency_s(records: Iterable[TraceRecord]) -> float:
    """Return the mean run latency in seconds, infinity if no run finished."""
    latencies = run_latencies_s(records)
    return sum(latencies) / len(latencies) if latencies else math.inf


def tuning_score_s(latencies_s: Sequence[float]) -> float:
    """Return what every policy is tuned for: mean, mean and tail of run latency, multiplied, in s.

    The cube root of the product: a per cent of the mean counts twice as much as one of the tail,
    which is the noisier of the two. The tail is the mean of the percentiles from 90 to 99, which
    is less noisy than one of them. Infinity if no run finished.

    Parameters
    ----------
    latencies_s
        Run latencies, seconds, in any order; shape (runs,).
    """
    if not len(latencies_s):
        return math.inf
    tail_s = float(np.quantile(latencies_s, np.arange(0.90, 0.995, 0.01)).mean())
    return math.cbrt(float(np.mean(latencies_s)) ** 2 * tail_s)


def run_latencies_s(records: Iterable[TraceRecord]) -> list[float]:
    """Return the latencies of the runs that ended well, in seconds."""
    return [
        record.finish_s - record.arrival_s
        for record in records
        if isinstance(record, RunRecord) and record.status == "ok"
    ]


def tune(
    setup: PolicySetup,
    score: Callable[[Sequence[PolicySetup]], Sequence[float]],
    progress: Callable[[str], Any] | None = None,
) -> PolicySetup:
    """Return the setup with its parameters tuned one after the other.

    Parameters
    ----------
    setup
        Policy to tune; one without a grid comes back as it is.
    score
        Returns what is to be least of each setup on the tuning runs, the same for all of them;
        see `tuning_score_s`.
    """
    rounds = tuner(setup, progress)
    try:
        candidates = next(rounds)
        while True:
            candidates = rounds.send(score(candidates))
    except StopIteration as end:
        best: PolicySetup = end.value
        return best


def tuner(
    setup: PolicySetup,
    progress: Callable[[str], Any] | None = None,
    *,
    grid: Sequence[tuple[str, Sequence[float]]] | None = None,
) -> Tuner:
    """Tune as `tune` does, but let the caller score, so that many can be tuned side by side.

    Parameters
    ----------
    setup
        Policy to tune; one without a grid is returned as it is, nothing yielded.
    grid
        Parameters with their values, the starting value first; the policy's own unless given.
        A table of a tail objective keeps its weight of the tail.
    """
    if grid is None:
        grid = GRIDS.get(setup.policy, ())
    if setup.table is not None and setup.table.tuning.tail_weight >= TAIL_WEIGHT:
        grid = [one for one in grid if one[0] != "tail_weight"]
    if not grid:
        return setup
    best = setup.with_parameters({name: values[0] for name, values in grid})
    best_score = math.inf
    for name, values in grid:
        # The value already held was scored in the round before.
        fresh = values if math.isinf(best_score) else values[1:]
        candidates = [best.with_parameters({name: value}) for value in fresh]
        scores = yield candidates
        for candidate, value, result in zip(candidates, fresh, scores, strict=True):
            if progress:
                progress(f"{setup.policy}: {name}={value:g} -> {result:.3f} s")
            if result < best_score - 1e-9:
                best, best_score = candidate, result
    return best
