"""How much longer a running workflow will take: a distribution, at any point of its progress.

Runs are sampled from the graph and its forecasts; those that contradict what the run has done so
far are dropped; what is done takes no more time, and what is under way takes what is left of it,
given how long it has taken (`Quantiles.given`). The rest takes its sampled time on the fleet as
loaded now. Loads to come are not known, so the result is corrected by a
`planner.domain.calibration.QuantileTracker` per level as runs end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from planner.domain.estimates import Quantiles
from planner.domain.ids import NodeId
from planner.domain.latency import LatencyRow
from planner.domain.run import RunSpec, Task
from planner.graph.analysis import completion_s

__all__ = ["EndpointLoad", "Progress", "Service", "fleet_service", "remaining_s"]

Service = Callable[[Task], float]
"""Seconds a call takes from ready to finish on the fleet as loaded now."""

LEAST_RUNS = 20
"""Sampled runs that must agree with what has happened; with fewer the closest are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a run has done so far.

    Parameters
    ----------
    done
        How often each node has finished.
    running
        Node -> seconds since its present execution began.
    outcomes
        Branch path -> outcomes taken so far, in order of visits.
    """

    done: Mapping[NodeId, int] = field(default_factory=dict)
    running: Mapping[NodeId, float] = field(default_factory=dict)
    outcomes: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointLoad:
    """An endpoint as it is now: its row, calls in flight, their context, and its slots."""

    row: LatencyRow
    calls: float
    kv_tokens: float
    slots: float


def fleet_service(loads: Sequence[EndpointLoad], cached_share: float = 0.0) -> Service:
    """Return the seconds of a call where it would finish first, as the endpoints are loaded now.

    Parameters
    ----------
    loads
        The endpoints that serve the call's model, at least one.
    cached_share
        Share of prompt tokens expected in the cache, [0, 1).

    Notes
    -----
    Calls beyond the slots wait for a turn of them.
    """

    def service(task: Task) -> float:
        fresh = task.prompt_tokens * (1.0 - cached_share)
        times = []
        for load in loads:
            calls = min(load.calls + 1.0, load.slots)
            mean = load.kv_tokens / load.calls if load.calls >= 1 else 0.0
            context = mean * max(calls - 1.0, 0.0) + task.prompt_tokens + task.output_tokens / 2
            step = load.row.decode_step_s(calls, context)
            own = load.row.prefill_s(fresh) + task.output_tokens * step
            turns = max(0.0, load.calls + 1.0 - load.slots) / load.slots
            times.append(own * (1.0 + turns))
        return min(times)

    return service


def remaining_s(runs: Sequence[RunSpec], service: Service, progress: Progress) -> Quantiles:
    """Return the distribution of a run's remaining seconds.

    Parameters
    ----------
    runs
        Sampled runs of its workflow (`planner.graph.sampling.scenarios`); a few hundred. The
        same ones serve every run of the workflow.
    service
        Seconds of a call now, see `fleet_service`.
    progress
        What the run has done; empty at its start.

    Raises
    ------
    ValueError
        If ``runs`` is empty.
    """
    if not runs:
        raise ValueError("at least one sampled run is needed")
    scored = [(_disagreement(run, progress), place) for place, run in enumerate(runs)]
    agreeing = [runs[place] for score, place in scored if score == 0]
    if len(agreeing) < min(LEAST_RUNS, len(runs)):
        agreeing = [runs[place] for _, place in sorted(scored)[:LEAST_RUNS]]
    times = [[_seconds(task, service) for task in run.tasks] for run in agreeing]
    whole: defaultdict[NodeId, list[float]] = defaultdict(list)
    for run, durations in zip(agreeing, times, strict=True):
        for task, duration in zip(run.tasks, durations, strict=True):
            if task.node in progress.running:
                whole[task.node].append(duration)
    overdue = {
        node: Quantiles.from_samples(whole[node]).given(elapsed)
        for node, elapsed in progress.running.items()
        if whole[node]
    }
    left = [
        _left(run, durations, progress, overdue, (number + 0.5) / len(agreeing))
        for number, (run, durations) in enumerate(zip(agreeing, times, strict=True))
    ]
    return Quantiles.from_samples(left)


def _seconds(task: Task, service: Service) -> float:
    return task.delay_s + (service(task) if task.kind == "llm" else 0.0)


def _disagreement(run: RunSpec, progress: Progress) -> int:
    """Count what happened in the run at hand and cannot happen in a sampled one."""
    taken: defaultdict[str, list[str]] = defaultdict(list)
    visits: Counter[NodeId] = Counter()
    for task in run.tasks:
        visits[task.node] += 1
        for branch, outcome in task.outcomes:
            taken[branch].append(outcome)
    wrong = 0
    for branch, outcomes in progress.outcomes.items():
        mine = taken[branch]
        wrong += sum(
            place >= len(mine) or mine[place] != outcome for place, outcome in enumerate(outcomes)
        )
    for node in {*progress.done, *progress.running}:
        seen = progress.done.get(node, 0) + (node in progress.running)
        wrong += max(0, seen - visits[node])
    return wrong


def _left(
    run: RunSpec,
    durations: Sequence[float],
    progress: Progress,
    overdue: Mapping[NodeId, Quantiles],
    uniform: float,
) -> float:
    seen: Counter[NodeId] = Counter()
    left = []
    for task, duration in zip(run.tasks, durations, strict=True):
        done = progress.done.get(task.node, 0)
        place = seen[task.node]
        seen[task.node] += 1
        if place < done:
            left.append(0.0)
        elif place == done and task.node in overdue:
            elapsed = progress.running[task.node]
            # Stratified over the sampled runs, so that few of them span the distribution.
            left.append(max(0.0, overdue[task.node].sample(uniform) - elapsed))
        else:
            left.append(duration)
    return completion_s(run, left)
