"""Independent checker of schedules; it shares no code with what makes them.

Rules: ``length`` (one start and mode per activity), ``mode`` (exists), ``release``,
``precedence`` (predecessor's end and transfer), ``slots`` and ``lane`` (never more than there
are), ``together`` (groups share their mode), ``objective`` (as recomputed), ``bound`` (at most the
objective).
"""

from __future__ import annotations

from collections import defaultdict

from planner.domain.schedule import Schedule, ScheduleQuestion
from planner.verify import Violation

__all__ = ["schedule_objective", "verify_schedule"]


def verify_schedule(question: ScheduleQuestion, schedule: Schedule) -> tuple[Violation, ...]:
    """Return every rule that a schedule breaks; empty if it may be used."""
    size = len(question.activities)
    if len(schedule.starts) != size or len(schedule.modes) != size:
        return (Violation("length", f"{len(schedule.starts)} starts for {size} activities"),)
    wrong = [
        Violation("mode", f"activity {a} has no mode {m}")
        for a, m in enumerate(schedule.modes)
        if not 0 <= m < len(question.activities[a].modes)
    ]
    if wrong:
        return tuple(wrong)
    return (
        *_order(question, schedule),
        *_resources(question, schedule),
        *(
            Violation("together", f"activities {group} choose different modes")
            for group in question.together
            if len({schedule.modes[a] for a in group}) > 1
        ),
        *_claims(question, schedule),
    )


def schedule_objective(question: ScheduleQuestion, schedule: Schedule) -> int:
    """Return the objective of starts and modes in weighted ticks."""
    ends = _ends(question, schedule)
    weighted = sum(one.weight * end for one, end in zip(question.activities, ends, strict=True))
    return question.makespan_weight * max(ends, default=0) + weighted


def _ends(question: ScheduleQuestion, schedule: Schedule) -> list[int]:
    return [
        start + one.modes[m].ticks
        for one, start, m in zip(question.activities, schedule.starts, schedule.modes, strict=True)
    ]


def _order(question: ScheduleQuestion, schedule: Schedule) -> list[Violation]:
    found = []
    ends = _ends(question, schedule)
    for a, one in enumerate(question.activities):
        start, mode = schedule.starts[a], one.modes[schedule.modes[a]]
        if start < one.release:
            found.append(Violation("release", f"activity {a} starts at {start} < {one.release}"))
        for pred in one.preds:
            source = question.activities[pred].modes[schedule.modes[pred]]
            ready = ends[pred] + question.transfer_ticks(pred, a, source, mode)
            if start < ready:
                found.append(
                    Violation("precedence", f"activity {a} starts at {start}, ready at {ready}")
                )
    return found


def _resources(question: ScheduleQuestion, schedule: Schedule) -> list[Violation]:
    # At one instant, what ends gives back before what starts takes: (tick, change) sorts so.
    slots: dict[int, list[tuple[int, int]]] = defaultdict(list)
    lanes: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for one, start, m in zip(question.activities, schedule.starts, schedule.modes, strict=True):
        mode = one.modes[m]
        if mode.endpoint is None:
            continue
        if mode.ticks:
            slots[mode.endpoint] += [(start, mode.slots), (start + mode.ticks, -mode.slots)]
        if mode.lane_ticks:
            lanes[mode.endpoint] += [(start, 1), (start + mode.lane_ticks, -1)]
    found = []
    for rule, events, room in (
        ("slots", slots, dict(enumerate(question.slots))),
        ("lane", lanes, dict.fromkeys(range(len(question.slots)), 1)),
    ):
        for endpoint, changes in sorted(events.items()):
            used = 0
            for tick, change in sorted(changes):
                used += change
                if used > room[endpoint]:
                    found.append(
                        Violation(
                            rule, f"endpoint {endpoint}: {used} of {room[endpoint]} at {tick}"
                        )
                    )
                    break
    return found


def _claims(question: ScheduleQuestion, schedule: Schedule) -> list[Violation]:
    found = []
    objective = schedule_objective(question, schedule)
    if schedule.objective != objective:
        found.append(Violation("objective", f"stated {schedule.objective}, it is {objective}"))
    if schedule.bound > schedule.objective:
        found.append(
            Violation("bound", f"bound {schedule.bound} exceeds objective {schedule.objective}")
        )
    return found
