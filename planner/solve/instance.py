"""Makes an instance of workflows, a fleet, forecasts and sampled runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.domain.errors import Infeasible, InvalidInput
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.objective import mix_shares
from planner.domain.plan import PLAN_TICK_S, UTILISATION_CAP
from planner.domain.run import RunSpec
from planner.domain.units import duration_to_ticks
from planner.domain.workflow import CallSite, Workflow
from planner.graph.sampling import site_estimate
from planner.graph.shape import all_sites
from planner.solve.arrays import Bools, Floats, Ints
from planner.solve.calls import (
    Calls,
    collect_calls,
    extra_s,
    pair_s,
    session_gaps,
    transfer_s,
    whole_s,
)
from planner.solve.question import LOAD_UNIT, Instance, Memory, Source, level_grid

__all__ = [
    "LOAD_UNIT",
    "Bools",
    "Demand",
    "Floats",
    "Instance",
    "Ints",
    "build_instance",
    "build_mix",
    "level_grid",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A workflow and how it comes.

    Parameters
    ----------
    workflow
        The workflow.
    rate_rps
        Runs per second, > 0.
    weight
        Weight of its runs in the objective, > 0.
    deadline_s
        Seconds a run may take, > 0, or None.
    hard
        Whether every scenario has to keep the deadline.
    """

    workflow: Workflow
    rate_rps: float
    weight: float = 1.0
    deadline_s: float | None = None
    hard: bool = False

    def __post_init__(self) -> None:
        where = f"workflow {self.workflow.name!r}"
        if not (self.rate_rps > 0 and math.isfinite(self.rate_rps)):
            raise InvalidInput(
                f"{self.rate_rps!r} runs per second",
                where=f"arrival rate of {where}",
                remedy="use > 0",
            )
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise InvalidInput(f"weight {self.weight!r}", where=where, remedy="use > 0")
        if self.deadline_s is not None and not (
            self.deadline_s > 0 and math.isfinite(self.deadline_s)
        ):
            raise InvalidInput(f"deadline {self.deadline_s!r} s", where=where, remedy="use > 0")
        if self.hard and self.deadline_s is None:
            raise InvalidInput("a hard deadline without a time", where=where, remedy="give one")


def build_instance(
    workflow: Workflow,
    fleet: Fleet,
    estimates: EstimateTable,
    scenarios: Sequence[RunSpec],
    *,
    arrival_rate_rps: float,
    run_classes: int,
    utilisation_cap: float = UTILISATION_CAP,
) -> Instance:
    """Arrange a question about one workflow in arrays; see `build_mix`."""
    return build_mix(
        [Demand(workflow=workflow, rate_rps=arrival_rate_rps)],
        fleet,
        estimates,
        [scenarios],
        run_classes=run_classes,
        utilisation_cap=utilisation_cap,
    )


def build_mix(
    demands: Sequence[Demand],
    fleet: Fleet,
    estimates: EstimateTable,
    samples: Sequence[Sequence[RunSpec]],
    *,
    run_classes: int,
    utilisation_cap: float = UTILISATION_CAP,
) -> Instance:
    """Arrange a planning question in arrays.

    Parameters
    ----------
    demands
        The workflows, at least one, each once.
    samples
        Scenarios of each, all of one number.

    Raises
    ------
    InvalidInput
        If the number of classes or of scenarios is not positive, or a workflow has no call site
        or comes twice.
    Infeasible
        If a call site fits no endpoint; the message names the site and what it lacks.
    """
    for value, name in ((run_classes, "run classes"), (min(map(len, samples)), "scenarios")):
        if value < 1:
            raise InvalidInput(f"{value} {name}", where=name, remedy="use at least 1")
    _check_workflows(demands)
    rate = sum(demand.rate_rps for demand in demands)
    index: list[dict[str, int]] = []
    sites: list[tuple[Demand, str, CallSite]] = []
    for demand in demands:
        own = all_sites(demand.workflow)
        index.append({str(path): len(sites) + n for n, path in enumerate(own)})
        sites += [(demand, str(path), site) for path, site in own.items()]
    calls = collect_calls(samples, index, [demand.rate_rps / rate for demand in demands])
    options = _options(fleet)
    allowed = _allowed(sites, calls, fleet, options)
    tasks = [task for runs in samples for run in runs for task in run.tasks]
    scenario_runs = [run for runs in samples for run in runs]
    offsets = np.concatenate(([0], np.cumsum([len(run.tasks) for run in scenario_runs])))
    grids = tuple(
        (1,)
        if e.role == "prefill"
        else level_grid(
            e.max_num_seqs, int(e.kv_tokens / calls.context) if calls.context else e.max_num_seqs
        )
        for e in fleet.endpoints
    )
    times = _times(fleet, estimates, options, grids, calls, len(tasks), len(sites))
    delay_s = np.array([task.delay_s if task.site is None else 0.0 for task in tasks])
    shares = mix_shares([demand.rate_rps * demand.weight for demand in demands])
    common = math.gcd(*shares)
    counts = [len(runs) for runs in samples]
    return Instance(
        sources=tuple(
            Source(
                name=demand.workflow.name,
                workflow_hash=demand.workflow.content_hash,
                rate_rps=demand.rate_rps,
                weight=demand.weight,
                # Durations are rounded up and the deadline down, so that a kept one is kept.
                deadline_ticks=None
                if demand.deadline_s is None
                else int(demand.deadline_s / PLAN_TICK_S + 1e-9),
                deadline_s=demand.deadline_s,
                hard=demand.hard,
                sites=range(min(own.values()), max(own.values()) + 1),
                paths=tuple(own),
            )
            for demand, own in zip(demands, index, strict=True)
        ),
        fleet_hash=fleet.content_hash(),
        sites=_site_names(sites, len(demands)),
        endpoints=tuple(str(endpoint.id) for endpoint in fleet.endpoints),
        option_endpoint=np.array([decode for decode, _ in options], dtype=np.int64),
        option_prefill=np.array([prefill for _, prefill in options], dtype=np.int64),
        levels=grids,
        run_classes=run_classes,
        arrival_rate_rps=rate,
        utilisation_cap=utilisation_cap,
        scenarios=len(scenario_runs),
        scenario_source=np.repeat(np.arange(len(samples)), counts),
        scenario_weight=np.repeat([share // common for share in shares], counts),
        task_scenario=tuple(s for s, run in enumerate(scenario_runs) for _ in run.tasks),
        task_site=_task_sites(samples, index),
        task_preds=tuple(
            tuple(int(offsets[s]) + pred for pred in task.preds)
            for s, run in enumerate(scenario_runs)
            for task in run.tasks
        ),
        delay_ticks=_ticks(delay_s),
        service_ticks=times.ticks,
        work_s=times.work,
        lane_work_s=times.lane,
        allowed=allowed,
        memory=_memory(
            fleet, estimates, samples, index, sites, options, calls, times, delay_s, rate,
            utilisation_cap,
        ),
    )  # fmt: skip


def _check_workflows(demands: Sequence[Demand]) -> None:
    seen: set[str] = set()
    for demand in demands:
        where = f"workflow {demand.workflow.name!r}"
        if not all_sites(demand.workflow):
            raise InvalidInput(
                "no call site: nothing to plan",
                where=where,
                remedy="declare the calls of its nodes, or learn them from traces",
            )
        if demand.workflow.content_hash in seen:
            raise InvalidInput("is given twice", where=where, remedy="add the rates up")
        seen.add(demand.workflow.content_hash)


def _site_names(sites: Sequence[tuple[Demand, str, CallSite]], workflows: int) -> tuple[str, ...]:
    """Return site names, with the workflow's hash where several could share one."""
    if workflows == 1:
        return tuple(path for _, path, _ in sites)
    return tuple(f"{demand.workflow.name}:{path}" for demand, path, _ in sites)


def _options(fleet: Fleet) -> list[tuple[int, int]]:
    """Return (endpoint that decodes, endpoint that prefills or -1) of all a call can be sent to."""
    options = [(i, -1) for i, e in enumerate(fleet.endpoints) if e.role == "both"]
    for p, prefill in enumerate(fleet.endpoints):
        for d, decode in enumerate(fleet.endpoints):
            if (prefill.role, decode.role) == ("prefill", "decode") and _same_kv(prefill, decode):
                options.append((d, p))
    return options


def _same_kv(one: Endpoint, other: Endpoint) -> bool:
    return (one.model, one.kv_bytes_per_token, one.block_tokens) == (
        other.model,
        other.kv_bytes_per_token,
        other.block_tokens,
    )


def _room(fleet: Fleet, option: tuple[int, int]) -> int:
    """Return the longest prompt and answer that an option holds, tokens."""
    ends = [fleet.endpoints[i] for i in option if i >= 0]
    return min(min(end.kv_tokens, end.max_model_len) for end in ends)


def _allowed(
    sites: Sequence[tuple[Demand, str, CallSite]],
    calls: Calls,
    fleet: Fleet,
    options: Sequence[tuple[int, int]],
) -> Bools:
    longest = np.zeros(len(sites))
    np.maximum.at(longest, calls.site, calls.cached + calls.uncached + calls.output)
    allowed = np.zeros((len(sites), len(options)), dtype=bool)
    for k, (_, path, site) in enumerate(sites):
        for m, option in enumerate(options):
            serves = site.model in (None, fleet.endpoints[option[0]].model)
            allowed[k, m] = serves and longest[k] <= _room(fleet, option)
        if not allowed[k].any():
            raise Infeasible(_no_endpoint(path, site.model, int(longest[k]), fleet, options))
    return allowed


def _no_endpoint(
    path: str, model: str | None, longest: int, fleet: Fleet, options: Sequence[tuple[int, int]]
) -> str:
    """Return why no endpoint can serve a call site."""
    serving = [one for one in options if model in (None, fleet.endpoints[one[0]].model)]
    if not serving:
        offered = ", ".join(sorted({e.model for e in fleet.endpoints}))
        return f"call site {path!r} asks for model {model!r}; fleet {fleet.name!r} serves {offered}"
    best = max(serving, key=lambda option: _room(fleet, option))
    room = _room(fleet, best)
    limit = "max_model_len" if room < fleet.endpoints[best[0]].kv_tokens else "its KV cache"
    return (
        f"call site {path!r} needs {longest} tokens of context; the largest endpoint that serves "
        f"its model, {fleet.endpoints[best[0]].id!r}, holds {room} ({limit})"
    )


@dataclass(frozen=True, slots=True)
class _Times:
    """Ticks (T, M, L), work (K, M, L), work of prefill lanes (K, M), idle seconds by (call, M)."""

    ticks: Ints
    work: Floats
    lane: Floats
    idle_s: Floats


def _times(
    fleet: Fleet,
    estimates: EstimateTable,
    options: Sequence[tuple[int, int]],
    grids: Sequence[Sequence[int]],
    calls: Calls,
    tasks: int,
    sites: int,
) -> _Times:
    depth = max(map(len, grids))
    ticks = np.zeros((tasks, len(options), depth), dtype=np.int64)
    work = np.zeros((sites, len(options), depth))
    lane = np.zeros((sites, len(options)))
    idle = np.zeros((calls.task.size, len(options)))
    rows = [estimates.endpoints.get(e.id, e.latency) for e in fleet.endpoints]
    # Fleets repeat few kinds of endpoints; what depends on the kind alone is computed once.
    made: dict[object, tuple[Floats, Floats]] = {}
    for m, (i, p) in enumerate(options):
        prefill, decode = fleet.endpoints[p], fleet.endpoints[i]
        for position, level in enumerate(grids[i]):
            link = min(prefill.link_gb_s, decode.link_gb_s) if p >= 0 else 0.0
            key = (rows[i], level, rows[p] if p >= 0 else None, link)
            if key not in made:
                if p < 0:
                    busy = whole_s(rows[i], level, calls)
                    seconds = busy
                else:
                    first, busy = pair_s(rows[p], rows[i], level, calls)
                    seconds = first + transfer_s(prefill, decode, calls) + busy
                made[key] = busy, seconds
            busy, seconds = made[key]
            np.add.at(work[:, m, position], calls.site, busy * calls.weight)
            ticks[calls.task, m, position] = _ticks(seconds)
            if position == 0:
                idle[:, m] = seconds
        if p >= 0:
            first, _ = pair_s(rows[p], rows[i], 1, calls)
            np.add.at(lane[:, m], calls.site, first * calls.weight)
    return _Times(ticks, work, lane, idle)


def _ticks(seconds: Floats) -> Ints:
    """Return `duration_to_ticks` by element."""
    return np.array([duration_to_ticks(value, PLAN_TICK_S) for value in seconds], dtype=np.int64)


def _task_sites(
    samples: Sequence[Sequence[RunSpec]], index: Sequence[dict[str, int]]
) -> tuple[int, ...]:
    return tuple(
        -1 if task.site is None else own[task.site]
        for runs, own in zip(samples, index, strict=True)
        for run in runs
        for task in run.tasks
    )


def _memory(
    fleet: Fleet,
    estimates: EstimateTable,
    samples: Sequence[Sequence[RunSpec]],
    index: Sequence[dict[str, int]],
    sites: Sequence[tuple[Demand, str, CallSite]],
    options: Sequence[tuple[int, int]],
    calls: Calls,
    times: _Times,
    delay_s: Floats,
    rate: float,
    cap: float,
) -> Memory:
    count, whole = len(sites), np.array([prefill < 0 for _, prefill in options])
    static, prefix, prefix_tokens = _prefixes(sites, estimates)
    serves = np.array(
        [
            [site.model in (None, fleet.endpoints[i].model) for i, _ in options]
            for _, _, site in sites
        ]
    ).reshape(count, len(options))
    use = (serves & whole)[calls.site]
    idle_s = delay_s.copy()
    chosen = np.maximum(use.sum(axis=1), 1)
    idle_s[calls.task] = (times.idle_s * use).sum(axis=1) / chosen
    gap_s = session_gaps(samples, index, idle_s)

    def per_site(values: Floats) -> Floats:
        total = np.zeros(count)
        np.add.at(total, calls.site, values * calls.weight)
        return total

    context = calls.cached + calls.uncached
    decoded = np.maximum(per_site(calls.output), 1e-12)
    active = per_site(calls.output * (context + calls.output / 2)) / decoded - static
    visits, later = per_site(np.ones(context.size)), per_site(calls.session.astype(float))
    after = per_site(context + calls.output) / np.maximum(visits, 1e-12)
    cold, lost = np.zeros_like(times.ticks[:, :, 0]), np.zeros_like(times.ticks[:, :, 0])
    cold_work, lost_work = np.zeros((count, len(options))), np.zeros((count, len(options)))
    for m, (i, p) in enumerate(options):
        if p >= 0:
            continue
        endpoint = fleet.endpoints[i]
        extra = extra_s(estimates.endpoints.get(endpoint.id, endpoint.latency), calls)
        cold[calls.task, m] = _ticks(np.where(calls.session, 0.0, extra))
        lost[calls.task, m] = _ticks(np.where(calls.session, extra, 0.0))
        cold_work[:, m] = per_site(np.where(calls.session, 0.0, extra))
        lost_work[:, m] = per_site(np.where(calls.session, extra, 0.0))
    return Memory(
        tokens=np.array([int(cap * e.kv_tokens + 1e-9) for e in fleet.endpoints], dtype=np.int64),
        active_tokens=np.maximum(active, 0.0),
        prefix=prefix,
        prefix_tokens=prefix_tokens,
        held_tokens=np.where(later > 0, rate * visits * after * gap_s, 0.0),
        visits=visits,
        later=later,
        gap_s=gap_s,
        context_tokens=after,
        cold_ticks=cold,
        lost_ticks=lost,
        cold_work_s=cold_work,
        lost_work_s=lost_work,
        whole=whole,
    )


def _prefixes(
    sites: Sequence[tuple[Demand, str, CallSite]], estimates: EstimateTable
) -> tuple[Floats, Ints, Ints]:
    """Return static tokens by site, the prefix of each site, and the tokens of each prefix."""
    static = np.zeros(len(sites))
    groups: dict[str, int] = {}
    prefix = np.full(len(sites), -1, dtype=np.int64)
    tokens: list[int] = []
    for k, (demand, path, site) in enumerate(sites):
        own = estimates.workflows.get(demand.workflow.content_hash, WorkflowEstimate())
        static[k] = round(site_estimate(site, path, own, estimates).shared_prefix_tokens)
        if static[k] > 0:
            name = site.static_prefix_hash or f"{demand.workflow.content_hash}:{path}"
            if name not in groups:
                groups[name] = len(tokens)
                tokens.append(0)
            prefix[k] = groups[name]
            tokens[prefix[k]] = max(tokens[prefix[k]], int(static[k]))
    return static, prefix, np.array(tokens, dtype=np.int64)
