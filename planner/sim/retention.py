"""What becomes of a run's KV while its tools run: left to LRU, pinned, offloaded or dropped.

The prefix cache already survives calls; a retention policy interferes with it. It is asked when a
call has ended and its run goes on, and knows what the answer has revealed, no more. About a pin it
may want to be asked again (`Fate.again`).

* ``pin``: the prefix cannot be evicted for ``ttl_s``, or until the run's next call has its own
  first token or goes elsewhere, or the engine would stand still for lack of blocks.
* ``offload``: it is copied to host memory over PCIe, and its blocks are taken first from then on.
  The next call there copies back what is no longer on the GPU. A call that comes before the copy
  is complete finds it on the GPU. Host memory is not limited.
* ``drop``: its blocks are taken first from now on.

Blocks that other runs have used too (a system prompt) are copied, but stay where they are.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from planner.dispatch.events import Call
from planner.domain.errors import InvalidInput
from planner.sim.cluster import Cluster

__all__ = ["Fate", "FixedRetention", "Idle", "Keeper", "Retention"]

At = Callable[[float, int, Callable[[float], None]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """A call that has ended while its run goes on.

    Parameters
    ----------
    call
        As it was revealed.
    endpoint
        Index of the endpoint that holds its KV.
    context_tokens
        Its prompt and output.
    kv_usage
        Share of the endpoint's blocks in use, [0, 1].
    now_s
        When it ended.
    """

    call: Call
    endpoint: int
    context_tokens: int
    kv_usage: float
    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What to do with the KV.

    Parameters
    ----------
    ttl_s
        How long a pin lasts, > 0, finite; counts for a pin only.
    again
        Whether to ask again about a pin whenever another run on that endpoint begins to wait.
    """

    action: Literal["leave", "pin", "offload", "drop"] = "leave"
    ttl_s: float = 300.0
    again: bool = False

    def __post_init__(self) -> None:
        if self.action not in ("leave", "pin", "offload", "drop") or not 0 < self.ttl_s < math.inf:
            raise InvalidInput(
                f"{self!r} is no fate",
                where="retention",
                remedy="use leave, pin, offload or drop, and a positive ttl_s",
            )


class Retention(Protocol):
    """Decides about idle KV."""

    def decide(self, idle: Idle) -> Fate:
        """Return what to do with the KV of a run that now waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedRetention:
    """Does the same each time: the static baselines."""

    fate: Fate

    def decide(self, idle: Idle) -> Fate:  # noqa: ARG002 - the protocol's signature
        """Return the fate."""
        return self.fate


class Keeper:
    """Carries out what a retention policy decides.

    Parameters
    ----------
    cluster
        The engines.
    retention
        The policy.
    at
        Schedules an action: instant, kind, action.
    """

    def __init__(self, cluster: Cluster, retention: Retention, at: At) -> None:
        self._cluster = cluster
        self._retention = retention
        self._at = at
        # Endpoint -> block -> its only run.
        self._owners: defaultdict[int, dict[int, str | None]] = defaultdict(dict)
        self._noted: dict[tuple[str, int], tuple[int, ...]] = {}  # (run, endpoint) -> last chain
        self._pins: dict[str, tuple[int, int]] = {}  # run -> endpoint, serial
        self._open: dict[str, tuple[Idle, tuple[int, ...]]] = {}  # run -> what is asked again
        self._host: dict[tuple[str, int], tuple[int, ...]] = {}  # (run, endpoint) -> chain
        self._serial = 0

    def idle(self, idle: Idle, chain: tuple[int, ...]) -> None:
        """Decide about a call with this block chain that has ended while its run goes on."""
        self._open.pop(idle.call.run_id, None)
        for other, text in [one for one in self._open.values() if one[0].endpoint == idle.endpoint]:
            # What an earlier answer has freed counts for the later ones.
            usage = self._cluster.engine(idle.endpoint).kv_usage
            renewed = replace(other, kv_usage=usage, now_s=idle.now_s)
            fate = self._retention.decide(renewed)
            if fate.action != "pin":
                self.let_go(other.call.run_id, idle.now_s)
                self._carry_out(fate, renewed, text)
        fate = self._retention.decide(idle)
        self._carry_out(fate, idle, chain)
        if fate.again and idle.call.run_id in self._pins:
            self._open[idle.call.run_id] = idle, chain

    def _carry_out(self, fate: Fate, idle: Idle, chain: tuple[int, ...]) -> None:
        run_id, index, now_s = idle.call.run_id, idle.endpoint, idle.now_s
        if fate.action == "leave":
            return
        owners = self._owners[index]
        # What another run has used it has used from the beginning.
        shared = bisect_left(chain, True, key=lambda block: owners.get(block) == run_id)
        if fate.action == "drop":
            self._cluster.engine(index).forget(chain, shared, now_s)
            return
        self.let_go(run_id, now_s)
        blocks = self._cluster.engine(index).pin(run_id, chain, now_s)
        if not blocks:
            return
        self._serial += 1
        pin = self._pins[run_id] = index, self._serial
        if fate.action == "pin":
            self._at(now_s + fate.ttl_s, 1, lambda now: self._expire(run_id, pin, now))
        else:
            tokens = blocks * self._cluster.fleet.endpoints[index].block_tokens
            self._cluster.move(
                f"offload {run_id}", [("pcie", index)], tokens, index, now_s,
                lambda now: self._offloaded(run_id, index, chain, blocks, shared, now),
            )  # fmt: skip

    def sent(self, run_id: str, index: int, chain: tuple[int, ...], now_s: float) -> int:
        """Return the leading tokens in host memory of a call sent to ``index``."""
        owners, known = self._owners[index], self._noted.get((run_id, index), ())
        # A run's next prompt mostly goes on from its last one.
        start = len(known) if chain[: len(known)] == known else 0
        self._noted[run_id, index] = chain
        for block in chain[start:]:
            if owners.setdefault(block, run_id) != run_id:
                owners[block] = None
        self._cluster.stop(f"offload {run_id}", now_s)
        self._open.pop(run_id, None)
        pin = self._pins.get(run_id)
        if pin is not None and pin[0] != index:
            self.let_go(run_id, now_s)
        held = self._host.get((run_id, index), ())
        same = 0
        while same < min(len(held), len(chain)) and held[same] == chain[same]:
            same += 1
        return same * self._cluster.fleet.endpoints[index].block_tokens

    def let_go(self, run_id: str, now_s: float) -> None:
        """End a run's pin, and an offload under way; the KV is left to the cache."""
        self._open.pop(run_id, None)
        self._cluster.stop(f"offload {run_id}", now_s)
        pin = self._pins.pop(run_id, None)
        if pin is not None and self._cluster.up[pin[0]]:
            self._cluster.engine(pin[0]).unpin(run_id, now_s)

    def ended(self, run_id: str, now_s: float) -> None:
        """Forget a run that is over."""
        self.let_go(run_id, now_s)
        for kept in (self._host, self._noted):
            for key in [key for key in kept if key[0] == run_id]:
                del kept[key]

    def lost(self, index: int, now_s: float) -> None:
        """Forget what a crashed endpoint held, its host memory included."""
        for run_id in [run_id for run_id, pin in self._pins.items() if pin[0] == index]:
            self.let_go(run_id, now_s)
        for kept in (self._host, self._noted):
            for key in [key for key in kept if key[1] == index]:
                del kept[key]
        self._owners.pop(index, None)

    def _expire(self, run_id: str, pin: tuple[int, int], now_s: float) -> None:
        if self._pins.get(run_id) == pin:
            self.let_go(run_id, now_s)

    def _offloaded(
        self,
        run_id: str,
        index: int,
        chain: tuple[int, ...],
        blocks: int,
        shared: int,
        now_s: float,
    ) -> None:
        self._host[run_id, index] = chain[:blocks]
        self.let_go(run_id, now_s)
        self._cluster.engine(index).forget(chain, shared, now_s)
