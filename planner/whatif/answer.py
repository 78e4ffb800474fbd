"""Answers: run latency, deadlines and cost of questions, with intervals and proven bounds.

Figures are means over seeds of what each seed's counted runs say. A bound is the mean over the
same seeds of what no policy can beat on those runs, so it and the figure compare exactly: no
policy whatever could have brought the figure below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planner.dispatch.table import DispatchTable
from planner.domain.errors import Infeasible, InvalidInput
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.graph.sampling import scenarios
from planner.report.terminal import align
from planner.whatif.changes import Scenario
from planner.whatif.figures import LEVEL, Figure, difference, mean_figure, share_figure
from planner.whatif.question import METRICS, Metric, Question, Target, check_deadlines
from planner.whatif.sample import BoundTask, Sample, SampleTask, TableTask
from planner.whatif.store import Store, Task

__all__ = [
    "Answer",
    "Effect",
    "Effort",
    "WhatIf",
    "answer_table",
    "ask",
    "bounded",
    "capacity_rps",
    "effect",
    "effect_table",
    "flat_row",
    "what_if",
]

_SCENARIOS = 64
_SATURATED = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is simulated.

    Parameters
    ----------
    seeds
        Replications, >= 2: intervals come from their spread.
    runs
        Runs of each, warm-up included, >= 20.
    bounds
        Metrics to bound; empty leaves bounds out.
    level
        Coverage of the intervals, in (0, 1).
    first_seed
        Seeds count from here, >= 0: other seeds are other runs.
    """

    seeds: int = 6
    runs: int = 150
    bounds: tuple[Metric, ...] = ("mean_s", "p95_s")
    level: float = LEVEL
    first_seed: int = 0

    @property
    def all_seeds(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def __post_init__(self) -> None:
        for value, least, name in (
            (self.seeds, 2, "seeds"),
            (self.runs, 20, "runs"),
            (self.first_seed, 0, "first seed"),
        ):
            if value < least:
                raise InvalidInput(f"{value}", where=name, remedy=f"use at least {least}")
        if not 0 < self.level < 1:
            raise InvalidInput(f"{self.level!r}", where="level", remedy="use a number in (0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is to be expected.

    Parameters
    ----------
    label
        The scenario, in the notation of changes.
    question
        What was asked.
    samples
        By seed.
    figures
        By metric; ``attainment`` only where runs have deadlines.
    tenants
        Figures by tenant.
    bounds
        By metric: what no policy can go below on these runs.
    capacity_rps
        Runs per second of this mix that the fleet carries by the planner's model, 0 if it cannot
        serve it at all.
    notes
        What to know about the figures.
    """

    label: str
    question: Question
    samples: tuple[Sample, ...] = ()
    figures: Mapping[Metric, Figure] = field(default_factory=dict)
    tenants: Mapping[str, Mapping[Metric, Figure]] = field(default_factory=dict)
    bounds: Mapping[Metric, float] = field(default_factory=dict)
    capacity_rps: float = math.inf
    notes: tuple[str, ...] = ()

    @property
    def load(self) -> float:
        """Arrival rate over capacity."""
        return self.question.rate_rps / self.capacity_rps if self.capacity_rps else math.inf

    def distance(self, metric: Metric) -> float | None:
        """Return how far the figure lies above its bound, relative to it; None without one."""
        bound, figure = self.bounds.get(metric), self.figures.get(metric)
        return None if not bound or figure is None else figure.value / bound - 1.0

    def impossible(self, target: Target) -> bool:
        """Whether it is proven that no policy meets a latency target on these runs."""
        return not target.least and self.bounds.get(target.metric, 0.0) > target.value

    def verdict(self, target: Target) -> str:
        """Return what can be said of a target, with the figures."""
        figure = self.figures.get(target.metric)
        if figure is None:
            return f"{target}: no figure, {'; '.join(self.notes) or 'no run counts'}"
        shown = figure.text(3 if target.least else 2)
        bound = self.bounds.get(target.metric)
        floor = "" if bound is None else f", and no policy can go below {bound:.2f} s"
        if self.impossible(target):
            name = str(target).replace("_s", "")
            return (
                f"no policy can reach {name} s on this fleet at this load: at least {bound:.2f} s, "
                f"here {shown} s"
            )
        sure = target.met(figure.low) and target.met(figure.high)
        if target.met(figure.value):
            return f"{target}: met{'' if sure else ', within the error'} with {shown}{floor}"
        unsure = target.met(figure.low) or target.met(figure.high)
        return f"{target}: missed{', within the error' if unsure else ''} with {shown}{floor}"

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; samples are left out."""
        question = self.question
        return {
            "label": self.label,
            "fleet": [f"{one.id} ({one.gpu}, {one.model})" for one in question.fleet.endpoints],
            "policy": question.policy,
            "retention": question.retention,
            "rate_rps": question.rate_rps,
            "capacity_rps": self.capacity_rps if math.isfinite(self.capacity_rps) else None,
            "load": self.load if math.isfinite(self.load) else None,
            "usd_per_hour": question.usd_per_hour,
            "usd_per_run": question.usd_per_run,
            "seeds": len(self.samples),
            "runs": sum(len(one.latency_s) for one in self.samples),
            "figures": {name: one.to_json() for name, one in self.figures.items()},
            "tenants": {
                tenant: {name: one.to_json() for name, one in row.items()}
                for tenant, row in self.tenants.items()
            },
            "bounds": dict(self.bounds),
            "distance": {name: self.distance(name) for name in self.bounds},
            "notes": list(self.notes),
        }


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
            capacities[one.workload_key] = _capacity(one)
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
        capacity = capacities[one.workload_key]
        if isinstance(capacity, Infeasible):
            answers.append(
                Answer(label=label, question=one, capacity_rps=0.0, notes=(str(capacity),))
            )
            continue
        documents = store.results(tasks[one.key])
        answer = _answer(label, one, documents[: effort.seeds], documents[effort.seeds :], effort)
        reason = tables.get(one.key, {}).get("reason")
        notes = answer.notes if reason is None else (*answer.notes, f"no plan: {reason}")
        answers.append(
            replace(answer, capacity_rps=capacity, notes=_saturation(one, capacity, notes))
        )
    return answers


def _carries(capacity: float | Infeasible) -> bool:
    return not isinstance(capacity, Infeasible)


def _is_planned(question: Question) -> bool:
    return question.setup().policy == "almanac"


def _saturation(question: Question, capacity: float, notes: tuple[str, ...]) -> tuple[str, ...]:
    load = question.rate_rps / capacity
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


def capacity_rps(question: Question) -> float:
    """Return the runs per second of the question's mix that its fleet can carry.

    The largest rate of the plan's own relaxation: every endpoint at its top level, call sites
    divided at will, prefixes warm.

    Raises
    ------
    Infeasible
        If a call site fits no endpoint.
    """
    found = _capacity(question)
    if isinstance(found, Infeasible):
        raise found
    return found


def _capacity(question: Question) -> float | Infeasible:
    from planner.solve.bounds import carried_rate_rps
    from planner.solve.instance import Demand, build_mix

    truth = question.truth or question.estimates
    loads = question.loads_rps
    graphs = [one for one in question.workflows if one.content_hash in loads]
    tiny = 1e-6 / question.rate_rps
    demands = [Demand(workflow=one, rate_rps=tiny * loads[one.content_hash]) for one in graphs]
    samples = [
        scenarios(
            one,
            truth.workflows.get(one.content_hash, WorkflowEstimate()),
            _SCENARIOS,
            seed=0,
            defaults=truth,
        )
        for one in graphs
    ]
    try:
        plain = EstimateTable(workflows=truth.workflows)
        instance = build_mix(demands, question.fleet, plain, samples, run_classes=1)
    except Infeasible as error:
        return error
    return carried_rate_rps(instance) / instance.utilisation_cap


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What a scenario changes against another: relative, by metric; shares as differences."""

    label: str
    against: str
    changes: Mapping[Metric, Figure]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "label": self.label,
            "against": self.against,
            "changes": {name: one.to_json() for name, one in self.changes.items()},
        }


def effect(before: Answer, after: Answer, level: float = LEVEL) -> Effect:
    """Return the paired effect of a change: both answers saw the same seeds."""
    found: dict[Metric, Figure] = {}
    for metric in METRICS:
        pairs = [
            (one, other)
            for a, b in zip(before.samples, after.samples, strict=False)
            if (one := a.value(metric)) is not None and (other := b.value(metric)) is not None
        ]
        if not pairs:
            continue
        old, new = [one for one, _ in pairs], [other for _, other in pairs]
        if metric != "attainment":
            if math.isfinite(math.fsum(old)) and math.fsum(old) > 0:
                found[metric] = difference(old, new, level)
            continue
        # A share may rise from 0: its change is a difference, laid as one of means around 1.
        shift = mean_figure([1.0 + y - x for x, y in pairs], level)
        found[metric] = Figure(
            value=shift.value - 1.0, low=max(-1.0, shift.low - 1.0), high=min(1.0, shift.high - 1.0)
        )
    return Effect(label=after.label, against=before.label, changes=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """A question, its changes, and what comes of each.

    Parameters
    ----------
    answers
        The question as it is first, then each scenario.
    effects
        Of each scenario against the question as it is.
    target
        What was asked for, or None.
    """

    answers: tuple[Answer, ...]
    effects: tuple[Effect, ...]
    target: Target | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": "almanac.whatif/1",
            "answers": [one.to_json() for one in self.answers],
            "effects": [one.to_json() for one in self.effects],
            "target": None
            if self.target is None
            else {
                "target": str(self.target),
                "verdicts": {one.label: one.verdict(self.target) for one in self.answers},
            },
        }

    def text(self) -> str:
        """Return the tables for a terminal."""
        lines = [answer_table(self.answers)]
        if self.effects:
            lines += ["", effect_table(self.effects)]
        if self.target is not None:
            lines += ["", *(f"{one.label}: {one.verdict(self.target)}" for one in self.answers)]
        notes = [f"{one.label}: {note}" for one in self.answers for note in one.notes]
        return "\n".join([*lines, *notes])

    def to_frame(self) -> Any:
        """Return the answers as a pandas data frame, a row each."""
        import pandas as pd

        return pd.DataFrame([flat_row(one) for one in self.answers])

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return str(self.to_frame().to_html(index=False, float_format=lambda x: f"{x:.3g}"))


def what_if(
    question: Question,
    scenarios_: Sequence[Scenario] = (),
    *,
    target: Target | None = None,
    effort: Effort | None = None,
    store: Store | None = None,
) -> WhatIf:
    """Return what is expected as things are, and after each scenario.

    Parameters
    ----------
    question
        As things are.
    scenarios_
        Changes to try, each on its own.
    target
        Judged for each answer; its metric is bounded, too.

    Raises
    ------
    InvalidInput
        If a change does not fit the question.
    """
    check_deadlines(target, question.streams)
    effort = bounded(effort or Effort(), target)
    asked = [(str(one), one.apply(question)) for one in (Scenario(), *scenarios_)]
    answers = ask(asked, effort, store=store or Store())
    return WhatIf(
        answers=tuple(answers),
        effects=tuple(effect(answers[0], one, effort.level) for one in answers[1:]),
        target=target,
    )


def bounded(effort: Effort, target: Target | None) -> Effort:
    """Return the effort with the target's metric among those that are bounded."""
    if target is None or target.least or target.metric in effort.bounds or not effort.bounds:
        return effort
    return replace(effort, bounds=(*effort.bounds, target.metric))


HEADINGS: Mapping[Metric, str] = {
    "mean_s": "mean s",
    "p50_s": "P50 s",
    "p95_s": "P95 s",
    "p99_s": "P99 s",
    "attainment": "in time",
}


def answer_table(answers: Sequence[Answer]) -> str:
    """Return answers as aligned text."""
    shown = [name for name in METRICS if any(name in one.figures for one in answers)]
    head = ["scenario", "policy", "runs/s", "load", *(HEADINGS[one] for one in shown)]
    rows = [[*head, "bound mean", "bound P95", "$/h", "$/run"]]
    for one in answers:
        question = one.question
        cells = [one.label, question.policy, f"{question.rate_rps:.3g}", f"{one.load:.2f}"]
        for name in shown:
            figure = one.figures.get(name)
            cells.append("-" if figure is None else figure.text(3 if name == "attainment" else 2))
        for metric in ("mean_s", "p95_s"):
            bound = one.bounds.get(metric)
            cells.append(
                "-" if bound is None else f"{bound:.2f} ({one.distance(metric) or 0:+.0%})"
            )
        cells.append(_money(question.usd_per_hour, 2))
        cells.append(_money(question.usd_per_run, 4))
        rows.append(cells)
    return align(rows)


def _money(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def effect_table(effects: Sequence[Effect]) -> str:
    """Return effects as aligned text, in per cent (shares in points)."""
    shown = [name for name in METRICS if any(name in one.changes for one in effects)]
    rows = [["change", *(HEADINGS[one].removesuffix(" s") + " %" for one in shown)]]
    for one in effects:
        cells = [one.changes[name].text(1, 100.0) if name in one.changes else "-" for name in shown]
        rows.append([one.label, *cells])
    return align(rows)


def flat_row(one: Answer) -> dict[str, Any]:
    """Return an answer as one flat row, for data frames and CSV."""
    row: dict[str, Any] = {
        "scenario": one.label,
        "policy": one.question.policy,
        "rate_rps": one.question.rate_rps,
        "load": one.load,
    }
    for metric in METRICS:
        figure = one.figures.get(metric)
        for part in ("value", "low", "high"):
            name = metric if part == "value" else f"{metric}_{part}"
            row[name] = None if figure is None else getattr(figure, part)
    row |= {f"bound_{metric}": one.bounds.get(metric) for metric in ("mean_s", "p95_s")}
    row |= {"usd_per_hour": one.question.usd_per_hour, "usd_per_run": one.question.usd_per_run}
    return row
