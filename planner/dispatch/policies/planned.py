"""Almanac's own policy: the planned table combined with the live counters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from planner.dispatch.events import Call, Event
from planner.dispatch.forecast import Forecast
from planner.dispatch.policies.base import Choice, Ready, Wait, age_priority, costs_among
from planner.dispatch.policies.finish import LeastExpectedFinish
from planner.dispatch.policies.placement import Placement
from planner.dispatch.policies.queued import Queue
from planner.dispatch.ranking import Ranking
from planner.dispatch.table import DispatchTable, Tuning
from planner.dispatch.tail import Tail
from planner.dispatch.view import Candidates, FleetView

__all__ = ["Planned"]

_POOLED_DEPTH = 2.0
"""How many times what it can run an endpoint of a pool has before calls wait for it. A call takes
its decode slot when it is sent, so with one the slot stays empty while the prompt is computed, and
with many the order is fixed as early as without waiting. In a simulated burst 1.5 and 2 are better
than 1 and 3 for mean and P95 together; on 1 the P95 is worse than without waiting."""


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
    with prefill and decode pools.

    Engines that serve by priority take the call whose run is oldest, less an allowance for what
    is expected to remain of it: of two runs of an age, the one that is sooner over goes first.

    Calls are sent at once, and engines order what waits. With prefill and decode pools they do not
    do that well: a call is bound to an engine of each pool long before the second one begins. So
    in fleets with pools calls wait in the router, in the same order, once the endpoints they would
    go to have twice what they can run.

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
        self._queue = _Queue(self)

    def holds(self, fleet: FleetView) -> bool:
        """Return whether the fleet has pools."""
        return fleet.pooled

    def observe(self, event: Event, fleet: FleetView) -> None:
        """Follow how long runs take."""
        self._tail.observe(event)
        if fleet.pooled:
            self._queue.note(event)

    def order(self, held: Sequence[Call], fleet: FleetView, now_s: float) -> Iterable[Call]:
        """Yield the waiting calls, first one first, while an endpoint of each pool has room."""
        return self._queue.order(held, fleet, now_s)

    def choose(self, ready: Ready) -> Choice | Wait:
        """Return the candidate with the least planned cost; with pools, see `_Queue`."""
        if ready.fleet.pooled:
            return self._queue.choose(ready)
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
        weight = self.urgency(call, forecast, tuning, ready.now_s)
        whole, indices = candidates.whole, candidates.indices
        theta = row.theta if whole else row.theta[indices]
        if forecast.delay is None or not tuning.join_weight:
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

    def urgency(self, call: Call, forecast: Forecast, tuning: Tuning, now_s: float) -> float:
        """Return how much more a call's own time counts because its run may be a slow one, >= 1."""
        if not tuning.tail_weight:
            return 1.0
        chance = self._tail.chance(call, forecast.remaining_s, now_s)
        return 1.0 + tuning.tail_weight * chance


class _Queue(Queue):
    """What waits in the router in fleets with pools: the order and the score of `Planned`.

    A run that fans out is over after the longest of its calls only, so those that wait share the
    place of the longest, and runs alike are served one after the other rather than in turns.

    The score of a way through the pools is that of its prefill endpoint, with the time until the
    last token for own. Ways that others wait for count their wait, so that none is held for an
    endpoint while another would be sooner done with it.

    Parameters
    ----------
    planned
        Has the table, and knows the slow runs.
    """

    def __init__(self, planned: Planned) -> None:
        super().__init__(Placement(depth=_POOLED_DEPTH))
        self._planned = planned
        self._left_s: dict[str, float] = {}  # run -> remainder of its longest waiting call

    def ranked(self, held: Sequence[Call], now_s: float) -> Iterable[Call]:
        """Return the waiting calls, most urgent first."""
        self._left_s.clear()
        for call in held:
            run, left_s = _run_of(call), self._remaining_s(call)
            if left_s > self._left_s.get(run, 0.0):
                self._left_s[run] = left_s
        return super().ranked(held, now_s)

    def key(self, call: Call, now_s: float) -> tuple[float, str, float]:  # noqa: ARG002 - no ageing
        """Return the run's arrival plus its weighted remainder, the run, and the call's place."""
        table = self._planned.table
        weight = 0.0 if table is None else table.tuning.remaining_weight
        run = _run_of(call)
        due_s = call.run_arrival_s + weight * self._left_s.get(run, 0.0)
        return due_s, run, -self._remaining_s(call)

    def _remaining_s(self, call: Call) -> float:
        return 0.0 if self.forecaster is None else self.forecaster.of(call).remaining_s

    def choose(self, ready: Ready) -> Choice | Wait:
        """Return the way of the least planned cost if it has room."""
        self.forecaster = ready.forecaster
        call, table, placement = ready.call, self._planned.table, self.placement
        row = None
        if table is not None:
            occupancy = ready.fleet.occupancy(ready.candidates)
            row = table.find(call.workflow_hash, call.site, occupancy)
        routes = placement.routes(ready)
        finish_s = scores = placement.finish_s(routes)
        reason, priority = "fallback", age_priority(call)
        if table is not None and row is not None:
            tuning, forecast = table.tuning, ready.forecaster.of(call)
            enters = routes.pairs.ends[0]
            urgency = self._planned.urgency(call, forecast, tuning, ready.now_s)
            scores = finish_s * (forecast.criticality * urgency)
            scores += row.theta[enters] * routes.imposed_s
            if tuning.plan_pull:
                scores += row.pull_s[enters]
            left_s = self._left_s.get(_run_of(call), forecast.remaining_s)
            allowance_s = tuning.remaining_weight * left_s
            priority = age_priority(call, allowance_s) if row.priority == "age" else 0
            reason = "plan"
        # A call whose own time counts nothing still goes to the best of its decode endpoints.
        way = int(np.lexsort((finish_s, scores))[0])
        route = placement.settle(routes, way, ready)
        if route is None:
            return Wait("room")
        decode = None if route.decode is None else route.decode.index
        return Choice(route.entry.index, reason, priority, route.cost, decode)


def _run_of(call: Call) -> str:
    """Return the run of a call; one without is a run of its own."""
    return call.run_id or call.call_id
