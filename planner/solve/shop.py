"""Job shops by local search: take a critical activity out, put it back where it is best.

A hint for questions too large for intervals to improve within the budget. A schedule is a
sequence of activities on each machine (an endpoint of several slots counts as several machines);
starts follow as longest paths. One step takes a random critical activity out, and considers every
machine that can do it. With heads and tails of the others known, what ends after the activity's
head may safely follow it, and what has more ahead than the activity's tail may safely precede it.
Any place after those that may only precede and before those that may only follow keeps the graph
free of cycles, and head + duration + tail there bounds the new length. The
step goes to the best such place other than the one it left, and is taken back if the schedule is
longer than both the one before and the one a hundred steps ago (late acceptance).

References
----------
Mastrolilli, Gambardella, Effective neighbourhood functions for the flexible job shop problem,
Journal of Scheduling 2000 (theorems on feasible and optimal insertion); Burke, Bykov, The late
acceptance hill-climbing heuristic, EJOR 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.domain.schedule import Schedule, ScheduleQuestion

__all__ = ["shop_schedule"]

_HISTORY = 100
"""Steps back that a step is compared with: no longer than then is good enough."""

_Place = tuple[int, int, int, int]
"""Machine, position on it, ticks and mode of an activity."""


def shop_schedule(
    question: ScheduleQuestion, start: Schedule, *, effort: float, seed: int = 0
) -> Schedule | None:
    """Return a schedule at least as good as ``start``, or None if the question is no job shop.

    A job shop here asks for the makespan alone, has no transfers, lanes, releases or shared
    modes, one slot per mode, and activities with at most one predecessor and one successor.

    Parameters
    ----------
    start
        A valid schedule.
    effort
        Activities to visit; about two million take a second. A count and not a time, so that the
        result is reproducible.
    """
    if not _is_shop(question):
        return None
    walk = _Walk(question, start)
    walk.run(effort, np.random.default_rng(seed))
    return walk.best if walk.best.objective <= start.objective else start


def _is_shop(question: ScheduleQuestion) -> bool:
    activities = question.activities
    followed = [pred for one in activities for pred in one.preds]
    return (
        bool(activities)
        and bool(question.makespan_weight)
        and not question.transfers
        and not question.together
        and len(set(followed)) == len(followed)
        and all(
            not one.release
            and not one.weight
            and len(one.preds) <= 1
            and all(
                mode.endpoint is not None
                and mode.slots == 1
                and not mode.lane_ticks
                and mode.ticks > 0
                for mode in one.modes
            )
            for one in activities
        )
    )


class _Walk:
    def __init__(self, question: ScheduleQuestion, start: Schedule) -> None:
        self._question = question
        activities = question.activities
        self._size = len(activities)
        self._pred = [one.preds[0] if one.preds else -1 for one in activities]
        self._succ = [-1] * self._size
        for a, pred in enumerate(self._pred):
            if pred >= 0:
                self._succ[pred] = a
        machines: list[list[int]] = []
        for slots in question.slots:
            count = sum(map(len, machines))
            machines.append(list(range(count, count + slots)))
        # (machine, ticks, mode) for each way to do an activity.
        self._ways = [
            [
                (machine, mode.ticks, m)
                for m, mode in enumerate(one.modes)
                if mode.endpoint is not None
                for machine in machines[mode.endpoint]
            ]
            for one in activities
        ]
        self._lines: list[list[int]] = [[] for _ in range(sum(question.slots))]
        self._machine = [0] * self._size
        self._mode = list(start.modes)
        self._ticks = [one.modes[m].ticks for one, m in zip(activities, start.modes, strict=True)]
        free = [0] * len(self._lines)
        for a in sorted(range(self._size), key=lambda a: (start.starts[a], a)):
            endpoint = activities[a].modes[start.modes[a]].endpoint
            assert endpoint is not None  # noqa: S101 - checked by _is_shop
            # Of the machines that are free by then; the latest wastes the least.
            machine = max(
                (m for m in machines[endpoint] if free[m] <= start.starts[a]), key=free.__getitem__
            )
            free[machine] = start.starts[a] + self._ticks[a]
            self._lines[machine].append(a)
            self._machine[a] = machine
        self.best = start

    def run(self, effort: float, rng: np.random.Generator) -> None:
        """Walk until the effort is spent."""
        heads, tails = self._paths(-1)
        length = self._keep(heads)
        history = [length] * _HISTORY
        steps = 0
        while effort > 0:
            effort -= 4 * self._size
            critical = [
                a for a in range(self._size) if heads[a] + self._ticks[a] + tails[a] == length
            ]
            a = critical[int(rng.integers(len(critical)))]
            left = self._reinsert(a, rng)
            new_heads, new_tails = self._paths(-1)
            found = max(h + t for h, t in zip(new_heads, self._ticks, strict=True))
            if found <= length or found <= history[steps % _HISTORY]:
                heads, tails, length = new_heads, new_tails, found
                if length * self._question.makespan_weight < self.best.objective:
                    self._keep(heads)
            else:
                self._lines[self._machine[a]].remove(a)
                machine, position, self._ticks[a], self._mode[a] = left
                self._lines[machine].insert(position, a)
                self._machine[a] = machine
            history[steps % _HISTORY] = length
            steps += 1

    def _keep(self, heads: Sequence[int]) -> int:
        """Note the schedule as the best if it is; return its makespan."""
        length = max(head + ticks for head, ticks in zip(heads, self._ticks, strict=True))
        objective = length * self._question.makespan_weight
        if objective <= self.best.objective:
            self.best = Schedule(
                starts=tuple(heads), modes=tuple(self._mode), objective=objective, bound=0
            )
        return length

    def _paths(self, without: int) -> tuple[list[int], list[int]]:
        """Return heads and tails of all; on its machine ``without`` is passed over."""
        size, pred, succ, ticks = self._size, self._pred, self._succ, self._ticks
        before, after = [-1] * size, [-1] * size
        for line in self._lines:
            last = -1
            for a in line:
                if a == without:
                    continue
                before[a] = last
                if last >= 0:
                    after[last] = a
                last = a
        waiting = [(pred[a] >= 0) + (before[a] >= 0) for a in range(size)]
        order = [a for a in range(size) if not waiting[a]]
        heads = [0] * size
        for a in order:
            end = heads[a] + ticks[a]
            for b in (succ[a], after[a]):
                if b >= 0:
                    heads[b] = max(heads[b], end)
                    waiting[b] -= 1
                    if not waiting[b]:
                        order.append(b)
        tails = [0] * size
        for a in reversed(order):
            tail = tails[a] + ticks[a]
            for b in (pred[a], before[a]):
                if b >= 0:
                    tails[b] = max(tails[b], tail)
        return heads, tails

    def _reinsert(self, a: int, rng: np.random.Generator) -> _Place:
        """Put an activity to the best place that is not its own; return the one it left."""
        home = self._machine[a]
        own = self._lines[home].index(a)
        heads, tails = self._paths(a)
        head, tail, ticks = heads[a], tails[a], self._ticks
        self._lines[home].pop(own)
        best: tuple[int, float] | None = None
        chosen = (home, own, ticks[a], self._mode[a])
        for machine, needed, mode in self._ways[a]:
            line = self._lines[machine]
            # Along a line ends rise and tails fall: late ones are last, early ones first.
            late = [heads[b] + ticks[b] > head for b in line]
            early = [tails[b] + ticks[b] > tail for b in line]
            low = max((p + 1 for p in range(len(line)) if early[p] and not late[p]), default=0)
            high = min((p for p in range(len(line)) if late[p] and not early[p]), default=len(line))
            for position in range(low, high + 1):
                if (machine, position) == (home, own):
                    continue
                start, rest = head, tail
                if position:
                    b = line[position - 1]
                    start = max(start, heads[b] + ticks[b])
                if position < len(line):
                    b = line[position]
                    rest = max(rest, tails[b] + ticks[b])
                value = (start + needed + rest, float(rng.random()))
                if best is None or value < best:
                    best, chosen = value, (machine, position, needed, mode)
        machine, position, needed, mode = chosen
        self._lines[machine].insert(position, a)
        left = (home, own, ticks[a], self._mode[a])
        self._machine[a], self._ticks[a], self._mode[a] = machine, needed, mode
        return left
