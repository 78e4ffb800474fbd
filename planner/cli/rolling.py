"""One step of the rolling horizon, from snapshot to verdict; the worker and `simulate` take it.

A plan is made and checked, its weights are tuned on runs drawn from the forecasts, and the table
is weighed against the one in use on the runs seen of late. Tuning and verdict see different runs,
so a table does not pass for having been fitted to the very runs that judge it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from planner.cli.activation import TOLERANCE, Activation, weigh_tables
from planner.dispatch.forecast import Forecaster
from planner.dispatch.table import DispatchTable
from planner.domain.errors import PlannerError
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.fleet import Fleet
from planner.domain.ids import RunId
from planner.domain.plan import Plan
from planner.domain.run import RunSpec
from planner.domain.snapshot import Snapshot
from planner.domain.trace import TraceRecord
from planner.domain.workflow import Workflow
from planner.graph.rebuild import runs_from_trace
from planner.sim.disturbance import Disturbance
from planner.sim.experiment import (
    Cell,
    PolicySetup,
    World,
    run_cell,
    run_latencies_s,
    tune,
    tuning_score_s,
)
from planner.sim.horizon import Replanned, Seen
from planner.sim.workload import poisson_arrivals, sampled_workload
from planner.solve.budget import Budget
from planner.solve.horizon import Planned, plan_snapshot

__all__ = ["Rolled", "RollingPlanner", "RollingPlanners", "RollingStep"]

LEAST_RUNS = 8
"""Recent runs below which runs drawn from the forecasts judge instead."""
_NOISE_CV = 0.02
"""Of the engines' steps in replays; what makes the replications differ."""
_TUNING_SEED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rolled:
    """What one step gave.

    Parameters
    ----------
    planned
        The plan with its table before tuning.
    table
        The candidate, tuned.
    activation
        The verdict on it.
    evidence
        ``recent`` runs or ``sampled`` ones.
    """

    planned: Planned
    table: DispatchTable
    activation: Activation
    evidence: str

    def facts(self) -> dict[str, Any]:
        """Return plan and verdict in one JSON-ready record."""
        facts = {**self.planned.facts(), "evidence": self.evidence}
        del facts["table"]
        return self.activation.to_json(**facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RollingStep:
    """Settings of the steps.

    Parameters
    ----------
    budget
        Of the solver, for a whole step.
    seed
        Of scenarios, solver, drawn runs and noise.
    tolerance
        Relative excess of mean and P95 at which a table still goes live, >= 0.
    runs
        Latest runs to weigh on, and runs to tune on, >= 1.
    replications
        Repeats of the comparison with other noise, >= 1.
    tuned
        Whether the table's weights are tuned; else they are the incumbent's, or the plan's own.
    """

    budget: Budget = field(default_factory=lambda: Budget(wall_s=10.0, relative_gap=0.02))
    seed: int = 0
    tolerance: float = TOLERANCE
    runs: int = 60
    replications: int = 2
    tuned: bool = True

    def take(
        self,
        snapshot: Snapshot,
        *,
        hint: Sequence[Plan] = (),
        incumbent: DispatchTable | None = None,
        recent: Sequence[TraceRecord] = (),
        timer: Callable[[], float] | None = None,
    ) -> Rolled:
        """Plan, tune and weigh.

        Parameters
        ----------
        hint
            Plans of the last step.
        incumbent
            The table in use; one for another fleet is bad input.
        recent
            What the trace says of late.
        timer
            A clock in seconds to measure with.

        Raises
        ------
        InvalidInput, SolveError
            See `plan_snapshot`.
        NoEndpointAvailable
            If a call of the replay fits no endpoint that is up.
        """
        planned = plan_snapshot(snapshot, hint, self.budget, self.seed, timer=timer)
        down = [one.id for one in snapshot.fleet.endpoints if one.id not in set(snapshot.up)]
        estimates = snapshot.learned_estimates
        world = World(
            fleet=snapshot.learned_fleet,
            forecaster=Forecaster(estimates, snapshot.workflows),
            noise_cv=_NOISE_CV,
            disturbances=tuple(Disturbance(endpoint=one, kind="crash") for one in down),
        )
        table = planned.table
        if self.tuned:
            table = self._tuned(table, snapshot, world)
        elif incumbent is not None:
            table = replace(table, tuning=incumbent.tuning)
        runs = runs_from_trace(recent, snapshot.workflows, estimates, last=self.runs)
        evidence = "recent"
        if len(runs) < LEAST_RUNS:
            runs, evidence = self._drawn(snapshot, self.seed), "sampled"
        activation = weigh_tables(
            table,
            incumbent,
            {self.seed + number: runs for number in range(self.replications)},
            snapshot.fleet,
            world.forecaster,
            engines=world.fleet,
            down=down,
            noise_cv=_NOISE_CV,
            tolerance=self.tolerance,
            timer=timer,
        )
        return Rolled(planned=planned, table=table, activation=activation, evidence=evidence)

    def _tuned(self, table: DispatchTable, snapshot: Snapshot, world: World) -> DispatchTable:
        seed = self.seed + _TUNING_SEED
        runs = self._drawn(snapshot, seed)

        def score(candidates: Sequence[PolicySetup]) -> list[float]:
            cells = (Cell(setup=one, seed=seed, runs=runs, world=world) for one in candidates)
            return [tuning_score_s(run_latencies_s(run_cell(cell))) for cell in cells]

        tuned = tune(PolicySetup(policy="almanac", table=table), score)
        return tuned.table or table

    def _drawn(self, snapshot: Snapshot, seed: int) -> tuple[RunSpec, ...]:
        """Return runs drawn from the forecasts at the planned load, by arrival."""
        loads = snapshot.loads_rps()
        total_rps = sum(loads.values())
        runs: list[RunSpec] = []
        for workflow in snapshot.workflows:
            load_rps = loads.get(workflow.content_hash, 0.0)
            if not load_rps:
                continue
            count = max(1, math.ceil(self.runs * load_rps / total_rps))
            arrivals = poisson_arrivals(load_rps, count, np.random.default_rng([seed, len(runs)]))
            estimates = snapshot.estimates
            estimate = estimates.workflows.get(workflow.content_hash, WorkflowEstimate())
            runs += [
                replace(run, run_id=RunId(f"{workflow.content_hash}/{run.run_id}"))
                for run in sampled_workload(
                    workflow, estimate, arrivals, seed=seed, defaults=estimates
                )
            ]
        return tuple(sorted(runs, key=lambda run: (run.arrival_s, run.run_id)))


class RollingPlanner:
    """Takes step after step inside a simulation, each with the last plans as its hint.

    Parameters
    ----------
    setup
        What it plans.
    step
        How.
    """

    def __init__(self, setup: RollingPlanners, step: RollingStep) -> None:
        self._setup = setup
        self._step = step
        self._hint: tuple[Plan, ...] = ()

    def plan(self, seen: Seen) -> Replanned:
        """Return the table if it may go live, and the measured seconds of the step."""
        setup = self._setup
        known = {str(workflow.content_hash) for workflow in setup.workflows}
        started_s = time.perf_counter()
        table = None
        try:
            rolled = self._step.take(
                Snapshot(
                    now_s=seen.now_s,
                    fleet=setup.fleet,
                    up=seen.up,
                    workflows=setup.workflows,
                    estimates=setup.estimates,
                    rates_rps={k: rate for k, rate in seen.rates_rps.items() if k in known},
                    latency={},
                    active_runs={k: count for k, count in seen.active_runs.items() if k in known},
                    horizon_s=setup.horizon_s,
                ),
                hint=self._hint,
                incumbent=seen.table,
                recent=seen.records,
                timer=time.perf_counter,
            )
        except PlannerError:
            pass  # as live: without a plan the old table stays
        else:
            self._hint = rolled.planned.plans
            table = rolled.table if rolled.activation.activate else None
        return Replanned(table=table, seconds=time.perf_counter() - started_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RollingPlanners:
    """Makes a fresh `RollingPlanner` for a seed; goes to other processes.

    Parameters
    ----------
    fleet, workflows, estimates
        What is planned.
    horizon_s
        How far each plan looks, > 0.
    step
        Its seed is replaced.
    """

    fleet: Fleet
    workflows: tuple[Workflow, ...]
    estimates: EstimateTable
    horizon_s: float
    step: RollingStep

    def __call__(self, seed: int) -> RollingPlanner:
        """Return a planner that knows nothing yet."""
        return RollingPlanner(self, replace(self.step, seed=seed))
