"""The hub: it owns the gateway's state, and the worker processes that ask it.

The listening socket belongs to the hub and is inherited, so a connection that waits to be accepted
survives the death of a worker. A worker that ends unasked is started again, after a pause that
doubles while it ends soon. When the hub ends, however it does, its workers end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from planner.domain.errors import EndpointFailed, InvalidInput
from runtime.desk import LocalDesk
from runtime.gateway import Gateway
from runtime.processes.channel import Channel
from runtime.processes.remote import State
from runtime.processes.session import Session
from runtime.processes.worker import BACKLOG, PULSE_S, Setup
from runtime.transport import bind_problem

__all__ = ["Crew"]

_log = logging.getLogger(__name__)

_READY_S = 60.0
_SOON_S = 10.0
_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.1, 30.0


class _Hand:
    """One place for a worker, and whoever holds it now."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: asyncio.subprocess.Process | None = None
        self.session: Session | None = None
        self.starts = 0


class Crew:
    """A gateway of several worker processes; an async context manager.

    Parameters
    ----------
    gateway
        Not started; closed with the crew.
    host, port
        Where the workers listen; port 0 takes a free one.
    workers
        How many, >= 1.
    certificate, key
        PEM files to serve HTTPS with, or None.
    """

    def __init__(
        self,
        gateway: Gateway,
        *,
        host: str,
        port: int,
        workers: int,
        certificate: str | None = None,
        key: str | None = None,
    ) -> None:
        self.gateway = gateway
        self._control = gateway.control
        self._desk = LocalDesk(gateway.control)
        self._host = host
        self._port = port
        self._tls = (certificate, key)
        self._hands = [_Hand(number) for number in range(workers)]
        self._exits = contextlib.AsyncExitStack()
        self._closing = False
        self._told: State | None = None
        self._listener: socket.socket
        self._hub_path = ""

    @property
    def address(self) -> str:
        """Base address, once started."""
        host, port = self._listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if self._tls[0] else 'http'}://{host}:{port}"

    async def start(self) -> list[str]:
        """Start hub and workers; return when all of them listen.

        Returns
        -------
        list of str
            Ids of the endpoints that did not answer.

        Raises
        ------
        InvalidInput
            If the port cannot be bound.
        EndpointFailed
            If a worker does not start.
        """
        try:
            self._listener = self._exits.enter_context(_bound(self._host, self._port))
            folder = Path(tempfile.mkdtemp(prefix="almanac-"))  # its owner's alone
            self._exits.callback(shutil.rmtree, folder, ignore_errors=True)
            self._hub_path = str(folder / "hub")
            self._exits.push_async_callback(self.gateway.aclose)
            missing = await self.gateway.start(lambda r: web.UnixSite(r, self._hub_path))
            self._control.processes = self._facts
            tasks = [asyncio.create_task(self._employ(hand)) for hand in self._hands]
            tasks.append(asyncio.create_task(self._pulse()))
            self._exits.push_async_callback(self._dismiss, tasks)
            await self._all_ready()
        except BaseException:
            await self.aclose()
            raise
        return missing

    async def aclose(self) -> None:
        """Stop accepting, let calls in flight end, then close everything."""
        self._closing = True
        await self._exits.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_details: object) -> None:
        await self.aclose()

    def publish(self) -> None:
        """Tell all workers what has changed, if anything has."""
        state = self._state()
        if state == self._told:
            return
        self._told = state
        for hand in self._hands:
            if hand.session is not None:
                hand.session.channel.tell("state", state)

    # Inside

    def _state(self) -> State:
        control = self._control
        states = control.router.view.states
        return State(
            config=control.config,
            tenancy=control.tenancy,
            models=control.models,
            endpoints=control.fleet.endpoints,
            table_version=control.table_version,
            up=tuple(state.healthy for state in states),
            down=tuple(breaker.down for breaker in control.breakers),
            rooms=tuple(state.most_tokens for state in states),
        )

    def _facts(self) -> list[dict[str, Any]]:
        """Return what the diagnostics show of the workers."""
        return [
            {
                "pid": None if hand.process is None else hand.process.pid,
                "calls": 0 if hand.session is None else hand.session.calls,
                "starts": hand.starts,
            }
            for hand in self._hands
        ]

    async def _all_ready(self) -> None:
        end_s = time.monotonic() + _READY_S
        while not all(hand.session and hand.session.ready.is_set() for hand in self._hands):
            if time.monotonic() > end_s or any(hand.starts > 1 for hand in self._hands):
                raise EndpointFailed("a worker process did not start; its own words are above")
            await asyncio.sleep(0.02)

    async def _employ(self, hand: _Hand) -> None:
        """Keep a worker at a place."""
        pause_s = _LEAST_PAUSE_S
        while True:
            begun_s = time.monotonic()
            await self._one(hand)
            if self._closing:
                return
            if time.monotonic() - begun_s > _SOON_S:
                pause_s = _LEAST_PAUSE_S
            _log.warning("worker process ended", extra={"number": hand.number, "pause_s": pause_s})
            await asyncio.sleep(pause_s)
            pause_s = min(_MOST_PAUSE_S, 2 * pause_s)

    async def _one(self, hand: _Hand) -> None:
        """Run one worker process to its end."""
        mine, theirs = socket.socketpair()
        hand.starts += 1
        session = Session(self._control, self._desk, changed=self.publish)
        gone = asyncio.Event()
        session.channel = await Channel.over(mine, session.receive, gone.set)
        try:
            with theirs:
                fds = (self._listener.fileno(), theirs.fileno())
                hand.process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "runtime.processes.worker", *map(str, fds),
                    pass_fds=fds, stdin=asyncio.subprocess.DEVNULL,
                )  # fmt: skip
            certificate, key = self._tls
            self.publish()  # so that all know the same
            setup = Setup(
                state=self._state(), hub_path=self._hub_path, certificate=certificate, key=key
            )
            session.channel.tell("setup", setup)
            hand.session = session
            await gone.wait()
            await hand.process.wait()
        finally:
            hand.session = None
            session.channel.close()
            await session.end()

    async def _dismiss(self, tasks: list[asyncio.Task[None]]) -> None:
        """Let the workers finish what they have, then end them."""
        for hand in self._hands:
            _signal(hand, lambda process: process.terminate())
        left = [hand.process.wait() for hand in self._hands if hand.process is not None]
        # A little more than each gives its calls.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._control.config.drain_s + 5.0):
                await asyncio.gather(*left)
        for hand in self._hands:
            _signal(hand, lambda process: process.kill())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pulse(self) -> None:
        """Tell the workers what changed of the fleet and what others have heard of it."""
        heard: tuple[float, ...] = ()
        while True:
            await asyncio.sleep(PULSE_S)
            self.publish()
            now = tuple(self._control.guard.heard_s)
            if now != heard:
                heard = now
                for hand in self._hands:
                    if hand.session is not None:
                        hand.session.channel.tell("heard", heard)


def _signal(hand: _Hand, how: Callable[[asyncio.subprocess.Process], None]) -> None:
    if hand.process is not None and hand.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            how(hand.process)


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens where it was told to."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise InvalidInput(
            f"port {port} on {host} cannot be bound ({bind_problem(error)})",
            where="--port",
            remedy="check --host, stop what uses the port or choose another",
        ) from error
    return listener
