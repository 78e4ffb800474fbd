"""Published scheduling instances as our own questions: FJSP, HFSP, DAGBench."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from planner.domain.schedule import Activity, Mode, ScheduleQuestion, Transfer

__all__ = ["dagbench_question", "fjsp_question", "hfsp_question"]

DAG_TICKS = 1_000_000
"""Resolution of a task graph: ticks in the work of all its tasks on the fastest node."""


def fjsp_question(row: Mapping[str, Any]) -> ScheduleQuestion:
    """Return a flexible job shop: operations of a job in a chain, a mode per allowed machine."""
    activities: list[Activity] = []
    for job in row["jobs"]:
        for o, times in enumerate(job):
            modes = tuple(Mode(endpoint=m, ticks=t) for m, t in enumerate(times) if t > 0)
            preds = (len(activities) - 1,) if o else ()
            activities.append(Activity(modes=modes, preds=preds))
    return ScheduleQuestion(slots=(1,) * int(row["n_machines"]), activities=tuple(activities))


def hfsp_question(row: Mapping[str, Any]) -> ScheduleQuestion:
    """Return a hybrid flow shop: each stage is an endpoint with as many slots as machines."""
    activities: list[Activity] = []
    for times in row["times"]:
        for stage, ticks in enumerate(times):
            preds = (len(activities) - 1,) if stage else ()
            mode = Mode(endpoint=stage, ticks=ticks)
            activities.append(Activity(modes=(mode,), preds=preds))
    return ScheduleQuestion(slots=tuple(row["machines_per_stage"]), activities=tuple(activities))


def dagbench_question(row: Mapping[str, Any]) -> ScheduleQuestion:
    """Return a task graph on unlike nodes: cost over speed, size over the link's speed.

    Links hold in both directions unless both are given; between nodes without a link the slowest
    of all is taken. Times are rounded up to ticks, of which the whole work has a million.
    """
    speeds = [float(speed) for _, speed in row["nodes"]]
    nodes = {name: position for position, (name, _) in enumerate(row["nodes"])}
    cost = {name: float(value) for name, value in row["tasks"]}
    tick = (sum(cost.values()) / max(speeds) or 1.0) / DAG_TICKS
    link: dict[tuple[int, int], float] = {}
    for source, target, speed in row["links"]:
        link[nodes[source], nodes[target]] = float(speed)
    for (i, j), speed in list(link.items()):
        link.setdefault((j, i), speed)
    slowest = min(link.values(), default=math.inf)

    order = _topological(list(cost), [(a, b) for a, b, _ in row["edges"]])
    position = {name: n for n, name in enumerate(order)}
    preds: dict[str, list[int]] = {name: [] for name in order}
    transfers: dict[tuple[int, int], Transfer] = {}
    for source, target, size in row["edges"]:
        preds[target].append(position[source])
        transfers[position[source], position[target]] = tuple(
            tuple(
                0 if i == j else math.ceil(float(size) / link.get((i, j), slowest) / tick - 1e-9)
                for j in range(len(speeds))
            )
            for i in range(len(speeds))
        )
    activities = tuple(
        Activity(
            modes=tuple(
                Mode(endpoint=i, ticks=math.ceil(cost[name] / speed / tick - 1e-9))
                for i, speed in enumerate(speeds)
            ),
            preds=tuple(sorted(preds[name])),
        )
        for name in order
    )
    return ScheduleQuestion(slots=(1,) * len(speeds), activities=activities, transfers=transfers)


def _topological(names: list[str], edges: list[tuple[str, str]]) -> list[str]:
    waiting = dict.fromkeys(names, 0)
    after: dict[str, list[str]] = {name: [] for name in names}
    for source, target in edges:
        waiting[target] += 1
        after[source].append(target)
    order = [name for name in names if not waiting[name]]
    for name in order:
        for target in after[name]:
            waiting[target] -= 1
            if not waiting[target]:
                order.append(target)
    return order
