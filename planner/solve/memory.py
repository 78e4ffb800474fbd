"""KV memory in plans: where it can be short, what placements hold, and what to keep.

Tokens are whole numbers, those of a class rounded up, so that a plan within the capacity here is
within it in truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.solve.arrays import Bools, Ints
from planner.solve.question import Instance

__all__ = ["Tokens", "contended", "held", "pack"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens that one class holds on average.

    Parameters
    ----------
    active
        Contexts in service, by site, option and level; shape (K, M, L).
    cold, lost
        More of them, since calls without their prefix or session take longer; shape (K, M).
    session
        Kept sessions, by site; shape (K,).
    """

    active: Ints
    cold: Ints
    lost: Ints
    session: Ints

    @classmethod
    def of(cls, instance: Instance) -> Tokens:
        """Return the tokens of an instance."""
        memory, rate = instance.memory, instance.arrival_rate_rps / instance.run_classes

        def up(values: object) -> Ints:
            return np.ceil(np.asarray(values) - 1e-9).astype(np.int64)

        context = memory.active_tokens
        return cls(
            active=up(rate * instance.work_s * context[:, None, None]),
            cold=up(rate * memory.cold_work_s * context[:, None]),
            lost=up(rate * memory.lost_work_s * context[:, None]),
            session=up(memory.held_tokens / instance.run_classes),
        )


def contended(instance: Instance) -> Bools:
    """Return which endpoints could be asked to hold more KV than they have; shape (I,).

    Elsewhere everything is kept in every plan.
    """
    memory = instance.memory
    out = np.zeros(len(instance.endpoints), dtype=bool)
    for m, i in enumerate(instance.option_endpoint.tolist()):
        mine = instance.allowed[:, m]
        if not mine.any():
            continue
        busy = instance.utilisation_cap * instance.levels[i][-1]
        need = busy * float(memory.active_tokens[mine].max()) + mine.sum() * instance.run_classes
        if memory.whole[m]:
            prefixes = np.unique(memory.prefix[mine & (memory.prefix >= 0)])
            need += float(memory.prefix_tokens[prefixes].sum() + memory.held_tokens[mine].sum())
        out[i] |= need > memory.tokens[i]
    return out


def held(instance: Instance, placements: Ints, levels: Ints, warm: Bools, keep: Bools) -> Ints:
    """Return the tokens a plan holds at each endpoint; shape (I,).

    Parameters
    ----------
    placements, warm, keep
        Option of each site, and whether prefix and sessions are kept there; shape (R, K).
    levels
        Level position of each endpoint; shape (I,).
    """
    tokens, memory = Tokens.of(instance), instance.memory
    out = np.zeros(len(instance.endpoints), dtype=np.int64)
    kept: set[tuple[int, int]] = set()
    for r, row in enumerate(placements.tolist()):
        for k, m in enumerate(row):
            i = int(instance.option_endpoint[m])
            out[i] += tokens.active[k, m, levels[i]]
            if not memory.whole[m]:
                continue
            if memory.prefix[k] >= 0:
                if warm[r, k]:
                    kept.add((i, int(memory.prefix[k])))
                else:
                    out[i] += tokens.cold[k, m]
            if memory.held_tokens[k] > 0:
                out[i] += tokens.session[k] if keep[r, k] else tokens.lost[k, m]
    for i, p in kept:
        out[i] += memory.prefix_tokens[p]
    return out


def pack(instance: Instance, placements: Ints, levels: Ints) -> tuple[Ints, Bools, Bools] | None:
    """Return levels (I,), ``warm`` and ``keep`` (R, K) that fit the KV of placements (R, K).

    Prefixes and sessions are kept in the order of seconds saved per token; where the others'
    prefills overload an endpoint, its level is raised. None if something does not fit.
    """
    memory, tight = instance.memory, contended(instance)
    warm = np.ones(placements.shape, dtype=bool)
    keep = np.ones(placements.shape, dtype=bool)
    levels = levels.copy()
    tokens = Tokens.of(instance)
    load, room = instance.class_load, instance.room
    cold_load, lost_load = (
        instance.in_units(work) for work in (memory.cold_work_s, memory.lost_work_s)
    )
    home = instance.option_endpoint[placements]
    for i in np.flatnonzero(tight).tolist():
        cells = [(int(r), int(k), int(placements[r, k])) for r, k in np.argwhere(home == i)]
        while True:
            n = int(levels[i])
            left = int(memory.tokens[i]) - sum(int(tokens.active[k, m, n]) for _, k, m in cells)
            busy = sum(int(load[k, m, n]) for _, k, m in cells)
            for r, k, m in cells:
                asks = bool(memory.whole[m])
                warm[r, k] = not (asks and memory.prefix[k] >= 0)
                keep[r, k] = not (asks and memory.held_tokens[k] > 0)
                for there, tokens_more, load_more in (
                    (warm[r, k], tokens.cold, cold_load),
                    (keep[r, k], tokens.lost, lost_load),
                ):
                    if not there:
                        left -= int(tokens_more[k, m])
                        busy += int(load_more[k, m])
            for size, members, which in _items(instance, tokens, cells):
                target = warm if which == "warm" else keep
                spared = tokens.cold if which == "warm" else tokens.lost
                lighter = cold_load if which == "warm" else lost_load
                need = size - sum(int(spared[k, m]) for _, k, m in members)
                if need <= left:
                    left -= need
                    for r, k, m in members:
                        target[r, k] = True
                        busy -= int(lighter[k, m])
            if left >= 0 and busy <= room[i, n]:
                break
            if left < 0 or n + 1 == len(instance.levels[i]):
                return None
            levels[i] = n + 1
    return levels, warm, keep


def _items(
    instance: Instance, tokens: Tokens, cells: list[tuple[int, int, int]]
) -> list[tuple[int, list[tuple[int, int, int]], str]]:
    """Return (tokens, cells, kind) of what an endpoint may keep, best value per token first."""
    memory = instance.memory
    prefixes: dict[int, list[tuple[int, int, int]]] = {}
    rated: list[tuple[float, int, list[tuple[int, int, int]], str]] = []
    for r, k, m in cells:
        if not memory.whole[m]:
            continue
        if memory.prefix[k] >= 0:
            prefixes.setdefault(int(memory.prefix[k]), []).append((r, k, m))
        if memory.held_tokens[k] > 0:
            size = int(tokens.session[k])
            rated.append((memory.lost_work_s[k, m] / max(size, 1), size, [(r, k, m)], "keep"))
    for p, members in prefixes.items():
        size = int(memory.prefix_tokens[p])
        saved = sum(float(memory.cold_work_s[k, m]) for _, k, m in members)
        rated.append((saved / size, size, members, "warm"))
    rated.sort(key=lambda one: (-one[0], one[1], one[2]))
    return [(size, members, kind) for _, size, members, kind in rated]
