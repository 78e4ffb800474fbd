"""Why there is no plan: the smallest reason that can be named.

Simple proofs come first: a deadline below the critical path, a load beyond the fleet. What is
left is a conflict of several limits; CP-SAT then names a set of them that cannot hold together
(sufficient assumptions), from which those are dropped that the conflict does not need.
"""

from __future__ import annotations

import numpy as np
from ortools.sat.python import cp_model

from planner.domain.errors import Infeasible
from planner.domain.plan import PLAN_TICK_S
from planner.solve.bounds import carried_rate_rps, least_latencies
from planner.solve.constraints import add_constraints
from planner.solve.memory import Tokens
from planner.solve.question import Instance
from planner.solve.timing import Timing
from planner.solve.variables import Variables

__all__ = ["check_limits", "conflict"]

_EFFORT = 2.0
"""Deterministic time of each question to CP-SAT."""


def check_limits(instance: Instance, timing: Timing) -> float:
    """Return the rate the fleet can carry, or raise what no plan can change.

    Raises
    ------
    Infeasible
        If a hard deadline is below the critical path, the load above the capacity, or the
        contexts in service need more KV than there is; with the figures.
    """
    least = least_latencies(instance, timing)
    for w, source in enumerate(instance.sources):
        if source.hard and source.deadline_ticks is not None:
            longest = int(least[instance.scenario_source == w].max())
            if longest > source.deadline_ticks:
                raise Infeasible(
                    f"deadline {source.deadline_s:g} s of workflow {source.name!r}: its critical "
                    f"path alone takes {longest * PLAN_TICK_S:.4g} s on the fastest endpoints; "
                    f"relax the deadline, or make it soft"
                )
    carried = carried_rate_rps(instance)
    if carried < instance.arrival_rate_rps * (1 - 1e-9):
        raise Infeasible(
            f"the load asks for {instance.arrival_rate_rps:.4g} runs/s; at "
            f"{instance.utilisation_cap:.0%} of its slots the fleet carries at most {carried:.4g}; "
            f"lower the rate or add endpoints"
        )
    _check_memory(instance)
    return carried


def _check_memory(instance: Instance) -> None:
    """Raise if contexts in service alone exceed the KV of all endpoints together."""
    active = Tokens.of(instance).active
    least = (
        np.where(instance.modes, active - 1, np.iinfo(np.int64).max).min(axis=(1, 2)).clip(min=0)
    )
    need, have = int(least.sum()) * instance.run_classes, int(instance.memory.tokens.sum())
    if need > have:
        raise Infeasible(
            f"calls in service hold at least {need} tokens of context at "
            f"{instance.arrival_rate_rps:.4g} runs/s; at {instance.utilisation_cap:.0%} the KV "
            f"caches of the fleet hold {have}; lower the rate or add endpoints"
        )


def conflict(instance: Instance, timing: Timing, carried_rps: float) -> Infeasible | None:
    """Return the error that names limits which cannot hold together, None if none are proven to."""
    core = _core(instance, timing, None)
    if core is None:
        return None
    for name in sorted(core):
        if len(core) > 1:
            smaller = _core(instance, timing, core - {name})
            if smaller is not None:
                core = smaller
    rate = f"{instance.arrival_rate_rps:.4g} runs/s cannot be placed in {instance.run_classes}"
    if all("slots" in name for name in core):
        return Infeasible(
            f"{rate} whole run classes, though divided freely the fleet would carry "
            f"{carried_rps:.4g}; use more classes or lower the rate"
        )
    return Infeasible(
        f"{rate} whole run classes within {', '.join(sorted(core))} together; relax one of them "
        f"or lower the rate"
    )


def _core(instance: Instance, timing: Timing, limits: set[str] | None) -> set[str] | None:
    """Return limits among the given ones (all if None) that CP-SAT proves to conflict."""
    model = cp_model.CpModel()
    guards: dict[str, cp_model.IntVar] = {}
    add_constraints(model, Variables(model, instance, timing), guards=guards)
    chosen = {name: one for name, one in guards.items() if limits is None or name in limits}
    model.add_assumptions(list(chosen.values()))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_deterministic_time = _EFFORT
    if solver.solve(model) != cp_model.INFEASIBLE:
        return None
    core = set(solver.sufficient_assumptions_for_infeasibility())
    return {name for name, one in chosen.items() if one.index in core} or set(chosen)
