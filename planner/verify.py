"""Independent checker and evaluator of plans.

Written before the solver, from the definitions in `planner.domain.plan`, and sharing no code with
it: durations, loads and the objective are computed here from the latency rows and the sampled
runs. A plan that passes is one the rest of the system may act on.

Rules
-----
=============  =====================================================================
workflow       the plan was made for this workflow
fleet          the plan was made for this fleet
scenarios      as many scenarios as the plan says, all of this workflow
status         ``optimal`` or ``feasible``; numbers finite, rate > 0, classes >= 1;
               ``optimal`` only with a closed gap
assignment     every run class and call site is assigned exactly once, and nothing else
endpoint       assigned endpoints exist
model          an assigned endpoint serves the model the call site asks for
level          every used endpoint has a level; levels are from 1 to the slots
context        the longest prompt and answer of a site fit the endpoint
kv             calls of typical context, as many as the level, fit the KV cache
capacity       the load of an endpoint is within the cap at its level
objective      the stated objective is the recomputed one, up to the rounding of ticks
bound          the stated bound does not exceed the stated objective
=============  =====================================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.latency import LatencyRow
from planner.domain.plan import PLAN_TICK_S, UTILISATION_CAP, Plan
from planner.domain.run import RunSpec, Task
from planner.domain.workflow import CallSite, Workflow
from planner.graph.analysis import completion_s
from planner.graph.sampling import site_estimate
from planner.graph.shape import all_sites

__all__ = ["VerifyReport", "Violation", "verify_plan"]

_OPTIMAL_GAP = 1e-6
_SLACK = 1e-6
"""Relative room for float error in loads and bounds."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that the plan breaks, with the facts."""

    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What the checker found.

    Parameters
    ----------
    violations
        Broken rules; empty for a plan that may be used.
    objective_s
        Recomputed expected run latency in seconds; None if broken rules leave it undefined.
    loads
        Endpoint id -> busy calls on average; empty if undefined.
    """

    violations: tuple[Violation, ...] = ()
    objective_s: float | None = None
    loads: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no rule is broken."""
        return not self.violations


def verify_plan(
    plan: Plan,
    workflow: Workflow,
    fleet: Fleet,
    estimates: EstimateTable,
    scenarios: Sequence[RunSpec],
    *,
    utilisation_cap: float = UTILISATION_CAP,
) -> VerifyReport:
    """Check a plan against what it was made for.

    Parameters
    ----------
    plan
        The plan.
    workflow, fleet, estimates
        What it was made for.
    scenarios
        The runs its objective is stated over (`planner.graph.sampling.scenarios` with the plan's
        seed gives them).
    utilisation_cap
        Largest share of a level's slots that may be filled.

    Returns
    -------
    VerifyReport
        Never raises for a broken plan; every broken rule is listed.
    """
    sites = {str(path): site for path, site in all_sites(workflow).items()}
    endpoints = {str(endpoint.id): endpoint for endpoint in fleet.endpoints}
    found = [
        *_check_identity(plan, workflow, fleet, scenarios),
        *_check_status(plan),
        *_check_assignment(plan, set(sites), set(endpoints)),
        *_check_levels(plan, endpoints),
    ]
    if found or not scenarios:
        return VerifyReport(violations=tuple(found))
    estimate = estimates.workflows.get(workflow.content_hash, WorkflowEstimate())
    static = {
        path: round(site_estimate(site, path, estimate, estimates).shared_prefix_tokens)
        for path, site in sites.items()
    }
    calls = [call for run in scenarios for call in _calls(run, static)]
    found += _check_fit(plan, endpoints, sites, calls)
    speeds = {
        name: _Speed(estimates.endpoints.get(name, endpoints[name].latency), level, calls)
        for name, level in plan.levels.items()
    }
    objective, loads = _evaluate(plan, scenarios, static, speeds)
    for name, load in loads.items():
        room = utilisation_cap * plan.levels[name]
        if load > room * (1 + _SLACK):
            found.append(
                Violation(
                    "capacity",
                    f"endpoint {name!r} carries {load:.3f} busy calls, its level "
                    f"{plan.levels[name]} allows {room:.3f}",
                )
            )
    # Each task is rounded up by less than a tick, so the stated value may exceed the exact one.
    longest = max(len(run.tasks) for run in scenarios)
    excess = plan.objective_s - objective
    if not -_SLACK * max(1.0, objective) <= excess <= longest * PLAN_TICK_S:
        found.append(
            Violation("objective", f"stated {plan.objective_s:.4f} s, recomputed {objective:.4f} s")
        )
    return VerifyReport(violations=tuple(found), objective_s=objective, loads=loads)


def _check_identity(
    plan: Plan, workflow: Workflow, fleet: Fleet, scenarios: Sequence[RunSpec]
) -> list[Violation]:
    found = []
    if plan.workflow_hash != workflow.content_hash:
        found.append(
            Violation("workflow", f"made for {plan.workflow_hash}, this is {workflow.content_hash}")
        )
    if plan.fleet_hash != fleet.content_hash():
        found.append(
            Violation("fleet", f"made for {plan.fleet_hash}, this is {fleet.content_hash()}")
        )
    if plan.scenarios != len(scenarios) or not scenarios:
        found.append(
            Violation("scenarios", f"stated over {plan.scenarios}, given {len(scenarios)}")
        )
    strange = {run.workflow_hash for run in scenarios} - {workflow.content_hash}
    if strange:
        found.append(Violation("scenarios", f"runs of other workflows: {sorted(strange)}"))
    return found


def _check_status(plan: Plan) -> list[Violation]:
    found = []
    if plan.status not in ("optimal", "feasible"):
        found.append(Violation("status", f"{plan.status!r} is not a status of a usable plan"))
    numbers = (plan.objective_s, plan.bound_s, plan.arrival_rate_rps)
    if not all(map(math.isfinite, numbers)) or plan.arrival_rate_rps <= 0 or plan.run_classes < 1:
        found.append(
            Violation(
                "status",
                f"objective {plan.objective_s}, bound {plan.bound_s}, rate "
                f"{plan.arrival_rate_rps}, classes {plan.run_classes}",
            )
        )
    elif plan.bound_s > plan.objective_s * (1 + _SLACK) + _SLACK:
        found.append(
            Violation("bound", f"bound {plan.bound_s} s exceeds objective {plan.objective_s} s")
        )
    elif plan.status == "optimal" and plan.gap > _OPTIMAL_GAP:
        found.append(Violation("status", f"called optimal with a gap of {plan.gap:.2%}"))
    return found


def _check_assignment(plan: Plan, sites: set[str], endpoints: set[str]) -> list[Violation]:
    found = []
    given = Counter((one.run_class, one.site) for one in plan.assignments)
    wanted = {(run_class, site) for run_class in range(plan.run_classes) for site in sites}
    found += [
        Violation("assignment", f"class {run_class}, site {site!r} has no endpoint")
        for run_class, site in sorted(wanted - given.keys())
    ]
    found += [
        Violation("assignment", f"class {run_class}, site {site!r} is assigned {count} times")
        for (run_class, site), count in sorted(given.items())
        if count > 1
    ]
    found += [
        Violation("assignment", f"class {run_class}, site {site!r} is not part of the plan")
        for run_class, site in sorted(given.keys() - wanted)
    ]
    unknown = sorted({one.endpoint for one in plan.assignments} - endpoints)
    found += [Violation("endpoint", f"the fleet has no {name!r}") for name in unknown]
    return found


def _check_levels(plan: Plan, endpoints: Mapping[str, Endpoint]) -> list[Violation]:
    found = []
    used = {one.endpoint for one in plan.assignments}
    found += [
        Violation("level", f"endpoint {name!r} is used without a level")
        for name in sorted(used - plan.levels.keys())
    ]
    for name, level in sorted(plan.levels.items()):
        if name not in endpoints:
            found.append(Violation("level", f"level for unknown endpoint {name!r}"))
        elif not 1 <= level <= endpoints[name].max_num_seqs:
            found.append(
                Violation(
                    "level",
                    f"endpoint {name!r} at level {level}, it has {endpoints[name].max_num_seqs} "
                    "slots",
                )
            )
    return found


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a scenario, in tokens: uncached and cached prompt, output."""

    site: str
    uncached: int
    cached: int
    output: int

    @property
    def prompt(self) -> int:
        return self.uncached + self.cached


def _calls(run: RunSpec, static: Mapping[str, int]) -> list[_Call]:
    """Return the calls of a run with the longest known start of each prompt as cached."""
    earlier: dict[str, list[Task]] = {}
    calls = []
    for task in run.tasks:
        if task.site is None:
            continue
        cached = min(static[task.site], task.prompt_tokens - 1)
        for old in earlier.get(task.site, ()):
            if task.prompt[: len(old.prompt)] != old.prompt:
                continue
            known = old.prompt_tokens
            rest = task.prompt[len(old.prompt) :]
            if rest and (rest[0].key, rest[0].tokens) == (old.output_key, old.output_tokens):
                known += old.output_tokens
            cached = max(cached, min(known, task.prompt_tokens - 1))
        earlier.setdefault(task.site, []).append(task)
        calls.append(
            _Call(
                site=task.site,
                uncached=task.prompt_tokens - cached,
                cached=cached,
                output=task.output_tokens,
            )
        )
    return calls


def _check_fit(
    plan: Plan,
    endpoints: Mapping[str, Endpoint],
    sites: Mapping[str, CallSite],
    calls: Sequence[_Call],
) -> list[Violation]:
    found = []
    longest: dict[str, int] = {}
    for call in calls:
        longest[call.site] = max(longest.get(call.site, 0), call.prompt + call.output)
    for site, name in sorted({(one.site, one.endpoint) for one in plan.assignments}):
        endpoint = endpoints[name]
        asked = sites[site].model
        if asked is not None and asked != endpoint.model:
            message = f"site {site!r} asks for {asked!r}, {name!r} serves {endpoint.model!r}"
            found.append(Violation("model", message))
        room = min(endpoint.kv_tokens, endpoint.max_model_len)
        if longest.get(site, 0) > room:
            found.append(
                Violation(
                    "context",
                    f"site {site!r} needs {longest[site]} tokens, {name!r} holds {room}",
                )
            )
    typical = _typical_context(calls)
    for name, level in sorted(plan.levels.items()):
        if level > 1 and level * typical > endpoints[name].kv_tokens:
            found.append(
                Violation(
                    "kv",
                    f"{level} calls of {typical:.0f} tokens exceed the "
                    f"{endpoints[name].kv_tokens} of {name!r}",
                )
            )
    return found


def _typical_context(calls: Sequence[_Call]) -> float:
    total = sum(call.output for call in calls)
    held = sum(call.output * (call.prompt + call.output / 2) for call in calls)
    return held / total if total else 0.0


class _Speed:
    """Service times of one endpoint at one level."""

    def __init__(self, row: LatencyRow, level: int, calls: Sequence[_Call]) -> None:
        self._row = row
        self._token_s = 0.0
        if calls:
            mean_output = sum(call.output for call in calls) / len(calls)
            stalls = [row.prefill_marginal_s(call.uncached, call.cached) for call in calls]
            step = row.decode_step_s(level, level * _typical_context(calls))
            self._token_s = step + (level - 1) * sum(stalls) / len(stalls) / mean_output

    def service_s(self, call: _Call) -> float:
        return self._row.prefill_s(call.uncached, call.cached) + call.output * self._token_s


def _evaluate(
    plan: Plan,
    scenarios: Sequence[RunSpec],
    static: Mapping[str, int],
    speeds: Mapping[str, _Speed],
) -> tuple[float, dict[str, float]]:
    """Return the expected run latency (s) and the busy calls per endpoint."""
    where = {(one.run_class, one.site): one.endpoint for one in plan.assignments}
    weight = 1.0 / (plan.run_classes * len(scenarios))
    objective = 0.0
    loads = dict.fromkeys(sorted(speeds), 0.0)
    for run in scenarios:
        calls = _calls(run, static)
        for run_class in range(plan.run_classes):
            upcoming = iter(calls)
            durations = []
            for task in run.tasks:
                if task.site is None:
                    durations.append(task.delay_s)
                    continue
                name = where[run_class, task.site]
                service = speeds[name].service_s(next(upcoming))
                loads[name] += plan.arrival_rate_rps * weight * service
                durations.append(service)
            objective += weight * completion_s(run, durations)
    return objective, loads
