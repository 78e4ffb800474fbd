"""What solving returns: plans with their provenance, and the arrays behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from planner.domain.objective import MEAN, Objective, Term
from planner.domain.plan import Assignment, Plan, Retention
from planner.domain.run import RunSpec
from planner.solve.arrays import Floats
from planner.solve.heuristics import Solution
from planner.solve.memory import contended, held
from planner.solve.objective import Goal
from planner.solve.question import Instance
from planner.solve.timing import Timing

__all__ = ["PlanResult", "Progress", "Proof", "make_plans"]


@dataclass(frozen=True, slots=True)
class Progress:
    """State of the search: seconds since it began, best objective and bound in seconds."""

    time_s: float
    objective_s: float
    bound_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """Plans with what led to them.

    Parameters
    ----------
    plans
        One per workflow, in the order given.
    samples
        The runs the objective is stated over, by workflow.
    log
        One row per improvement, and a last one.
    instance, timing, solution
        The question and the answer in arrays.
    token_price
        Seconds of the objective that one KV token more would save, by endpoint; shape (I,).
    wall_s
        Search time; the plan itself carries it only when the budget is by the wall clock.
    """

    plans: tuple[Plan, ...]
    samples: tuple[tuple[RunSpec, ...], ...]
    log: tuple[Progress, ...]
    instance: Instance
    timing: Timing
    solution: Solution
    token_price: Floats
    wall_s: float

    @property
    def plan(self) -> Plan:
        """The first workflow's plan."""
        return self.plans[0]

    @property
    def scenarios(self) -> tuple[RunSpec, ...]:
        """The first workflow's runs."""
        return self.samples[0]

    @property
    def busy_slots(self) -> float:
        """Calls that the plans expect to be in service at the same time."""
        instance, solution = self.instance, self.solution
        sites = np.arange(len(instance.sites))
        busy = 0.0
        for row in solution.placements:
            level = solution.levels[instance.option_endpoint[row]]
            busy += float(instance.work_s[sites, row, level].sum())
        return busy * instance.arrival_rate_rps / instance.run_classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What is known of a solution.

    Parameters
    ----------
    bounds
        Proven least cost of each stage.
    closed
        Whether every stage ended at its bound.
    wall_s, deterministic_time
        What the search took.
    notes
        Further figures by name.
    token_price
        See `PlanResult`.
    """

    bounds: tuple[int, ...]
    closed: bool
    wall_s: float
    deterministic_time: float
    notes: Mapping[str, float]
    token_price: Floats


def make_plans(
    instance: Instance,
    timing: Timing,
    solution: Solution,
    objective: Objective,
    proof: Proof,
    *,
    seed: int,
    reproducible: bool,
) -> tuple[Plan, ...]:
    """Return the plan of each workflow; all state the joint objective and levels."""
    latencies = solution.latencies(timing)[np.newaxis]

    def value(terms: tuple[Term, ...]) -> float:
        goal = Goal(instance, Objective(terms=terms))
        return goal.seconds(int(goal.cost(latencies)[0]))

    terms = {term.name: term for term in (*MEAN.terms, *objective.terms)}
    stages = objective.stages
    first = Goal(instance, stages[0])
    cost = int(first.cost(latencies)[0])
    used = np.unique(solution.placements)
    hosts = {int(instance.option_endpoint[m]) for m in used}
    hosts |= {int(instance.option_prefill[m]) for m in used} - {-1}
    retention = _retention(instance, solution, proof.token_price)
    notes = {**proof.notes, **_memory_notes(instance, solution, proof.token_price)}
    plans = []
    for source in instance.sources:
        names = dict(zip(source.sites, source.paths, strict=True))
        plans.append(
            Plan(
                workflow_hash=source.workflow_hash,
                fleet_hash=instance.fleet_hash,
                arrival_rate_rps=source.rate_rps,
                run_classes=instance.run_classes,
                assignments=tuple(
                    _assignment(instance, solution, r, k, names[k])
                    for r in range(instance.run_classes)
                    for k in source.sites
                ),
                levels={
                    instance.endpoints[i]: instance.levels[i][solution.levels[i]]
                    for i in sorted(hosts)
                },
                objective_s=first.seconds(cost),
                bound_s=first.seconds(min(cost, proof.bounds[0])),
                status="optimal" if proof.closed and proof.bounds[0] >= cost else "feasible",
                scenarios=instance.scenarios // len(instance.sources),
                seed=seed,
                wall_s=0.0 if reproducible else round(proof.wall_s, 3),
                deterministic_time=round(proof.deterministic_time, 6),
                notes=notes,
                objective=objective,
                values={
                    name: value((Term(kind=t.kind, alpha=t.alpha),)) for name, t in terms.items()
                },
                bounds={
                    stage.name: Goal(instance, stage).seconds(bound)
                    for stage, bound in zip(stages, proof.bounds, strict=True)
                },
                weight=source.weight,
                deadline_s=source.deadline_s,
                hard_deadline=source.hard,
                retention=tuple(retention[k] for k in source.sites if k in retention),
            )
        )
    return tuple(plans)


def _assignment(instance: Instance, solution: Solution, r: int, k: int, path: str) -> Assignment:
    m = int(solution.placements[r, k])
    lane = int(instance.option_prefill[m])
    return Assignment(
        run_class=r,
        site=path,
        endpoint=instance.endpoints[instance.option_endpoint[m]],
        prefill=None if lane < 0 else instance.endpoints[lane],
        warm=bool(solution.warm[r, k]),
        keep=bool(solution.keep[r, k]),
    )


def _memory_notes(instance: Instance, solution: Solution, token_price: Floats) -> dict[str, float]:
    """Return share of KV tokens held, and price of a million token seconds, where KV is scarce."""
    tokens = held(instance, solution.placements, solution.levels, solution.warm, solution.keep)
    notes = {}
    for i in np.flatnonzero(contended(instance)).tolist():
        name = instance.endpoints[i]
        notes[f"kv_use {name}"] = float(tokens[i] / instance.memory.tokens[i])
        notes[f"kv_price_per_mtoken_s {name}"] = (
            1e6 * float(token_price[i]) * instance.arrival_rate_rps
        )
    return notes


def _retention(instance: Instance, solution: Solution, token_price: Floats) -> dict[int, Retention]:
    """Return the decision of each site whose sessions are worth a thought."""
    memory, out = instance.memory, {}
    paths = {
        k: path
        for source in instance.sources
        for k, path in zip(source.sites, source.paths, strict=True)
    }
    for k in np.flatnonzero(memory.held_tokens > 0).tolist():
        options = solution.placements[:, k]
        homes = instance.option_endpoint[options]
        probability = float(memory.later[k] / memory.visits[k])
        saved_s = float(memory.lost_work_s[k, options].mean() / memory.later[k])
        held = max(float(memory.context_tokens[k] * memory.gap_s[k]), 1e-9)
        out[k] = Retention(
            site=paths[k],
            share=float(solution.keep[:, k].mean()),
            return_probability=probability,
            gap_s=float(memory.gap_s[k]),
            saved_s=saved_s,
            value=probability * saved_s / held,
            # A token held for good is a token second each second; runs come at the rate.
            price=float(token_price[homes].mean()) * instance.arrival_rate_rps,
        )
    return out
