"""The fleet plan with freely divided traffic: a bound within seconds, and shares to round.

Classes are exchangeable, so the mean of their placements is a feasible point of the relaxation
(latencies are convex in it, and the terms of an objective convex and growing in the latencies; the
share that comes too late is relaxed by its own big constant): one fractional placement stands for
all classes. An endpoint may work at a mix of levels; a mix offers the mix of their rooms. On
studied questions the bound is within 0.5 % of that with whole levels.

Endpoints that cannot be told apart are one column with a multiple of the room: the mean over their
permutations is a feasible point as good as any, so the bound loses nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ortools.linear_solver.python import model_builder

from planner.solve.arrays import Floats
from planner.solve.bounds import longest_latency
from planner.solve.memory import Tokens, contended
from planner.solve.objective import Goal
from planner.solve.question import Instance
from planner.solve.terms import Terms
from planner.solve.timing import Timing

__all__ = ["Relaxation", "relax"]

_LINKED = 10_000
"""Modes up to which each is bounded by its level, beside the level's capacity. In larger questions
a site takes a small part of an endpoint's room: with 200 sites on 64 endpoints the rows move the
bound by 0.0003 % and take five times as long. The dual simplex is a quarter faster then."""
_TRUST = 1e-6
"""Relative error of the linear solver's optimum that the bound allows for."""


@dataclass(frozen=True, slots=True)
class Relaxation:
    """Optimum of the relaxation.

    Parameters
    ----------
    bound
        No plan's cost is below.
    mean_aim
        Weighted sum of latencies that the shares promise: what rounding aims at.
    shares
        Share of site k's traffic at option m and level l; shape (K, M, L).
    levels
        Share of each level of each endpoint; shape (I, L).
    token_price
        Seconds of the objective that one KV token more would save, by endpoint; shape (I,).
    """

    bound: int
    mean_aim: float
    shares: Floats
    levels: Floats
    token_price: Floats


def relax(
    instance: Instance, timing: Timing, goal: Goal, caps: Sequence[tuple[Goal, int]] = ()
) -> Relaxation | None:
    """Return the relaxation's optimum, or None if there is none or the linear solver fails.

    ``caps`` are goals with the largest cost that a plan may have.
    """
    return _Relaxed(instance, timing, goal).solved(caps)


class _Relaxed:
    """The linear model."""

    def __init__(self, instance: Instance, timing: Timing, goal: Goal) -> None:
        self._instance, self._timing, self._goal = instance, timing, goal
        self.model = model_builder.Model()  # type: ignore[no-untyped-call]
        self._tight = contended(instance)
        self._groups = instance.twins
        self._column = np.arange(len(instance.option_endpoint))
        for group in self._groups:
            self._column[list(group)] = group[0]
        sites = len(instance.sites)
        kept = set(self._column.tolist())
        self.keys = [
            (k, m, n)
            for k in range(sites)
            for m, grid in enumerate(instance.option_grids)
            if instance.allowed[k, m] and m in kept
            for n in range(len(grid))
        ]
        self.use = {key: self.model.new_num_var(0.0, 1.0, "") for key in self.keys}
        multiple = {group[0]: len(group) for group in self._groups}
        self._multiple = np.array([multiple.get(i, 1) for i in range(len(instance.endpoints))])
        self.level = [
            [self.model.new_num_var(0.0, float(self._multiple[i]), "") for _ in grid]
            for i, grid in enumerate(instance.levels)
        ]
        memory = instance.memory
        cells = sorted({(k, m) for k, m, _ in self.keys})
        asked = [
            (k, m) for k, m in cells if self._tight[instance.option_endpoint[m]] and memory.whole[m]
        ]
        self.warm = {c: self.variable(0, 1) for c in asked if memory.prefix[c[0]] >= 0}
        self.keep = {c: self.variable(0, 1) for c in asked if memory.held_tokens[c[0]] > 0}
        self._token_rows: dict[int, Any] = {}
        self._place()
        self._hold()
        self._starts = [self.model.new_num_var(0.0, math.inf, "") for _ in timing.joins]
        self._terms = Terms(
            self.keys, list(self.use.values()), warm=self.warm, keep=self.keep,
            starts=self._starts, shape=instance.allowed.shape,
        )  # fmt: skip

    def variable(self, least: int, most: int) -> Any:
        """Return a new variable."""
        return self.model.new_num_var(float(least), float(most), "")

    def add(self, constraint: Any) -> Any:
        """Add a constraint."""
        return self.model.add(constraint)

    def _place(self) -> None:
        """Divide each site, one level in all per endpoint, capacities of levels and lanes."""
        instance, model = self._instance, self.model
        total = model_builder.LinearExpr.weighted_sum
        for i, row in enumerate(self.level):
            model.add_linear_constraint(
                total(row, [1.0] * len(row)),
                lb=float(self._multiple[i]),
                ub=float(self._multiple[i]),
            )
        by_site: dict[int, list[Any]] = defaultdict(list)
        by_level: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for k, m, n in self.keys:
            by_site[k].append(self.use[k, m, n])
            i = int(instance.option_endpoint[m])
            by_level[i, n].append((k, m))
            if len(self.keys) <= _LINKED:
                model.add_linear_constraint(self.use[k, m, n] - self.level[i][n], ub=0.0)
        for mine in by_site.values():
            model.add_linear_constraint(total(mine, [1.0] * len(mine)), lb=1.0, ub=1.0)
        load, room = instance.class_load * instance.run_classes, instance.room
        for (i, n), users in by_level.items():
            weights = [float(load[k, m, n]) for k, m in users]
            model.add_linear_constraint(
                total(
                    [*(self.use[k, m, n] for k, m in users), self.level[i][n]],
                    [*weights, -float(room[i, n])],
                ),
                ub=0.0,
            )
        lane_load = instance.lane_load * instance.run_classes
        for p in np.unique(instance.option_prefill[instance.option_prefill >= 0]).tolist():
            users3 = [key for key in self.keys if instance.option_prefill[key[1]] == p]
            weights = [float(lane_load[k, m]) for k, m, _ in users3]
            model.add_linear_constraint(
                total([self.use[key] for key in users3], weights), ub=float(room[p, 0])
            )

    def _hold(self) -> None:
        """Keep contexts, prefixes and sessions within the KV of contended endpoints."""
        instance, memory, classes = (
            self._instance,
            self._instance.memory,
            self._instance.run_classes,
        )
        tokens = Tokens.of(instance)
        need: dict[int, list[Any]] = {int(i): [] for i in np.flatnonzero(self._tight)}
        used: dict[tuple[int, int], list[Any]] = defaultdict(list)
        for k, m, n in self.keys:
            used[k, m].append(self.use[k, m, n])
            i = int(instance.option_endpoint[m])
            if i in need:
                need[i].append(classes * float(tokens.active[k, m, n]) * self.use[k, m, n])
        holds: dict[tuple[int, int], Any] = {}
        for (k, m), warm in self.warm.items():
            i, p = int(instance.option_endpoint[m]), int(memory.prefix[k])
            if (i, p) not in holds:
                copies = int(self._multiple[i])
                holds[i, p] = self.variable(0, copies)
                need[i].append(float(memory.prefix_tokens[p]) * holds[i, p])
            self.add(warm <= sum(used[k, m]))
            self.add(warm <= holds[i, p])
            need[i].append(classes * float(tokens.cold[k, m]) * (sum(used[k, m]) - warm))
        for (k, m), keep in self.keep.items():
            i = int(instance.option_endpoint[m])
            self.add(keep <= sum(used[k, m]))
            need[i].append(classes * float(tokens.session[k]) * keep)
            need[i].append(classes * float(tokens.lost[k, m]) * (sum(used[k, m]) - keep))
        for i, terms in need.items():
            if terms:
                room = float(memory.tokens[i]) * float(self._multiple[i])
                self._token_rows[i] = self.model.add_linear_constraint(sum(terms), ub=room)

    def _end(self, chains: Sequence[int], factors: Sequence[int]) -> Any:
        """Return the weighted sum of the ends of chains."""
        mixed = self._timing.mixed(chains, factors)
        variables, weights = self._terms.of(mixed)
        total = model_builder.LinearExpr.weighted_sum(variables, list(map(float, weights)))
        return total + float(mixed.fixed)

    def solved(self, caps: Sequence[tuple[Goal, int]]) -> Relaxation | None:
        instance, timing, goal = self._instance, self._timing, self._goal
        for j, chains in enumerate(timing.joins):
            for chain in chains:
                self.add(self._starts[j] >= self._end([chain], [1]))
        ends = [int(chain) for chain in timing.ends]
        finish: list[tuple[int, Any]] = []
        ceiling = longest_latency(instance, timing)
        for s, w in enumerate(instance.scenario_source.tolist()):
            source = instance.sources[w]
            bounded = source.hard and source.deadline_ticks is not None
            if bounded or not all(one.plain for one in (goal, *(cap for cap, _ in caps))):
                latency = self.variable(0, ceiling)
                self.add(latency >= self._end([ends[s]], [1]))
                finish.append((s, latency))
                if bounded:
                    self.add(latency <= float(source.deadline_ticks or 0))
        total = self._end(ends, timing.weight.tolist())

        def cost(one: Goal) -> Any:
            return one.express(self, total, finish, ceiling, copies=instance.run_classes)

        for cap, most in caps:
            self.add(cost(cap) <= float(most))
        self.model.minimize(cost(goal))
        solver = model_builder.Solver("GLOP")
        if len(self.keys) > _LINKED:
            solver.set_solver_specific_parameters("use_dual_simplex: true")
        if solver.solve(self.model) != model_builder.SolveStatus.OPTIMAL:
            return None
        return self._read(solver, float(solver.value(total)) * instance.run_classes)

    def _read(self, solver: model_builder.Solver, aim: float) -> Relaxation:
        instance = self._instance
        shares = np.zeros(instance.work_s.shape)
        mix = np.zeros(instance.room.shape)
        prices = np.zeros(len(instance.endpoints))
        for key, variable in self.use.items():
            shares[key] = solver.value(variable)
        for i, row in enumerate(self.level):
            mix[i, : len(row)] = [solver.value(variable) for variable in row]
        for i, constraint in self._token_rows.items():
            prices[i] = self._goal.seconds(max(0.0, -solver.dual_value(constraint)))
        for group in self._groups:
            members = list(group)
            prices[members] = prices[group[0]]
            together, mix[members] = mix[group[0]].copy(), _spread(mix[group[0]], len(group))
            of_level = mix[members] / np.maximum(together, 1e-12)
            shares[:, members] = shares[:, group[0], np.newaxis] * of_level
        bound = math.ceil(float(solver.objective_value) * (1 - _TRUST) - 1e-9)
        return Relaxation(bound, aim, shares, mix, prices)


def _spread(mix: Floats, count: int) -> Floats:
    """Return the levels of ``count`` twins that sum to a mix, high levels first: (count, L)."""
    out = np.zeros((count, mix.size))
    left = mix.copy()
    for row in out:
        room = 1.0
        for n in range(mix.size - 1, -1, -1):
            row[n] = min(room, left[n])
            left[n] -= row[n]
            room -= row[n]
    return out
