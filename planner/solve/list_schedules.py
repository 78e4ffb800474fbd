"""List schedules of the literature: HEFT, CPoP, PEFT, with insertion into gaps.

Baselines for task graphs and hints for the exact model. Durations of an activity are averaged over
its modes, transfers over pairs of different endpoints, as in the papers; an endpoint of several
slots takes that many activities at once.

References
----------
Topcuoglu, Hariri, Wu, Performance-effective and low-complexity task scheduling for heterogeneous
computing, IEEE TPDS 2002 (HEFT and CPoP); Arabnejad, Barbosa, List scheduling algorithm for
heterogeneous systems by an optimistic cost table, IEEE TPDS 2014 (PEFT).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from planner.domain.schedule import Mode, Schedule, ScheduleQuestion

__all__ = ["LIST_SCHEDULES", "cpop", "heft", "list_schedule", "peft"]


def heft(question: ScheduleQuestion) -> Schedule:
    """Return HEFT's schedule: by falling upward rank, each where it ends first."""
    up = _Averages(question).upward()
    return list_schedule(question, [-value for value in up])


def cpop(question: ScheduleQuestion) -> Schedule:
    """Return CPoP's schedule: the critical path on the endpoint that does it fastest."""
    averages = _Averages(question)
    up, down = averages.upward(), averages.downward()
    length = [u + d for u, d in zip(up, down, strict=True)]
    path = _critical_path(question, averages.successors, length)
    homes: dict[int, int] = {}
    for endpoint in range(len(question.slots)):
        ticks = [_ticks_on(question, a, endpoint) for a in path]
        if None not in ticks:
            homes[endpoint] = sum(t for t in ticks if t is not None)
    home = min(homes, key=lambda i: (homes[i], i), default=None)
    on_path = frozenset(path)

    def score(activity: int, mode: Mode, end: int) -> float:
        wanted = activity not in on_path or home is None or mode.endpoint == home
        return end if wanted else float("inf")

    return list_schedule(question, [-value for value in length], score)


def peft(question: ScheduleQuestion) -> Schedule:
    """Return PEFT's schedule: by falling mean of the optimistic cost table, end plus that cost."""
    averages = _Averages(question)
    table: list[list[float]] = [[] for _ in question.activities]
    for a in reversed(range(len(question.activities))):
        for mode in question.activities[a].modes:
            worst = 0.0
            for b in averages.successors[a]:
                best = min(
                    table[b][m]
                    + other.ticks
                    + (averages.transfer(a, b) if other.endpoint != mode.endpoint else 0.0)
                    for m, other in enumerate(question.activities[b].modes)
                )
                worst = max(worst, best)
            table[a].append(worst)
    order = [-sum(row) / len(row) for row in table]

    def score(activity: int, mode: Mode, end: int) -> float:
        return end + table[activity][question.activities[activity].modes.index(mode)]

    return list_schedule(question, order, score)


LIST_SCHEDULES: dict[str, Callable[[ScheduleQuestion], Schedule]] = {
    "HEFT": heft,
    "CPoP": cpop,
    "PEFT": peft,
}


def list_schedule(
    question: ScheduleQuestion,
    order: Sequence[float],
    score: Callable[[int, Mode, int], float] = lambda _a, _mode, end: end,
) -> Schedule:
    """Return the schedule that takes ready activities by increasing ``order``.

    Parameters
    ----------
    order
        Key by activity; ties go by position.
    score
        What to minimise over the modes: activity, mode, end it would have there. Ties go to the
        first mode.
    """
    size = len(question.activities)
    starts, ends, chosen = [0] * size, [0] * size, [0] * size
    waiting = [len(one.preds) for one in question.activities]
    successors: list[list[int]] = [[] for _ in question.activities]
    for a, one in enumerate(question.activities):
        for pred in one.preds:
            successors[pred].append(a)
    slots = [_Timeline(room) for room in question.slots]
    lanes = [_Timeline(1) for _ in question.slots]
    leader = {a: group[0] for group in question.together for a in group}
    decided: dict[int, int] = {}
    ready = [(order[a], a) for a in range(size) if not waiting[a]]
    heapq.heapify(ready)
    while ready:
        _, a = heapq.heappop(ready)
        one = question.activities[a]
        group = leader.get(a, a)
        best: tuple[float, int, int] | None = None
        for m, mode in enumerate(one.modes):
            if decided.get(group, m) != m:
                continue
            start = one.release
            for pred in one.preds:
                source = question.activities[pred].modes[chosen[pred]]
                arrival = ends[pred] + question.transfer_ticks(pred, a, source, mode)
                start = max(start, arrival)
            if mode.endpoint is not None:
                start = _fit(start, mode, slots[mode.endpoint], lanes[mode.endpoint])
            value = (score(a, mode, start + mode.ticks), m, start)
            if best is None or value < best:
                best = value
        assert best is not None  # noqa: S101 - every activity has a mode
        _, m, start = best
        mode = one.modes[m]
        decided[group] = m
        starts[a], ends[a], chosen[a] = start, start + mode.ticks, m
        if mode.endpoint is not None:
            slots[mode.endpoint].take(start, mode.ticks, mode.slots)
            lanes[mode.endpoint].take(start, mode.lane_ticks, 1)
        for b in successors[a]:
            waiting[b] -= 1
            if not waiting[b]:
                heapq.heappush(ready, (order[b], b))
    weighted = sum(one.weight * end for one, end in zip(question.activities, ends, strict=True))
    return Schedule(
        starts=tuple(starts),
        modes=tuple(chosen),
        objective=question.makespan_weight * max(ends, default=0) + weighted,
        bound=0,
    )


class _Timeline:
    """Slots in use over time, as a step function: ``used[n]`` holds from ``times[n]`` on."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._times = [0]
        self._used = [0]

    def first(self, ready: int, ticks: int, slots: int) -> int:
        """Return the first tick from ``ready`` on with room for the whole duration."""
        if not ticks:
            return ready
        times, used, most = self._times, self._used, self._room - slots
        position = self._at(ready)
        start = ready
        while True:
            if used[position] > most:
                position += 1
                start = times[position]
            elif position + 1 == len(times) or times[position + 1] >= start + ticks:
                return start
            else:
                position += 1

    def take(self, start: int, ticks: int, slots: int) -> None:
        """Use slots for a while."""
        if not ticks:
            return
        first, last = self._cut(start), self._cut(start + ticks)
        # The cut at the end never moves the one at the start: it lies later.
        for position in range(first, last):
            self._used[position] += slots

    def _at(self, tick: int) -> int:
        low, high = 0, len(self._times)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._times[middle] <= tick else (low, middle)
        return low

    def _cut(self, tick: int) -> int:
        position = self._at(tick)
        if self._times[position] == tick:
            return position
        self._times.insert(position + 1, tick)
        self._used.insert(position + 1, self._used[position])
        return position + 1


def _fit(ready: int, mode: Mode, slots: _Timeline, lane: _Timeline) -> int:
    """Return the first start at which both slots and lane are free long enough."""
    start = ready
    while True:
        later = lane.first(slots.first(start, mode.ticks, mode.slots), mode.lane_ticks, 1)
        if later == start:
            return start
        start = later


class _Averages:
    """Mean durations and transfers, and the ranks made of them."""

    def __init__(self, question: ScheduleQuestion) -> None:
        self._question = question
        self.ticks = [
            sum(mode.ticks for mode in one.modes) / len(one.modes) for one in question.activities
        ]
        self.successors: list[list[int]] = [[] for _ in question.activities]
        for a, one in enumerate(question.activities):
            for pred in one.preds:
                self.successors[pred].append(a)
        pairs = max(1, len(question.slots) * (len(question.slots) - 1))
        self._transfers = {
            edge: sum(t for i, row in enumerate(ticks) for j, t in enumerate(row) if i != j) / pairs
            for edge, ticks in question.transfers.items()
        }

    def transfer(self, pred: int, successor: int) -> float:
        """Return the mean ticks between two different endpoints."""
        return self._transfers.get((pred, successor), 0.0)

    def upward(self) -> list[float]:
        """Return the longest mean chain from the start of each activity to the end."""
        rank = [0.0] * len(self.ticks)
        for a in reversed(range(len(rank))):
            after = (self.transfer(a, b) + rank[b] for b in self.successors[a])
            rank[a] = self.ticks[a] + max(after, default=0.0)
        return rank

    def downward(self) -> list[float]:
        """Return the longest mean chain from the beginning to the start of each activity."""
        rank = [0.0] * len(self.ticks)
        for b, one in enumerate(self._question.activities):
            before = (rank[a] + self.ticks[a] + self.transfer(a, b) for a in one.preds)
            rank[b] = max(before, default=0.0)
        return rank


def _critical_path(
    question: ScheduleQuestion, successors: Sequence[Sequence[int]], length: Sequence[float]
) -> list[int]:
    """Return the activities of one longest chain, by upward plus downward rank."""
    entries = [a for a, one in enumerate(question.activities) if not one.preds]
    if not entries:
        return []
    path = [max(entries, key=lambda a: (length[a], -a))]
    while successors[path[-1]]:
        path.append(max(successors[path[-1]], key=lambda a: (length[a], -a)))
    return path


def _ticks_on(question: ScheduleQuestion, activity: int, endpoint: int) -> int | None:
    ticks = [m.ticks for m in question.activities[activity].modes if m.endpoint == endpoint]
    return min(ticks, default=None)
