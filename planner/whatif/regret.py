"""Hindsight: what recorded runs could have taken, and where their excess comes from.

The runs of a trace are simulated again with their realised lengths, delays and branches, each time
with one shortcoming less. A step keeps the better of what it had and what it tries, so parts are
never negative on average and add up, run by run, to the excess over the best that was found:

============= ====================================================================================
part          what the step changes
============= ====================================================================================
admission     calls go out when they are ready, not when the router let them go
order         same endpoints; engines serve the least remaining work first, or the oldest run
placement     endpoints by marginal cost, from the same forecasts
forecast      marginal cost with each call's own length known when it is ready
information   placements by local search that knows all runs, lengths and arrivals to come
============= ====================================================================================

What remains of a run is known exactly in ``order``, so a part of what it shows is information,
too. Parts depend on the order of the steps; this one goes from what is least to most work to mend.
The search is not exhaustive, so ``information`` is what is known to be there; the distance from
the best found to the bound is open. What the engine model does not reproduce of the recorded
latency (the queues that the window began with among it) is shown on its own, and is no part of the
excess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies.base import Choice, Ready
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Fleet
from planner.domain.ids import EndpointId
from planner.domain.run import RunSpec
from planner.domain.trace import CallRecord, RunRecord, TraceRecord
from planner.domain.workflow import Workflow
from planner.graph.analysis import upward_ranks
from planner.graph.rebuild import runs_from_trace
from planner.report.terminal import align
from planner.sim.kernel import simulate
from planner.study.clairvoyant import Exact, Pinned

__all__ = ["PARTS", "Regret", "RunExcess", "hindsight"]

PARTS = ("admission", "order", "placement", "forecast", "information")
_THETAS = (1.0, 1.5, 2.0)
Latencies = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunExcess:
    """One run: seconds as recorded, as replayed, as well as was found, and the parts between."""

    run_id: str
    workflow: str
    recorded_s: float
    replayed_s: float
    found_s: float
    parts: Mapping[str, float]

    @property
    def excess_s(self) -> float:
        """What the run took beyond the best found; the sum of its parts."""
        return self.replayed_s - self.found_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """The runs of a trace in hindsight.

    Parameters
    ----------
    runs
        By arrival.
    bound_s
        No policy's mean on these runs is below, s.
    simulations
        Schedules tried.
    """

    runs: tuple[RunExcess, ...]
    bound_s: float
    simulations: int

    @property
    def model_s(self) -> float:
        """Mean recorded latency less the mean replayed: what the engine model leaves open."""
        return _mean([one.recorded_s - one.replayed_s for one in self.runs])

    def groups(self) -> dict[str, tuple[RunExcess, ...]]:
        """Return the runs by workflow, and all of them under ``all`` if there are several."""
        names = sorted({one.workflow for one in self.runs})
        found = {name: tuple(one for one in self.runs if one.workflow == name) for name in names}
        return found if len(names) == 1 else {**found, "all": self.runs}

    def rows(self) -> list[dict[str, Any]]:
        """Return means by workflow, seconds."""
        return [
            {
                "workflow": name,
                "runs": len(group),
                "recorded_s": _mean([one.recorded_s for one in group]),
                "replayed_s": _mean([one.replayed_s for one in group]),
                "found_s": _mean([one.found_s for one in group]),
                "excess_s": _mean([one.excess_s for one in group]),
                **{f"{part}_s": _mean([one.parts[part] for one in group]) for part in PARTS},
            }
            for name, group in self.groups().items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, run by run."""
        return {
            "schema": "almanac.regret/1",
            "bound_s": self.bound_s,
            "model_s": self.model_s,
            "simulations": self.simulations,
            "workflows": self.rows(),
            "runs": [
                {
                    "run_id": one.run_id,
                    "workflow": one.workflow,
                    "recorded_s": one.recorded_s,
                    "replayed_s": one.replayed_s,
                    "found_s": one.found_s,
                    "parts": dict(one.parts),
                }
                for one in self.runs
            ],
        }

    def text(self) -> str:
        """Return the table for a terminal."""
        head = ["workflow", "runs", "recorded s", "replayed s", "best found s", "excess s", *PARTS]
        rows = [head]
        for row in self.rows():
            numbers = [row[k] for k in ("recorded_s", "replayed_s", "found_s", "excess_s")]
            numbers += [row[f"{part}_s"] for part in PARTS]
            rows.append([row["workflow"], str(row["runs"]), *(f"{one:.3f}" for one in numbers)])
        found = _mean([one.found_s for one in self.runs])
        return (
            f"{align(rows)}\nno policy has a mean below {self.bound_s:.3f} s on these runs; "
            f"{found - self.bound_s:.3f} s between that and the best found are open\n"
            f"the engine model is off by {self.model_s:+.3f} s on average (recorded less replayed)"
        )

    def to_frame(self) -> Any:
        """Return a pandas data frame, a row per workflow."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return str(self.to_frame().to_html(index=False, float_format=lambda x: f"{x:.3f}"))


def hindsight(
    records: Sequence[TraceRecord],
    fleet: Fleet,
    workflows: Sequence[Workflow] = (),
    estimates: EstimateTable | None = None,
    *,
    last: int = 80,
    steps: int = 60,
    seed: int = 0,
    progress: Callable[[str], object] = lambda _: None,
) -> Regret:
    """Return the regret of a trace, run by run.

    Parameters
    ----------
    records
        The trace.
    fleet
        Where it was recorded: its endpoints by id.
    workflows, estimates
        Graphs, and the forecasts there were at the time.
    last
        Keep only the latest runs, >= 1: a schedule is a simulation of them all.
    steps
        Moves of the local search, >= 0.
    seed
        Of the search.

    Raises
    ------
    InvalidInput
        If the trace holds no run that ended well, names an endpoint that the fleet lacks, or the
        fleet serves several models (a trace does not say which one a call asked for) or in pools.
    """
    if last < 1 or steps < 0:
        raise InvalidInput(
            f"{last} runs, {steps} steps", where="regret", remedy="use at least 1 run, 0 steps"
        )
    _check(fleet)
    table = estimates or EstimateTable()
    runs = runs_from_trace(records, workflows, table, last=last)
    if not runs:
        raise InvalidInput(
            "no run with a call ended well", where="trace", remedy="give a longer trace"
        )
    recorded = {
        one.run_id: one.finish_s - one.arrival_s for one in records if isinstance(one, RunRecord)
    }
    ladder = _Ladder(runs, fleet, Forecaster(table, workflows))
    ladder.climb(_recorded_calls(records, runs, fleet), steps, seed, progress)
    from planner.solve.workload_bounds import workload_bound

    return Regret(
        runs=tuple(
            RunExcess(
                run_id=run.run_id,
                workflow=run.workflow,
                recorded_s=recorded[run.run_id],
                replayed_s=ladder.levels[0][run.run_id],
                found_s=ladder.levels[-1][run.run_id],
                parts={
                    part: before[run.run_id] - after[run.run_id]
                    for part, (before, after) in zip(PARTS, pairwise(ladder.levels), strict=True)
                },
            )
            for run in runs
        ),
        bound_s=workload_bound(runs, fleet, percentiles=()).mean_s,
        simulations=ladder.simulations,
    )


def _check(fleet: Fleet) -> None:
    models = sorted({one.model for one in fleet.endpoints})
    if len(models) > 1:
        raise InvalidInput(
            f"the fleet serves {', '.join(models)}; a trace does not say which a call asked for",
            where="regret",
            remedy="give the endpoints of one model, and the trace of their calls",
        )
    if any(one.role != "both" for one in fleet.endpoints):
        raise InvalidInput(
            "the fleet serves in prefill/decode pools",
            where="regret",
            remedy="give a fleet whose endpoints serve calls whole",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """Where calls went and how long the router held them, by the ids that a simulation gives."""

    places: Mapping[str, int]
    held_s: Mapping[str, float]


def _recorded_calls(
    records: Sequence[TraceRecord], runs: Sequence[RunSpec], fleet: Fleet
) -> _Recorded:
    """Match the calls of rebuilt runs with their records: both are in the order of readiness."""
    by_run: dict[str, list[CallRecord]] = {}
    for one in records:
        if isinstance(one, CallRecord) and one.status == "ok" and one.finish_s is not None:
            by_run.setdefault(one.run_id, []).append(one)
    places: dict[str, int] = {}
    held_s: dict[str, float] = {}
    for run in runs:
        own = sorted(by_run[run.run_id], key=lambda c: (c.ready_s, c.finish_s, c.node))
        calls = [task for task in run.tasks if task.site is not None]
        for task, record in zip(calls, own, strict=True):
            call_id = f"{run.run_id}/{task.index}"
            places[call_id] = fleet.index_of(EndpointId(record.endpoint))
            held_s[call_id] = max(0.0, record.sent_s - record.ready_s)
    return _Recorded(places=places, held_s=held_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Schedule:
    """Calls that are pinned, what orders engine queues, and the rule for the other calls."""

    places: Mapping[str, int] = field(default_factory=dict)
    priorities: Mapping[str, int] | None = None
    theta: float = 1.0
    exact: bool = False


class _Placed(Pinned):
    """Marginal cost with some calls pinned, and an order of its own if one is given."""

    name = "hindsight"

    def __init__(self, schedule: _Schedule) -> None:
        super().__init__(schedule.theta, schedule.places)
        self._priorities = schedule.priorities

    def choose(self, ready: Ready) -> Choice:
        """Return the place and the priority."""
        choice = super().choose(ready)
        if self._priorities is None:
            return choice
        return replace(choice, priority=self._priorities[ready.call.call_id])


class _Ladder:
    """The levels: run latencies of the best schedule so far, step by step."""

    def __init__(self, runs: Sequence[RunSpec], fleet: Fleet, forecaster: Forecaster) -> None:
        self._runs = runs
        self._fleet = fleet
        self._known = forecaster
        self._exact = Exact(forecaster, runs, list(forecaster.workflows.values()))
        self.levels: list[Latencies] = []
        self.simulations = 0

    def climb(
        self,
        recorded: _Recorded,
        steps: int,
        seed: int,
        progress: Callable[[str], object],
    ) -> None:
        """Take all steps."""
        start = _Schedule(places=recorded.places)
        self.levels = [self._latencies(start, held_s=recorded.held_s)]
        order = _remaining_order(self._runs)
        best = self._step([start], None)
        progress(f"without waiting in the router: {self._now():.3f} s")
        best = self._step([replace(best, priorities=order)], best)
        progress(f"in the better order: {self._now():.3f} s")
        rules = [
            _Schedule(theta=theta, priorities=one) for theta in _THETAS for one in (None, order)
        ]
        best = self._step(rules, best)
        progress(f"placed by the forecasts: {self._now():.3f} s")
        best = self._step([replace(one, exact=True) for one in rules], best)
        progress(f"with exact lengths: {self._now():.3f} s")
        self._search(best, steps, seed)
        progress(f"with all that was to come known: {self._now():.3f} s")

    def _now(self) -> float:
        return _mean(list(self.levels[-1].values()))

    def _step(self, tried: Sequence[_Schedule], best: _Schedule | None) -> _Schedule:
        """Add the level of the best of what there was and what is tried; return its schedule."""
        found, latencies = best, self.levels[-1]
        for one in tried:
            made = self._latencies(one)
            if found is None or _total(made) < _total(latencies) - 1e-9:
                found, latencies = one, made
        # Letting calls go at once may, by chance, cost more than it gains: then it is no part.
        if best is None and _total(latencies) > _total(self.levels[-1]):
            latencies = self.levels[-1]
        assert found is not None  # noqa: S101 - the first step tries one
        self.levels.append(latencies)
        return found

    def _search(self, best: _Schedule, steps: int, seed: int) -> None:
        """Move calls while the mean falls; add the level of the best."""
        rng = np.random.default_rng(seed)
        endpoints = self._fleet.endpoints
        speed = np.array([1.0 / one.latency.decode_step_s(8, 8e3) for one in endpoints])
        chances = speed / speed.sum()
        calls = [
            f"{run.run_id}/{task.index}" for run in self._runs for task in run.tasks if task.site
        ]
        schedule, latencies = best, self.levels[-1]
        for _ in range(steps):
            moved = [calls[int(n)] for n in rng.integers(len(calls), size=int(rng.integers(1, 3)))]
            places = dict(schedule.places)
            for call_id in moved:
                places[call_id] = int(rng.choice(len(chances), p=chances))
            tried = replace(schedule, places=places)
            made = self._latencies(tried)
            if _total(made) < _total(latencies):
                schedule, latencies = tried, made
        self.levels.append(latencies)

    def _latencies(
        self, schedule: _Schedule, *, held_s: Mapping[str, float] | None = None
    ) -> Latencies:
        self.simulations += 1
        runs = self._runs if held_s is None else [_held(run, held_s) for run in self._runs]
        forecaster = self._exact if schedule.exact else self._known
        records = simulate(runs, self._fleet, _Placed(schedule), forecaster)
        found = {
            one.run_id: one.finish_s - one.arrival_s if one.status == "ok" else math.inf
            for one in records
            if isinstance(one, RunRecord)
        }
        return {run.run_id: found[run.run_id] for run in self._runs}


def _held(run: RunSpec, held_s: Mapping[str, float]) -> RunSpec:
    """Return a run whose calls are sent later by the time the router held them."""
    return replace(
        run,
        tasks=tuple(
            replace(task, delay_s=task.delay_s + held_s.get(f"{run.run_id}/{task.index}", 0.0))
            for task in run.tasks
        ),
    )


_TOKEN_S = 0.02
_PROMPT_TOKEN_S = 0.0001


def _remaining_order(runs: Sequence[RunSpec]) -> dict[str, int]:
    """Return priorities, ms: the longest chain that is left from each call on, at middling speed.

    Shortest remaining first; known here because lengths and branches are.
    """
    found = {}
    for run in runs:
        durations = [
            task.delay_s + task.prompt_tokens * _PROMPT_TOKEN_S + task.output_tokens * _TOKEN_S
            for task in run.tasks
        ]
        for task, rank in zip(run.tasks, upward_ranks(run, durations), strict=True):
            found[f"{run.run_id}/{task.index}"] = int(rank * 1000.0)
    return found


def _total(latencies: Latencies) -> float:
    return math.fsum(latencies.values())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
