"""From questions to answers: plans are made first, then all seeds are simulated and bounded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from planner.dispatch.table import DispatchTable
from planner.domain.errors import Infeasible
from planner.whatif.answer import Answer
from planner.whatif.capacity import capacity
from planner.whatif.effort import Effort
from planner.whatif.figures import Figure, mean_figure, share_figure
from planner.whatif.question import METRICS, Metric, Question
from planner.whatif.sample import BoundTask, Sample, SampleTask, TableTask
from planner.whatif.store import Store, Task

__all__ = ["ask"]

_SATURATED = 1.0


def ask(
    questions: Sequence[tuple[str, Question]], effort: Effort | None = None, *, store: Store
) -> list[Answer]:
    """Return the answers to labelled questions, in order.

    Raises
    ------
    InvalidInput
        If a question cannot be simulated as it is written. A fleet that cannot serve its work is
        an answer without figures, not an error.
    """
    effort = effort or Effort()
    capacities: dict[str, float | Infeasible] = {}
    for _, one in questions:
        if one.workload_key not in capacities:
            capacities[one.workload_key] = capacity(one)
    able = [one for _, one in questions if _carries(capacities[one.workload_key])]
    planned = [TableTask(question=one) for one in able if _is_planned(one)]
    tables = dict(zip((one.question.key for one in planned), store.results(planned), strict=True))
    tasks: dict[str, list[Task]] = {}
    for one in able:
        document = tables.get(one.key, {"table": None})["table"]
        table = None if document is None else DispatchTable.from_json(document)
        samples: list[Task] = [
            SampleTask(question=one, seed=seed, runs=effort.runs, table=table)
            for seed in effort.all_seeds
        ]
        bounds: list[Task] = [
            BoundTask(question=one, seed=seed, runs=effort.runs, metrics=effort.bounds)
            for seed in (effort.all_seeds if effort.bounds else ())
        ]
        tasks[one.key] = samples + bounds
    store.results([task for group in tasks.values() for task in group])
    answers = []
    for label, one in questions:
        carried = capacities[one.workload_key]
        if isinstance(carried, Infeasible):
            answers.append(
                Answer(label=label, question=one, capacity_rps=0.0, notes=(str(carried),))
            )
            continue
        documents = store.results(tasks[one.key])
        answer = _answer(label, one, documents[: effort.seeds], documents[effort.seeds :], effort)
        reason = tables.get(one.key, {}).get("reason")
        notes = answer.notes if reason is None else (*answer.notes, f"no plan: {reason}")
        answers.append(
            replace(answer, capacity_rps=carried, notes=_saturation(one, carried, notes))
        )
    return answers


def _carries(found: float | Infeasible) -> bool:
    return not isinstance(found, Infeasible)


def _is_planned(question: Question) -> bool:
    return question.setup().policy == "almanac"


def _saturation(question: Question, capacity_rps: float, notes: tuple[str, ...]) -> tuple[str, ...]:
    load = question.rate_rps / capacity_rps
    if load < _SATURATED:
        return notes
    return (
        *notes,
        f"load {load:.2f} of what the fleet carries: queues and figures grow with each further run",
    )


def _answer(
    label: str,
    question: Question,
    samples: Sequence[Mapping[str, Any]],
    bounds: Sequence[Mapping[str, Any]],
    effort: Effort,
) -> Answer:
    made = tuple(Sample.from_json(one) for one in samples)
    tenants = sorted({one.tenant for one in question.streams if one.rate_rps > 0})
    notes = []
    lost = sum(not math.isfinite(x) for one in made for x in one.latency_s)
    if lost:
        notes.append(f"{lost} runs did not end well")
    reasons = sorted({one["reason"] for one in bounds if not one["values"]})
    return Answer(
        label=label,
        question=question,
        samples=made,
        figures=_figures(made, effort.level),
        tenants={one: _figures(made, effort.level, one) for one in tenants},
        bounds=_bounds(bounds, effort.bounds) if not reasons else {},
        notes=(*notes, *(f"no bound: {reason}" for reason in reasons)),
    )


def _bounds(
    documents: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]
) -> dict[Metric, float]:
    if not documents:
        return {}
    return {
        name: math.fsum(one["values"][name] for one in documents) / len(documents)
        for name in metrics
        if name in documents[0]["values"]
    }


def _figures(
    samples: Sequence[Sample], level: float, tenant: str | None = None
) -> dict[Metric, Figure]:
    found: dict[Metric, Figure] = {}
    for metric in METRICS:
        values = [value for one in samples if (value := one.value(metric, tenant)) is not None]
        if not values:
            continue
        if metric == "attainment":
            counted = sum(len(one.latency_s) for one in samples)
            found[metric] = share_figure(values, counted, level)
        else:
            found[metric] = mean_figure(values, level)
    return found
