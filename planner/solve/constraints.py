"""The constraints of the fleet plan, one function per family."""

from __future__ import annotations

import itertools

import numpy as np
from ortools.sat.python import cp_model

from planner.solve.memory import Tokens
from planner.solve.variables import Variables

__all__ = ["add_constraints"]


class _Guarded:
    """Constraints that can be told apart when there is no plan.

    With guards, each limit of the question holds only if the literal of its name does.
    """

    def __init__(self, model: cp_model.CpModel, guards: dict[str, cp_model.IntVar] | None) -> None:
        self._model = model
        self._guards = guards

    def add(self, name: str, constraint: cp_model.BoundedLinearExpression | bool) -> None:
        """Add a constraint that belongs to a named limit."""
        added = self._model.add(constraint)
        if self._guards is not None:
            if name not in self._guards:
                self._guards[name] = self._model.new_bool_var(name)
            added.only_enforce_if(self._guards[name])


def add_constraints(
    model: cp_model.CpModel,
    v: Variables,
    *,
    whole: bool = True,
    guards: dict[str, cp_model.IntVar] | None = None,
) -> None:
    """Add every family, redundant ones last.

    Parameters
    ----------
    whole
        Whether all placements are free; symmetries may be broken only then.
    guards
        Filled with a literal per limit (capacities, KV memory, deadlines) that enforces it; the
        limits hold always if not given.
    """
    limits = _Guarded(model, guards)
    one_mode_per_site(model, v)
    one_level_per_endpoint(model, v)
    capacity(limits, v)
    lanes(limits, v)
    memory(model, limits, v)
    joins(model, v)
    deadlines(limits, v)
    if whole and guards is None:
        least_level(model, v)
        class_symmetry(model, v)
        twin_symmetry(model, v)


def one_mode_per_site(model: cp_model.CpModel, v: Variables) -> None:
    """Give each call site of each class exactly one option, at its endpoint's level."""
    for r in range(v.instance.run_classes):
        for k in range(len(v.instance.sites)):
            model.add_exactly_one(v.use(r, k, m, n) for m, n in v.modes(r, k))
            for m, n in v.modes(r, k):
                model.add_implication(
                    v.use(r, k, m, n), v.level(int(v.instance.option_endpoint[m]), n)
                )


def one_level_per_endpoint(model: cp_model.CpModel, v: Variables) -> None:
    """Let each endpoint work at exactly one level."""
    for i in range(len(v.instance.endpoints)):
        model.add_exactly_one(v.levels_of(i))


def capacity(limits: _Guarded, v: Variables) -> None:
    """Keep the load of an endpoint within the room of its level.

    Multiplying the room by the level literal is implied by the modes, but tightens the
    relaxation: a level half chosen offers half its room. Where KV is contended, what calls take
    longer without prefix or session comes on top, whatever the level.
    """
    load, room = v.instance.class_load, v.instance.room
    for i, grid in enumerate(v.instance.levels):
        for n in range(len(grid)):
            users = v.users(i, n)
            if users:
                limits.add(
                    f"the slots of endpoint {v.instance.endpoints[i]!r}",
                    sum(int(load[k, m, n]) * use for k, m, use in users)
                    <= int(room[i, n]) * v.level(i, n),
                )
    kv = v.instance.memory
    extra = {
        "warm": v.instance.in_units(kv.cold_work_s),
        "keep": v.instance.in_units(kv.lost_work_s),
    }
    for i in np.flatnonzero(v.contended).tolist():
        more = [
            int(extra[kind][k, m]) * (v.used(r, k, m) - literal)
            for r in range(v.instance.run_classes)
            for kind, literals in (("warm", v.warm(r)), ("keep", v.keep(r)))
            for (k, m), literal in literals.items()
            if v.instance.option_endpoint[m] == i
        ]
        if more:
            grid = v.instance.levels[i]
            base = [
                int(load[k, m, n]) * use for n in range(len(grid)) for k, m, use in v.users(i, n)
            ]
            rooms = [int(room[i, n]) * v.level(i, n) for n in range(len(grid))]
            limits.add(
                f"the slots of endpoint {v.instance.endpoints[i]!r}",
                sum([*base, *more]) <= sum(rooms),
            )


def lanes(limits: _Guarded, v: Variables) -> None:
    """Keep the prefill endpoints of pairs, which prefill one call at a time, within the cap."""
    load, room = v.instance.lane_load, v.instance.room
    for p in np.unique(v.instance.option_prefill[v.instance.option_prefill >= 0]).tolist():
        users = v.lane_users(p)
        if users:
            limits.add(
                f"the prefill lane of endpoint {v.instance.endpoints[p]!r}",
                sum(int(load[k, m]) * use for k, m, use in users) <= int(room[p, 0]),
            )


def memory(model: cp_model.CpModel, limits: _Guarded, v: Variables) -> None:
    """Keep contexts, prefixes and sessions within the KV of contended endpoints."""
    kv, tokens = v.instance.memory, Tokens.of(v.instance)
    need: dict[int, list[cp_model.LinearExprT]] = {}
    for i in np.flatnonzero(v.contended).tolist():
        need[i] = [
            int(tokens.active[k, m, n]) * use
            for n in range(len(v.instance.levels[i]))
            for k, m, use in v.users(i, n)
        ]
        need[i] += [
            int(size) * literal for size, literal in zip(kv.prefix_tokens, v.holds(i), strict=True)
        ]
    for r in range(v.instance.run_classes):
        for (k, m), literal in v.warm(r).items():
            i, used = int(v.instance.option_endpoint[m]), v.used(r, k, m)
            model.add(literal <= used)
            model.add_implication(literal, v.holds(i)[int(kv.prefix[k])])
            need[i].append(int(tokens.cold[k, m]) * (used - literal))
        for (k, m), literal in v.keep(r).items():
            i, used = int(v.instance.option_endpoint[m]), v.used(r, k, m)
            model.add(literal <= used)
            need[i].append(int(tokens.session[k]) * literal)
            need[i].append(int(tokens.lost[k, m]) * (used - literal))
    for i, terms in need.items():
        if terms:
            limits.add(
                f"the KV memory of endpoint {v.instance.endpoints[i]!r}",
                cp_model.LinearExpr.sum(terms) <= int(kv.tokens[i]),
            )


def joins(model: cp_model.CpModel, v: Variables) -> None:
    """Start a join when the last of its chains has ended."""
    for r in range(v.instance.run_classes):
        for j, chains in enumerate(v.timing.joins):
            for chain in chains:
                model.add(v.start(r, j) >= v.end_of(r, chain))


def deadlines(limits: _Guarded, v: Variables) -> None:
    """Keep hard deadlines in every scenario of every class."""
    for s, w in enumerate(v.instance.scenario_source.tolist()):
        source = v.instance.sources[w]
        if source.hard and source.deadline_ticks is not None:
            for r in range(v.instance.run_classes):
                limits.add(
                    f"the deadline of {source.deadline_s:g} s of workflow {source.name!r}",
                    source.deadline_ticks >= v.finish(r, s),
                )


def least_level(model: cp_model.CpModel, v: Variables) -> None:
    """Choose a level only if the load does not fit the next lower one.

    Cuts no optimum: with the same placements the lower level is at least as fast. Contended
    endpoints are left out: there the room may be needed for prefills of what is not kept.
    """
    load, room = v.instance.class_load, v.instance.room
    for i, grid in enumerate(v.instance.levels):
        if v.contended[i]:
            continue
        for n in range(1, len(grid)):
            model.add(
                sum(int(load[k, m, n - 1]) * use for k, m, use in v.users(i, n))
                >= (int(room[i, n - 1]) + 1) * v.level(i, n)
            )


def class_symmetry(model: cp_model.CpModel, v: Variables) -> None:
    """Put classes, which are interchangeable, in order of falling latency."""
    for r in range(1, v.instance.run_classes):
        model.add(v.total(r - 1) >= v.total(r))


def twin_symmetry(model: cp_model.CpModel, v: Variables) -> None:
    """Put endpoints that cannot be told apart in order of falling level."""
    for group in v.instance.twins:
        for i, j in itertools.pairwise(group):
            first, second = v.levels_of(i), v.levels_of(j)
            model.add(
                sum(n * literal for n, literal in enumerate(first))
                >= sum(n * literal for n, literal in enumerate(second))
            )
