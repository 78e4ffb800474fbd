"""Objectives in the whole numbers of the solver.

A `Goal` is one stage of `planner.domain.objective.Objective`: its terms over latencies in ticks,
scaled to integers by one factor, so that what CP-SAT minimises, what the heuristics evaluate and
what the relaxation bounds is the same number. All terms are convex or monotone in the latencies
and treat classes alike.

The tail mean is written as Rockafellar and Uryasev do: with its threshold as a variable,
``eta + sum of p max(0, L - eta) / (1 - alpha)``, which the least eta makes exact.

References
----------
Rockafellar, Uryasev, Optimization of conditional value-at-risk, Journal of Risk 2 (2000).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from planner.domain.errors import InvalidInput
from planner.domain.objective import MEAN, Objective, Term
from planner.domain.plan import PLAN_TICK_S
from planner.solve.arrays import Ints
from planner.solve.question import Instance

__all__ = ["Goal", "Maker"]

_LARGEST = 2**52
"""Largest cost: beyond, floats of solver bounds lose whole numbers."""
_LONG_TICKS = 10**7
"""A run latency (about a day) up to which costs have to stay below the largest."""


class Maker(Protocol):
    """Adds to a model, CP-SAT or linear."""

    def variable(self, least: int, most: int) -> Any:
        """Return a new variable; whole-numbered where the solver knows such."""

    def add(self, constraint: Any) -> Any:
        """Add a constraint."""


class Goal:
    """One stage of an objective for one instance.

    Parameters
    ----------
    objective
        A weighted sum of terms (the mean if not given).
    instance
        Its weights and deadlines.

    Attributes
    ----------
    unit_s
        Seconds per unit of cost.

    Raises
    ------
    InvalidInput
        If a term needs a deadline and no workflow has one, or weights are so unlike that their
        common multiple is too large.
    """

    def __init__(self, instance: Instance, objective: Objective = MEAN) -> None:
        self.objective = objective
        self._weight = instance.scenario_weight
        self._classes = instance.run_classes
        deadlines = [source.deadline_ticks for source in instance.sources]
        self._deadline = np.array(
            [-1 if (ticks := deadlines[w]) is None else ticks for w in instance.scenario_source],
            dtype=np.int64,
        )
        if objective.needs_deadline and not (self._deadline >= 0).any():
            raise InvalidInput(
                f"{objective.name} without a deadline",
                where="objective",
                remedy="give at least one workflow a deadline",
            )
        total = instance.total_weight
        factors: list[Fraction] = []
        for term in objective.terms:
            factors += _factors(term, total)
        scale = math.lcm(*(factor.denominator for factor in factors))
        whole = [int(factor * scale) for factor in factors]
        common = math.gcd(*whole)
        rest = iter(value // common for value in whole)
        self._terms = [
            (term, [next(rest) for _ in _factors(term, total)]) for term in objective.terms
        ]
        self.unit_s = PLAN_TICK_S * common / scale / total
        if max(whole) // common * int(self._weight.max()) > _LARGEST // _LONG_TICKS * total:
            raise InvalidInput(
                f"weights of {objective.name} have no small common multiple",
                where="objective",
                remedy="use rounder weights and levels",
            )

    @property
    def plain(self) -> bool:
        """Whether this is the mean alone, whose cost is a sum over classes."""
        return all(term.kind == "mean" for term, _ in self._terms)

    def seconds(self, cost: float) -> float:
        """Return the value of the objective for a cost."""
        return cost * self.unit_s

    def cost(self, latencies: Ints) -> Ints:
        """Return the cost of latencies in ticks; shape (n, R, S) to (n,)."""
        out = np.zeros(len(latencies), dtype=np.int64)
        for term, factors in self._terms:
            out += self._cost_of(term, factors, latencies)
        return out

    def _cost_of(self, term: Term, factors: Sequence[int], latencies: Ints) -> Ints:
        weight = self._weight
        if term.kind == "mean":
            return np.asarray(factors[0] * (latencies @ weight).sum(axis=1))
        if term.kind == "makespan":
            return np.asarray(factors[0] * latencies.max(axis=(1, 2)))
        if term.kind == "cvar":
            return _tail_cost(latencies, weight, *factors)
        late = np.where(self._deadline >= 0, latencies - self._deadline, 0)
        missed = np.maximum(late, 0) if term.kind == "tardiness" else (late > 0).astype(np.int64)
        return np.asarray(factors[0] * (missed @ weight).sum(axis=1))

    def express(
        self,
        maker: Maker,
        total: Any,
        finish: Sequence[tuple[int, Any]],
        ceiling: int,
        copies: int = 1,
    ) -> Any:
        """Return the cost as an expression of a model, with the variables that it needs.

        Parameters
        ----------
        total
            Weighted sum of the latencies.
        finish
            (scenario, latency) of each run that the model knows.
        ceiling
            No latency is above, ticks.
        copies
            Classes that each of these runs stands for.
        """

        def summed(ones: Sequence[Any], weights: Sequence[int]) -> Any:
            return sum(weight * one for one, weight in zip(ones, weights, strict=True))

        weights = [copies * int(self._weight[s]) for s, _ in finish]
        cost: Any = 0
        for term, factors in self._terms:
            if term.kind == "mean":
                cost = cost + factors[0] * copies * total
            elif term.kind == "makespan":
                last = maker.variable(0, ceiling)
                for _, latency in finish:
                    maker.add(last >= latency)
                cost = cost + factors[0] * last
            elif term.kind == "cvar":
                threshold = maker.variable(0, ceiling)
                beyond = [maker.variable(0, ceiling) for _ in finish]
                for (_, latency), one in zip(finish, beyond, strict=True):
                    maker.add(one >= latency - threshold)
                cost = cost + factors[0] * threshold + factors[1] * summed(beyond, weights)
            else:
                due = [n for n, (s, _) in enumerate(finish) if self._deadline[s] >= 0]
                most = ceiling if term.kind == "tardiness" else 1
                late = [maker.variable(0, most) for _ in due]
                for n, one in zip(due, late, strict=True):
                    s, latency = finish[n]
                    deadline = int(self._deadline[s])
                    reach = one if term.kind == "tardiness" else max(0, ceiling - deadline) * one
                    maker.add(latency <= deadline + reach)
                cost = cost + factors[0] * summed(late, [weights[n] for n in due])
        return cost


def _factors(term: Term, total: int) -> list[Fraction]:
    """Return the factors of a term's sums, for costs in ticks times the total weight."""
    if term.kind == "makespan":
        return [term.factor * total]
    if term.kind == "cvar":
        return [term.factor * total, term.factor / term.tail]
    if term.kind == "miss":
        # A share of one counts like a second.
        return [term.factor * round(1 / PLAN_TICK_S)]
    return [term.factor]


def _tail_cost(latencies: Ints, weight: Ints, level: int, beyond: int) -> Ints:
    """Return the least ``level * eta + beyond * sum of weight * max(0, L - eta)`` over eta.

    It is reached where eta is one of the latencies.
    """
    flat = latencies.reshape(len(latencies), -1)
    order = np.argsort(flat, axis=1, kind="stable")
    values = np.take_along_axis(flat, order, axis=1)
    weights = np.tile(weight, latencies.shape[1])[order]
    above = weights[:, ::-1].cumsum(axis=1)[:, ::-1]
    mass = (weights * values)[:, ::-1].cumsum(axis=1)[:, ::-1]
    return np.asarray((level * values + beyond * (mass - above * values)).min(axis=1))
