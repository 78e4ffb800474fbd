"""KV of finished prefills on its way to the endpoints that decode.

What vLLM's NIXL connector does: a prefill with ``do_remote_decode`` keeps its blocks and tells
where they lie; a decode with ``do_remote_prefill`` takes its own blocks, pulls, and then has one
token left to compute. The blocks of the sender stay in use until they are read, or until its
lease runs out because nobody reads them. Flows share the links of sender and receiver.

Only endpoints of one fleet process can pull from each other; a pull from elsewhere fails, as from
a peer that is gone.

References
----------
vllm 0.33.0: vllm/distributed/kv_transfer/kv_connector/v1/nixl/pull_scheduler.py.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from planner.domain.fleet import Fleet
from planner.domain.ids import EndpointId
from planner.sim.transfer import Links, Transfers
from runtime.clock import Clock

__all__ = ["DEFAULT_KV_BYTES", "KvExchange"]

DEFAULT_KV_BYTES = 131072  # per token, of an 8B model in 16 bits, where the fleet does not say


@dataclass(slots=True)
class _Kept:
    expire: Callable[[], None]
    release: Callable[[], None]
    timer: asyncio.TimerHandle | None = None


class KvExchange:
    """The links of a fleet, and the blocks kept for others.

    Parameters
    ----------
    fleet
        Bandwidths and KV sizes.
    clock
        Engine seconds.
    transfers
        Set-up time and lease.
    """

    def __init__(self, fleet: Fleet, clock: Clock, transfers: Transfers) -> None:
        self.transfers = transfers
        self._clock = clock
        self._bytes = {
            one.id: one.kv_bytes_per_token or DEFAULT_KV_BYTES for one in fleet.endpoints
        }
        # Each rank moves its share over its own link.
        bandwidth: dict[Hashable, float] = {
            (way, one.id): one.link_gb_s * 1e9 * one.tp
            for one in fleet.endpoints
            for way in ("out", "in")
        }
        self._links = Links(bandwidth)
        self._arrivals: dict[str, asyncio.Future[None]] = {}
        self._changed = asyncio.Event()
        self._kept: dict[tuple[EndpointId, str], _Kept] = {}

    # Senders

    def keep(
        self,
        owner: EndpointId,
        name: str,
        *,
        release: Callable[[], None],
        expired: Callable[[], None],
    ) -> None:
        """Keep the blocks of a finished request until they are read or the lease runs out."""

        def expire() -> None:
            if self._kept.pop((owner, name), None) is not None:
                expired()
                release()

        kept = _Kept(expire=expire, release=release)
        self._kept[owner, name] = kept
        self._lend(kept)

    def forget(self, owner: EndpointId) -> None:
        """Forget what a process kept that is gone."""
        for key in [key for key in self._kept if key[0] == owner]:
            timer = self._kept.pop(key).timer
            if timer is not None:
                timer.cancel()

    # Receivers

    def reserve(self, owner: EndpointId, name: str) -> bool:
        """Hold the lease while a receiver waits for its turn; False if nothing is kept."""
        kept = self._kept.get((owner, name))
        if kept is None:
            return False
        if kept.timer is not None:
            kept.timer.cancel()
            kept.timer = None
        return True

    def give_up(self, owner: EndpointId, name: str) -> None:
        """Stop holding the lease of something that was not read."""
        kept = self._kept.get((owner, name))
        if kept is not None and kept.timer is None:
            self._lend(kept)

    def done(self, owner: EndpointId, name: str) -> bool:
        """Let the sender have its blocks back; False if they are gone."""
        kept = self._kept.pop((owner, name), None)
        if kept is None:
            return False
        if kept.timer is not None:
            kept.timer.cancel()
        kept.release()
        return True

    def close(self) -> None:
        """Let no lease run on."""
        for owner, _name in tuple(self._kept):
            self.forget(owner)

    def size_bytes(self, owner: EndpointId, tokens: int) -> float:
        """Return the bytes of so many tokens' KV."""
        return float(tokens * self._bytes[owner])

    async def move(self, flow: str, source: EndpointId, target: EndpointId, tokens: int) -> None:
        """Move the KV of ``tokens`` (>= 1) tokens; return when it has arrived."""
        await asyncio.sleep(self._clock.wall_s(self.transfers.setup_s))
        arrival = self._arrivals[flow] = asyncio.get_running_loop().create_future()
        links = (("out", source), ("in", target))
        self._links.start(flow, links, self.size_bytes(source, tokens), self._catch_up())
        self._changed.set()
        try:
            await arrival
        finally:
            self._arrivals.pop(flow, None)
            if self._links.cancel(flow, self._catch_up()):
                self._changed.set()

    async def run(self) -> None:
        """Let flows end at their time, until cancelled."""
        while True:
            self._changed.clear()
            self._catch_up()
            wait_s = self._links.next_event_s() - self._clock.now_s()
            timeout_s = None if math.isinf(wait_s) else max(0.0, self._clock.wall_s(wait_s))
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _catch_up(self) -> float:
        """Bring the links to the present, and return it."""
        now_s = max(self._clock.now_s(), self._links.now_s)
        while self._links.next_event_s() <= now_s:
            for flow in self._links.advance(self._links.next_event_s()):
                arrival = self._arrivals.get(flow)
                if arrival is not None and not arrival.done():
                    arrival.set_result(None)
        return now_s

    def _lend(self, kept: _Kept) -> None:
        loop = asyncio.get_running_loop()
        kept.timer = loop.call_later(self._clock.wall_s(self.transfers.lease_s), kept.expire)
