"""The decision variables of the fleet plan, with query methods so that constraints read plainly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from ortools.sat.python import cp_model

from planner.solve.bounds import chain_extremes
from planner.solve.instance import Instance, Ints
from planner.solve.timing import Timing

__all__ = ["Variables"]


class Variables:
    """All variables of one model.

    ``use(r, k, i, n)`` is 1 iff site k of class r goes to endpoint i and that endpoint works at
    level n; ``level(i, n)`` iff endpoint i works at level n; ``start(r, j)`` is at least the
    start of join j for class r, and equal to it in an optimal plan.
    """

    def __init__(self, model: cp_model.CpModel, instance: Instance, timing: Timing) -> None:
        self.instance = instance
        self.timing = timing
        self._use: list[dict[tuple[int, int, int], cp_model.IntVar]] = []
        self._level: list[list[cp_model.IntVar]] = [
            [model.new_bool_var(f"level_{i}_{n}") for n in range(len(grid))]
            for i, grid in enumerate(instance.levels)
        ]
        least, most = (
            timing.join_starts(s[np.newaxis])[0] for s in chain_extremes(instance, timing)
        )
        self._start: list[list[cp_model.IntVar]] = []
        for r in range(instance.run_classes):
            self._use.append(
                {
                    (k, i, n): model.new_bool_var(f"use_{r}_{k}_{i}_{n}")
                    for k in range(len(instance.sites))
                    for i, n in self.modes(k)
                }
            )
            self._start.append(
                [
                    model.new_int_var(int(least[j]), int(most[j]), f"start_{r}_{j}")
                    for j in range(len(timing.joins))
                ]
            )

    def modes(self, site: int) -> Iterator[tuple[int, int]]:
        """Yield the (endpoint, level) pairs that may serve a site."""
        for i, grid in enumerate(self.instance.levels):
            if self.instance.allowed[site, i]:
                for n in range(len(grid)):
                    yield i, n

    def use(self, r: int, k: int, i: int, n: int) -> cp_model.IntVar:
        """Return the literal of a mode; it exists for allowed endpoints only."""
        return self._use[r][k, i, n]

    def level(self, i: int, n: int) -> cp_model.IntVar:
        """Return the literal of a level."""
        return self._level[i][n]

    def levels_of(self, i: int) -> list[cp_model.IntVar]:
        """Return the level literals of an endpoint in order of level."""
        return self._level[i]

    def users(self, i: int, n: int) -> list[tuple[int, cp_model.IntVar]]:
        """Return (site, literal) of everything that may use endpoint i at level n."""
        return [
            (k, literal)
            for uses in self._use
            for (k, at, level), literal in uses.items()
            if at == i and level == n
        ]

    def start(self, r: int, j: int) -> cp_model.IntVar:
        """Return the start of a join."""
        return self._start[r][j]

    def end_of(self, r: int, chain: int) -> cp_model.LinearExprT:
        """Return the end of a chain for a class, in ticks."""
        return self._sum(r, self.timing.ticks[chain], (chain,))

    def total(self, r: int) -> cp_model.LinearExprT:
        """Return the run latency of a class summed over the scenarios, in ticks."""
        ends = self.timing.ends
        return self._sum(r, self.timing.ticks[ends].sum(axis=0), tuple(int(c) for c in ends))

    def _sum(self, r: int, ticks: Ints, chains: tuple[int, ...]) -> cp_model.LinearExprT:
        """Return summed ticks of the chosen modes, fixed delays and join starts of chains."""
        literals = list(self._use[r].values())
        weights = [int(ticks[key]) for key in self._use[r]]
        starts = [self.start(r, int(j)) for c in chains if (j := self.timing.base[c]) >= 0]
        fixed = int(self.timing.fixed[list(chains)].sum())
        return (
            cp_model.LinearExpr.weighted_sum([*literals, *starts], [*weights, *[1] * len(starts)])
            + fixed
        )
