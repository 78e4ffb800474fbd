"""Affinity without looking at prompts: consistent hashing, and sessions that stay where they are.

The key of a call is its session, else its run, else the beginning of its prompt.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from planner.dispatch.events import Call, Event
from planner.dispatch.policies.base import Choice, Ready
from planner.dispatch.view import EndpointState, FleetView

__all__ = ["ConsistentHash", "SessionAffinity", "affinity_key"]

_VIRTUAL_NODES = 160
_MOST_SESSIONS = 100_000


def affinity_key(call: Call) -> str:
    """Return what ties a call to others: session, else run, else prompt, else the call itself."""
    if call.session_id is not None:
        return f"session {call.session_id}"
    if call.run_id:
        return f"run {call.run_id}"
    return f"prompt {call.prefix[0]}" if call.prefix else f"call {call.call_id}"


def _bounded(candidates: Sequence[EndpointState], bound: float) -> float:
    """Return how many calls one endpoint may have, the new one included."""
    if math.isinf(bound):
        return math.inf
    total = sum(state.in_flight for state in candidates) + 1
    return math.ceil(bound * total / len(candidates))


def _position(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


class ConsistentHash:
    """A ring of hashed endpoints; a call goes to the first one after its key.

    Parameters
    ----------
    bound
        With a finite bound, >= 1, an endpoint takes at most that many times the mean of the calls
        in flight, rounded up, and what exceeds it goes on to the next one of the ring.

    References
    ----------
    vllm-project/router 0.1.17, policy ``consistent_hash`` (160 virtual nodes each; unbounded).
    Mirrokni, Thorup, Zadimoghaddam, Consistent hashing with bounded loads, SODA 2018. The hash
    function is ours.
    """

    name = "consistent_hash"

    def __init__(self, *, bound: float = math.inf) -> None:
        self.bound = bound
        self._ring: list[tuple[int, int]] = []  # position, endpoint
        self._size = 0

    def choose(self, ready: Ready) -> Choice:
        """Return the first candidate after the key that may take one more call."""
        states = ready.fleet.states
        if len(states) != self._size:  # endpoints keep their index, new ones come at the end
            self._ring = sorted(
                (_position(f"{state.endpoint.id} {number}"), state.index)
                for state in states
                for number in range(_VIRTUAL_NODES)
            )
            self._size = len(states)
        most = _bounded(ready.candidates, self.bound)
        able = {state.index for state in ready.candidates if state.in_flight < most}
        able = able or {state.index for state in ready.candidates}
        start = bisect_right(self._ring, (_position(affinity_key(ready.call)), -1))
        for step in range(len(self._ring)):
            index = self._ring[(start + step) % len(self._ring)][1]
            if index in able:
                return Choice(index, "hash" if step == 0 else "next")
        raise AssertionError("every endpoint is on the ring")


class SessionAffinity:
    """A session stays on its endpoint while that is able and not overloaded.

    With the engines' own LRU cache this is the plain baseline of agent serving: a new session goes
    where fewest sessions are, ties to the fewest calls in flight; later calls follow it. A session
    whose endpoint is down, or above the bound, moves to the least loaded endpoint and stays there.

    Parameters
    ----------
    bound
        An endpoint keeps its sessions up to this many times the mean of calls in flight, rounded
        up; >= 1, infinite for strict affinity.
    ttl_s
        A session is forgotten after that long without a call, s, > 0.

    References
    ----------
    vllm-project/router 0.1.17, policy ``sticky_least_loaded`` (fewest sessions, TTL 7200 s); the
    bound as in consistent hashing with bounded loads, see `ConsistentHash`.
    """

    name = "session_affinity"

    def __init__(self, *, bound: float = 2.0, ttl_s: float = 7200.0) -> None:
        self.bound = bound
        self.ttl_s = ttl_s
        # key -> endpoint, last use; the least recently used first
        self._homes: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._sessions: dict[int, int] = {}
        self._now_s = -math.inf

    def observe(self, event: Event, fleet: FleetView) -> None:  # noqa: ARG002 - the clock alone
        """Follow the clock, and forget sessions that were not heard of."""
        self._now_s = max(self._now_s, event.now_s)
        while self._homes:
            key, (_, used_s) = next(iter(self._homes.items()))
            if used_s + self.ttl_s > self._now_s and len(self._homes) <= _MOST_SESSIONS:
                return
            self._leave(key)

    def choose(self, ready: Ready) -> Choice:
        """Return the session's endpoint, or a new one."""
        key, candidates = affinity_key(ready.call), ready.candidates
        home = self._homes.get(key)
        if home is not None and home[1] + self.ttl_s > ready.now_s:
            most = _bounded(candidates, self.bound)
            for state in candidates:
                if state.index == home[0] and state.in_flight < most:
                    return self._stay(key, state, ready.now_s, "session")
            loads = [(state.in_flight, 0) for state in candidates]
            reason = "moved"
        else:
            loads = [(self._sessions.get(state.index, 0), state.in_flight) for state in candidates]
            reason = "new"
        return self._stay(key, candidates[loads.index(min(loads))], ready.now_s, reason)

    def _stay(self, key: str, state: EndpointState, now_s: float, reason: str) -> Choice:
        self._leave(key)
        self._homes[key] = state.index, now_s
        self._sessions[state.index] = self._sessions.get(state.index, 0) + 1
        return Choice(state.index, reason)

    def _leave(self, key: str) -> None:
        home = self._homes.pop(key, None)
        if home is not None:
            self._sessions[home[0]] -= 1
