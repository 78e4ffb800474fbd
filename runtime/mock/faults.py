"""Faults of one endpoint as they happen: each is a task that begins, holds and undoes it.

Faults that only change answers are looked up where they matter (`FaultBoard.active`); those that
do something to the endpoint are an effect below. A fault that is cleared, or cut short by the end
of the fleet, is undone in the same way as one that has run its time.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

from planner.domain.faults import FAULT_KINDS, Fault
from runtime.clock import Clock

__all__ = ["FaultBoard", "Host"]

_SCALE_STEP = 0.01  # a drift moves in steps of 1 %, so that the engine plans ahead between them


class Host(Protocol):
    """What faults do to an endpoint."""

    async def go_down(self, *, abort: bool, keep_engine: bool = False) -> None:
        """Leave the network, resetting connections or (``abort`` False) closing them."""

    async def come_up(self) -> None:
        """Come back, with a cold engine unless the old one was kept."""

    def die(self) -> None:
        """Let the engine die with the server alive."""

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests and let those under way end for ``grace_s`` engine seconds."""

    def pause(self, why: str) -> None:
        """Stop stepping."""

    def resume(self, why: str) -> None:
        """Step again."""

    def occupy(self, share: float) -> None:
        """Take a share of the KV blocks away; 0 gives them back."""


class FaultBoard:
    """The faults of one endpoint, scheduled and active.

    Parameters
    ----------
    host
        The endpoint.
    clock
        Engine seconds.
    seed
        Of faults that hit a share of the requests.
    """

    def __init__(self, host: Host, clock: Clock, seed: int) -> None:
        self._host = host
        self._clock = clock
        self._random = random.Random(seed)
        self._tasks: dict[asyncio.Task[None], Fault] = {}
        self._active: list[Fault] = []
        self._ended = asyncio.Event()
        self._outage = asyncio.Lock()  # coming back takes time, and the next one may be due

    def add(self, fault: Fault) -> None:
        """Schedule a fault; one whose time has come begins at once."""
        task = asyncio.create_task(self._play(fault), name=f"fault {fault.kind}")
        self._tasks[task] = fault
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def clear(self, kind: str | None = None) -> int:
        """End the faults of a kind, or all; return how many there were."""
        tasks = [task for task, fault in self._tasks.items() if kind in (None, fault.kind)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(tasks)

    def faults(self) -> list[Fault]:
        """Return all faults that are not over."""
        return list(self._tasks.values())

    def active(self, kind: str) -> Fault | None:
        """Return the active fault of a kind that began last, or None."""
        if self._active:
            for fault in reversed(self._active):
                if fault.kind == kind:
                    return fault
        return None

    def hits(self, kind: str) -> Fault | None:
        """Return the active fault of a kind if it hits this request, by its share."""
        fault = self.active(kind)
        if fault is None or self._random.random() >= fault.settings["share"]:
            return None
        return fault

    async def until_over(self, kind: str) -> None:
        """Wait while a fault of this kind is active."""
        while self.active(kind) is not None:
            self._ended.clear()
            await self._ended.wait()

    def scale(self, now_s: float) -> float:
        """Return the factor on step times at an instant."""
        factor = 1.0
        for fault in self._active:
            if fault.kind == "straggler":
                factor *= fault.settings["factor"]
            elif fault.kind == "drift":
                ramp_s = fault.settings["ramp_s"]
                share = 1.0 if ramp_s <= 0 else min(1.0, max(0.0, (now_s - fault.at_s) / ramp_s))
                grown = (fault.settings["factor"] - 1.0) * share
                factor *= 1.0 + round(grown / _SCALE_STEP) * _SCALE_STEP
        return factor

    def to_json(self) -> list[dict[str, Any]]:
        """Return all faults, those under way first."""
        rows = [{**fault.to_json(), "state": "active"} for fault in self._active]
        waiting = [fault for fault in self._tasks.values() if fault not in self._active]
        return rows + [{**fault.to_json(), "state": "scheduled"} for fault in waiting]

    async def _play(self, fault: Fault) -> None:
        await self._sleep(fault.at_s - self._clock.now_s())
        async with self._outage if FAULT_KINDS[fault.kind].outage else nullcontext():
            self._active.append(fault)
            try:
                effect = _EFFECTS.get(fault.kind)
                if effect is None:
                    await self._sleep(fault.for_s)
                else:
                    await effect(self._host, fault, self._sleep)
            finally:
                self._active.remove(fault)
                self._ended.set()

    async def _sleep(self, seconds: float) -> None:
        """Wait engine seconds; for ever if they are infinite."""
        if math.isinf(seconds):
            await asyncio.Event().wait()
        elif seconds > 0:
            await asyncio.sleep(self._clock.wall_s(seconds))


_Sleep = Callable[[float], Awaitable[None]]


async def _to_its_end(undo: Coroutine[Any, Any, None]) -> None:
    """Await what undoes a fault, also where the fault is cleared while it is being undone."""
    task, cleared = asyncio.create_task(undo), False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cleared = True
    if cleared:
        raise asyncio.CancelledError


async def _crash(host: Host, fault: Fault, sleep: _Sleep) -> None:
    try:
        await host.go_down(abort=True)
        await sleep(fault.for_s)
    finally:
        await _to_its_end(host.come_up())


async def _engine_dead(host: Host, fault: Fault, sleep: _Sleep) -> None:
    linger_s = min(fault.settings["linger_s"], fault.for_s)
    try:
        host.die()
        await sleep(linger_s)
        await host.go_down(abort=True)
        await sleep(max(0.0, fault.for_s - linger_s) if fault.for_s < math.inf else math.inf)
    finally:
        await _to_its_end(host.come_up())


async def _cold_restart(host: Host, fault: Fault, sleep: _Sleep) -> None:
    try:
        await host.go_down(abort=False)
        await sleep(fault.for_s)
    finally:
        await _to_its_end(host.come_up())


async def _drain(host: Host, fault: Fault, sleep: _Sleep) -> None:
    try:
        await host.drain(min(fault.settings["grace_s"], fault.for_s))
        await host.go_down(abort=False)
        await sleep(fault.for_s)
    finally:
        await _to_its_end(host.come_up())


async def _network_cut(host: Host, fault: Fault, sleep: _Sleep) -> None:
    try:
        await host.go_down(abort=True, keep_engine=True)
        await sleep(fault.for_s)
    finally:
        await _to_its_end(host.come_up())


async def _hang(host: Host, fault: Fault, sleep: _Sleep) -> None:
    host.pause("hang")
    try:
        await sleep(fault.for_s)
    finally:
        host.resume("hang")


async def _storm(host: Host, fault: Fault, sleep: _Sleep) -> None:
    host.occupy(1.0 - fault.settings["left"])
    try:
        await sleep(fault.for_s)
    finally:
        host.occupy(0.0)


_EFFECTS: Mapping[str, Callable[[Host, Fault, _Sleep], Awaitable[None]]] = {
    "crash": _crash,
    "engine_dead": _engine_dead,
    "cold_restart": _cold_restart,
    "drain": _drain,
    "network_cut": _network_cut,
    "hang": _hang,
    "preemption_storm": _storm,
}
