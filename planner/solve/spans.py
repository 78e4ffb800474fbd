"""Shops too large for one model: improve a schedule span by span.

Take activities that follow each other in time out of a schedule and keep all others on their
machines, in their order. What comes before the span then only says when its activities and
machines are ready (heads), what comes after only how much must follow them (tails), and almost
every longest path of the schedule crosses the span. So a span is a small question of its own:
rearranged such that the longest of head, path and tail is below the makespan, it makes the whole
schedule that short. CP-SAT takes one span after the other, always from the schedule as it is.

Any order that respects all precedences may be cut into spans: by earliest start, by latest start,
or anything between the two. Spans grow while they are solved to the end, and shrink when not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from ortools.sat.python import cp_model

from planner.domain.schedule import Schedule, ScheduleQuestion
from planner.solve.budget import Budget
from planner.solve.lines import Lines

__all__ = ["span_schedule"]

_FIRST_SIZE = 40.0
_LEAST_SIZE = 15.0
_GROWTH, _SHRINKAGE = 1.05, 0.9
_SPAN_LIMIT = 0.3
"""Limit on one span, in seconds or in the solver's deterministic time."""
_EACH_SPAN = 3e-3
_EACH = 2e-5
"""Seconds a span takes beside the search: at least, and for each activity and mode."""
_PATIENCE = 400
"""Spans in a row that bring nothing before the rest of the budget is given back."""


def span_schedule(
    question: ScheduleQuestion, start: Schedule, *, budget: Budget, least: int = 0, seed: int = 0
) -> tuple[Schedule, float]:
    """Return a schedule at least as good as ``start``, and the share of the budget it took.

    Parameters
    ----------
    question
        A shop, see `planner.solve.lines.is_shop`.
    start
        A valid schedule.
    budget
        Limit in all; its relative gap does not count. With a deterministic limit and one worker
        the result is reproducible.
    least
        A makespan in ticks that no schedule is below: reaching it ends the search.
    """
    rng = np.random.default_rng(seed)
    lines = Lines(question, start)
    heads, tails = lines.paths()
    length = lines.makespan(heads)
    limit = budget.wall_s if budget.wall_s is not None else budget.deterministic
    assert limit is not None  # noqa: S101 - Budget asks for one
    spent, size, stale = 0.0, min(_FIRST_SIZE, float(len(heads))), 0
    while spent < limit and length > least and stale < _PATIENCE:
        span = _Span(lines, heads, tails, *_cut(lines, heads, tails, int(size), rng))
        spent += _EACH * len(heads)
        stale += 1
        if span.floor >= length:
            continue
        span.build()
        solver = cp_model.CpSolver()
        parameters = solver.parameters
        parameters.num_workers = budget.workers
        parameters.random_seed = int(rng.integers(1 << 30))
        share = min(_SPAN_LIMIT, limit - spent)
        if budget.wall_s is not None:
            parameters.max_time_in_seconds = max(share, 0.01)
        else:
            parameters.max_deterministic_time = max(share, 0.01)
        status = solver.solve(span.cp)
        # CP-SAT counts no work for what presolve alone decides.
        took = (
            solver.wall_time
            if budget.wall_s is not None
            else solver.response_proto.deterministic_time
        )
        spent += took + _EACH_SPAN + _EACH * span.modes
        if status == cp_model.OPTIMAL:
            size = min(size * _GROWTH, float(len(heads)))
        else:
            size = max(size * _SHRINKAGE, min(_LEAST_SIZE, size))
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            span.apply(solver)
            heads, tails = lines.paths()
            stale = stale if lines.makespan(heads) == length else 0
            length = lines.makespan(heads)
        if status == cp_model.OPTIMAL and span.whole:
            break
    found = lines.schedule()
    return (found if found.objective <= start.objective else start), min(1.0, spent / limit)


def _cut(
    lines: Lines, heads: Sequence[int], tails: Sequence[int], size: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Return what comes before a random span, and the span."""
    mix = float(rng.random())
    length = lines.makespan(heads)
    key = [
        (1 - mix) * head + mix * (length - ticks - tail)
        for head, ticks, tail in zip(heads, lines.ticks, tails, strict=True)
    ]
    order = sorted(range(len(heads)), key=lambda a: (key[a], heads[a], a))
    if size >= len(order):
        return [], order
    # Ends may stick out, or activities there would be in fewer spans than others.
    first = int(rng.integers(-size // 2, len(order) - size // 2))
    return order[: max(0, first)], order[max(0, first) : first + size]


class _Span:
    """The model of one span.

    Each unit is ready after its last activity before the span, and must be left ``after`` ticks
    before the end for the first one behind it. On an endpoint of several units, what comes behind
    the span need not stay on its unit: it is an interval that lasts to the end.
    """

    def __init__(
        self,
        lines: Lines,
        heads: Sequence[int],
        tails: Sequence[int],
        before: Sequence[int],
        chosen: Sequence[int],
    ) -> None:
        self._lines = lines
        self._heads = heads
        self._chosen = chosen
        self._inside = set(chosen)
        self._before = set(before)
        self._length = lines.makespan(heads)
        ticks = lines.ticks
        self._ends = [head + t for head, t in zip(heads, ticks, strict=True)]
        self._from_start = [t + tail for t, tail in zip(ticks, tails, strict=True)]
        self._kept = [[a for a in line if a in self._before] for line in lines.lines]
        self._rest = [
            [a for a in line if a not in self._before and a not in self._inside]
            for line in lines.lines
        ]
        self._ready = [self._ends[kept[-1]] if kept else 0 for kept in self._kept]
        self._after = [self._from_start[rest[0]] if rest else 0 for rest in self._rest]
        self.floor = self._passing()
        self.whole = len(chosen) == len(heads)
        self.modes = sum(len(lines.question.activities[a].modes) for a in chosen)

    def _passing(self) -> int:
        """Return the longest path that the span leaves as it is."""
        longest = 0
        for a in self._before:
            for b in self._lines.successors[a]:
                if b not in self._before and b not in self._inside:
                    longest = max(longest, self._ends[a] + self._from_start[b])
            if not self._lines.successors[a]:
                longest = max(longest, self._ends[a])
        for a, one in enumerate(self._lines.question.activities):
            if a not in self._before and a not in self._inside:
                longest = max(longest, one.release + self._from_start[a])
        for units in self._lines.units:
            # On one of several units the rest may follow other activities than it does.
            if len(units) == 1:
                longest = max(longest, self._ready[units[0]] + self._after[units[0]])
        return longest

    def build(self) -> None:
        """Make the model, with the schedule as it is for a hint."""
        self.cp = cp_model.CpModel()
        self.makespan = self.cp.new_int_var(self.floor, self._length, "makespan")
        self.start: dict[int, cp_model.IntVar] = {}
        self.end: dict[int, cp_model.LinearExprT] = {}
        self.use: dict[int, list[cp_model.IntVar | int]] = {}
        self.leave: dict[int, cp_model.IntVar] = {}
        self._intervals: dict[int, list[cp_model.IntervalVar]] = defaultdict(list)
        self._work: dict[int, list[cp_model.LinearExprT]] = defaultdict(list)
        for a in self._chosen:
            self._activity(a)
            self._occupy(a)
        for endpoint, intervals in self._intervals.items():
            self._room(endpoint, intervals)
        self.cp.add_hint(self.makespan, self._length)
        self.cp.minimize(self.makespan)

    def _activity(self, a: int) -> None:
        """Start after predecessors, end early enough for successors."""
        cp, lines, one = self.cp, self._lines, self._lines.question.activities[a]
        ticks = [mode.ticks for mode in one.modes]
        head = max([one.release, *(self._ends[p] for p in one.preds if p in self._before)])
        tail = max(
            (self._from_start[b] for b in lines.successors[a] if b not in self._inside), default=0
        )
        latest = self._length - tail
        start = self.start[a] = cp.new_int_var(head, latest - min(ticks), "")
        cp.add_hint(start, self._heads[a])
        if len(ticks) == 1:
            self.use[a] = [1]
            self.end[a] = start + ticks[0]
        else:
            use = [cp.new_bool_var("") for _ in ticks]
            cp.add_exactly_one(use)
            end = cp.new_int_var(head + min(ticks), latest, "")
            cp.add(end == start + cp_model.LinearExpr.weighted_sum(use, ticks))
            cp.add_hint(end, self._ends[a])
            for m, literal in enumerate(use):
                cp.add_hint(literal, int(m == lines.modes[a]))
            self.use[a] = list(use)
            self.end[a] = end
        cp.add(self.makespan >= self.end[a] + tail)
        for pred in one.preds:
            if pred in self._inside:
                cp.add(start >= self.end[pred])

    def _occupy(self, a: int) -> None:
        """Occupy a unit while it lasts; where there is but one, between what stays there."""
        cp, start = self.cp, self.start[a]
        for mode, use in zip(self._lines.question.activities[a].modes, self.use[a], strict=True):
            assert mode.endpoint is not None  # noqa: S101 - a shop has none without
            units = self._lines.units[mode.endpoint]
            self._work[mode.endpoint].append(mode.ticks * use)
            limits = []
            if len(units) == 1:
                limits = [
                    cp.add(start >= self._ready[units[0]]),
                    cp.add(self.makespan >= start + mode.ticks + self._after[units[0]]),
                ]
            if isinstance(use, int):
                interval = cp.new_fixed_size_interval_var(start, mode.ticks, "")
            else:
                interval = cp.new_optional_fixed_size_interval_var(start, mode.ticks, use, "")
                for limit in limits:
                    limit.only_enforce_if(use)
            self._intervals[mode.endpoint].append(interval)

    def _room(self, endpoint: int, intervals: list[cp_model.IntervalVar]) -> None:
        cp, units = self.cp, self._lines.units[endpoint]
        edges = sum(self._ready[unit] + self._after[unit] for unit in units)
        # Redundant: ready, work and what follows fit into the makespan.
        cp.add(len(units) * self.makespan >= sum(self._work[endpoint]) + edges)
        if len(units) == 1:
            cp.add_no_overlap(intervals)
            return
        soonest = min(self._ready[unit] for unit in units)
        beyond = self._length + 1
        for unit in units:
            if self._ready[unit]:
                intervals.append(cp.new_fixed_size_interval_var(0, self._ready[unit], ""))
            if self._rest[unit]:
                first, after = self._rest[unit][0], self._after[unit]
                leave = self.leave[unit] = cp.new_int_var(soonest, self._length - after, "")
                cp.add(self.makespan >= leave + after)
                cp.add_hint(leave, self._heads[first])
                intervals.append(cp.new_interval_var(leave, beyond - leave, beyond, ""))
        cp.add_cumulative(intervals, [1] * len(intervals), len(units))

    def apply(self, solver: cp_model.CpSolver) -> None:
        """Put the solver's solution into the lines."""
        lines = self._lines
        placed: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for a in self._chosen:
            lines.modes[a] = next(
                m
                for m, use in enumerate(self.use[a])
                if isinstance(use, int) or solver.boolean_value(use)
            )
            lines.ticks[a] = lines.question.activities[a].modes[lines.modes[a]].ticks
            placed[lines.endpoint(a)].append((int(solver.value(self.start[a])), 0, a))
        for endpoint, units in enumerate(lines.units):
            events = placed[endpoint]
            # An endpoint that nothing in the span may use keeps its rests where they are.
            moved = [unit for unit in units if unit in self.leave]
            events += [(int(solver.value(self.leave[unit])), 1, unit) for unit in moved]
            free = {unit: self._ready[unit] for unit in units}
            new = {unit: list(self._kept[unit]) for unit in units}
            for tick, behind, what in sorted(events):
                unit = max((u for u in free if free[u] <= tick), key=free.__getitem__)
                if behind:
                    new[unit] += self._rest[what]
                    del free[unit]
                else:
                    new[unit].append(what)
                    free[unit] = tick + lines.ticks[what]
            for unit in units:
                lines.lines[unit] = new[unit] if moved else new[unit] + self._rest[unit]
