"""Independent checker and evaluator of plans.

Written before the solver, from the definitions in `planner.domain.plan` and
`planner.domain.objective`, and sharing no code with it: durations, loads, KV tokens and objectives
are computed here from the latency rows and the sampled runs. A plan that passes is one the rest of
the system may act on.

Rules
-----
=============  =====================================================================
workflow       the plan was made for this workflow
fleet          the plan was made for this fleet
scenarios      as many scenarios as the plan says, all of this workflow
status         ``optimal`` or ``feasible``; numbers finite, rate > 0, classes >= 1;
               ``optimal`` only with a closed gap
together       plans made together agree on objective, levels, classes and bound
assignment     every run class and call site is assigned exactly once, and nothing else
endpoint       assigned endpoints exist
role           a whole call goes to an endpoint of role ``both``; a pair is a prefill and
               a decode endpoint of the same model and KV size
model          an assigned endpoint serves the model the call site asks for
level          every used endpoint has a level; levels are from 1 to the slots
context        the longest prompt and answer of a site fit the endpoint
kv             calls of typical context, as many as the level, fit the KV cache
capacity       the load of an endpoint is within the cap at its level
memory         contexts, prefixes and sessions kept are within the cap of the KV cache
deadline       every scenario keeps a hard deadline
objective      the stated objective, and each stated value, is the recomputed one, up to
               the rounding of ticks
retention      the stated decisions are those of the assignments
bound          the stated bound does not exceed the stated objective
=============  =====================================================================
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.latency import LatencyRow
from planner.domain.objective import MEAN, mix_shares
from planner.domain.plan import (
    PLAN_TICK_S,
    TRANSFER_SETUP_S,
    UTILISATION_CAP,
    Assignment,
    Plan,
)
from planner.domain.run import RunSpec, Task
from planner.domain.workflow import CallSite, Workflow
from planner.graph.analysis import completion_s, finish_times
from planner.graph.sampling import site_estimate
from planner.graph.shape import all_sites
from planner.verify_objective import Outcome, objective_value, term_value

__all__ = ["VerifyReport", "Violation", "verify_plan", "verify_plans"]

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
        Broken rules; empty for plans that may be used.
    objective_s
        Recomputed value of the objective in seconds; None if broken rules leave it undefined.
    loads
        Endpoint id -> busy calls on average (of a prefill lane: the share of time); empty if
        undefined.
    tokens
        Endpoint id -> KV tokens held on average; empty if undefined.
    """

    violations: tuple[Violation, ...] = ()
    objective_s: float | None = None
    loads: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, float] = field(default_factory=dict)

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
    """Check the plan of one workflow that was planned alone; see `verify_plans`."""
    return verify_plans(
        [plan], [workflow], fleet, estimates, [scenarios], utilisation_cap=utilisation_cap
    )


def verify_plans(
    plans: Sequence[Plan],
    workflows: Sequence[Workflow],
    fleet: Fleet,
    estimates: EstimateTable,
    samples: Sequence[Sequence[RunSpec]],
    *,
    utilisation_cap: float = UTILISATION_CAP,
) -> VerifyReport:
    """Check plans that were made together against what they were made for.

    Parameters
    ----------
    plans, workflows, samples
        One each per workflow, in the same order. The samples are the runs the objective is stated
        over (`planner.graph.sampling.scenarios` with the plan's seed gives them).
    fleet, estimates
        What the plans were made for.
    utilisation_cap
        Largest share of a level's slots, and of a KV cache, that may be filled.

    Returns
    -------
    VerifyReport
        Never raises for a broken plan; every broken rule is listed.
    """
    endpoints = {str(endpoint.id): endpoint for endpoint in fleet.endpoints}
    found = _check_together(plans)
    for plan, workflow, runs in zip(plans, workflows, samples, strict=True):
        found += _check_identity(plan, workflow, fleet, runs)
        found += _check_status(plan)
        found += _check_assignment(plan, set(map(str, all_sites(workflow))), endpoints)
        found += _check_levels(plan, endpoints)
    if found or not all(samples):
        return VerifyReport(violations=tuple(found))
    total_rps = sum(plan.arrival_rate_rps for plan in plans)
    parts = [
        _Part(plan, workflow, runs, estimates, plan.arrival_rate_rps / total_rps)
        for plan, workflow, runs in zip(plans, workflows, samples, strict=True)
    ]
    everything = _Traffic([call for part in parts for call in part.all_calls()])
    for part in parts:
        found += _check_fit(part, endpoints)
    found += _check_levels_fit(plans[0], endpoints, everything)
    book = _Book(plans[0], endpoints, estimates, everything)
    outcomes = _evaluate(parts, book)
    found += book.overfull(utilisation_cap)
    found += _check_deadlines(parts, outcomes)
    found += _check_values(plans, parts, outcomes)
    for part in parts:
        found += _check_retention(part)
    flat = [one for rows in outcomes for one in rows]
    return VerifyReport(
        violations=tuple(found),
        objective_s=objective_value(plans[0].objective, flat),
        loads=book.loads,
        tokens=book.tokens,
    )


def _check_together(plans: Sequence[Plan]) -> list[Violation]:
    first = plans[0]
    return [
        Violation("together", f"the plan of {plan.workflow_hash} states another {name}")
        for plan in plans[1:]
        for name in ("objective", "levels", "run_classes", "objective_s", "bound_s", "values")
        if getattr(plan, name) != getattr(first, name)
    ]


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


def _check_assignment(
    plan: Plan, sites: set[str], endpoints: Mapping[str, Endpoint]
) -> list[Violation]:
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
    unknown = sorted({name for one in plan.assignments for name in _ends(one)} - endpoints.keys())
    found += [Violation("endpoint", f"the fleet has no {name!r}") for name in unknown]
    if not unknown:
        found += [
            Violation("role", f"class {one.run_class}, site {one.site!r}: {' > '.join(_ends(one))}")
            for one in plan.assignments
            if not _roles_fit(*(endpoints[name] for name in _ends(one)))
        ]
    return found


def _ends(one: Assignment) -> tuple[str, ...]:
    """Return the endpoints of an assignment, the prefill endpoint of a pair first."""
    return (one.endpoint,) if one.prefill is None else (one.prefill, one.endpoint)


def _roles_fit(*ends: Endpoint) -> bool:
    if len(ends) == 1:
        return ends[0].role == "both"
    first, last = ends
    return (first.role, last.role) == ("prefill", "decode") and (
        first.model,
        first.kv_bytes_per_token,
        first.block_tokens,
    ) == (last.model, last.kv_bytes_per_token, last.block_tokens)


def _check_levels(plan: Plan, endpoints: Mapping[str, Endpoint]) -> list[Violation]:
    found = []
    used = {name for one in plan.assignments for name in _ends(one)}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """A call of a scenario, in tokens: uncached and cached prompt, output.

    ``session`` says that more than the static prefix is cached; ``weight`` is how many calls per
    run of all workflows it stands for.
    """

    site: str
    uncached: int
    cached: int
    output: int
    session: bool
    weight: float

    @property
    def prompt(self) -> int:
        return self.uncached + self.cached


class _Traffic:
    """Means over all calls of all workflows."""

    def __init__(self, calls: Sequence[_Call]) -> None:
        self.calls = calls
        decoded = sum(call.weight * call.output for call in calls)
        held = sum(call.weight * call.output * (call.prompt + call.output / 2) for call in calls)
        self.context = held / decoded if decoded else 0.0
        self._decoded = decoded

    def stall_s(self, row: LatencyRow) -> float:
        """Return the prefill seconds per token decoded."""
        stalls = sum(
            call.weight * row.prefill_marginal_s(call.uncached, call.cached) for call in self.calls
        )
        return stalls / self._decoded


class _Part:
    """One workflow with its plan, and its runs seen as calls."""

    def __init__(
        self,
        plan: Plan,
        workflow: Workflow,
        runs: Sequence[RunSpec],
        estimates: EstimateTable,
        share: float,
    ) -> None:
        self.plan, self.runs, self.share = plan, runs, share
        self.sites: dict[str, CallSite] = {str(k): v for k, v in all_sites(workflow).items()}
        estimate = estimates.workflows.get(workflow.content_hash, WorkflowEstimate())
        self.static = {
            path: round(site_estimate(site, path, estimate, estimates).shared_prefix_tokens)
            for path, site in self.sites.items()
        }
        self.weight = share / len(runs)
        self.calls = [_calls(run, self.static, self.weight) for run in runs]
        self.where = {(one.run_class, one.site): one for one in plan.assignments}

    def all_calls(self) -> Iterator[_Call]:
        """Yield the calls of all runs."""
        for calls in self.calls:
            yield from calls

    def prefix(self, site: str) -> str:
        """Return the identity of a site's static prefix."""
        return self.sites[site].static_prefix_hash or f"{self.plan.workflow_hash}:{site}"

    def session_sites(self) -> set[str]:
        """Return the sites at which runs go on with a session."""
        return {call.site for call in self.all_calls() if call.session}


def _calls(run: RunSpec, static: Mapping[str, int], weight: float) -> list[_Call]:
    """Return the calls of a run with the longest known start of each prompt as cached."""
    earlier: dict[str, list[Task]] = {}
    calls = []
    for task in run.tasks:
        if task.site is None:
            continue
        prefix = cached = min(static[task.site], task.prompt_tokens - 1)
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
                session=cached > prefix,
                weight=weight,
            )
        )
    return calls


def _check_fit(part: _Part, endpoints: Mapping[str, Endpoint]) -> list[Violation]:
    found = []
    longest: dict[str, int] = {}
    for call in part.all_calls():
        longest[call.site] = max(longest.get(call.site, 0), call.prompt + call.output)
    for site, name in sorted(
        {(one.site, name) for one in part.plan.assignments for name in _ends(one)}
    ):
        endpoint = endpoints[name]
        asked = part.sites[site].model
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
    return found


def _check_levels_fit(
    plan: Plan, endpoints: Mapping[str, Endpoint], traffic: _Traffic
) -> list[Violation]:
    return [
        Violation(
            "kv",
            f"{level} calls of {traffic.context:.0f} tokens exceed the "
            f"{endpoints[name].kv_tokens} of {name!r}",
        )
        for name, level in sorted(plan.levels.items())
        if level > 1 and level * traffic.context > endpoints[name].kv_tokens
    ]


class _Book:
    """Adds up what each endpoint has to do and to hold."""

    def __init__(
        self,
        plan: Plan,
        endpoints: Mapping[str, Endpoint],
        estimates: EstimateTable,
        traffic: _Traffic,
    ) -> None:
        self._endpoints, self._levels = endpoints, plan.levels
        self._rows = {
            name: estimates.endpoints.get(one.id, one.latency) for name, one in endpoints.items()
        }
        self._traffic = traffic
        self._token_s: dict[tuple[str, int], float] = {}
        self.loads = dict.fromkeys(sorted(plan.levels), 0.0)
        self.tokens = dict.fromkeys(sorted(plan.levels), 0.0)
        self._prefixes: dict[tuple[str, str], int] = {}

    def token_s(self, name: str, level: int) -> float:
        """Return the seconds per token that an endpoint decodes at a level."""
        if (name, level) not in self._token_s:
            row = self._rows[name]
            step = row.decode_step_s(level, level * self._traffic.context)
            if self._endpoints[name].role == "both":
                step += (level - 1) * self._traffic.stall_s(row)
            self._token_s[name, level] = step
        return self._token_s[name, level]

    def serve(self, call: _Call, one: Assignment, rate_rps: float, active: float) -> float:
        """Return the service time of a call where it is assigned, and add it to the loads.

        ``rate_rps`` is how often it comes, ``active`` its site's context beyond the prefix.
        """
        row = self._rows[_ends(one)[0]]
        prefill_s = row.prefill_s(call.uncached, call.cached)
        decode_s = call.output * self.token_s(one.endpoint, self._levels[one.endpoint])
        if one.prefill is not None:
            first, last = self._endpoints[one.prefill], self._endpoints[one.endpoint]
            size = call.prompt * (first.kv_bytes_per_token or 0)
            pull_s = TRANSFER_SETUP_S + size / (1e9 * min(first.link_gb_s, last.link_gb_s))
            self.loads[one.prefill] += rate_rps * prefill_s
            self.loads[one.endpoint] += rate_rps * decode_s
            self.tokens[one.endpoint] += rate_rps * decode_s * active
            return prefill_s + pull_s + decode_s
        gone = not (one.keep if call.session else one.warm)
        service_s = prefill_s + decode_s
        service_s += row.prefill_marginal_s(call.cached) if gone else 0.0
        self.loads[one.endpoint] += rate_rps * service_s
        self.tokens[one.endpoint] += rate_rps * service_s * active
        return service_s

    def host(self, endpoint: str, prefix: str, tokens: int) -> None:
        """Note that an endpoint keeps a static prefix."""
        known = self._prefixes.get((endpoint, prefix), 0)
        self._prefixes[endpoint, prefix] = max(known, tokens)
        self.tokens[endpoint] += max(0, tokens - known)

    def idle_s(self, call: _Call, model: str | None) -> float:
        """Return a call's mean duration at level 1 over the endpoints that serve it whole."""
        times = [
            self._rows[name].prefill_s(call.uncached, call.cached)
            + call.output * self.token_s(name, 1)
            for name, endpoint in self._endpoints.items()
            if endpoint.role == "both" and model in (None, endpoint.model)
        ]
        return sum(times) / len(times) if times else 0.0

    def overfull(self, cap: float) -> list[Violation]:
        """Return the endpoints with more load, or more KV tokens, than they may have."""
        found = []
        for name, load in self.loads.items():
            room = cap * (1 if self._endpoints[name].role == "prefill" else self._levels[name])
            if load > room * (1 + _SLACK):
                found.append(
                    Violation(
                        "capacity",
                        f"endpoint {name!r} carries {load:.3f} busy calls, its level "
                        f"{self._levels[name]} allows {room:.3f}",
                    )
                )
        for name, tokens in self.tokens.items():
            have = cap * self._endpoints[name].kv_tokens
            if tokens > have * (1 + _SLACK):
                found.append(
                    Violation(
                        "memory",
                        f"endpoint {name!r} holds {tokens:.0f} KV tokens on average, "
                        f"{have:.0f} are allowed",
                    )
                )
        return found


def _evaluate(parts: Sequence[_Part], book: _Book) -> list[list[Outcome]]:
    """Return the outcomes of each workflow, and fill the book."""
    shares = mix_shares([part.plan.arrival_rate_rps * part.plan.weight for part in parts])
    out = []
    for part, share in zip(parts, shares, strict=True):
        plan = part.plan
        active = _active_tokens(part)
        probability = share / (1000 * plan.run_classes * len(part.runs))
        rate_rps = plan.arrival_rate_rps / (plan.run_classes * len(part.runs))
        outcomes = []
        for run, calls in zip(part.runs, part.calls, strict=True):
            for run_class in range(plan.run_classes):
                upcoming = iter(calls)
                durations = [
                    task.delay_s
                    if task.site is None
                    else book.serve(
                        next(upcoming),
                        part.where[run_class, task.site],
                        rate_rps,
                        active[task.site],
                    )
                    for task in run.tasks
                ]
                latency_s = completion_s(run, durations)
                outcomes.append(Outcome(latency_s, probability, plan.deadline_s))
        _add_kept(part, book)
        out.append(outcomes)
    return out


def _active_tokens(part: _Part) -> dict[str, float]:
    """Return the context beyond the static prefix of a call in service, by site."""
    decoded = dict.fromkeys(part.sites, 0.0)
    context = dict.fromkeys(part.sites, 0.0)
    for call in part.all_calls():
        decoded[call.site] += call.output
        context[call.site] += call.output * (call.prompt + call.output / 2)
    return {
        site: max(0.0, context[site] / decoded[site] - part.static[site]) if decoded[site] else 0.0
        for site in part.sites
    }


def _add_kept(part: _Part, book: _Book) -> None:
    """Add the prefixes and sessions that endpoints keep for a workflow."""
    plan, sessions = part.plan, part.session_sites()
    held = {site: _held_tokens(part, book, site) for site in sorted(sessions)}
    for one in plan.assignments:
        if one.prefill is not None:
            continue
        if one.warm and part.static[one.site] > 0:
            book.host(one.endpoint, part.prefix(one.site), part.static[one.site])
        if one.keep and one.site in sessions:
            book.tokens[one.endpoint] += held[one.site] / plan.run_classes


def _held_tokens(part: _Part, book: _Book, site: str) -> float:
    """Return the tokens that kept sessions of a site hold on average, all classes together."""
    gaps, after = [], 0.0
    for run, calls in zip(part.runs, part.calls, strict=True):
        upcoming = iter(calls)
        durations = []
        for task in run.tasks:
            if task.site is None:
                durations.append(task.delay_s)
                continue
            call = next(upcoming)
            durations.append(book.idle_s(call, part.sites[task.site].model))
            if task.site == site:
                after += call.prompt + call.output
        finish = finish_times(run, durations)
        visits = [task.index for task in run.tasks if task.site == site]
        gaps += [
            max(0.0, finish[later] - durations[later] - finish[earlier])
            for earlier, later in itertools.pairwise(visits)
        ]
    mean_gap_s = sum(gaps) / len(gaps) if gaps else 0.0
    return part.plan.arrival_rate_rps * after / len(part.runs) * mean_gap_s


def _check_deadlines(
    parts: Sequence[_Part], outcomes: Sequence[Sequence[Outcome]]
) -> list[Violation]:
    found = []
    for part, rows in zip(parts, outcomes, strict=True):
        limit = part.plan.deadline_s
        longest = max(one.latency_s for one in rows)
        if part.plan.hard_deadline and (limit is None or longest > limit * (1 + _SLACK)):
            found.append(Violation("deadline", f"a scenario takes {longest:.3f} s of {limit} s"))
    return found


def _check_values(
    plans: Sequence[Plan], parts: Sequence[_Part], outcomes: Sequence[Sequence[Outcome]]
) -> list[Violation]:
    """Compare stated values with the exact ones and those of latencies rounded up."""
    first = plans[0]
    exact = [one for rows in outcomes for one in rows]
    # Each task is rounded up by less than a tick, what it prefills again by another; a deadline
    # is rounded down by one. All terms grow with the latencies.
    kept = all(one.warm and one.keep for plan in plans for one in plan.assignments)
    longest = max(len(run.tasks) for part in parts for run in part.runs)
    slack_s = PLAN_TICK_S * (longest * (1 if kept else 2) + (first.objective.needs_deadline))
    rounded = [replace(one, latency_s=one.latency_s + slack_s) for one in exact]

    def wrong(name: str, stated: float, least: float, most: float) -> list[Violation]:
        room = _SLACK * max(1.0, abs(least))
        if least - room <= stated <= most + room:
            return []
        return [Violation("objective", f"{name}: stated {stated:.4f}, recomputed {least:.4f}")]

    found = wrong(
        first.objective.name,
        first.objective_s,
        objective_value(first.objective, exact),
        objective_value(first.objective, rounded),
    )
    known = {term.name: term for term in (*MEAN.terms, *first.objective.terms)}
    for name, stated in first.values.items():
        if name not in known:
            found.append(Violation("objective", f"{name}: no term of {first.objective.name}"))
            continue
        term = known[name]
        found += wrong(name, stated, term_value(term, exact), term_value(term, rounded))
    return found


def _check_retention(part: _Part) -> list[Violation]:
    found = []
    stated = {one.site: one for one in part.plan.retention}
    for site, one in sorted(stated.items()):
        kept = [each.keep for each in part.plan.assignments if each.site == site]
        share = sum(kept) / len(kept) if kept else -1.0
        if abs(share - one.share) > _SLACK:
            message = f"site {site!r} keeps {share:.0%} of its sessions, stated {one.share:.0%}"
            found.append(Violation("retention", message))
    return found
