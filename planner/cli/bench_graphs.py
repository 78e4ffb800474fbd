"""`almanac bench-planner`, graphs: list schedules of the literature, published critical paths."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.cli.bench_figures import Bar, at_most, check, published_rows

__all__ = ["critical_paths", "task_graphs"]


def task_graphs(path: Path, limit: float) -> Iterator[Bar]:
    """Schedule task graphs; count those where a list schedule is better."""
    from planner.solve.budget import Budget
    from planner.solve.intervals import solve_schedule
    from planner.solve.list_schedules import LIST_SCHEDULES
    from planner.solve.public import dagbench_question
    from planner.verify_schedule import verify_schedule

    worse, gain, optimal, count = 0, [], 0, 0
    for row in published_rows(path):
        question = dagbench_question(row)
        others = {name: rule(question) for name, rule in LIST_SCHEDULES.items()}
        result = solve_schedule(question, budget=Budget(wall_s=limit, relative_gap=0.0))
        for one in (result.schedule, *others.values()):
            check(verify_schedule(question, one), row["id"])
        best = min(one.objective for one in others.values())
        worse += result.schedule.objective > best
        gain.append(100 * (1 - result.schedule.objective / others["HEFT"].objective))
        optimal += result.status == "optimal"
        count += 1
    yield at_most("dagbench_worse_than_heft_cpop_peft", worse, "graphs", 0)
    yield Bar(name="dagbench_below_heft_mean", value=statistics.fmean(gain), unit="%")
    yield Bar(name="dagbench_proven_optimal", value=100 * optimal / count, unit="%")


def critical_paths(path: Path) -> Bar:
    """Count plans whose longest path is not the published answer."""
    from planner.domain.ids import NodeId, RunId, WorkflowHash
    from planner.domain.run import RunSpec, Task
    from planner.graph.analysis import completion_s

    wrong = 0
    for row in published_rows(path):
        order = _ordered(row["dur_s_min_max"], row["edges"])
        position = {name: n for n, name in enumerate(order)}
        preds: dict[str, list[int]] = {name: [] for name in order}
        for source, target in row["edges"]:
            preds[target].append(position[source])
        run = RunSpec(
            run_id=RunId(str(row["id"])),
            workflow="plan",
            workflow_hash=WorkflowHash("plan"),
            arrival_s=0.0,
            tasks=tuple(
                Task(index=n, node=NodeId(name), kind="tool", preds=tuple(preds[name]))
                for n, name in enumerate(order)
            ),
        )
        for side in (0, 1):
            length = completion_s(run, [row["dur_s_min_max"][name][side] for name in order])
            if abs(length - row["critical_path_s_min_max"][side]) > 1e-6 * max(1.0, length):
                wrong += 1
                break
    return at_most("asynchow_critical_paths_wrong", wrong, "plans", 1)


def _ordered(names: Mapping[str, Any], edges: Sequence[Sequence[str]]) -> list[str]:
    """Return the steps with predecessors first."""
    before = {name: {source for source, target in edges if target == name} for name in names}
    order: list[str] = []
    while before:
        ready = sorted(name for name, left in before.items() if left <= set(order))
        order += ready
        for name in ready:
            del before[name]
    return order
