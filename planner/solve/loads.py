"""Workloads of a shop: a bound on the makespan, and list schedules that pay for busy endpoints.

If work may be split at will, the least possible largest load of an endpoint is a linear program.
Its optimum is a bound, often within a per cent of the best makespan known where jobs are many.
Its dual values say what a tick of each endpoint is worth: a mode is as wasteful as its ticks cost
more than those of the activity's cheapest mode. A list schedule by earliest end alone fills idle
endpoints with work that takes long there and ends 10 % above; adding a multiple of the waste to
the end leaves 2 to 4 %. Which multiple does best differs, so several are tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ortools.linear_solver.python import model_builder

from planner.domain.schedule import Mode, Schedule, ScheduleQuestion
from planner.solve.list_schedules import list_schedule

__all__ = ["Loads", "priced_schedules", "spread_loads"]

_TRUST = 1e-6
_MULTIPLES = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """The workload relaxation of a shop.

    Parameters
    ----------
    least
        A makespan in ticks that no schedule is below.
    price
        Ticks of makespan per tick of work on each endpoint, 1 in the mean; shape (I,).
    ticks
        Duration of each activity in the relaxation, a mean over its modes; shape (A,).
    """

    least: int
    price: tuple[float, ...]
    ticks: tuple[float, ...]


def spread_loads(question: ScheduleQuestion) -> Loads | None:
    """Return the relaxation of a shop (see `is_shop`), or None if the linear program fails."""
    model = model_builder.Model()  # type: ignore[no-untyped-call]
    total = model_builder.LinearExpr.weighted_sum
    longest = model.new_num_var(0.0, math.inf, "")
    rows = [([longest], [-float(slots)]) for slots in question.slots]
    uses = []
    for one in question.activities:
        use = [model.new_num_var(0.0, 1.0, "") for _ in one.modes]
        model.add_linear_constraint(total(use, [1.0] * len(use)), lb=1.0, ub=1.0)
        for variable, mode in zip(use, one.modes, strict=True):
            assert mode.endpoint is not None  # noqa: S101 - a shop has none without
            rows[mode.endpoint][0].append(variable)
            rows[mode.endpoint][1].append(float(mode.ticks))
        uses.append(use)
    loads = [model.add_linear_constraint(total(*row), ub=0.0) for row in rows]
    model.minimize(longest)
    solver = model_builder.Solver("GLOP")
    if solver.solve(model) != model_builder.SolveStatus.OPTIMAL:
        return None
    value = float(solver.objective_value)
    return Loads(
        least=math.ceil(value - _TRUST * abs(value)),
        price=tuple(max(0.0, -solver.dual_value(load)) * len(loads) for load in loads),
        ticks=tuple(
            sum(
                solver.value(variable) * mode.ticks
                for variable, mode in zip(use, one.modes, strict=True)
            )
            for use, one in zip(uses, question.activities, strict=True)
        ),
    )


def priced_schedules(question: ScheduleQuestion, loads: Loads) -> list[Schedule]:
    """Return list schedules by falling upward rank, each mode's waste added to its end."""
    cheapest = [min(_price(mode, loads) for mode in one.modes) for one in question.activities]
    rank = list(loads.ticks)
    for a in reversed(range(len(rank))):
        for pred in question.activities[a].preds:
            rank[pred] = max(rank[pred], loads.ticks[pred] + rank[a])

    def priced(multiple: float) -> Schedule:
        def score(a: int, mode: Mode, end: int) -> float:
            return end + multiple * (_price(mode, loads) - cheapest[a])

        return list_schedule(question, [-value for value in rank], score)

    return [priced(multiple) for multiple in _MULTIPLES]


def _price(mode: Mode, loads: Loads) -> float:
    assert mode.endpoint is not None  # noqa: S101 - a shop has none without
    return loads.price[mode.endpoint] * mode.ticks
