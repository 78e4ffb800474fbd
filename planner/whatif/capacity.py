"""The load a fleet can carry, by the planner's own relaxation: no simulation."""

from __future__ import annotations

from planner.domain.errors import Infeasible
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.graph.sampling import scenarios
from planner.whatif.question import Question

__all__ = ["capacity", "capacity_rps"]

_SCENARIOS = 64


def capacity_rps(question: Question) -> float:
    """Return the runs per second of the question's mix that its fleet can carry.

    The largest rate of the plan's own relaxation: every endpoint at its top level, call sites
    divided at will, prefixes warm.

    Raises
    ------
    Infeasible
        If a call site fits no endpoint.
    """
    found = capacity(question)
    if isinstance(found, Infeasible):
        raise found
    return found


def capacity(question: Question) -> float | Infeasible:
    """Return `capacity_rps`, or why the fleet cannot serve the mix at all."""
    from planner.solve.bounds import carried_rate_rps
    from planner.solve.instance import Demand, build_mix

    truth = question.truth or question.estimates
    loads = question.loads_rps
    graphs = [one for one in question.workflows if one.content_hash in loads]
    tiny = 1e-6 / question.rate_rps
    demands = [Demand(workflow=one, rate_rps=tiny * loads[one.content_hash]) for one in graphs]
    samples = [
        scenarios(
            one,
            truth.workflows.get(one.content_hash, WorkflowEstimate()),
            _SCENARIOS,
            seed=0,
            defaults=truth,
        )
        for one in graphs
    ]
    try:
        plain = EstimateTable(workflows=truth.workflows)
        instance = build_mix(demands, question.fleet, plain, samples, run_classes=1)
    except Infeasible as error:
        return error
    return carried_rate_rps(instance) / instance.utilisation_cap
