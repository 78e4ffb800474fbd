"""The objective of the fleet plan: run latency summed over classes and scenarios, in ticks."""

from __future__ import annotations

from ortools.sat.python import cp_model

from planner.domain.plan import PLAN_TICK_S
from planner.domain.units import ticks_to_seconds
from planner.solve.instance import Instance
from planner.solve.variables import Variables

__all__ = ["mean_latency_s", "minimise_latency"]


def minimise_latency(model: cp_model.CpModel, v: Variables, least: int = 0) -> None:
    """Ask for the least sum; dividing by R * S gives the mean.

    ``least`` is a proven bound in ticks that the model may rely on.
    """
    total = sum(v.total(r) for r in range(v.instance.run_classes))
    if least > 0:
        model.add(total >= least)
    model.minimize(total)


def mean_latency_s(ticks: float, instance: Instance) -> float:
    """Return the mean run latency in seconds of a sum in ticks."""
    return ticks_to_seconds(1, PLAN_TICK_S) * ticks / (instance.run_classes * instance.scenarios)
