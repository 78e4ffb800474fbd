"""One step of the rolling horizon: a snapshot in, a verified plan and its dispatch table out.

Pure: the worker process and the simulator call the same function. The plans of the last step are
the hint of the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.dispatch.table import DispatchTable, LoadLevel, Ranked, Row, compile_table
from planner.domain.errors import Infeasible, InvalidInput, SolveError
from planner.domain.fleet import Fleet
from planner.domain.plan import Plan
from planner.domain.snapshot import Snapshot
from planner.solve.budget import Budget
from planner.solve.instance import build_instance
from planner.solve.mixture import Mixture, mix
from planner.solve.prices import instance_prices, site_criticality
from planner.solve.solver import PlanResult, solve_instance
from planner.solve.tables import LOAD_FACTORS
from planner.verify import verify_plan

__all__ = ["Planned", "plan_snapshot"]

_HALVINGS = 6
"""How often the load is halved until the fleet carries it; beyond a fleet is of no use at all."""
_CLASSES = 4
_SAMPLES = 8


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
        By increasing load, as far as the fleet carries it; each accepted by the checker.
    loads_rps
        Runs per second of each plan, all workflows together.
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
    serving = _serving(snapshot)
    mixture = mix(
        snapshot.workflows,
        snapshot.loads_rps(),
        snapshot.learned_estimates,
        samples=_SAMPLES,
        seed=seed,
    )
    load_rps = mixture.rate_rps
    for _ in range(_HALVINGS):
        try:
            results = _ladder(mixture, serving, load_rps, hint, budget, seed)
            break
        except Infeasible as error:
            failure = error
            load_rps /= 2
    else:
        raise failure
    table = _table(snapshot, serving, mixture, results)
    middle = min(results, key=lambda r: abs(r.plan.arrival_rate_rps - mixture.rate_rps)).plan
    return Planned(
        snapshot_version=snapshot.version,
        table=table,
        plans=tuple(result.plan for result in results),
        loads_rps=tuple(result.plan.arrival_rate_rps for result in results),
        status="optimal" if all(r.plan.status == "optimal" for r in results) else "feasible",
        objective_s=middle.objective_s,
        bound_s=middle.bound_s,
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


def _ladder(
    mixture: Mixture,
    fleet: Fleet,
    load_rps: float,
    hint: Sequence[Plan],
    budget: Budget,
    seed: int,
) -> list[PlanResult]:
    """Return checked plans at increasing loads, as far as the fleet carries them."""
    results: list[PlanResult] = []
    for position, factor in enumerate(LOAD_FACTORS):
        earlier = hint[min(position, len(hint) - 1)] if hint else None
        try:
            instance = build_instance(
                mixture.workflow,
                fleet,
                mixture.estimates,
                mixture.runs,
                arrival_rate_rps=factor * load_rps,
                run_classes=_CLASSES,
            )
            result = solve_instance(instance, mixture.runs, seed=seed, budget=budget, hint=earlier)
        except Infeasible:
            if not results:
                raise
            break
        report = verify_plan(result.plan, mixture.workflow, fleet, mixture.estimates, mixture.runs)
        if report.violations:
            raise SolveError(
                "the plan breaks rules of the independent checker: "
                + "; ".join(str(violation) for violation in report.violations)
            )
        results.append(result)
    return results


def _table(
    snapshot: Snapshot, serving: Fleet, mixture: Mixture, results: Sequence[PlanResult]
) -> DispatchTable:
    """Return the table for the whole fleet, rows named as their workflows name them."""
    slots = sum(endpoint.max_num_seqs for endpoint in serving.endpoints)
    busy = [result.busy_slots for result in results]
    levels: list[LoadLevel] = []
    for position, result in enumerate(results):
        # Half way to the next load planned for; the last bucket is open.
        occupancy = math.inf
        if position + 1 < len(results):
            least = levels[-1].occupancy + 1e-6 if levels else 1e-6
            occupancy = max((busy[position] + busy[position + 1]) / (2 * slots), least)
        prices = instance_prices(result.instance, site_criticality(result.instance, mixture.runs))
        levels.append(LoadLevel(occupancy=occupancy, plan=result.plan, prices=prices))
    table = compile_table(levels, mixture.workflow, serving, mixture.estimates)
    absent = [one.id for one in snapshot.fleet.endpoints if one.id not in set(snapshot.up)]
    return DispatchTable(
        fleet_hash=snapshot.fleet.content_hash(),
        endpoints=tuple(one.id for one in snapshot.fleet.endpoints),
        bounds=table.bounds,
        rows=tuple(_renamed(row, mixture, absent) for row in table.rows),
        tuning=table.tuning,
    )


def _renamed(row: Row, mixture: Mixture, absent: Sequence[str]) -> Row:
    """Return a row under its own workflow's names, endpoints that are down ranked last."""
    workflow_hash, site = mixture.origin(row.site)
    slowest_s = max(one.cost_s for one in row.ranked)
    last = tuple(Ranked(endpoint=one, cost_s=slowest_s, share=0.0, price=0.0) for one in absent)
    return replace(row, workflow_hash=workflow_hash, site=site, ranked=(*row.ranked, *last))
