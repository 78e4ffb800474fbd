"""What the router knows of each endpoint: counters of its own doing, kept in constant time.

The view is built from the router's own sends and the answers it saw, so it needs no telemetry and
is never stale. Policies read it and change nothing. What a decision has to know of all endpoints
at once lies in arrays, see `planner.dispatch.loads` and `planner.dispatch.prefixes`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from planner.dispatch.loads import LEAST_LEFT, Loads
from planner.dispatch.prefixes import Holders, News, PrefixIndex, levels
from planner.domain.fleet import Endpoint
from planner.domain.latency import LatencyRow

__all__ = ["Candidates", "Crowd", "EndpointState", "FleetView", "PrefixIndex", "Resident"]

_SPREADS = 1024
"""Sets of endpoints kept as arrays."""


@dataclass(slots=True)
class Resident:
    """A call in flight on an endpoint, with the forecast it was sent on.

    Parameters
    ----------
    uncached_tokens
        Prompt tokens expected to need prefill.
    output_tokens
        Predicted output length (mean).
    criticality
        Probability of being on its run's critical path, [0, 1].
    least_left
        See `planner.dispatch.forecast.Forecast`.
    place
        Its place among the endpoint's residents; kept by `Loads`.
    """

    call_id: str
    run_id: str
    prompt_tokens: int
    uncached_tokens: float
    output_tokens: float
    criticality: float
    sent_s: float
    first_token_s: float | None = None
    least_left: float = LEAST_LEFT
    place: int = -1


class EndpointState:
    """Live counters of one endpoint.

    Attributes
    ----------
    in_flight
        Calls sent and unfinished.
    prefill_tokens
        Uncached prompt tokens of calls that have not shown a first token.
    decoding
        Calls that have.
    context_tokens
        Prompt tokens plus predicted output of all residents (KV they will need).
    criticality
        Sum of the residents' criticality.
    kv_tokens, most_tokens
        KV cache of the endpoint, and the longest sequence (prompt and output) it can hold.
    """

    __slots__ = (
        "_healthy", "_latency", "_view", "context_tokens", "criticality", "decoding", "endpoint",
        "in_flight", "index", "kv_tokens", "most_tokens", "prefill_tokens", "prefix", "residents",
    )  # fmt: skip

    def __init__(self, index: int, endpoint: Endpoint, latency: LatencyRow) -> None:
        self.index = index
        self.endpoint = endpoint
        self._latency = latency
        self._healthy = True
        self._view: FleetView | None = None
        self._learn_size(endpoint)
        self.prefix = PrefixIndex(self.kv_tokens)
        self.residents: dict[str, Resident] = {}
        self.in_flight = 0
        self.prefill_tokens = 0.0
        self.decoding = 0
        self.context_tokens = 0.0
        self.criticality = 0.0

    @property
    def view(self) -> FleetView:
        """The view it belongs to; one that is in none gets its own."""
        return self._view or FleetView([self])

    @property
    def latency(self) -> LatencyRow:
        """The row that costs are predicted with."""
        return self._latency

    @latency.setter
    def latency(self, row: LatencyRow) -> None:
        self._latency = row
        if self._view is not None:
            self._view.revision += 1
            self._view.loads.update(self)

    @property
    def healthy(self) -> bool:
        """Whether calls may be sent there."""
        return self._healthy

    @healthy.setter
    def healthy(self, healthy: bool) -> None:
        self._healthy = healthy
        if self._view is not None:
            self._view.forget_candidates()

    def join(self, view: FleetView, holders: Holders) -> None:
        """Be counted by a view from now on, instead of the one before."""
        self._view = view
        self.prefix.join(holders, 1 << self.index)

    def refit(self, endpoint: Endpoint) -> bool:
        """Take up changed facts; calls in flight and cache stay. Return whether the row changed."""
        changed = endpoint.latency != self.endpoint.latency
        if changed:
            self.latency = endpoint.latency
        self.endpoint = endpoint
        self._learn_size(endpoint)
        self.prefix.capacity_tokens = self.kv_tokens
        return changed

    def _learn_size(self, endpoint: Endpoint) -> None:
        self.kv_tokens = endpoint.kv_tokens
        # vLLM keeps one block for itself.
        self.most_tokens = min(endpoint.max_model_len, self.kv_tokens - endpoint.block_tokens)

    def add(self, resident: Resident) -> None:
        """Count a call just sent."""
        self.residents[resident.call_id] = resident
        self.in_flight += 1
        self.prefill_tokens += resident.uncached_tokens
        self.context_tokens += resident.prompt_tokens + resident.output_tokens
        self.criticality += resident.criticality
        if self._view is not None:
            self._view.loads.add(self, resident)
            self._view.loads.update(self)

    def first_token(self, call_id: str, now_s: float) -> None:
        """Count a call's change from prefill to decode."""
        resident = self.residents[call_id]
        if resident.first_token_s is None:
            resident.first_token_s = now_s
            self.prefill_tokens -= resident.uncached_tokens
            self.decoding += 1
            if self._view is not None:
                self._view.loads.first_token(self, resident, now_s)
                self._view.loads.update(self)

    def remove(self, call_id: str) -> Resident:
        """Stop counting a call, however it ended."""
        resident = self.residents.pop(call_id)
        self.in_flight -= 1
        if resident.first_token_s is None:
            self.prefill_tokens -= resident.uncached_tokens
        else:
            self.decoding -= 1
        self.context_tokens -= resident.prompt_tokens + resident.output_tokens
        self.criticality -= resident.criticality
        if self.in_flight == 0:
            # Floats are summed and subtracted in different orders; an idle endpoint is exact.
            self.prefill_tokens = self.context_tokens = self.criticality = 0.0
        if self._view is not None:
            self._view.loads.remove(self, resident)
            self._view.loads.update(self)
        return resident

    def __repr__(self) -> str:
        state = "up" if self.healthy else "down"
        return f"<{self.endpoint.id} {state} in_flight={self.in_flight} decoding={self.decoding}>"


class Crowd:
    """What an endpoint has to do, with the calls that its counters are about to show.

    Parameters
    ----------
    state
        The endpoint.
    new
        Calls that were sent there and are not counted yet.

    Attributes
    ----------
    in_flight, prefill_tokens, context_tokens
        As in `EndpointState`, the new ones counted.
    """

    __slots__ = ("_new", "context_tokens", "in_flight", "prefill_tokens", "state")

    def __init__(self, state: EndpointState, new: Sequence[Resident] = ()) -> None:
        self.state, self._new = state, new
        self.in_flight = state.in_flight + len(new)
        self.prefill_tokens = state.prefill_tokens
        self.context_tokens = state.context_tokens
        for one in new:
            self.prefill_tokens += one.uncached_tokens
            self.context_tokens += one.prompt_tokens + one.output_tokens

    @property
    def output_tokens(self) -> float:
        """Predicted output of all its calls together."""
        counted = sum(one.output_tokens for one in self.state.residents.values())
        return counted + sum(one.output_tokens for one in self._new)


class Candidates(tuple[EndpointState, ...]):  # noqa: SLOT001 - a tuple cannot have any
    """Endpoints that can take a call, in fleet order, with what decisions need of them as a whole.

    Attributes
    ----------
    indices
        Their places in the fleet.
    whole
        Whether they are all of the fleet.
    slots
        Calls they can serve at once.
    prefill
        Places in the fleet of those that only prefill.
    """

    prefill: npt.NDArray[np.intp]
    indices: npt.NDArray[np.intp]
    whole: bool
    slots: int
    _fleet: FleetView

    @classmethod
    def of(cls, states: Iterable[EndpointState], fleet: FleetView) -> Candidates:
        """Return endpoints of a fleet as candidates; those that are already are left as is."""
        if isinstance(states, cls):
            return states
        made = cls(states)
        made.indices = np.array([state.index for state in made], dtype=np.intp)
        made.prefill = np.array(
            [state.index for state in made if state.endpoint.role == "prefill"], dtype=np.intp
        )
        made.whole = made == fleet.states
        made.slots = sum(state.endpoint.max_num_seqs for state in made)
        made._fleet = fleet
        return made

    @cached_property
    def decoders(self) -> Candidates:
        """Those that take over after a prefill elsewhere."""
        return Candidates.of((one for one in self if one.endpoint.role == "decode"), self._fleet)

    @cached_property
    def entries(self) -> Candidates:
        """Those a call can be sent to: they serve it whole, or a decoder of their model is up."""
        models = {state.endpoint.model for state in self.decoders}
        return Candidates.of(
            (
                state
                for state in self
                if state.endpoint.role == "both"
                or (state.endpoint.role == "prefill" and state.endpoint.model in models)
            ),
            self._fleet,
        )


class FleetView:
    """All endpoint states, in fleet order.

    A state is counted by the last view that was made with it.

    Attributes
    ----------
    loads
        The same as arrays.
    everyone
        The whole fleet as bits, see `matches`.
    pooled
        Whether it has prefill and decode pools.
    revision
        Counts the changes of endpoints and their latency rows.
    """

    __slots__ = (
        "_candidates", "_forks", "_holders", "_models", "_single", "_spreads", "_states",
        "everyone", "loads", "pooled", "revision",
    )  # fmt: skip

    def __init__(self, states: Sequence[EndpointState]) -> None:
        self.revision = 0
        self._holders = Holders()
        self.states = tuple(states)

    @property
    def states(self) -> tuple[EndpointState, ...]:
        """The endpoints; assign to change the fleet."""
        return self._states

    @states.setter
    def states(self, states: tuple[EndpointState, ...]) -> None:
        self._states = states
        # By model: the rooms that endpoints have, rising, and who has at least so much.
        self._candidates: dict[str | None, tuple[list[int], list[Candidates]]] = {}
        self._models: dict[str | None, tuple[npt.NDArray[np.intp] | slice, int]] = {}
        self._spreads: dict[int, npt.NDArray[np.bool_]] = {}
        self._single: dict[int, Candidates] = {}
        self.revision += 1
        self._holders = Holders(self._holders.version + 1)
        self._forks: dict[int, int] = {}
        self.everyone = (1 << len(states)) - 1
        self.pooled = any(state.endpoint.role != "both" for state in states)
        self.loads = Loads(states, pooled=self.pooled)
        for state in states:
            state.join(self, self._holders)

    def forget_candidates(self) -> None:
        """Look anew for endpoints that are up."""
        self._candidates.clear()

    def candidates(
        self, model: str | None = None, exclude: frozenset[int] = frozenset(), tokens: int = 0
    ) -> Candidates:
        """Return the healthy endpoints that can take a call.

        Parameters
        ----------
        model
            Model wanted; None takes any.
        exclude
            Indices not to use.
        tokens
            Prompt plus declared output of the call; it must fit the model's context and the KV
            pool.
        """
        kept = self._candidates.get(model)
        if kept is None:
            serving = [state for state in self._states if _serves(state, model)]
            if not serving:
                return Candidates.of((), self)  # not kept: clients name models freely
            # Calls between the same two rooms have the same candidates.
            rooms = sorted({state.most_tokens for state in serving})
            groups = [
                Candidates.of((state for state in serving if room <= state.most_tokens), self)
                for room in rooms
            ]
            kept = self._candidates[model] = rooms, [*groups, Candidates.of((), self)]
        rooms, groups = kept
        found = groups[bisect_left(rooms, tokens)]
        if exclude:
            return Candidates.of((one for one in found if one.index not in exclude), self)
        return found

    def only(self, index: int) -> Candidates:
        """Return one endpoint as the only candidate."""
        found = self._single.get(index)
        if found is None:
            found = self._single[index] = Candidates.of((self._states[index],), self)
        return found

    def room_tokens(self, model: str | None) -> int:
        """Return the longest sequence an endpoint of a model can hold, be it up or down.

        Raises
        ------
        ValueError
            If no endpoint serves the model.
        """
        return self._of_model(model)[1]

    def alone_s(self, model: str | None, prompt_tokens: float, output_tokens: float) -> float:
        """Return the seconds of a call alone on the endpoint of its model that is best for it.

        Raises
        ------
        ValueError
            If no endpoint serves the model.
        """
        seconds = self.loads.alone_s(prompt_tokens, output_tokens)
        return float(seconds[self._of_model(model)[0]].min())

    def _of_model(self, model: str | None) -> tuple[npt.NDArray[np.intp] | slice, int]:
        """Return where the endpoints of a model are, and the longest sequence one can hold."""
        found = self._models.get(model)
        if found is None:
            serving = [s for s in self._states if model is None or s.endpoint.model == model]
            room = max(state.most_tokens for state in serving)
            places: npt.NDArray[np.intp] | slice = slice(None)
            if len(serving) < len(self._states):
                places = np.array([state.index for state in serving], dtype=np.intp)
            found = self._models[model] = places, room
        return found

    def occupancy(self, candidates: Sequence[EndpointState]) -> float:
        """Return the calls in flight per slot of some endpoints."""
        if not isinstance(candidates, Candidates):
            candidates = Candidates.of(candidates, self)
        if candidates.whole:
            return self.loads.total / candidates.slots
        return int(self.loads.in_flight[candidates.indices].sum()) / candidates.slots

    def matches(self, prefix: Sequence[int]) -> list[tuple[int, int]]:
        """Return the depths to which a prompt is held, rising, with the endpoints that do."""
        return levels(prefix, self._holders, self._forks)

    @property
    def text_version(self) -> int:
        """A number that grows whenever what endpoints are believed to hold changes."""
        return self._holders.version

    def news(self, version: int) -> list[tuple[EndpointState, News]]:
        """Return what has changed since a `text_version`, by endpoint.

        `planner.dispatch.prefixes.concerns` says whether that is of interest to a prompt.
        """
        changes = self._holders.since(version)
        return [(self._states[bit.bit_length() - 1], news) for bit, news in changes.items()]

    def spread(self, bits: int) -> npt.NDArray[np.bool_]:
        """Return a set of endpoints, given as bits, as a mask."""
        found = self._spreads.get(bits)
        if found is None:
            if len(self._spreads) >= _SPREADS:
                self._spreads.clear()
            size = len(self._states)
            packed = np.frombuffer(bits.to_bytes((size + 7) // 8, "little"), dtype=np.uint8)
            found = np.unpackbits(packed, count=size, bitorder="little").astype(np.bool_)
            self._spreads[bits] = found
        return found


def _serves(state: EndpointState, model: str | None) -> bool:
    return state.healthy and (model is None or state.endpoint.model == model)
