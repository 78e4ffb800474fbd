"""Almanac's own policy: the planned table combined with the live counters."""

from __future__ import annotations

from planner.dispatch.events import Event
from planner.dispatch.policies.base import Choice, Ready, age_priority, costs_among
from planner.dispatch.policies.finish import LeastExpectedFinish
from planner.dispatch.ranking import Ranking
from planner.dispatch.table import DispatchTable
from planner.dispatch.tail import Tail
from planner.dispatch.view import Candidates, FleetView

__all__ = ["Planned"]


class Planned:
    """Least of own and imposed cost, the latter at the prices of the plan.

    For call c on endpoint i, with the row of c's site at the present load,

        (1 + tail_weight tail(c)) crit(c) own_i + (theta + price_i) imposed_i + pull_i

    own and imposed come from the live counters, price and pull from the table. A second by which
    the residents of i are delayed is lost to their runs (theta), and it keeps slots of i from the
    calls to come, which the plan values at price_i a slot second: the more an endpoint is wanted,
    the less it is disturbed. Greedy rules see the residents only, never who comes next. tail is
    the chance that c's run is about to be among the slowest, see `planner.dispatch.tail`: such
    calls get the better endpoints. Where branches join, crit(c) own_i is replaced by the delay of
    the run that own_i is expected to cause, times join_weight, see `planner.dispatch.joins`; not
    on prefill pools, where own_i is a part of what the call takes.

    Engines that serve by priority take the call whose run is oldest, less an allowance for what
    is expected to remain of it: of two runs of an age, the one that is sooner over goes first.

    Where the table has no row (unknown workflow or site, load out of range, no table) the call
    goes by least expected finish, and the reason says so.

    Parameters
    ----------
    table
        The dispatch table, or None until one is loaded. Assign `table` to swap it: decisions are
        synchronous, so a swap falls between two of them.
    """

    name = "almanac"

    def __init__(self, *, table: DispatchTable | None = None) -> None:
        self.table = table
        self._tail = Tail()
        self._fallback = LeastExpectedFinish()

    def observe(self, event: Event, fleet: FleetView) -> None:  # noqa: ARG002
        """Follow how long runs take."""
        self._tail.observe(event)

    def choose(self, ready: Ready) -> Choice:
        """Return the candidate with the least planned cost."""
        table = self.table
        call, candidates = ready.call, Candidates.of(ready.candidates, ready.fleet)
        row = None
        if table is not None:
            occupancy = ready.fleet.occupancy(candidates)
            row = table.find(call.workflow_hash, call.site, occupancy)
        if table is None or row is None:
            choice = self._fallback.choose(ready)
            return Choice(
                choice.endpoint,
                "fallback",
                age_priority(call),
                choice.cost,
                ranking=choice.ranking,
            )
        forecast = ready.forecaster.of(call)
        costs = costs_among(candidates, ready, forecast)
        tuning = table.tuning
        weight = 1.0
        if tuning.tail_weight:
            chance = self._tail.chance(call, forecast.remaining_s, ready.now_s)
            weight += tuning.tail_weight * chance
        whole, indices = candidates.whole, candidates.indices
        theta = row.theta if whole else row.theta[indices]
        if forecast.delay is None or not tuning.join_weight or candidates.prefill.size:
            scores = costs.weighted(forecast.criticality * weight, theta)
        else:
            scores = costs.imposed_s * theta
            scores += forecast.delay.of(costs.own_s) * (tuning.join_weight * weight)
        if tuning.plan_pull:
            scores += row.pull_s if whole else row.pull_s[indices]
        position = int(scores.argmin())
        return Choice(
            candidates[position].index,
            "plan",
            priority=age_priority(call, tuning.remaining_weight * forecast.remaining_s)
            if row.priority == "age"
            else 0,
            cost=costs[position],
            ranking=Ranking(candidates, scores, costs.own_s, position),
        )
