"""The one question a policy answers: which endpoint, at what priority, or wait.

Three more methods are optional. A policy with ``observe`` is told every event after the router has
applied it. A policy with ``order`` may answer `Wait`: the router then keeps the call, and after
each event offers held calls again, in the order and the selection that ``order`` returns. Such a
policy sees to it that nothing waits for ever. If it has ``holds`` too, it may wait only in fleets
of which that is true.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from planner.dispatch.cost import Cost, Costs, call_cost, fleet_costs
from planner.dispatch.events import Call, Event
from planner.dispatch.forecast import Forecast, Forecaster
from planner.dispatch.pairing import prefill_only
from planner.dispatch.ranking import Ranking
from planner.dispatch.view import Candidates, EndpointState, FleetView

__all__ = [
    "Choice",
    "Observing",
    "Policy",
    "Queueing",
    "Ready",
    "Selective",
    "Wait",
    "age_priority",
    "cost_of",
    "costs_among",
    "costs_of",
    "least",
]


@dataclass(slots=True)
class Choice:
    """A policy's answer; like all that is made for each decision it is not frozen, see `Cost`.

    Parameters
    ----------
    endpoint
        Index in the fleet.
    reason
        Decision label.
    priority
        Engine priority, smaller first; 0 keeps arrival order.
    cost
        The forecast for the chosen endpoint if the policy made one, else None.
    decode_endpoint
        Index of the endpoint to decode on, if ``endpoint`` only prefills; None lets
        `planner.dispatch.pairing` choose.
    ranking
        How the candidates were ranked, if by seconds, else None; no part of the answer.
    """

    endpoint: int
    reason: str
    priority: int = 0
    cost: Cost | None = None
    decode_endpoint: int | None = None
    ranking: Ranking | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Wait:
    """A policy's answer that keeps the call in the router.

    Parameters
    ----------
    reason
        Label for people and metrics.
    until_s
        When to ask again at the latest, on the caller's clock; None leaves it to other events.
    """

    reason: str
    until_s: float | None = None


@dataclass(slots=True)
class Ready:
    """A ready call with all that may be looked at to place it.

    Parameters
    ----------
    call
        What is revealed of the call.
    candidates
        Endpoints that can take it, in fleet order; never empty.
    fleet
        All endpoints, also those that are down or excluded.
    forecaster
        Forecasts by call site.
    now_s
        The caller's clock.
    decoders
        Decode endpoints that can take it over, in fleet order; empty without pools.
    """

    call: Call
    candidates: Sequence[EndpointState]
    fleet: FleetView
    forecaster: Forecaster
    now_s: float
    decoders: Sequence[EndpointState] = ()


class Policy(Protocol):
    """Chooses among candidate endpoints.

    A policy may keep state of its own decisions (a counter, a random stream), never anything
    that has not been revealed.
    """

    name: str

    def choose(self, ready: Ready) -> Choice | Wait:
        """Return the choice for a ready call."""
        ...


@runtime_checkable
class Observing(Protocol):
    """A policy that follows what happens."""

    def observe(self, event: Event, fleet: FleetView) -> None:
        """Take note of an event; the view already shows its effect."""
        ...


@runtime_checkable
class Queueing(Protocol):
    """A policy that may keep calls waiting in the router."""

    def order(self, held: Sequence[Call], fleet: FleetView, now_s: float) -> Iterable[Call]:
        """Return the held calls to offer now, first one first; an empty answer offers none.

        The answer is read as the calls are offered, so a generator may stop when room is gone.
        """
        ...


@runtime_checkable
class Selective(Protocol):
    """A queueing policy that keeps calls waiting in some fleets only."""

    def holds(self, fleet: FleetView) -> bool:
        """Return whether calls may wait in a fleet; asked at first and when it has changed."""
        ...


def cost_of(call: Call, forecast: Forecast, state: EndpointState, now_s: float) -> Cost:
    """Return the predicted cost of a call on an endpoint, of its prefill if it only does that.

    Its own: the delay imposed on others is left out.
    """
    if state.endpoint.role == "prefill":
        forecast = prefill_only(forecast)
    return call_cost(
        call.prompt_tokens, call.prefix, call.prefix_tokens, forecast, state, now_s, imposed=False
    )


def costs_of(
    ready: Ready, *, imposed: bool = True, cached: npt.NDArray[np.float64] | None = None
) -> Costs:
    """Return the predicted costs of a ready call on its candidates, in their order.

    ``imposed`` and ``cached`` are those of `planner.dispatch.cost.fleet_costs`.
    """
    candidates = Candidates.of(ready.candidates, ready.fleet)
    forecast = ready.forecaster.of(ready.call)
    return costs_among(candidates, ready, forecast, imposed=imposed, cached=cached)


def costs_among(
    candidates: Candidates,
    ready: Ready,
    forecast: Forecast,
    *,
    imposed: bool = True,
    cached: npt.NDArray[np.float64] | None = None,
) -> Costs:
    """Return the same where the candidates and the forecast are at hand."""
    call = ready.call

    def costs(expected: Forecast) -> Costs:
        return fleet_costs(
            call.prompt_tokens, call.prefix, call.prefix_tokens, expected, ready.fleet,
            ready.now_s, imposed=imposed, cached=cached,
        )  # fmt: skip

    only_prefill = 0 < candidates.prefill.size == len(candidates)
    found = costs(prefill_only(forecast) if only_prefill else forecast)
    if candidates.prefill.size and not only_prefill:
        found.put(candidates.prefill, costs(prefill_only(forecast)))
    return found if candidates.whole else found.take(candidates.indices)


def least(scores: Sequence[float] | npt.NDArray[np.float64]) -> int:
    """Return the position of the smallest score; the first one wins ties."""
    return int(np.asarray(scores).argmin())


def age_priority(call: Call, allowance_s: float = 0.0) -> int:
    """Return the engine priority that serves older runs first: the run's arrival in ms.

    A call with an allowance is served like one whose run came that much later.
    """
    return int((call.run_arrival_s + allowance_s) * 1000.0)
