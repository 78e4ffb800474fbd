"""Why a plan looks as it does: how full each endpoint is, and each call site's runner-up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.solve.heuristics import latencies_of
from planner.solve.memory import held
from planner.solve.objective import Goal
from planner.solve.question import LOAD_UNIT
from planner.solve.result import PlanResult

__all__ = ["EndpointUse", "RunnerUp", "endpoint_use", "runners_up"]

_BINDING = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointUse:
    """Busy calls and KV tokens of an endpoint against what its level and its cache allow.

    ``binding`` says that at least 95 % of the room is taken at the highest level: more load has
    to go elsewhere. ``kv_binding`` says the same of KV tokens, or that they have a price:
    ``kv_price`` is what a token second costs, in seconds of run latency. A prefill endpoint is
    busy for the share of time in which it prefills.
    """

    endpoint: str
    level: int
    busy: float
    room: float
    binding: bool
    kv_tokens: int
    kv_room: int
    kv_binding: bool
    kv_price: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """The next best home of a call site, all else as planned.

    Parameters
    ----------
    site, endpoint
        The call site and where most of its traffic goes.
    runner_up
        The endpoint where moving the site there, in all classes that use ``endpoint``, changes
        the objective (its first term, if they are taken one after the other) least; None if no
        other endpoint may serve it.
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
    instance, solution = result.instance, result.solution
    levels = solution.levels
    busy, room = _busy(result), instance.room
    tokens = held(instance, solution.placements, levels, solution.warm, solution.keep)
    used = set(instance.option_endpoint[solution.placements].ravel().tolist())
    used |= set(instance.option_prefill[solution.placements].ravel().tolist()) - {-1}
    rows = []
    for i in sorted(used):
        n = int(levels[i])
        full = busy[i] >= _BINDING * room[i, n] and n == len(instance.levels[i]) - 1
        have = int(instance.memory.tokens[i])
        rows.append(
            EndpointUse(
                endpoint=instance.endpoints[i],
                level=instance.levels[i][n],
                busy=busy[i] * LOAD_UNIT,
                room=float(room[i, n]) * LOAD_UNIT,
                binding=bool(full),
                kv_tokens=int(tokens[i]),
                kv_room=have,
                kv_binding=bool(result.token_price[i] > 0 or tokens[i] >= _BINDING * have),
                kv_price=float(result.token_price[i]) * instance.arrival_rate_rps,
            )
        )
    return tuple(rows)


def runners_up(result: PlanResult) -> tuple[RunnerUp, ...]:
    """Return the runner-up of each call site, in site order."""
    instance, timing, solution = result.instance, result.timing, result.solution
    goal = Goal(instance, result.plan.objective.stages[0])
    before = int(goal.cost(solution.latencies(timing)[np.newaxis])[0])
    busy, room, load = _busy(result), instance.room, instance.class_load
    home_of = instance.option_endpoint
    rows = []
    for k, site in enumerate(instance.sites):
        home = int(np.bincount(solution.placements[:, k]).argmax())
        moving = solution.placements[:, k] == home
        options = []
        for m in np.flatnonzero(instance.allowed[k]).tolist():
            if m == home:
                continue
            moved = solution.placements.copy()
            moved[moving, k] = m
            latencies = latencies_of(timing, moved, solution.levels, solution.warm, solution.keep)
            extra = goal.seconds(int(goal.cost(latencies[np.newaxis])[0]) - before)
            i = int(home_of[m])
            n = int(solution.levels[i])
            stays = home_of[home] == i
            added = 0 if stays else int(moving.sum()) * int(load[k, m, n])
            options.append((extra, m, bool(busy[i] + added <= room[i, n])))
        extra, other, fits = min(options, default=(0.0, None, False))
        rows.append(
            RunnerUp(
                site=site,
                endpoint=instance.option_name(home),
                runner_up=None if other is None else instance.option_name(other),
                extra_s=extra,
                fits=fits,
            )
        )
    return tuple(rows)


def _busy(result: PlanResult) -> list[int]:
    """Return the load of each endpoint at its level, in load units."""
    instance, solution = result.instance, result.solution
    load, lane_load, levels = instance.class_load, instance.lane_load, solution.levels
    extras = [instance.in_units(instance.memory.cold_work_s)]
    extras.append(instance.in_units(instance.memory.lost_work_s))
    busy = [0] * len(instance.endpoints)
    for r, row in enumerate(solution.placements.tolist()):
        for k, m in enumerate(row):
            i, p = int(instance.option_endpoint[m]), int(instance.option_prefill[m])
            busy[i] += int(load[k, m, levels[i]])
            busy[i] += 0 if solution.warm[r, k] else int(extras[0][k, m])
            busy[i] += 0 if solution.keep[r, k] else int(extras[1][k, m])
            if p >= 0:
                busy[p] += int(lane_load[k, m])
    return busy
