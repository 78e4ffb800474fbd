"""Values of objectives, recomputed for the plan checker from latencies in seconds.

From the definitions of `planner.domain.objective`, without the solver's formulas: the tail mean is
an average over the worst latencies, not a minimum over thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.domain.objective import Objective, Term

__all__ = ["Outcome", "objective_value", "term_value"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Latency of a scenario under a run class in seconds, its probability, and its deadline."""

    latency_s: float
    probability: float
    deadline_s: float | None = None


def objective_value(objective: Objective, outcomes: Sequence[Outcome]) -> float:
    """Return the weighted sum of the terms; of the first alone if they come one after the other."""
    first = objective.stages[0]
    return sum(float(term.factor) * term_value(term, outcomes) for term in first.terms)


def term_value(term: Term, outcomes: Sequence[Outcome]) -> float:
    """Return the value of a term, without its weight."""
    if term.kind == "mean":
        return sum(one.probability * one.latency_s for one in outcomes)
    if term.kind == "makespan":
        return max(one.latency_s for one in outcomes)
    if term.kind == "cvar":
        return _tail_mean(outcomes, float(term.tail))
    late = [
        (one.probability, one.latency_s - one.deadline_s)
        for one in outcomes
        if one.deadline_s is not None and one.latency_s > one.deadline_s
    ]
    if term.kind == "miss":
        return sum(probability for probability, _ in late)
    return sum(probability * by_s for probability, by_s in late)


def _tail_mean(outcomes: Sequence[Outcome], tail: float) -> float:
    """Return the mean of the worst outcomes that make up a probability of ``tail``."""
    left, total = tail, 0.0
    for one in sorted(outcomes, key=lambda o: -o.latency_s):
        part = min(left, one.probability)
        total += part * one.latency_s
        left -= part
        if left <= 0:
            break
    return total / (tail - max(0.0, left))
