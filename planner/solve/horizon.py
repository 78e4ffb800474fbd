"""One step of the rolling horizon: a snapshot in, a verified plan and its dispatch table out.

Pure: the worker process and the simulator call the same function. The plans of the last step are
the hint of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.dispatch.table import DispatchTable, Ranked, Row
from planner.domain.errors import Infeasible, InvalidInput
from planner.domain.fleet import Fleet
from planner.domain.plan import Plan
from planner.domain.snapshot import Snapshot
from planner.solve.budget import Budget
from planner.solve.instance import Demand
from planner.solve.tables import LOAD_FACTORS, plan_ladder, table_of

__all__ = ["Planned", "plan_snapshot"]

_HALVINGS = 6
"""How often the load is halved until the fleet carries it; beyond a fleet is of no use at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The outcome of one step.

    Parameters
    ----------
    snapshot_version
        What it was made from.
    table
        For the snapshot's whole fleet; endpoints that were down have no share.
    plans
        By increasing load, as far as the fleet carries it, and for each load by workflow; all
        accepted by the checker.
    loads_rps
        Runs per second of each load, all workflows together.
    status
        ``optimal`` if every plan is proven to be, else ``feasible``.
    objective_s, bound_s
        Expected run latency, and the proven least, at the load nearest to the expected one.
    seconds
        What the step took on the caller's timer; 0 without one.
    """

    snapshot_version: str
    table: DispatchTable
    plans: tuple[Plan, ...]
    loads_rps: tuple[float, ...]
    status: str
    objective_s: float
    bound_s: float
    seconds: float

    @property
    def gap(self) -> float:
        """Relative distance of objective and bound, >= 0."""
        return max(0.0, 1.0 - self.bound_s / self.objective_s) if self.objective_s > 0 else 0.0

    def facts(self) -> dict[str, Any]:
        """Return what people and metrics want to know of it, JSON-ready."""
        return {
            "snapshot": self.snapshot_version,
            "table": self.table.version,
            "status": self.status,
            "objective_s": round(self.objective_s, 4),
            "bound_s": round(self.bound_s, 4),
            "gap": round(self.gap, 4),
            "loads_rps": [round(load, 5) for load in self.loads_rps],
            "plan_s": round(self.seconds, 4),
        }


def plan_snapshot(
    snapshot: Snapshot,
    hint: Sequence[Plan] = (),
    budget: Budget | None = None,
    seed: int = 0,
    *,
    timer: Callable[[], float] | None = None,
) -> Planned:
    """Plan the workflows of a snapshot on its endpoints that are up.

    Parameters
    ----------
    hint
        Plans of an earlier step; they need not fit.
    budget
        For the whole step, divided equally among the loads planned for; 10 s of wall clock
        unless given.
    seed
        Of scenarios and solver.
    timer
        A clock in seconds to measure the step with.

    Raises
    ------
    InvalidInput
        If nothing arrives, no endpoint is up, or the ones that are make no fleet.
    Infeasible
        If a call fits no endpoint that is up, or hardly any load is carried.
    SolveError
        If the solver finds no plan, or the checker refuses one.
    """
    started_s = timer() if timer else 0.0
    budget = _part(budget or Budget(wall_s=10.0, relative_gap=0.02))
    serving, estimates = _serving(snapshot), snapshot.learned_estimates
    expected = _demands(snapshot)
    demands = expected
    for _ in range(_HALVINGS):
        try:
            rungs = plan_ladder(
                demands, serving, estimates, budget=budget, seed=seed, hint=hint,
            )  # fmt: skip
            break
        except Infeasible as error:
            failure = error
            demands = [replace(one, rate_rps=one.rate_rps / 2) for one in demands]
    else:
        raise failure
    loads = tuple(rung.result.instance.arrival_rate_rps for rung in rungs)
    expected_rps = sum(one.rate_rps for one in expected)
    middle = min(rungs, key=lambda one: abs(one.result.instance.arrival_rate_rps - expected_rps))
    plans = tuple(plan for rung in rungs for plan in rung.result.plans)
    return Planned(
        snapshot_version=snapshot.version,
        table=_whole(table_of(rungs, demands, serving, estimates), snapshot),
        plans=plans,
        loads_rps=loads,
        status="optimal" if all(plan.status == "optimal" for plan in plans) else "feasible",
        objective_s=middle.result.plan.objective_s,
        bound_s=middle.result.plan.bound_s,
        seconds=timer() - started_s if timer else 0.0,
    )


def _part(budget: Budget) -> Budget:
    """Return the budget of one of the loads."""
    count = len(LOAD_FACTORS)
    return replace(
        budget,
        wall_s=None if budget.wall_s is None else budget.wall_s / count,
        deterministic=None if budget.deterministic is None else budget.deterministic / count,
    )


def _serving(snapshot: Snapshot) -> Fleet:
    up = set(snapshot.up)
    endpoints = tuple(one for one in snapshot.learned_fleet.endpoints if one.id in up)
    if not endpoints:
        raise InvalidInput(
            "no endpoint is up", where="snapshot: up", remedy="plan when one has come back"
        )
    return Fleet(name=snapshot.fleet.name, endpoints=endpoints)


def _demands(snapshot: Snapshot) -> list[Demand]:
    """Return the workflows that arrive, in an order that does not depend on the snapshot's."""
    loads_rps = snapshot.loads_rps()
    demands = [
        Demand(workflow=one, rate_rps=loads_rps[one.content_hash])
        for one in sorted(snapshot.workflows, key=lambda one: one.content_hash)
        if loads_rps.get(one.content_hash, 0.0) > 0
    ]
    if not demands:
        raise InvalidInput(
            "no workflow has arrivals", where="snapshot: rates_rps", remedy="give a rate above 0"
        )
    return demands


def _whole(table: DispatchTable, snapshot: Snapshot) -> DispatchTable:
    """Return the table for the snapshot's whole fleet, endpoints that are down ranked last."""
    absent = [one.id for one in snapshot.fleet.endpoints if one.id not in set(snapshot.up)]

    def extended(row: Row) -> Row:
        slowest_s = max(one.cost_s for one in row.ranked)
        last = (Ranked(endpoint=one, cost_s=slowest_s, share=0.0, price=0.0) for one in absent)
        return replace(row, ranked=(*row.ranked, *last))

    return DispatchTable(
        fleet_hash=snapshot.fleet.content_hash(),
        endpoints=tuple(one.id for one in snapshot.fleet.endpoints),
        bounds=table.bounds,
        rows=tuple(extended(row) for row in table.rows),
        tuning=table.tuning,
    )
