"""Ranks, slack, critical paths and visit counts of sampled runs.

Durations are given per task, in seconds, in the order of ``RunSpec.tasks``. A run starts at 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from planner.domain.ids import NodeId, SiteId
from planner.domain.run import RunSpec

__all__ = [
    "Durations",
    "allowances_s",
    "completion_s",
    "criticality",
    "expected_completion_s",
    "expected_visits",
    "finish_times",
    "reach_probability",
    "remaining_s",
    "slacks",
    "upward_ranks",
]

Durations = Callable[[RunSpec], Sequence[float]]
"""Gives the duration in seconds of each task of a run."""
_ON_PATH_S = 1e-9
"""Slack below which a task counts as critical: float error of sums of seconds."""


def finish_times(run: RunSpec, durations: Sequence[float]) -> list[float]:
    """Return when each task finishes if it starts once its predecessors have, in seconds."""
    finish: list[float] = []
    for task, duration in zip(run.tasks, durations, strict=True):
        finish.append(max((finish[pred] for pred in task.preds), default=0.0) + duration)
    return finish


def completion_s(run: RunSpec, durations: Sequence[float]) -> float:
    """Return the length of the longest chain of a run in seconds (0 for an empty run)."""
    return max(finish_times(run, durations), default=0.0)


def upward_ranks(run: RunSpec, durations: Sequence[float]) -> list[float]:
    """Return the longest chain from the start of each task to the end of the run, in seconds.

    References
    ----------
    Topcuoglu, Hariri, Wu (2002), section 4.1, without communication costs.
    """
    after = [0.0] * len(run.tasks)
    rank = [0.0] * len(run.tasks)
    for task in reversed(run.tasks):
        rank[task.index] = after[task.index] + durations[task.index]
        for pred in task.preds:
            after[pred] = max(after[pred], rank[task.index])
    return rank


def slacks(run: RunSpec, durations: Sequence[float]) -> list[float]:
    """Return by how many seconds each task may grow before the run gets longer."""
    finish = finish_times(run, durations)
    total = max(finish, default=0.0)
    rank = upward_ranks(run, durations)
    return [total - (finish[i] - durations[i]) - rank[i] for i in range(len(finish))]


def allowances_s(run: RunSpec, durations: Sequence[float]) -> list[float]:
    """Return how long each task may take before the run gets longer by it, in seconds.

    By how much the longest chain without the task exceeds the rest of the longest one with it, or
    0 if it does not, as for a task on every chain. The task's own duration does not count.

    Notes
    -----
    Tasks come after their predecessors, so a chain without task t goes from an earlier task to a
    later one in one edge, or begins after t, or ends before it. A sweep over the tasks keeps the
    chains of the edges that span the present one by length: O(n log n) for n edges.
    """
    finish, rank = finish_times(run, durations), upward_ranks(run, durations)
    size = len(run.tasks)
    followed = {pred for task in run.tasks for pred in task.preds}
    spans: list[list[tuple[float, int]]] = [[] for _ in range(size + 1)]

    def span(first: int, last: int, length_s: float) -> None:
        spans[first + 1].append((-length_s, last))

    for task in run.tasks:
        place = task.index
        for pred in task.preds:
            span(pred, place, finish[pred] + rank[place])
        if not task.preds:
            span(-1, place, rank[place])
        if place not in followed:
            span(place, size, finish[place])
    found = []
    chains: list[tuple[float, int]] = []
    for place, duration in enumerate(durations):
        for entry in spans[place]:
            heappush(chains, entry)
        while chains and chains[0][1] <= place:
            heappop(chains)
        without = -chains[0][0] if chains else 0.0
        found.append(max(0.0, without - (finish[place] + rank[place] - 2.0 * duration)))
    return found


def criticality(runs: Sequence[RunSpec], durations: Durations) -> dict[SiteId, float]:
    """Return, per call site seen, the share of its calls that lie on a critical path.

    Where chains tie, all of them count as critical.
    """
    seen: Counter[SiteId] = Counter()
    critical: Counter[SiteId] = Counter()
    for run in runs:
        for task, slack in zip(run.tasks, slacks(run, durations(run)), strict=True):
            if task.site is not None:
                seen[task.site] += 1
                critical[task.site] += slack <= _ON_PATH_S
    return {site: critical[site] / count for site, count in sorted(seen.items())}


def remaining_s(runs: Sequence[RunSpec], durations: Durations) -> dict[SiteId, float]:
    """Return, per call site seen, the mean longest chain from its calls to the end of their run.

    In seconds, the call itself included.
    """
    total: dict[SiteId, float] = {}
    seen: Counter[SiteId] = Counter()
    for run in runs:
        for task, rank in zip(run.tasks, upward_ranks(run, durations(run)), strict=True):
            if task.site is not None:
                seen[task.site] += 1
                total[task.site] = total.get(task.site, 0.0) + rank
    return {site: total[site] / count for site, count in sorted(seen.items())}


def expected_completion_s(runs: Sequence[RunSpec], durations: Durations) -> float:
    """Return the mean completion of a non-empty sample of runs in seconds."""
    return sum(completion_s(run, durations(run)) for run in runs) / len(runs)


def expected_visits(runs: Sequence[RunSpec]) -> dict[NodeId, float]:
    """Return how often a run executes each node on average, for nodes seen in the sample.

    A node with several call sites is counted once per visit.
    """
    visits: Counter[NodeId] = Counter()
    for run in runs:
        visits.update(node for node, _ in {(task.node, task.visit) for task in run.tasks})
    return {node: count / len(runs) for node, count in sorted(visits.items())}


def reach_probability(runs: Sequence[RunSpec]) -> dict[NodeId, float]:
    """Return the share of runs that execute each node at least once, for nodes seen."""
    reached: Counter[NodeId] = Counter()
    for run in runs:
        reached.update({task.node for task in run.tasks})
    return {node: count / len(runs) for node, count in sorted(reached.items())}
