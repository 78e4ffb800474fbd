"""A plan from the relaxation: round its shares, then descend at fixed levels.

With fixed levels a move changes the sums of one class only, so thousands of moves are weighed in
milliseconds; the descent of `planner.solve.heuristics`, which lets levels follow, comes last.

Where a site is divided, its faster endpoints go to the classes of lower number for all sites
alike: chains that meet at a join are then slow in the same classes, which keeps the mean of the
maximum low.

The descent looks at the mean; other objectives start from its plan. Questions with prefill/decode
pairs are left to `planner.solve.heuristics`.
"""

from __future__ import annotations

import numpy as np

from planner.solve.arrays import Ints
from planner.solve.question import Instance
from planner.solve.relaxation import Relaxation
from planner.solve.timing import Timing

__all__ = ["rounded_placements"]

_EFFORT = 2e8
"""Latencies of chains that may be computed in all: a count and not a time, so that the result is
reproducible; about two seconds."""
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
    best: tuple[int, Ints, _Descent] | None = None
    spent = 0.0
    for levels in _level_choices(instance, relaxed):
        placements = _round(instance, relaxed, levels)
        if placements is None:
            continue
        descent = _Descent(instance, timing, levels)
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


class _Descent:
    """Moves and exchanges at fixed levels."""

    def __init__(self, instance: Instance, timing: Timing, levels: Ints) -> None:
        self.spent = 0.0
        self._timing = timing
        self._allowed = instance.allowed
        endpoints = np.arange(len(instance.endpoints))
        self._load = instance.class_load[:, endpoints, levels]
        self._room = instance.room[endpoints, levels]
        self._ticks = timing.ticks[:, np.arange(len(instance.sites))[:, None], endpoints, levels]

    def improve(self, placements: Ints) -> int:
        """Improve placements in place until no move or exchange does, or the effort is spent."""
        free = self._free(placements)
        site = np.arange(placements.shape[1])
        sums = np.stack([self._ticks[:, site, row].sum(axis=1) for row in placements])
        totals = self._timing.latency(sums)
        while self.spent < _EFFORT and (
            self._move(placements, sums, totals, free)
            or self._exchange(placements, sums, totals, free)
        ):
            pass
        self.spent += sums.size
        return int(totals.sum())

    def disturbed(self, placements: Ints, rng: np.random.Generator) -> Ints:
        """Return a copy with a few calls moved at random to where there is room."""
        out = placements.copy()
        free = self._free(out)
        classes, sites = out.shape
        for _ in range(int(rng.integers(2, 7))):
            r, k = int(rng.integers(classes)), int(rng.integers(sites))
            here = int(out[r, k])
            room = np.flatnonzero(self._allowed[k] & (self._load[k] <= free))
            if room.size:
                there = int(rng.choice(room))
                out[r, k] = there
                free[here] += self._load[k, here]
                free[there] -= self._load[k, there]
        return out

    def _free(self, placements: Ints) -> Ints:
        """Return the room left at each endpoint."""
        free = self._room.copy()
        flat = placements.ravel()
        site = np.tile(np.arange(placements.shape[1]), len(placements))
        np.subtract.at(free, flat, self._load[site, flat])
        return free

    def _move(self, placements: Ints, sums: Ints, totals: Ints, free: Ints) -> bool:
        """Take the best move of one site of one class, if it improves."""
        fits = self._allowed & (self._load <= free)
        r, k, j = np.nonzero(np.broadcast_to(fits, (len(placements), *fits.shape)))
        i = placements[r, k]
        keep = i != j
        r, k, j, i = r[keep], k[keep], j[keep], i[keep]
        if not r.size:
            return False
        after = sums[r] + (self._ticks[:, k, j] - self._ticks[:, k, i]).T
        self.spent += after.size
        gain = totals[r] - self._timing.latency(after)
        best = int(gain.argmax())
        if gain[best] <= 0:
            return False
        self._apply(placements, sums, totals, free, int(r[best]), int(k[best]), int(j[best]))
        return True

    def _exchange(self, placements: Ints, sums: Ints, totals: Ints, free: Ints) -> bool:
        """Let the best two calls exchange endpoints, if that improves."""
        sites, cells = placements.shape[1], placements.size
        flat = placements.ravel()
        one, two = np.triu_indices(cells, k=1)
        i, j = flat[one], flat[two]
        k, m = one % sites, two % sites
        keep = (
            (i != j)
            & self._allowed[k, j]
            & self._allowed[m, i]
            & (free[i] + self._load[k, i] - self._load[m, i] >= 0)
            & (free[j] + self._load[m, j] - self._load[k, j] >= 0)
        )
        one, two, i, j, k, m = one[keep], two[keep], i[keep], j[keep], k[keep], m[keep]
        if not one.size:
            return False
        r, q = one // sites, two // sites
        first = (self._ticks[:, k, j] - self._ticks[:, k, i]).T
        second = (self._ticks[:, m, i] - self._ticks[:, m, j]).T
        same = (r == q)[:, None]
        self.spent += 2 * first.size
        gain = totals[r] - self._timing.latency(sums[r] + first + np.where(same, second, 0))
        gain += np.where(r == q, 0, totals[q] - self._timing.latency(sums[q] + second))
        best = int(gain.argmax())
        if gain[best] <= 0:
            return False
        self._apply(placements, sums, totals, free, int(r[best]), int(k[best]), int(j[best]))
        self._apply(placements, sums, totals, free, int(q[best]), int(m[best]), int(i[best]))
        return True

    def _apply(
        self, placements: Ints, sums: Ints, totals: Ints, free: Ints, r: int, k: int, j: int
    ) -> None:
        i = int(placements[r, k])
        placements[r, k] = j
        sums[r] += self._ticks[:, k, j] - self._ticks[:, k, i]
        free[i] += self._load[k, i]
        free[j] -= self._load[k, j]
        totals[r] = self._timing.latency(sums[r][np.newaxis])[0]
