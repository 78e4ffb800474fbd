"""The decision variables of the fleet plan, with query methods so that constraints read plainly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from ortools.sat.python import cp_model

from planner.solve.arrays import Bools
from planner.solve.bounds import chain_extremes
from planner.solve.memory import contended
from planner.solve.question import Instance
from planner.solve.terms import Terms
from planner.solve.timing import Timing

__all__ = ["Variables"]


class Variables:
    """All variables of one model.

    ``use(r, k, m, n)`` is 1 iff site k of class r goes to option m and that option's endpoint
    works at level n; ``level(i, n)`` iff endpoint i works at level n; ``start(r, j)`` is at least
    the start of join j for class r, and equal to it in an optimal plan. Where KV is contended,
    ``warm(r, k, m)`` and ``keep(r, k, m)`` are 1 only if site k of class r goes to option m and
    its prefix, its sessions, are kept there; ``holds(i, p)`` if endpoint i keeps prefix p.

    Parameters
    ----------
    open_to
        Options each site of each class may take; shape (R, K, M). All allowed ones unless given.
    """

    def __init__(
        self,
        model: cp_model.CpModel,
        instance: Instance,
        timing: Timing,
        open_to: Bools | None = None,
    ) -> None:
        self.instance = instance
        self.timing = timing
        classes, sites = instance.run_classes, len(instance.sites)
        allowed = np.broadcast_to(instance.allowed, (classes, *instance.allowed.shape))
        self._open = allowed if open_to is None else open_to & allowed
        self._level: list[list[cp_model.IntVar]] = [
            [model.new_bool_var(f"level_{i}_{n}") for n in range(len(grid))]
            for i, grid in enumerate(instance.levels)
        ]
        self.contended = contended(instance)
        least, most = (
            timing.join_starts(s[np.newaxis])[0] for s in chain_extremes(instance, timing)
        )
        self._use: list[dict[tuple[int, int, int], cp_model.IntVar]] = []
        self._users: dict[tuple[int, int], list[tuple[int, int, cp_model.IntVar]]] = defaultdict(
            list
        )
        self._start: list[list[cp_model.IntVar]] = []
        self._warm: list[dict[tuple[int, int], cp_model.IntVar]] = []
        self._keep: list[dict[tuple[int, int], cp_model.IntVar]] = []
        self._terms: list[Terms] = []
        memory = instance.memory
        cells = _cells(instance, self.contended)
        for r in range(classes):
            uses = {}
            for k in range(sites):
                for m, n in self.modes(r, k):
                    literal = uses[k, m, n] = model.new_bool_var(f"use_{r}_{k}_{m}_{n}")
                    self._users[int(instance.option_endpoint[m]), n].append((k, m, literal))
            self._use.append(uses)
            self._start.append(
                [
                    model.new_int_var(int(least[j]), int(most[j]), f"start_{r}_{j}")
                    for j in range(len(timing.joins))
                ]
            )
            for kept, may, name in (
                (self._warm, cells & (memory.prefix >= 0)[:, np.newaxis], "warm"),
                (self._keep, cells & (memory.held_tokens > 0)[:, np.newaxis], "keep"),
            ):
                kept.append(
                    {
                        (k, m): model.new_bool_var(f"{name}_{r}_{k}_{m}")
                        for k, m in np.argwhere(may & self._open[r]).tolist()
                    }
                )
            self._terms.append(
                Terms(
                    list(uses),
                    list(uses.values()),
                    warm=self._warm[r],
                    keep=self._keep[r],
                    starts=self._start[r],
                    shape=instance.allowed.shape,
                )
            )
        self._holds = {
            (int(i), p): model.new_bool_var(f"holds_{i}_{p}")
            for i in np.flatnonzero(self.contended)
            for p in range(instance.memory.prefix_tokens.size)
        }

    def modes(self, r: int, site: int) -> Iterator[tuple[int, int]]:
        """Yield the (option, level) pairs that may serve a site of a class."""
        for m in np.flatnonzero(self._open[r, site]).tolist():
            for n in range(len(self.instance.levels[self.instance.option_endpoint[m]])):
                yield m, n

    def use(self, r: int, k: int, m: int, n: int) -> cp_model.IntVar:
        """Return the literal of a mode; it exists for open options only."""
        return self._use[r][k, m, n]

    def used(self, r: int, k: int, m: int) -> cp_model.LinearExpr:
        """Return whether a site of a class goes to an option."""
        grid = self.instance.levels[self.instance.option_endpoint[m]]
        literals = [self._use[r][k, m, n] for n in range(len(grid))]
        return cp_model.LinearExpr.weighted_sum(literals, [1] * len(literals))

    def level(self, i: int, n: int) -> cp_model.IntVar:
        """Return the literal of a level."""
        return self._level[i][n]

    def levels_of(self, i: int) -> list[cp_model.IntVar]:
        """Return the level literals of an endpoint in order of level."""
        return self._level[i]

    def users(self, i: int, n: int) -> list[tuple[int, int, cp_model.IntVar]]:
        """Return (site, option, literal) of everything that may use endpoint i at level n."""
        return self._users[i, n]

    def lane_users(self, p: int) -> list[tuple[int, int, cp_model.IntVar]]:
        """Return (site, option, literal) of everything that may prefill at endpoint p."""
        lane = self.instance.option_prefill
        return [one for users in self._users.values() for one in users if lane[one[1]] == p]

    def warm(self, r: int) -> dict[tuple[int, int], cp_model.IntVar]:
        """Return by (site, option) the literals of prefixes kept for a class."""
        return self._warm[r]

    def keep(self, r: int) -> dict[tuple[int, int], cp_model.IntVar]:
        """Return by (site, option) the literals of sessions kept for a class."""
        return self._keep[r]

    def holds(self, i: int) -> list[cp_model.IntVar]:
        """Return by prefix whether a contended endpoint keeps it."""
        return [self._holds[i, p] for p in range(self.instance.memory.prefix_tokens.size)]

    def start(self, r: int, j: int) -> cp_model.IntVar:
        """Return the start of a join."""
        return self._start[r][j]

    def end_of(self, r: int, chain: int) -> cp_model.LinearExprT:
        """Return the end of a chain for a class, in ticks."""
        return self._sum(r, [chain], [1])

    def finish(self, r: int, s: int) -> cp_model.LinearExprT:
        """Return the latency of a scenario for a class, in ticks."""
        return self.end_of(r, int(self.timing.ends[s]))

    def total(self, r: int) -> cp_model.LinearExprT:
        """Return the weighted sum of a class's latencies over the scenarios, in ticks."""
        timing = self.timing
        return self._sum(r, timing.ends.tolist(), timing.weight.tolist())

    def _sum(self, r: int, chains: Sequence[int], factors: Sequence[int]) -> cp_model.LinearExprT:
        """Return summed ticks of the chosen modes, fixed delays and join starts of chains."""
        mixed = self.timing.mixed(chains, factors)
        variables, weights = self._terms[r].of(mixed)
        return cp_model.LinearExpr.weighted_sum(variables, weights) + mixed.fixed


def _cells(instance: Instance, tight: Bools) -> Bools:
    """Return the (site, option) pairs whose KV is a question; shape (K, M)."""
    return instance.allowed & tight[instance.option_endpoint] & instance.memory.whole
