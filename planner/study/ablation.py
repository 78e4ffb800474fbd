"""Policies with something taken away: what each signal is worth, and what a part does.

A variant changes what a policy is told (its forecasts), what it sees of a call, or what it answers;
the policy's own code stays as it is. Tuning leaves fixed parameters alone and gives the others the
policy's own grid, so that a variant makes the best of what it has left.

Signals of ``almanac``, each removed in turn:

=========== ================================================================================
speed       every endpoint is believed to have the mean row of its role
length      every call is believed to give the mean answer
structure   every call counts as critical, nothing is believed to remain after it
branch      the outcomes of a branch are believed to be equally likely
tool        nothing is known of tools: the prior for all
prefix      no prompt is believed to be cached anywhere
externality no delay of others counts, neither of residents nor at the plan's prices
plan        no prices, remainder, tail or joins: marginal cost, tuned over its own grid
prices      no prices: the delay of others counts alike on all endpoints
order       engines serve calls as they come
remainder   engines serve the oldest run first, whatever remains of it
slow        a run counts the same however slow it is
joins       each second of a call counts as much as it is likely to be critical
=========== ================================================================================

And one gains something: ``tail`` has the weight that tables of a CVaR objective give to runs about
to be among the slowest.

The dispatch table is planned with the changed forecasts, so the plan loses the signal too. What
engines do, and the counters that the router keeps of them, is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from planner.dispatch.events import Call
from planner.dispatch.forecast import Forecast, Forecaster
from planner.dispatch.policies import Choice, Policy
from planner.dispatch.policies.base import Ready, Wait
from planner.dispatch.policies.hexagent import HexAGenT
from planner.dispatch.policies.placement import Placement, Route
from planner.dispatch.table import TAIL_WEIGHT
from planner.domain.estimates import EstimateTable, Quantiles
from planner.domain.fleet import Fleet
from planner.domain.latency import LatencyRow
from planner.sim.experiment import PolicySetup
from planner.sim.grids import GRIDS
from planner.sim.retention import Fate, FixedRetention, Retention
from planner.study.lengths import pooled

__all__ = ["SIGNALS", "VARIANTS", "Variant", "VariedSetup"]

Grid = tuple[tuple[str, tuple[float, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A policy changed in one respect.

    Parameters
    ----------
    forecasts
        Makes the forecasts it gets, of the setting's and the fleet; None leaves them.
    change
        Changes a fresh policy; None leaves it.
    fixed
        Parameters that it always has, whatever it is tuned for.
    grid
        What it is tuned over in place of the policy's grid; None keeps that, less ``fixed``.
    retention
        What becomes of idle KV, where the policy brings nothing of its own.
    """

    forecasts: Callable[[Forecaster, Fleet], Forecaster] | None = None
    change: Callable[[Policy], Policy] | None = None
    fixed: Mapping[str, float] = field(default_factory=dict)
    grid: Grid | None = None
    retention: Retention | None = None

    def tuned_over(self, policy: str) -> Grid:
        """Return the grid of the variant of a policy; empty if nothing is to be tuned."""
        if self.grid is not None:
            return self.grid
        return tuple(one for one in GRIDS.get(policy, ()) if one[0] not in self.fixed)


@dataclass(frozen=True, slots=True, kw_only=True)
class VariedSetup(PolicySetup):
    """A setup whose policies are changed by a variant, which has a name among `VARIANTS`."""

    variant: str

    def make(self, seed: int) -> Policy:
        """Return a fresh policy, changed."""
        # Named, since slots and an argumentless super do not go together.
        policy = PolicySetup.make(self, seed)
        change = VARIANTS[self.policy][self.variant].change
        return policy if change is None else change(policy)


# -- forecasts --------------------------------------------------------------------------------


def _anew(known: Forecaster, estimates: EstimateTable, what: str) -> Forecaster:
    named = replace(estimates, version=f"{known.estimates.version}-{what}")
    return Forecaster(named, known.workflows.values())


def _one_speed(known: Forecaster, fleet: Fleet) -> Forecaster:
    rows: dict[str, list[LatencyRow]] = {}
    learned = known.estimates.endpoints
    for one in fleet.endpoints:
        rows.setdefault(one.role, []).append(learned.get(one.id, one.latency))
    means = {role: _mean_row(group) for role, group in rows.items()}
    alike: dict[str, LatencyRow] = {one.id: means[one.role] for one in fleet.endpoints}
    return _anew(known, replace(known.estimates, endpoints=alike), "no-speed")


def _mean_row(rows: list[LatencyRow]) -> LatencyRow:
    """Return the row whose times are the mean of those of some rows."""
    names = [one.name for one in fields(LatencyRow) if one.name != "scale"]
    return LatencyRow(
        **{n: float(np.mean([getattr(row, n) * row.scale for row in rows])) for n in names}
    )


def _one_length(known: Forecaster, fleet: Fleet) -> Forecaster:  # noqa: ARG001 - the signature
    table = known.estimates
    every = [site.output_tokens for one in table.workflows.values() for site in one.sites.values()]
    length = pooled(every)
    workflows = {
        key: replace(
            one,
            sites={name: replace(site, output_tokens=length) for name, site in one.sites.items()},
        )
        for key, one in table.workflows.items()
    }
    return _anew(known, replace(table, workflows=workflows), "no-length")


class _Serial(Forecaster):
    """Believes every call to be critical, and the last of its run."""

    def of(self, call: Call) -> Forecast:
        """Return the forecast of a call without its place in the graph."""
        return replace(super().of(call), criticality=1.0, remaining_s=0.0, delay=None)


def _no_structure(known: Forecaster, fleet: Fleet) -> Forecaster:  # noqa: ARG001 - the signature
    return _Serial(known.estimates, known.workflows.values())


def _even_branches(known: Forecaster, fleet: Fleet) -> Forecaster:  # noqa: ARG001 - the signature
    table = known.estimates
    workflows = dict(table.workflows)
    for key, graph in known.workflows.items():
        if key in workflows:
            even = {
                branch.id: {one.id: (1.0 / len(branch.outcomes),) for one in branch.outcomes}
                for branch in graph.branches
            }
            workflows[key] = replace(workflows[key], branches=even)
    return _anew(known, replace(table, workflows=workflows), "no-branch")


def _no_tools(known: Forecaster, fleet: Fleet) -> Forecaster:  # noqa: ARG001 - the signature
    table = known.estimates
    empty: dict[str, Quantiles] = {}
    workflows = {key: replace(one, tools=empty) for key, one in table.workflows.items()}
    return _anew(known, replace(table, workflows=workflows), "no-tool")


# -- what a policy sees and says --------------------------------------------------------------


def _without_prefix(policy: Policy) -> Policy:
    choose = policy.choose

    def blind(ready: Ready) -> Choice | Wait:
        return choose(replace(ready, call=replace(ready.call, prefix=())))

    policy.choose = blind  # type: ignore[method-assign]
    return policy


def _without_order(policy: Policy) -> Policy:
    choose = policy.choose

    def plain(ready: Ready) -> Choice | Wait:
        answer = choose(ready)
        return replace(answer, priority=0) if isinstance(answer, Choice) else answer

    policy.choose = plain  # type: ignore[method-assign]
    return policy


class _ShortestQueue(Placement):
    """The route whose endpoints have fewest calls, whatever their speed."""

    def place(self, ready: Ready) -> Route | None:
        """Return the route of the shortest queues if it has room, else None."""
        routes = self.routes(ready)
        states = ready.fleet.states
        queues = [
            states[entry].in_flight + (states[decode].in_flight if decode >= 0 else 0)
            for entry, decode in routes.pairs.indices
        ]
        return self.settle(routes, int(np.argmin(queues)), ready)


def _by_queue(policy: Policy) -> Policy:
    assert isinstance(policy, HexAGenT)  # noqa: S101 - it is a variant of no other
    policy.placement = _ShortestQueue()
    # The plan's order counts, its endpoints do not.
    policy.place = policy.placement.place  # type: ignore[method-assign]
    return policy


def _keeping(action: Any) -> Variant:
    return Variant(retention=FixedRetention(fate=Fate(action=action)))


_IDLE_KV = {"drop": _keeping("drop"), "preserve": _keeping("pin"), "swap": _keeping("offload")}
VARIANTS: Mapping[str, Mapping[str, Variant]] = {
    "almanac": {
        "speed": Variant(forecasts=_one_speed),
        "length": Variant(forecasts=_one_length),
        "structure": Variant(forecasts=_no_structure, fixed={"remaining_weight": 0.0}),
        "branch": Variant(forecasts=_even_branches),
        "tool": Variant(forecasts=_no_tools),
        "prefix": Variant(change=_without_prefix),
        "externality": Variant(fixed={"theta": 0.0, "price_scale": 0.0}),
        "plan": Variant(
            fixed=dict.fromkeys(
                ("price_scale", "remaining_weight", "tail_weight", "join_weight"), 0.0
            ),
            grid=GRIDS["marginal_cost"],
        ),
        "prices": Variant(fixed={"price_scale": 0.0}),
        "order": Variant(change=_without_order, fixed={"remaining_weight": 0.0}),
        "remainder": Variant(fixed={"remaining_weight": 0.0}),
        "slow": Variant(fixed={"tail_weight": 0.0}),
        "joins": Variant(fixed={"join_weight": 0.0}),
        "tail": Variant(fixed={"tail_weight": TAIL_WEIGHT}),
    },
    "hexagent": {"queue": Variant(change=_by_queue)},
    "fcfs_call": _IDLE_KV,
    "astraea": _IDLE_KV,
}
"""Variants by policy: ``almanac-speed`` is almanac without speed, ``hexagent-queue`` HexAGenT's
order with placement by queue length, ``astraea-drop`` drops idle KV (with ``adaptive_kv=0``)."""
SIGNALS = tuple(name for name in VARIANTS["almanac"] if name != "tail")
"""What can be taken from ``almanac``."""
