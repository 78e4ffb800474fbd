"""A plan from the relaxation: round its shares, then descend at fixed levels.

At fixed levels (`planner.solve.descent`) thousands of moves are weighed in milliseconds; the
descent of `planner.solve.heuristics`, which lets levels follow, comes last.

Where a site is divided, its faster endpoints go to the classes of lower number for all sites
alike: chains that meet at a join are then slow in the same classes, which keeps the mean of the
maximum low.

The descent looks at the mean; other objectives start from its plan. Questions with prefill/decode
pairs are left to `planner.solve.heuristics`.
"""

from __future__ import annotations

import numpy as np

from planner.solve.arrays import Ints
from planner.solve.descent import Descent
from planner.solve.question import Instance
from planner.solve.relaxation import Relaxation
from planner.solve.timing import Timing

__all__ = ["rounded_placements"]

_EFFORT = 2e8
"""Estimates and chain lengths that may be computed in all; about two seconds."""
_KICKS = 4
"""Disturbances tried at most, per call placed."""
_SHARE = 0.02
"""Share of a level below which rounding does not try it."""
_MOST_LEVELS = 8
"""Level choices tried; the relaxation leaves few endpoints between two levels."""


def rounded_placements(
    instance: Instance, timing: Timing, relaxed: Relaxation, *, relative_gap: float, seed: int = 0
) -> Ints | None:
    """Return improved placements (R, K) near the relaxation, or None if rounding finds no room.

    Each choice of whole levels that the relaxation suggests is rounded and improved. While the
    best is further from the bound than ``relative_gap``, it is disturbed at random and improved
    again.
    """
    if instance.pairs:
        return None
    target = relaxed.mean_aim / max(1e-9, 1.0 - relative_gap)
    best: tuple[int, Ints, Descent] | None = None
    spent = 0.0
    for levels in _level_choices(instance, relaxed):
        placements = _round(instance, relaxed, levels)
        if placements is None:
            continue
        descent = Descent(instance, timing, levels, _EFFORT)
        value = descent.improve(placements)
        spent += descent.spent
        if best is None or value < best[0]:
            best = value, placements, descent
        if value <= target:
            return placements
        if spent > _EFFORT / 2:
            break
    if best is None:
        return None
    value, placements, descent = best
    rng = np.random.default_rng(seed)
    limit = descent.spent + _EFFORT - spent
    for _ in range(_KICKS * placements.size):
        if value <= target or descent.spent > limit:
            break
        other = descent.disturbed(placements, rng)
        found = descent.improve(other)
        if found < value:
            value, placements = found, other
    return placements


def _level_choices(instance: Instance, relaxed: Relaxation) -> list[Ints]:
    """Return whole levels to round to: the likeliest first, all tops last."""
    top = np.array([len(grid) - 1 for grid in instance.levels])
    likely = relaxed.levels.argmax(axis=1)
    highest = np.array([np.flatnonzero(row > _SHARE).max() for row in relaxed.levels])
    choices = [likely, highest]
    for i in np.flatnonzero(highest != likely).tolist():
        other = likely.copy()
        other[i] = highest[i]
        choices.append(other)
    choices = [*choices[: _MOST_LEVELS - 2], np.minimum(likely + 1, top), top]
    distinct = {choice.tobytes(): choice for choice in choices}
    return list(distinct.values())


def _round(instance: Instance, relaxed: Relaxation, levels: Ints) -> Ints | None:
    """Return placements with room at the given levels, close to the shares."""
    classes, endpoints = instance.run_classes, np.arange(len(instance.endpoints))
    load = instance.class_load[:, endpoints, levels]
    free = instance.room[endpoints, levels].copy()
    wanted = relaxed.shares.sum(axis=2) * classes
    service = instance.work_s[:, endpoints, levels]
    placements = np.zeros((classes, len(instance.sites)), dtype=np.int64)
    order = np.argsort(-np.where(instance.allowed, load, 0).max(axis=1), kind="stable")
    for k in order.tolist():
        chosen = []
        slow = 1e-3 * service[k] / max(float(service[k].max()), 1e-9)
        for _ in range(classes):
            open_ones = instance.allowed[k] & (load[k] <= free)
            if not open_ones.any():
                return None
            # What the relaxation still wants here; beyond that the fastest with room.
            rank = np.where(open_ones, wanted[k] - slow, -np.inf)
            i = int(rank.argmax())
            chosen.append(i)
            wanted[k, i] -= 1
            free[i] -= load[k, i]
        placements[:, k] = sorted(chosen, key=lambda i: (service[k, i], i))
    return placements
