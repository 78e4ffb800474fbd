"""A shop's schedule as one sequence of activities on each machine; starts are longest paths.

An endpoint of several slots counts as several machines, here called units. The sequences and the
precedences make a graph without cycles; an activity's *head* is the longest path to its start,
its *tail* the longest from its end. Every activity with head + ticks + tail equal to the makespan
is critical.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from planner.domain.schedule import Schedule, ScheduleQuestion

__all__ = ["Lines", "is_shop"]


def is_shop(question: ScheduleQuestion) -> bool:
    """Whether the makespan alone counts, and each activity takes one slot of some endpoint.

    Then no transfers, lanes or shared modes tie an activity to more than its neighbours.
    """
    return (
        bool(question.activities)
        and bool(question.makespan_weight)
        and not question.transfers
        and not question.together
        and all(
            not one.weight
            and all(
                mode.endpoint is not None
                and mode.slots == 1
                and not mode.lane_ticks
                and mode.ticks > 0
                for mode in one.modes
            )
            for one in question.activities
        )
    )


class Lines:
    """Sequences of activities by unit; whoever changes them keeps the graph free of cycles.

    Parameters
    ----------
    question
        A shop, see `is_shop`.
    start
        A valid schedule.
    """

    def __init__(self, question: ScheduleQuestion, start: Schedule) -> None:
        self.question = question
        activities = question.activities
        self.successors: list[list[int]] = [[] for _ in activities]
        for a, one in enumerate(activities):
            for pred in one.preds:
                self.successors[pred].append(a)
        last = list(itertools.accumulate(question.slots, initial=0))
        self.units = [range(first, end) for first, end in itertools.pairwise(last)]
        """Units of each endpoint."""
        self.modes = list(start.modes)
        self.ticks = [one.modes[m].ticks for one, m in zip(activities, start.modes, strict=True)]
        self.lines: list[list[int]] = [[] for _ in range(last[-1])]
        """Activities of each unit, in order."""
        free = [0] * len(self.lines)
        for a in sorted(range(len(activities)), key=lambda a: (start.starts[a], a)):
            unit = self.unit(a, start.starts[a], free)
            free[unit] = start.starts[a] + self.ticks[a]
            self.lines[unit].append(a)

    def endpoint(self, a: int) -> int:
        """Return the endpoint an activity is on."""
        endpoint = self.question.activities[a].modes[self.modes[a]].endpoint
        assert endpoint is not None  # noqa: S101 - a shop has none without
        return endpoint

    def unit(self, a: int, tick: int, free: Sequence[int]) -> int:
        """Return the unit for an activity that starts at a tick, given when units are free.

        Of those free by then the last to become so: it idles least.
        """
        units = [unit for unit in self.units[self.endpoint(a)] if free[unit] <= tick]
        return max(units, key=free.__getitem__)

    def paths(self) -> tuple[list[int], list[int]]:
        """Return heads and tails of all activities in ticks."""
        activities, ticks, successors = self.question.activities, self.ticks, self.successors
        size = len(activities)
        after = [-1] * size
        waiting = [len(one.preds) for one in activities]
        for line in self.lines:
            for a, b in itertools.pairwise(line):
                after[a] = b
                waiting[b] += 1
        order = [a for a in range(size) if not waiting[a]]
        heads = [one.release for one in activities]
        followers = [own if after[a] < 0 else [*own, after[a]] for a, own in enumerate(successors)]
        for a in order:
            end = heads[a] + ticks[a]
            for b in followers[a]:
                heads[b] = max(heads[b], end)
                waiting[b] -= 1
                if not waiting[b]:
                    order.append(b)
        tails = [0] * size
        for a in reversed(order):
            tails[a] = max((ticks[b] + tails[b] for b in followers[a]), default=0)
        return heads, tails

    def makespan(self, heads: Sequence[int]) -> int:
        """Return the last end for given heads, in ticks."""
        return max(head + ticks for head, ticks in zip(heads, self.ticks, strict=True))

    def schedule(self) -> Schedule:
        """Return the schedule in which each activity starts at its head."""
        heads, _ = self.paths()
        return Schedule(
            starts=tuple(heads),
            modes=tuple(self.modes),
            objective=self.question.makespan_weight * self.makespan(heads),
            bound=0,
        )
