"""Answers: run latency, deadlines and cost of a question, with intervals and proven bounds.

Figures are means over seeds of what each seed's counted runs say. A bound is the mean over the
same seeds of what no policy can beat on those runs, so it and the figure compare exactly: no
policy whatever could have brought the figure below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from planner.whatif.figures import Figure
from planner.whatif.question import Metric, Question, Target
from planner.whatif.sample import Sample

__all__ = ["Answer"]


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
