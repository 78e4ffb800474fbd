"""Exact scheduling questions and answers: activities, modes, slots, transfers, start times.

A *plan* says where the calls of a workflow go from now on; a *schedule* says when each activity
of a known, finite set starts. It is what small offline questions, published shop and task-graph
instances, and the exact check of a heuristic have in common. Times are integer ticks.

An activity is done once, in one of its modes. A mode occupies ``slots`` of an endpoint while it
lasts, and the endpoint's lane (one activity at a time) during its first ``lane_ticks``: prefill,
in our own use. Mode endpoint None needs nothing (a tool, a delay). An activity starts once it is
released and each predecessor has ended, plus the transfer time between the two endpoints.

The objective is ``makespan_weight * makespan + sum of weight * end`` over the activities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.domain.errors import InvalidInput

__all__ = ["Activity", "Mode", "Schedule", "ScheduleQuestion", "Transfer"]

Transfer = tuple[tuple[int, ...], ...]
"""Ticks from the endpoint of a predecessor (row) to that of its successor (column)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to do an activity.

    Parameters
    ----------
    endpoint
        Position of the endpoint, or None if it needs none.
    ticks
        Duration, >= 0.
    slots
        Slots held, >= 1.
    lane_ticks
        How long the lane is held from the start on, [0, ticks].
    """

    endpoint: int | None
    ticks: int
    slots: int = 1
    lane_ticks: int = 0

    def __post_init__(self) -> None:
        if self.ticks < 0 or self.slots < 1 or not 0 <= self.lane_ticks <= self.ticks:
            raise InvalidInput(
                f"{self.ticks} ticks, {self.slots} slots, {self.lane_ticks} lane ticks",
                where="mode",
                remedy="use ticks >= 0, slots >= 1 and a lane time within the duration",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Something to be done once.

    Parameters
    ----------
    modes
        Ways to do it, at least one.
    preds
        Positions of its predecessors, all smaller than its own.
    release
        First tick it may start, >= 0.
    weight
        Weight of its end in the objective, >= 0.
    """

    modes: tuple[Mode, ...]
    preds: tuple[int, ...] = ()
    release: int = 0
    weight: int = 0

    def __post_init__(self) -> None:
        if not self.modes:
            raise InvalidInput("no mode", where="activity", remedy="give at least one")
        if self.release < 0 or self.weight < 0:
            raise InvalidInput(
                f"release {self.release}, weight {self.weight}",
                where="activity",
                remedy="use values >= 0",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleQuestion:
    """A scheduling question.

    Parameters
    ----------
    slots
        Slots of each endpoint, >= 1.
    activities
        In an order in which predecessors come first.
    transfers
        (predecessor, successor) -> ticks between endpoints; pairs left out cost nothing, and so
        do modes without endpoint.
    together
        Groups of activities that must choose modes of the same position: scenarios of one call
        that share its placement.
    makespan_weight
        Weight of the makespan in the objective, >= 0.
    """

    slots: tuple[int, ...]
    activities: tuple[Activity, ...]
    transfers: Mapping[tuple[int, int], Transfer] = field(default_factory=dict)
    together: tuple[tuple[int, ...], ...] = ()
    makespan_weight: int = 1

    def __post_init__(self) -> None:
        for position, one in enumerate(self.activities):
            where = f"activity {position}"
            if any(not 0 <= pred < position for pred in one.preds):
                raise InvalidInput(
                    f"predecessors {one.preds}", where=where, remedy="number predecessors first"
                )
            for mode in one.modes:
                if mode.endpoint is None:
                    continue
                if not 0 <= mode.endpoint < len(self.slots):
                    raise InvalidInput(
                        f"endpoint {mode.endpoint}", where=where, remedy="name one that exists"
                    )
                if mode.slots > self.slots[mode.endpoint]:
                    raise InvalidInput(
                        f"{mode.slots} slots, endpoint {mode.endpoint} has "
                        f"{self.slots[mode.endpoint]}",
                        where=where,
                        remedy="leave that mode out",
                    )
        size = len(self.slots)
        for (pred, successor), ticks in self.transfers.items():
            known = 0 <= successor < len(self.activities)
            if not known or pred not in self.activities[successor].preds:
                raise InvalidInput(
                    f"transfer from {pred} to {successor}",
                    where="transfers",
                    remedy="give transfers of predecessors only",
                )
            if len(ticks) != size or any(len(row) != size or min(row) < 0 for row in ticks):
                raise InvalidInput(
                    f"times from {pred} to {successor}",
                    where="transfers",
                    remedy=f"give {size} x {size} ticks >= 0",
                )
        for group in self.together:
            if len({len(self.activities[a].modes) for a in group}) > 1:
                raise InvalidInput(
                    f"activities {group} differ in modes",
                    where="together",
                    remedy="give each the same modes",
                )

    def transfer_ticks(self, pred: int, successor: int, source: Mode, target: Mode) -> int:
        """Return the ticks between the end of a predecessor and the start of its successor."""
        ticks = self.transfers.get((pred, successor))
        if ticks is None or source.endpoint is None or target.endpoint is None:
            return 0
        return ticks[source.endpoint][target.endpoint]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Start and mode position of each activity, with what is claimed of them.

    Parameters
    ----------
    starts, modes
        By activity: start tick, and position in its ``modes``.
    objective, bound
        Objective in weighted ticks, and the proven least; equal if and only if optimal.
    """

    starts: tuple[int, ...]
    modes: tuple[int, ...]
    objective: int
    bound: int

    @property
    def gap(self) -> float:
        """Relative distance of the objective to the bound, >= 0."""
        return max(0.0, (self.objective - self.bound) / self.objective) if self.objective else 0.0
