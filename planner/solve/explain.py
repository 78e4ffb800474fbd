"""Why a plan looks as it does: how full each endpoint is, and each call site's runner-up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.domain.plan import PLAN_TICK_S
from planner.solve.instance import LOAD_UNIT
from planner.solve.solver import PlanResult

__all__ = ["EndpointUse", "RunnerUp", "endpoint_use", "runners_up"]

_BINDING = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointUse:
    """Busy calls of an endpoint against the room of its level.

    ``binding`` says that at least 95 % of the room is taken at the highest level: more load has
    to go elsewhere.
    """

    endpoint: str
    level: int
    busy: float
    room: float
    binding: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """The next best home of a call site, all else as planned.

    Parameters
    ----------
    site, endpoint
        The call site and where most of its traffic goes.
    runner_up
        The endpoint where moving the site there, in all classes that use ``endpoint``, changes
        the expected run latency least; None if no other endpoint may serve it.
    extra_s
        That change in seconds; below zero if the move is better but finds no room.
    fits
        Whether the runner-up has room for it at its planned level.
    """

    site: str
    endpoint: str
    runner_up: str | None
    extra_s: float
    fits: bool


def endpoint_use(result: PlanResult) -> tuple[EndpointUse, ...]:
    """Return the use of each endpoint the plan sends calls to, in fleet order."""
    instance, levels = result.instance, result.solution.levels
    busy, room = _busy(result), instance.room
    rows = []
    for i in np.unique(result.solution.placements).tolist():
        n = int(levels[i])
        full = busy[i] >= _BINDING * room[i, n] and n == len(instance.levels[i]) - 1
        rows.append(
            EndpointUse(
                endpoint=instance.endpoints[i],
                level=instance.levels[i][n],
                busy=busy[i] * LOAD_UNIT,
                room=float(room[i, n]) * LOAD_UNIT,
                binding=bool(full),
            )
        )
    return tuple(rows)


def runners_up(result: PlanResult) -> tuple[RunnerUp, ...]:
    """Return the runner-up of each call site, in site order."""
    instance, timing, solution = result.instance, result.timing, result.solution
    classes = len(solution.placements)
    levels = np.repeat(solution.levels[np.newaxis], classes, axis=0)
    before = int(timing.totals(solution.placements, levels).sum())
    busy, room, load = _busy(result), instance.room, instance.class_load
    scale = PLAN_TICK_S / (classes * instance.scenarios)
    rows = []
    for k, site in enumerate(instance.sites):
        home = int(np.bincount(solution.placements[:, k]).argmax())
        moving = solution.placements[:, k] == home
        options = []
        for i in np.flatnonzero(instance.allowed[k]).tolist():
            if i == home:
                continue
            moved = solution.placements.copy()
            moved[moving, k] = i
            extra = (int(timing.totals(moved, levels).sum()) - before) * scale
            n = int(solution.levels[i])
            fits = bool(busy[i] + int(moving.sum()) * load[k, i, n] <= room[i, n])
            options.append((extra, i, fits))
        extra, other, fits = min(options, default=(0.0, None, False))
        rows.append(
            RunnerUp(
                site=site,
                endpoint=instance.endpoints[home],
                runner_up=None if other is None else instance.endpoints[other],
                extra_s=extra,
                fits=fits,
            )
        )
    return tuple(rows)


def _busy(result: PlanResult) -> list[int]:
    """Return the load of each endpoint at its level, in load units."""
    load, levels = result.instance.class_load, result.solution.levels
    busy = [0] * len(result.instance.endpoints)
    for row in result.solution.placements.tolist():
        for k, i in enumerate(row):
            busy[i] += int(load[k, i, levels[i]])
    return busy
