"""A live comparison: mock fleet and gateway as processes of their own, a LangGraph app in front.

Runs arrive open-loop: each starts at its own instant, whatever the system does. Between two
policies the caches are emptied and the gateway gets a fresh router, so that each starts equal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx

from planner.domain.errors import EndpointFailed, InvalidInput
from planner.domain.fleet import Fleet
from planner.domain.run import RunSpec

__all__ = ["Driven", "LiveServers", "app_environment", "check_ports", "drive"]

_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 15.0
_BAD_INPUT = 2
"""Exit code of our commands for a user's mistake."""
_LOOPBACK = ("127.0.0.1", "localhost")
_KEY_VARIABLE = "ALMANAC_ADMIN_KEY"


def check_ports(fleet: Fleet, fleet_file: Path, port: int) -> None:
    """Check that the mock endpoints and the gateway can listen where they are asked to.

    Without it a server that happens to listen there already would answer in their place, and be
    measured.

    Parameters
    ----------
    port
        Of the gateway.

    Raises
    ------
    InvalidInput
        If an endpoint has no address on this machine, or a port is taken.
    """
    wanted: list[tuple[str, int]] = []
    for endpoint in fleet.endpoints:
        where = f"{fleet_file}: worker {endpoint.id!r}: url"
        url = urlsplit(endpoint.url or "")
        if url.hostname not in _LOOPBACK:
            raise InvalidInput(
                f"{endpoint.url or 'none'} is not on this machine",
                where=where,
                remedy="mock endpoints are started there: use http://127.0.0.1:PORT",
            )
        wanted.append((where, url.port or 80))
    wanted.append(("--port", port))
    with contextlib.ExitStack() as opened:
        for where, number in wanted:
            # All stay open until the last is tried, so that a port named twice is found, too.
            one = opened.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind(("127.0.0.1", number))
                one.listen()
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or "a port is at most 65535"
                raise InvalidInput(
                    f"port {number} cannot be used ({reason})",
                    where=where,
                    remedy="stop what uses it, or name another port",
                ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launch:
    name: str
    arguments: tuple[str, ...]
    ready_urls: tuple[str, ...]
    log: Path


class LiveServers:
    """The mock fleet and the gateway in front of it, as a context manager.

    Parameters
    ----------
    fleet_file, fleet
        The fleet; its addresses are where the mock endpoints listen.
    port
        Port of the gateway on loopback.
    dilation
        Model seconds per wall second, the same in mocks and gateway.
    stream_interval
        Tokens per streamed chunk.
    noise_cv
        Coefficient of variation of the mocks' step times, >= 0.
    seed
        Of the mocks' answers and noise.
    gateway_arguments
        Further arguments of `almanac serve`.
    folder
        Receives the two logs.

    Raises
    ------
    InvalidInput
        If a process refuses its arguments or ports.
    EndpointFailed
        If a process ends or does not answer in time; the message holds the end of its log.
    """

    def __init__(
        self,
        fleet_file: Path,
        fleet: Fleet,
        *,
        port: int,
        dilation: float,
        stream_interval: int,
        noise_cv: float,
        seed: int,
        gateway_arguments: Sequence[str],
        folder: Path,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._fleet = fleet
        self._processes: list[tuple[subprocess.Popen[bytes], _Launch]] = []
        self._key = secrets.token_urlsafe(24)
        self._http = httpx.Client(timeout=10.0, trust_env=False)
        self._launches = (
            _Launch(
                name="mock fleet",
                arguments=(
                    "mock-fleet", str(fleet_file), "--dilation", str(dilation),
                    "--stream-interval", str(stream_interval), "--noise-cv", str(noise_cv),
                    "--seed", str(seed),
                ),
                ready_urls=tuple(f"{one.url}/health" for one in fleet.endpoints),
                log=folder / "mock-fleet.log",
            ),
            _Launch(
                name="gateway",
                arguments=(
                    "serve", str(fleet_file), "--port", str(port), "--dilation", str(dilation),
                    "--admin-key-env", _KEY_VARIABLE, *gateway_arguments,
                ),
                ready_urls=(f"{self.url}/readiness",),
                log=folder / "gateway.log",
            ),
        )  # fmt: skip

    def __enter__(self) -> Self:
        try:
            for launch in self._launches:
                self._start(launch)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, launch: _Launch) -> None:
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        with launch.log.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own command with our own arguments
                [sys.executable, "-m", "planner.cli.main", *launch.arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, _KEY_VARIABLE: self._key},
                # A Ctrl-C goes to this process, which then stops the others in order.
                start_new_session=True,
            )
        self._processes.append((process, launch))
        end_s = time.monotonic() + _START_LIMIT_S
        for url in launch.ready_urls:
            while not self._answers(url):
                if process.poll() is not None or time.monotonic() > end_s:
                    said = launch.log.read_text(errors="replace").strip()[-800:]
                    state = (
                        f"ended with code {process.returncode}"
                        if process.returncode is not None
                        else f"did not answer at {url} within {_START_LIMIT_S:.0f} s"
                    )
                    if process.returncode == _BAD_INPUT:
                        # Its own words name the port or field and the remedy.
                        raise InvalidInput(said.removeprefix("error: "), where=launch.name)
                    raise EndpointFailed(f"the {launch.name} {state}; its log ends: {said}")
                time.sleep(0.05)

    def _answers(self, url: str) -> bool:
        try:
            return self._http.get(url).status_code == 200
        except httpx.HTTPError:
            return False

    def admin(self, path: str, body: Mapping[str, Any]) -> None:
        """Post to an admin route of the gateway.

        Raises
        ------
        EndpointFailed
            If the gateway refuses.
        """
        answer = self._http.post(
            f"{self.url}/almanac/v1/{path}",
            json=body,
            headers={"authorization": f"Bearer {self._key}"},
        )
        if answer.status_code != 200:
            raise EndpointFailed(
                f"the gateway answered {answer.status_code} to {path}: {answer.text[:300]}"
            )

    def begin(self, policy: str, trace: Path) -> None:
        """Start afresh: empty caches, a new router under ``policy``, a new trace file."""
        for endpoint in self._fleet.endpoints:
            answer = self._http.post(f"{endpoint.url}/reset_prefix_cache")
            if answer.status_code != 200:
                raise EndpointFailed(
                    f"endpoint {endpoint.id} did not empty its cache ({answer.status_code})"
                )
        self.admin("policy", {"policy": policy})
        self.admin("trace", {"path": str(trace.resolve())})

    def end(self) -> None:
        """Close the present trace."""
        self.admin("trace", {"path": None})

    def close(self) -> None:
        """Stop both processes, the gateway first."""
        self._http.close()
        for process, _ in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process, _ in reversed(self._processes):
            try:
                process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()


@contextlib.contextmanager
def app_environment() -> Iterator[None]:
    """Keep the app's libraries from phoning home, and calls to this machine from any proxy."""
    wanted = dict.fromkeys(("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"), "false")
    if getproxies().keys() - {"no"}:  # else langchain-openai warns of a proxy that is none
        for name in ("NO_PROXY", "no_proxy"):
            wanted[name] = ",".join(filter(None, (os.environ.get(name), *_LOOPBACK)))
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass(frozen=True, slots=True, kw_only=True)
class Driven:
    """How the runs of one policy and seed went.

    Parameters
    ----------
    failed
        Runs that raised or were cut off.
    error
        What the first of them raised, in arrival order; empty if none did.
    late_s
        Largest lateness of a start, wall seconds.
    """

    failed: int
    error: str
    late_s: float


async def drive(
    launch: Callable[[RunSpec], Any],
    runs: Sequence[RunSpec],
    *,
    dilation: float,
    limit_s: float,
) -> Driven:
    """Start each run at its arrival and wait for all of them.

    Parameters
    ----------
    launch
        Returns an awaitable that executes a run to its end.
    dilation
        Model seconds per wall second.
    limit_s
        Wall seconds after which what is left is cancelled and counted as failed.
    """
    loop = asyncio.get_running_loop()
    start_s = loop.time() + 0.05
    late_s = 0.0

    async def one(run: RunSpec) -> None:
        nonlocal late_s
        due_s = start_s + run.arrival_s / dilation
        await asyncio.sleep(max(0.0, due_s - loop.time()))
        late_s = max(late_s, loop.time() - due_s)
        await launch(run)

    tasks = [asyncio.create_task(one(run)) for run in runs]
    try:
        await asyncio.wait(tasks, timeout=limit_s)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    return Driven(
        failed=len(errors),
        error=f"{type(errors[0]).__name__}: {errors[0]}"[:300] if errors else "",
        late_s=late_s,
    )
