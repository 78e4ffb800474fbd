"""The solver's view of a planning question: index arrays in place of domain objects.

Indices: k call site, i endpoint, l level (position in the endpoint's grid), s scenario, t task
over all scenarios, r run class. Service times follow the definition in `planner.domain.plan`.

Run classes are exchangeable: all face the same scenarios, so what a class costs depends on its
placement and the levels only. (Scenarios of its own would let a class choose its endpoints
knowing its branches and lengths.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.domain.errors import Infeasible, InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.latency import LatencyRow
from planner.domain.plan import PLAN_TICK_S, UTILISATION_CAP
from planner.domain.run import RunSpec
from planner.domain.units import duration_to_ticks
from planner.domain.workflow import Workflow
from planner.graph.shape import all_sites

__all__ = ["LOAD_UNIT", "Instance", "build_instance", "level_grid"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

LOAD_UNIT = 1e-5
"""Resolution of loads in the model: busy calls per unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A planning question in arrays.

    Parameters
    ----------
    workflow_hash, fleet_hash
        What it was made from.
    sites, endpoints
        Ids by index; K and I of them.
    levels
        Level grid of each endpoint, increasing.
    run_classes
        R.
    arrival_rate_rps
        Runs per second, all classes together.
    utilisation_cap
        Largest share of a level's slots that may be busy on average.
    scenarios
        S.
    task_scenario, task_site, task_preds
        Scenario, call site (-1 for a delay) and predecessors of each task, in an order in which
        predecessors come first.
    delay_ticks
        Ticks of each delay, 0 for calls; shape (T,).
    service_ticks
        Ticks of each call on endpoint i at level l; shape (T, I, L), 0 for delays.
    work_s
        Expected seconds of service a run needs at site k on endpoint i at level l; shape
        (K, I, L).
    allowed
        Whether endpoint i may serve site k; shape (K, I).
    """

    workflow_hash: str
    fleet_hash: str
    sites: tuple[str, ...]
    endpoints: tuple[str, ...]
    levels: tuple[tuple[int, ...], ...]
    run_classes: int
    arrival_rate_rps: float
    utilisation_cap: float
    scenarios: int
    task_scenario: tuple[int, ...]
    task_site: tuple[int, ...]
    task_preds: tuple[tuple[int, ...], ...]
    delay_ticks: Ints
    service_ticks: Ints
    work_s: Floats
    allowed: Bools

    @property
    def level_count(self) -> int:
        """L: length of the longest level grid."""
        return int(self.work_s.shape[2])

    @property
    def class_load(self) -> Ints:
        """Busy calls one class brings at site k on endpoint i at level l, in load units: (K, I, L).

        Rounded up, so that a plan within the room in units is within it in truth.
        """
        busy = self.work_s * (self.arrival_rate_rps / self.run_classes)
        return np.ceil(busy / LOAD_UNIT - 1e-9).astype(np.int64)

    @property
    def room(self) -> Ints:
        """Busy calls allowed on endpoint i at level l, in units, -1 beyond its grid: (I, L)."""
        out = np.full((len(self.endpoints), self.level_count), -1, dtype=np.int64)
        for i, grid in enumerate(self.levels):
            out[i, : len(grid)] = np.floor(
                np.array(grid) * (self.utilisation_cap / LOAD_UNIT) + 1e-9
            )
        return out

    @property
    def twins(self) -> tuple[tuple[int, ...], ...]:
        """Groups of two or more endpoints that no plan can tell apart."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, grid in enumerate(self.levels):
            parts = (self.service_ticks[:, i], self.work_s[:, i], self.allowed[:, i])
            groups.setdefault((grid, *(part.tobytes() for part in parts)), []).append(i)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def level_grid(slots: int, most: int) -> tuple[int, ...]:
    """Return powers of two up to ``min(slots, most)``, and that number itself; at least 1."""
    top = max(1, min(slots, most))
    grid = [1 << power for power in range(top.bit_length()) if 1 << power < top]
    return (*grid, top)


@dataclass(frozen=True, slots=True)
class _Calls:
    """Token counts of all calls of the scenarios, by task position; arrays of one length."""

    task: Ints
    site: Ints
    uncached: Floats
    cached: Floats
    output: Floats

    @property
    def context(self) -> float:
        """Context of a call found decoding: mean weighted by output length, tokens."""
        held = self.cached + self.uncached + self.output / 2
        return float(np.average(held, weights=self.output))


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
    """Arrange a planning question in arrays.

    Raises
    ------
    InvalidInput
        If the rate, the number of classes or of scenarios is not positive, or the workflow has
        no call site.
    Infeasible
        If a call site fits no endpoint; the message names the site and what it lacks.
    """
    if not (arrival_rate_rps > 0 and np.isfinite(arrival_rate_rps)):
        raise InvalidInput(
            f"{arrival_rate_rps!r} runs per second", where="arrival rate", remedy="use > 0"
        )
    for value, name in ((run_classes, "run classes"), (len(scenarios), "scenarios")):
        if value < 1:
            raise InvalidInput(f"{value} {name}", where=name, remedy="use at least 1")
    sites = all_sites(workflow)
    if not sites:
        raise InvalidInput(
            "no call site: nothing to plan",
            where=f"workflow {workflow.name!r}",
            remedy="declare the calls of its nodes, or learn them from traces",
        )
    index = {str(site): k for k, site in enumerate(sites)}
    tasks = [(s, task) for s, run in enumerate(scenarios) for task in run.tasks]
    calls = _collect_calls(scenarios, index)
    longest = np.zeros(len(sites))
    np.maximum.at(longest, calls.site, calls.cached + calls.uncached + calls.output)
    allowed = np.zeros((len(sites), len(fleet.endpoints)), dtype=bool)
    for k, (path, site) in enumerate(sites.items()):
        for i, endpoint in enumerate(fleet.endpoints):
            fits = longest[k] <= min(endpoint.kv_tokens, endpoint.max_model_len)
            allowed[k, i] = fits and site.model in (None, endpoint.model)
        if not allowed[k].any():
            raise Infeasible(_no_endpoint(path, site.model, int(longest[k]), fleet))

    context = calls.context if calls.task.size else 0.0
    grids = tuple(
        level_grid(e.max_num_seqs, int(e.kv_tokens / context) if context else e.max_num_seqs)
        for e in fleet.endpoints
    )
    depth = max(map(len, grids))
    ticks = np.zeros((len(tasks), len(grids), depth), dtype=np.int64)
    work = np.zeros((len(sites), len(grids), depth))
    for i, endpoint in enumerate(fleet.endpoints):
        row = estimates.endpoints.get(endpoint.id, endpoint.latency)
        for position, level in enumerate(grids[i]):
            service = _service_s(row, level, calls, context)
            np.add.at(work[:, i, position], calls.site, service / len(scenarios))
            ticks[calls.task, i, position] = [
                duration_to_ticks(float(value), PLAN_TICK_S) for value in service
            ]
    offsets = np.concatenate(([0], np.cumsum([len(run.tasks) for run in scenarios])))
    return Instance(
        workflow_hash=workflow.content_hash,
        fleet_hash=fleet.content_hash(),
        sites=tuple(index),
        endpoints=tuple(str(endpoint.id) for endpoint in fleet.endpoints),
        levels=grids,
        run_classes=run_classes,
        arrival_rate_rps=arrival_rate_rps,
        utilisation_cap=utilisation_cap,
        scenarios=len(scenarios),
        task_scenario=tuple(s for s, _ in tasks),
        task_site=tuple(-1 if task.site is None else index[task.site] for _, task in tasks),
        task_preds=tuple(tuple(int(offsets[s]) + pred for pred in task.preds) for s, task in tasks),
        delay_ticks=np.array(
            [
                duration_to_ticks(task.delay_s, PLAN_TICK_S) if task.site is None else 0
                for _, task in tasks
            ],
            dtype=np.int64,
        ),
        service_ticks=ticks,
        work_s=work,
        allowed=allowed,
    )


def _collect_calls(scenarios: Sequence[RunSpec], index: dict[str, int]) -> _Calls:
    rows: list[tuple[int, int, int, int, int]] = []
    position = 0
    for run in scenarios:
        known: dict[str, set[int]] = {}
        for task in run.tasks:
            if task.site is not None:
                # What the first visit shares with nothing earlier is its static prefix, if any:
                # the sampler puts it in a segment of its own before the fresh one.
                warm = known.setdefault(task.site, {task.prompt[0].key} - {task.prompt[-1].key})
                cached = 0
                for segment in task.prompt[:-1]:
                    if segment.key not in warm:
                        break
                    cached += segment.tokens
                warm.update(segment.key for segment in task.prompt)
                warm.add(task.output_key)
                uncached = task.prompt_tokens - cached
                rows.append((position, index[task.site], uncached, cached, task.output_tokens))
            position += 1
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    return _Calls(
        task=table[:, 0],
        site=table[:, 1],
        uncached=table[:, 2].astype(float),
        cached=table[:, 3].astype(float),
        output=table[:, 4].astype(float),
    )


def _service_s(row: LatencyRow, level: int, calls: _Calls, context: float) -> Floats:
    """Return the planned service time of each call in seconds; shape (calls,)."""
    if not calls.task.size:
        return np.zeros(0)
    stall = np.array(
        [row.prefill_marginal_s(u, c) for u, c in zip(calls.uncached, calls.cached, strict=True)]
    )
    base = row.prefill_s(0.0)
    token_s = row.decode_step_s(level, level * context)
    token_s += (level - 1) * float(stall.mean()) / float(calls.output.mean())
    return base + stall + calls.output * token_s


def _no_endpoint(path: str, model: str | None, longest: int, fleet: Fleet) -> str:
    """Return why no endpoint can serve a call site."""
    serving = [e for e in fleet.endpoints if model in (None, e.model)]
    if not serving:
        offered = ", ".join(sorted({e.model for e in fleet.endpoints}))
        return f"call site {path!r} asks for model {model!r}; fleet {fleet.name!r} serves {offered}"

    def room(endpoint: Endpoint) -> int:
        return min(endpoint.kv_tokens, endpoint.max_model_len)

    best = max(serving, key=room)
    return (
        f"call site {path!r} needs {longest} tokens of context; the largest endpoint that serves "
        f"its model, {best.id!r}, holds {room(best)}"
    )
