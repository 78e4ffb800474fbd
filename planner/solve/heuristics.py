"""A complete plan without CP-SAT: greedy construction and descent.

It is the solver's hint, and the plan that is used when the budget ends before CP-SAT has one.

For given placements the least level with enough room is best at every endpoint (a lower level is
faster), so levels follow from the placements and only these are searched. Moves: one call site of
one class to another endpoint; two call sites (of any classes) exchange endpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.solve.arrays import Bools, Ints
from planner.solve.memory import pack
from planner.solve.objective import Goal
from planner.solve.question import Instance
from planner.solve.timing import Timing

__all__ = ["Solution", "greedy_solution", "latencies_of", "least_levels", "ordered"]

_BATCH = 256
"""Candidate plans evaluated at once: enough to amortise numpy, small enough for the cache."""

_NO_ROOM = int(np.iinfo(np.int64).max)
"""Value of a candidate that some endpoint has no room for."""

_Move = tuple[tuple[int, int, int], ...]
"""Changes (class, site, new endpoint) that make one candidate."""


@dataclass(frozen=True, slots=True)
class Solution:
    """Options (R, K), level positions (I,), what is kept (R, K), and the cost of the goal.

    Classes are in order of falling latency, which is what the model's symmetry breaking asks.
    """

    placements: Ints
    levels: Ints
    warm: Bools
    keep: Bools
    cost: int

    def latencies(self, timing: Timing) -> Ints:
        """Return the latency of each scenario for each class in ticks; shape (R, S)."""
        return latencies_of(timing, self.placements, self.levels, self.warm, self.keep)


def least_levels(loads: Ints, room: Ints) -> Ints:
    """Return the least level position with enough room, -1 where there is none.

    Parameters
    ----------
    loads, room
        Load in units and room in units by endpoint and level; shapes (..., I, L) and (I, L).

    Returns
    -------
    Shape (..., I).
    """
    fits = (loads <= room) & (room >= 0)
    return np.where(fits.any(axis=-1), fits.argmax(axis=-1), -1)


def latencies_of(timing: Timing, placements: Ints, levels: Ints, warm: Bools, keep: Bools) -> Ints:
    """Return the latencies of a plan in ticks; shape (R, S)."""
    repeated = np.repeat(levels[np.newaxis], len(placements), axis=0)
    sums = timing.sums(placements, repeated) + timing.extras(placements, warm, keep)
    return timing.latencies(sums)


def greedy_solution(
    instance: Instance,
    timing: Timing,
    goal: Goal,
    *,
    start: Ints | None = None,
    effort: float = 1e8,
) -> Solution | None:
    """Return a plan that no single move improves, or None if no start finds room.

    Parameters
    ----------
    instance, timing, goal
        The question. The descent takes KV as ample; what does not fit then is not kept
        (`planner.solve.memory.pack`).
    start
        Placements (R, K) to descend from in place of the constructions.
    effort
        Where to stop at the latest: parts and chains that may be looked up, >= 0. A count and not
        a time, so that the result is reproducible; 1e8 is about two seconds.
    """
    search = _Search(instance, timing, goal)
    tried = (search.construct(0), search.construct(1)) if start is None else (start,)
    starts = [one for one in tried if one is not None]
    if not starts:
        return None
    best = min((search.descend(one, effort / len(starts)) for one in starts), key=lambda s: s[1])
    return None if best[1] == _NO_ROOM else search.finished(best[0])


class _Search:
    def __init__(self, instance: Instance, timing: Timing, goal: Goal) -> None:
        self._instance = instance
        self._timing = timing
        self._goal = goal
        self._load = instance.class_load
        self._lane_load = instance.lane_load
        self._room = instance.room
        self._home = instance.option_endpoint
        self._classes, self._sites = instance.run_classes, len(instance.sites)
        # Ticks a site adds per run on an endpoint, to rank endpoints during construction.
        self._service = np.zeros(instance.work_s.shape, dtype=np.int64)
        np.add.at(
            self._service,
            [max(site, 0) for site in instance.task_site],
            instance.service_ticks,
        )

    def construct(self, rule: int) -> Ints | None:
        """Place one call after the other at top levels; None when one finds no room.

        Rule 0 takes the fastest endpoint with room, calls with the most to lose first; rule 1
        the endpoint that is left the emptiest, largest calls first.
        """
        instance, home, lane = self._instance, self._home, self._instance.option_prefill
        top = np.array([len(grid) - 1 for grid in instance.levels])
        options = np.arange(home.size)
        load = self._load[:, options, top[home]]
        service = self._service[:, options, top[home]]
        free = self._room[np.arange(top.size), top].copy()
        capacity = np.maximum(free, 1)
        allowed = instance.allowed
        shown = np.where(allowed, service, -1)
        loss = shown.max(axis=1) - np.where(allowed, service, np.iinfo(np.int64).max).min(axis=1)
        weight = loss if rule == 0 else load.max(axis=1)
        order = sorted(range(self._sites), key=lambda k: (-int(weight[k]), k))
        placements = np.zeros((self._classes, self._sites), dtype=np.int64)
        for k in order:
            for r in range(self._classes):
                lane_fits = (lane < 0) | (self._lane_load[k] <= free[lane])
                open_ones = allowed[k] & (load[k] <= free[home]) & lane_fits
                if not open_ones.any():
                    return None
                left = capacity[home] - free[home] + load[k]
                cost = service[k] if rule == 0 else left / capacity[home]
                m = int(np.where(open_ones, cost, np.inf).argmin())
                placements[r, k] = m
                free[home[m]] -= load[k, m]
                if lane[m] >= 0:
                    free[lane[m]] -= self._lane_load[k, m]
        return placements

    def descend(self, placements: Ints, effort: float) -> tuple[Ints, int]:
        """Take the best improving move of each batch of neighbours until no batch has one."""
        cost = self._classes * (self._timing.site.size + self._timing.fixed.size)
        value = int(self._evaluate(placements[np.newaxis])[0])
        improved = True
        while improved and effort > 0:
            improved = False
            for batch in self._neighbours(placements):
                values = self._evaluate(batch)
                effort -= len(batch) * cost
                best = int(values.argmin())
                if values[best] < value:
                    value, placements, improved = int(values[best]), batch[best], True
                    break
                if effort <= 0:
                    break
        return placements, value

    def _neighbours(self, placements: Ints) -> Iterator[Ints]:
        """Yield all neighbours in batches; shape (n, R, K)."""
        moves = [*self._moves(placements), *self._exchanges(placements)]
        for begin in range(0, len(moves), _BATCH):
            chunk = moves[begin : begin + _BATCH]
            batch = np.repeat(placements[np.newaxis], len(chunk), axis=0)
            for n, changes in enumerate(chunk):
                for r, k, i in changes:
                    batch[n, r, k] = i
            yield batch

    def _moves(self, placements: Ints) -> Iterator[_Move]:
        for r, row in enumerate(placements.tolist()):
            for k, here in enumerate(row):
                for i in np.flatnonzero(self._instance.allowed[k]).tolist():
                    if i != here:
                        yield ((r, k, i),)

    def _exchanges(self, placements: Ints) -> Iterator[_Move]:
        allowed = self._instance.allowed
        cells = [(r, k, i) for r, row in enumerate(placements.tolist()) for k, i in enumerate(row)]
        for position, (r, k, i) in enumerate(cells):
            for q, m, j in cells[position + 1 :]:
                if i != j and allowed[k, j] and allowed[m, i]:
                    yield ((r, k, j), (q, m, i))

    def _levels(self, batch: Ints) -> Ints:
        """Return the least levels of candidate placements (n, R, K); shape (n, I)."""
        flat = batch.reshape(len(batch), -1)
        site = np.tile(np.arange(self._sites), self._classes)
        loads = np.zeros((len(batch), *self._room.shape), dtype=np.int64)
        rows = np.arange(len(batch))[:, np.newaxis]
        np.add.at(loads, (rows, self._home[flat]), self._load[site, flat])
        if self._instance.pairs:
            # A lane has one level; its load comes on top of none.
            lane = self._instance.option_prefill[flat]
            used = np.where(lane >= 0, self._lane_load[site, flat], 0)
            np.add.at(loads[:, :, 0], (rows, lane), used)
        return least_levels(loads, self._room)

    def _evaluate(self, batch: Ints) -> Ints:
        """Return the costs of candidate placements, the largest integer if no room."""
        levels = self._levels(batch)
        fits = (levels >= 0).all(axis=1)
        values = np.full(len(batch), _NO_ROOM)
        if fits.any():
            good = batch[fits]
            rows = good.reshape(-1, self._sites)
            repeated = np.repeat(levels[fits], self._classes, axis=0)
            latencies = self._timing.latencies(self._timing.sums(rows, repeated))
            values[fits] = self._goal.cost(latencies.reshape(len(good), self._classes, -1))
        return values

    def finished(self, placements: Ints) -> Solution | None:
        """Return the solution in the order that the model's symmetry breaking asks.

        None if its contexts do not fit the KV memory.
        """
        levels = self._levels(placements[np.newaxis])[0]
        for group in self._instance.twins:
            members = np.array(group)
            order = members[np.argsort(-levels[members], kind="stable")]
            levels[members] = levels[order]
            renamed = np.arange(levels.size)
            renamed[order] = members
            placements = renamed[placements]
        packed = pack(self._instance, placements, levels)
        if packed is None:
            return None
        return ordered(self._timing, self._goal, placements, *packed)


def ordered(
    timing: Timing, goal: Goal, placements: Ints, levels: Ints, warm: Bools, keep: Bools
) -> Solution:
    """Return a solution with its classes in order of falling latency."""
    latencies = latencies_of(timing, placements, levels, warm, keep)
    ranking = np.argsort(-(latencies @ timing.weight), kind="stable")
    cost = int(goal.cost(latencies[np.newaxis])[0])
    return Solution(placements[ranking], levels, warm[ranking], keep[ranking], cost)
