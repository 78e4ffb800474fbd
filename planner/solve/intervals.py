"""Exact schedules by CP-SAT: optional intervals, slots, lanes, transfers (formulation F3).

One start and one end variable per activity, one optional interval per mode. Activities whose
modes are alike and whose endpoint is used in no other way need no choice of slot: an endpoint of
several slots is one cumulative resource. Redundant: the duration of an activity as a sum over its
modes, and, for the makespan, head, work and tail of each endpoint.

The list schedules of `planner.solve.list_schedules` are the hint, and the answer if nothing
better is found, so the result is never worse than any of them. Shops of more than 60 activities
get a better hint first. A flow shop's comes from local search, which takes most of the budget and
bounds all stages together; that of others from list schedules that pay for busy endpoints and
improvement span by span, and the larger the shop, the more of the budget goes there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ortools.sat.python import cp_model

from planner.domain.errors import ModelInvalid
from planner.domain.schedule import Mode, Schedule, ScheduleQuestion
from planner.solve.budget import Budget
from planner.solve.effort import Effort
from planner.solve.flow import flow_schedule
from planner.solve.lines import is_shop
from planner.solve.list_schedules import LIST_SCHEDULES
from planner.solve.loads import priced_schedules, spread_loads
from planner.solve.spans import span_schedule

__all__ = ["ScheduleResult", "solve_schedule"]

_SMALL = 60
_MEDIUM = 300
"""Activities up to which a shop is one model from the start, and up to which mostly."""
_FLOW_SHARE, _LARGE_FLOW_SHARE = 0.45, 0.95
"""Shares of the budget that local search and a bound take in medium and larger flow shops."""
_SPAN_SHARE, _LARGE_SPAN_SHARE = 0.4, 0.8
"""Shares that other shops spend on spans."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleResult:
    """A schedule, its status (``optimal`` or ``feasible``) and the seconds of search."""

    schedule: Schedule
    status: str
    search_s: float


def solve_schedule(
    question: ScheduleQuestion,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    hint: Schedule | None = None,
    timer: Callable[[], float] | None = None,
) -> ScheduleResult:
    """Return the best schedule found within a budget.

    Parameters
    ----------
    budget
        15 s on two workers unless given.
    hint
        A schedule to start from, beside the list schedules.
    timer
        Returns seconds, for searches outside the solver under a wall-clock limit. Without one they
        count their work, and take longer than their share where others use the machine as well.

    Raises
    ------
    ModelInvalid
        If the solver refuses the model (a bug, or times beyond 64 bits).
    """
    budget = budget or Budget()
    starts = [rule(question) for rule in LIST_SCHEDULES.values()]
    if hint is not None:
        starts.append(hint)
    best = min(starts, key=lambda one: one.objective)
    if not question.activities:
        return ScheduleResult(schedule=best, status="optimal", search_s=0.0)
    best, least, budget = _searched(question, best, budget, seed, timer)
    model = _Model(question, best)
    least = max(least, model.least)
    if best.objective <= least:
        return ScheduleResult(schedule=replace(best, bound=least), status="optimal", search_s=0.0)
    solver = cp_model.CpSolver()
    budget.apply(solver, seed)
    status = solver.solve(model.cp)
    if status == cp_model.MODEL_INVALID:
        raise ModelInvalid(f"CP-SAT refused the schedule model: {model.cp.validate()}")
    bound = max(0, math.ceil(solver.best_objective_bound - 1e-6))
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = model.read(solver)
        best = min(found, best, key=lambda one: one.objective)
    bound = min(max(bound, least), best.objective)
    return ScheduleResult(
        schedule=replace(best, bound=bound),
        status="optimal" if bound == best.objective else "feasible",
        search_s=solver.wall_time,
    )


def _searched(
    question: ScheduleQuestion,
    start: Schedule,
    budget: Budget,
    seed: int,
    timer: Callable[[], float] | None,
) -> tuple[Schedule, int, Budget]:
    """Return what heuristics make of a shop's schedule, a bound, and the budget they leave.

    Small questions, and those that are no shops, are left to the solver.
    """
    if len(question.activities) <= _SMALL or not is_shop(question):
        return start, 0, budget
    medium = len(question.activities) <= _MEDIUM
    limit = budget.wall_s if budget.wall_s is not None else budget.deterministic
    assert limit is not None  # noqa: S101 - Budget asks for one
    share = _FLOW_SHARE if medium else _LARGE_FLOW_SHARE
    effort = Effort(limit * share, timer if budget.wall_s is not None else None)
    flow = flow_schedule(question, effort=effort, seed=seed)
    if flow is not None:
        # Spans, which take the rest elsewhere, gain nothing from where the local search ends.
        best = min(start, flow, key=lambda one: one.objective)
        return best, flow.bound, _part(budget, 1 - share)
    best, least = start, 0
    loads = spread_loads(question)
    if loads is not None:
        least = loads.least
        best = min([best, *priced_schedules(question, loads)], key=lambda one: one.objective)
    share = _SPAN_SHARE if medium else _LARGE_SPAN_SHARE
    spans = _part(budget, share)
    best, spent = span_schedule(question, best, budget=spans, least=least, seed=seed)
    return best, least * question.makespan_weight, _part(budget, 1 - share * spent)


def _part(budget: Budget, share: float) -> Budget:
    """Return a share of a budget's limits."""
    return replace(
        budget,
        wall_s=None if budget.wall_s is None else budget.wall_s * share,
        deterministic=None if budget.deterministic is None else budget.deterministic * share,
    )


class _Model:
    def __init__(self, question: ScheduleQuestion, hint: Schedule) -> None:
        self._question = question
        self.cp = cp_model.CpModel()
        self._horizon = self._latest(hint)
        self._heads, self._tails = _heads_and_tails(question)
        self.least = self._longest_chain()
        self._variables()
        self._order()
        self._resources()
        self._together()
        self._objective()
        self._hint(hint)

    def _latest(self, hint: Schedule) -> int:
        """Return an end that some best schedule keeps."""
        ends = _ends(self._question, hint)
        if self._question.makespan_weight and not any(o.weight for o in self._question.activities):
            return max(ends)
        # With weighted ends a better schedule may end later, but never leaves all idle.
        work = sum(max(mode.ticks for mode in one.modes) for one in self._question.activities)
        moves = sum(max(map(max, ticks)) for ticks in self._question.transfers.values())
        return max(one.release for one in self._question.activities) + work + moves

    def _longest_chain(self) -> int:
        """Return an objective no schedule is below: each activity at once, where it is shortest."""
        ends = [
            head + min(mode.ticks for mode in one.modes)
            for head, one in zip(self._heads, self._question.activities, strict=True)
        ]
        weighted = sum(o.weight * e for o, e in zip(self._question.activities, ends, strict=True))
        return self._question.makespan_weight * max(ends) + weighted

    def _variables(self) -> None:
        cp, horizon = self.cp, self._horizon
        self.start: list[cp_model.IntVar] = []
        self.end: list[cp_model.LinearExprT] = []
        self.use: list[list[cp_model.IntVar | int]] = []
        self._slots: dict[int, list[tuple[cp_model.IntervalVar, int, Mode, int]]] = defaultdict(
            list
        )
        self._lanes: dict[int, list[cp_model.IntervalVar]] = defaultdict(list)
        for a, one in enumerate(self._question.activities):
            shortest = min(mode.ticks for mode in one.modes)
            last = max(self._heads[a], horizon - self._tails[a] - shortest)
            start = cp.new_int_var(self._heads[a], last, f"start_{a}")
            self.start.append(start)
            if len(one.modes) == 1:
                (mode,) = one.modes
                self.end.append(start + mode.ticks)
                self.use.append([1])
                self._occupy(a, mode, start, None)
                continue
            literals = [cp.new_bool_var(f"use_{a}_{m}") for m in range(len(one.modes))]
            cp.add_exactly_one(literals)
            end = cp.new_int_var(self._heads[a] + shortest, horizon, f"end_{a}")
            ticks = [mode.ticks for mode in one.modes]
            cp.add(end == start + cp_model.LinearExpr.weighted_sum(literals, ticks))
            for mode, literal in zip(one.modes, literals, strict=True):
                self._occupy(a, mode, start, literal)
            self.end.append(end)
            self.use.append(list(literals))

    def _occupy(
        self, a: int, mode: Mode, start: cp_model.IntVar, literal: cp_model.IntVar | None
    ) -> None:
        if mode.endpoint is None:
            return
        for ticks, lane in ((mode.ticks, False), (mode.lane_ticks, True)):
            if not ticks:
                continue
            name = f"{'lane' if lane else 'slot'}_{a}_{mode.endpoint}"
            if literal is None:
                interval = self.cp.new_fixed_size_interval_var(start, ticks, name)
            else:
                interval = self.cp.new_optional_fixed_size_interval_var(start, ticks, literal, name)
            if lane:
                self._lanes[mode.endpoint].append(interval)
            else:
                self._slots[mode.endpoint].append((interval, mode.slots, mode, a))

    def _order(self) -> None:
        """Start after each predecessor, and after the transfer between the chosen endpoints."""
        question = self._question
        for b, two in enumerate(question.activities):
            for a in two.preds:
                self.cp.add(self.start[b] >= self.end[a])
                if (a, b) not in question.transfers:
                    continue
                for m, source in enumerate(question.activities[a].modes):
                    by_ticks: dict[int, list[cp_model.IntVar | int]] = defaultdict(list)
                    for n, target in enumerate(two.modes):
                        ticks = question.transfer_ticks(a, b, source, target)
                        if ticks:
                            by_ticks[ticks].append(self.use[b][n])
                    for ticks, targets in sorted(by_ticks.items()):
                        self._after(a, b, ticks, self.use[a][m], targets, len(two.modes))

    def _after(
        self,
        a: int,
        b: int,
        ticks: int,
        source: cp_model.IntVar | int,
        targets: Sequence[cp_model.IntVar | int],
        modes: int,
    ) -> None:
        """Delay b behind a where both use the given modes; ``targets`` exclude each other."""
        constraint = self.cp.add(self.start[b] >= self.end[a] + ticks)
        literals = [] if isinstance(source, int) else [source]
        if len(targets) < modes or modes > 1:
            chosen = [one for one in targets if not isinstance(one, int)]
            if len(chosen) == 1:
                literals.append(chosen[0])
            elif chosen:
                # Exactly one mode of b is chosen: one of these, or one of the others.
                any_of = self.cp.new_bool_var("")
                self.cp.add(sum(chosen) == any_of)
                literals.append(any_of)
        if literals:
            constraint.only_enforce_if(literals)

    def _resources(self) -> None:
        for endpoint, users in sorted(self._slots.items()):
            room = self._question.slots[endpoint]
            intervals = [interval for interval, _, _, _ in users]
            if room == 1:
                self.cp.add_no_overlap(intervals)
            else:
                self.cp.add_cumulative(intervals, [slots for _, slots, _, _ in users], room)
        for _, intervals in sorted(self._lanes.items()):
            self.cp.add_no_overlap(intervals)

    def _together(self) -> None:
        for first, *rest in self._question.together:
            for other in rest:
                for one, two in zip(self.use[first], self.use[other], strict=True):
                    self.cp.add(one == two)

    def _objective(self) -> None:
        question = self._question
        terms: list[cp_model.LinearExprT] = []
        if question.makespan_weight:
            self.makespan = self.cp.new_int_var(0, self._horizon, "makespan")
            followed = {pred for one in question.activities for pred in one.preds}
            for a, end in enumerate(self.end):
                if a not in followed:
                    self.cp.add(self.makespan >= end)
            self._work()
            terms.append(question.makespan_weight * self.makespan)
        terms += [
            one.weight * end
            for one, end in zip(question.activities, self.end, strict=True)
            if one.weight
        ]
        total = sum(terms)
        self.cp.minimize(total)

    def _work(self) -> None:
        """Let the makespan cover head, work and tail of each endpoint (redundant)."""
        for endpoint, users in sorted(self._slots.items()):
            head = min(self._heads[a] for _, _, _, a in users)
            tail = min(self._tails[a] for _, _, _, a in users)
            work = sum(
                mode.ticks * slots * self.use[a][self._question.activities[a].modes.index(mode)]
                for _, slots, mode, a in users
            )
            room = self._question.slots[endpoint]
            # With nobody there head and tail do not count; some activity always is when all of
            # them must be.
            forced = any(isinstance(self.use[a][0], int) for _, _, _, a in users)
            edge = room * (head + tail) if forced else 0
            self.cp.add(room * self.makespan >= work + edge)

    def _hint(self, hint: Schedule) -> None:
        ends = _ends(self._question, hint)
        for a, one in enumerate(self._question.activities):
            self.cp.add_hint(self.start[a], hint.starts[a])
            if len(one.modes) > 1:
                end = self.end[a]
                assert isinstance(end, cp_model.IntVar)  # noqa: S101 - made in _variables
                self.cp.add_hint(end, ends[a])
                for m, literal in enumerate(self.use[a]):
                    if not isinstance(literal, int):
                        self.cp.add_hint(literal, int(m == hint.modes[a]))
        if self._question.makespan_weight:
            self.cp.add_hint(self.makespan, max(ends))

    def read(self, solver: cp_model.CpSolver) -> Schedule:
        """Return the solver's schedule."""
        question = self._question
        starts = tuple(int(solver.value(start)) for start in self.start)
        modes = tuple(
            next(m for m, literal in enumerate(row) if isinstance(literal, int)
                 or solver.boolean_value(literal))
            for row in self.use
        )  # fmt: skip
        found = Schedule(starts=starts, modes=modes, objective=0, bound=0)
        ends = _ends(question, found)
        weighted = sum(one.weight * end for one, end in zip(question.activities, ends, strict=True))
        return replace(found, objective=question.makespan_weight * max(ends) + weighted)


def _ends(question: ScheduleQuestion, schedule: Schedule) -> list[int]:
    return [
        start + one.modes[m].ticks
        for one, start, m in zip(question.activities, schedule.starts, schedule.modes, strict=True)
    ]


def _heads_and_tails(question: ScheduleQuestion) -> tuple[list[int], list[int]]:
    """Return the least ticks before the start and after the end of each activity."""
    shortest = [min(mode.ticks for mode in one.modes) for one in question.activities]
    heads = [one.release for one in question.activities]
    tails = [0] * len(heads)
    for b, one in enumerate(question.activities):
        for a in one.preds:
            heads[b] = max(heads[b], heads[a] + shortest[a])
    for b in reversed(range(len(heads))):
        for a in question.activities[b].preds:
            tails[a] = max(tails[a], shortest[b] + tails[b])
    return heads, tails
