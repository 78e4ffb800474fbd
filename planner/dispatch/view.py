"""What the router knows of each endpoint: counters of its own doing, kept in constant time.

The view is built from the router's own sends and the answers it saw, so it needs no telemetry and
is never stale. Policies read it and change nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.domain.fleet import Endpoint
from planner.domain.latency import LatencyRow

__all__ = ["EndpointState", "FleetView", "PrefixIndex", "Resident"]


class PrefixIndex:
    """Which prompt prefixes an endpoint is believed to hold: an LRU set of fingerprint items.

    Items of one prompt are refreshed tail first, so the tail is always older than the head, and
    presence along a chain is monotone: the longest match is found by bisection.

    Parameters
    ----------
    capacity_tokens
        KV cache of the endpoint in tokens; beyond it the least recently used items go.
    """

    __slots__ = ("_held", "_items", "capacity_tokens")

    def __init__(self, capacity_tokens: float) -> None:
        self.capacity_tokens = capacity_tokens
        self._items: OrderedDict[int, float] = OrderedDict()
        self._held = 0.0

    def match(self, prefix: Sequence[int]) -> int:
        """Return how many leading items of ``prefix`` are held."""
        items = self._items
        if not prefix or prefix[0] not in items:
            return 0
        low, high = 1, len(prefix) + 1  # items[:low] are held; items[:high] are not
        while high - low > 1:
            middle = (low + high) // 2
            if prefix[middle - 1] in items:
                low = middle
            else:
                high = middle
        return low

    def record(self, prefix: Sequence[int], item_tokens: float) -> None:
        """Note that a prompt with this chain was sent there."""
        items = self._items
        for item in reversed(prefix):
            if item in items:
                items.move_to_end(item)
            else:
                items[item] = item_tokens
                self._held += item_tokens
        while self._held > self.capacity_tokens and items:
            self._held -= items.popitem(last=False)[1]

    def clear(self) -> None:
        """Forget everything (the endpoint restarted)."""
        self._items.clear()
        self._held = 0.0

    def newest(self, most: int) -> list[tuple[int, float]]:
        """Return up to ``most`` items with their tokens, the least recently used first."""
        items = list(self._items.items())
        return items[max(0, len(items) - most) :]

    def restore(self, items: Iterable[tuple[int, float]]) -> None:
        """Take up what `newest` returned."""
        for item, tokens in items:
            self.record((item,), tokens)

    @property
    def held_tokens(self) -> float:
        """Tokens believed to be cached."""
        return self._held


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
    """

    call_id: str
    run_id: str
    prompt_tokens: int
    uncached_tokens: float
    output_tokens: float
    criticality: float
    sent_s: float
    first_token_s: float | None = None


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
    most_tokens
        Longest sequence (prompt and output) the endpoint can hold.
    """

    __slots__ = (
        "context_tokens", "criticality", "decoding", "endpoint", "healthy", "in_flight",
        "index", "latency", "most_tokens", "prefill_tokens", "prefix", "residents",
    )  # fmt: skip

    def __init__(self, index: int, endpoint: Endpoint, latency: LatencyRow) -> None:
        self.index = index
        self.endpoint = endpoint
        self.latency = latency
        self.healthy = True
        # vLLM keeps one block for itself.
        self.most_tokens = min(endpoint.max_model_len, endpoint.kv_tokens - endpoint.block_tokens)
        self.prefix = PrefixIndex(endpoint.kv_tokens)
        self.residents: dict[str, Resident] = {}
        self.in_flight = 0
        self.prefill_tokens = 0.0
        self.decoding = 0
        self.context_tokens = 0.0
        self.criticality = 0.0

    def refit(self, endpoint: Endpoint) -> bool:
        """Take up changed facts; calls in flight and cache stay. Return whether the row changed."""
        changed = endpoint.latency != self.endpoint.latency
        if changed:
            self.latency = endpoint.latency
        self.endpoint = endpoint
        self.most_tokens = min(endpoint.max_model_len, endpoint.kv_tokens - endpoint.block_tokens)
        self.prefix.capacity_tokens = endpoint.kv_tokens
        return changed

    def add(self, resident: Resident) -> None:
        """Count a call just sent."""
        self.residents[resident.call_id] = resident
        self.in_flight += 1
        self.prefill_tokens += resident.uncached_tokens
        self.context_tokens += resident.prompt_tokens + resident.output_tokens
        self.criticality += resident.criticality

    def first_token(self, call_id: str, now_s: float) -> None:
        """Count a call's change from prefill to decode."""
        resident = self.residents[call_id]
        if resident.first_token_s is None:
            resident.first_token_s = now_s
            self.prefill_tokens -= resident.uncached_tokens
            self.decoding += 1

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
        return resident

    def __repr__(self) -> str:
        state = "up" if self.healthy else "down"
        return f"<{self.endpoint.id} {state} in_flight={self.in_flight} decoding={self.decoding}>"


class FleetView:
    """All endpoint states, in fleet order."""

    __slots__ = ("states",)

    def __init__(self, states: Sequence[EndpointState]) -> None:
        self.states = tuple(states)

    def candidates(
        self, model: str | None = None, exclude: frozenset[int] = frozenset(), tokens: int = 0
    ) -> list[EndpointState]:
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
        return [
            state
            for state in self.states
            if state.healthy
            and state.index not in exclude
            and (model is None or state.endpoint.model == model)
            and tokens <= state.most_tokens
        ]
