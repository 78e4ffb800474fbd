"""The constraints of the fleet plan, one function per family."""

from __future__ import annotations

import itertools

from ortools.sat.python import cp_model

from planner.solve.variables import Variables

__all__ = ["add_constraints"]


def add_constraints(model: cp_model.CpModel, v: Variables) -> None:
    """Add every family, redundant ones last."""
    one_mode_per_site(model, v)
    one_level_per_endpoint(model, v)
    capacity(model, v)
    joins(model, v)
    least_level(model, v)
    class_symmetry(model, v)
    twin_symmetry(model, v)


def one_mode_per_site(model: cp_model.CpModel, v: Variables) -> None:
    """Give each call site of each class exactly one endpoint, at that endpoint's level."""
    for r in range(v.instance.run_classes):
        for k in range(len(v.instance.sites)):
            model.add_exactly_one(v.use(r, k, i, n) for i, n in v.modes(k))
            for i, n in v.modes(k):
                model.add_implication(v.use(r, k, i, n), v.level(i, n))


def one_level_per_endpoint(model: cp_model.CpModel, v: Variables) -> None:
    """Let each endpoint work at exactly one level."""
    for i in range(len(v.instance.endpoints)):
        model.add_exactly_one(v.levels_of(i))


def capacity(model: cp_model.CpModel, v: Variables) -> None:
    """Keep the load of an endpoint within the room of its level.

    Multiplying the room by the level literal is implied by the modes, but tightens the
    relaxation: a level half chosen offers half its room.
    """
    load, room = v.instance.class_load, v.instance.room
    for i, grid in enumerate(v.instance.levels):
        for n in range(len(grid)):
            model.add(
                sum(int(load[k, i, n]) * use for k, use in v.users(i, n))
                <= int(room[i, n]) * v.level(i, n)
            )


def joins(model: cp_model.CpModel, v: Variables) -> None:
    """Start a join when the last of its chains has ended."""
    for r in range(v.instance.run_classes):
        for j, chains in enumerate(v.timing.joins):
            for chain in chains:
                model.add(v.start(r, j) >= v.end_of(r, chain))


def least_level(model: cp_model.CpModel, v: Variables) -> None:
    """Choose a level only if the load does not fit the next lower one.

    Cuts no optimum: with the same placements the lower level is at least as fast.
    """
    load, room = v.instance.class_load, v.instance.room
    for i, grid in enumerate(v.instance.levels):
        for n in range(1, len(grid)):
            model.add(
                sum(int(load[k, i, n - 1]) * use for k, use in v.users(i, n))
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
