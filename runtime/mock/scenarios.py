"""Faults of one endpoint of a mock fleet, played against whatever routes in front of it.

Nothing here knows the router: calls go to one address as any client sends them, faults to the mock
fleet's own routes. So the same scenarios judge this gateway and others side by side.

A scenario is played in three parts by clients that each send one call after the other: until all
endpoints are warm; from the fault on, for as long as detection may take; and then for a number of
calls that hardly any of should still reach the bad endpoint.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

__all__ = ["SCENARIOS", "Attempts", "Load", "Outcome", "Scenario", "Score", "attempts_at", "play"]

Attempts = Callable[[], Awaitable[float]]
"""Returns how many attempts the bad endpoint has been sent so far."""

_DONE = b"data: [DONE]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What happens to one endpoint.

    Parameters
    ----------
    name, meaning
        For people.
    fault
        As the fault routes of a mock endpoint read it; it begins at once and lasts.
    cuts
        Whether answers under way may be lost: what the client has of them cannot be taken back.
    """

    name: str
    meaning: str
    fault: Mapping[str, Any]
    cuts: bool = False


SCENARIOS: Mapping[str, Scenario] = {
    one.name: one
    for one in (
        Scenario(
            name="killed",
            meaning="its process is killed in the middle of answers and stays away",
            fault={"kind": "crash", "for_s": None},
            cuts=True,
        ),
        Scenario(
            name="hung",
            meaning="it takes requests and sends nothing; its health check stays well",
            fault={"kind": "hang", "for_s": None},
            cuts=True,
        ),
        Scenario(
            name="errors",
            meaning="it answers 500 at once; its health check stays well",
            fault={"kind": "http_500"},
        ),
        Scenario(
            name="slow",
            meaning="every step takes ten times as long",
            fault={"kind": "straggler", "factor": 10},
        ),
        Scenario(
            name="cut",
            meaning="connections are reset in the middle of answers, and refused from then on",
            fault={"kind": "network_cut", "for_s": None},
            cuts=True,
        ),
    )
}
"""Name -> scenario."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The calls of a scenario.

    Parameters
    ----------
    model
        Asked for by each call.
    clients
        Calls under way at a time.
    output_tokens
        Of each answer.
    warm_calls, later_calls
        Calls before the fault, and after its detection.
    detect_s
        Wall seconds that detection may take.
    limit_s
        Wall seconds after which a client gives an answer up: it is lost.
    """

    model: str
    clients: int = 6
    output_tokens: int = 16
    warm_calls: int = 150
    later_calls: int = 250
    detect_s: float = 1.0
    limit_s: float = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one client saw of one call.

    Parameters
    ----------
    status
        ``ok``; ``refused`` (an error instead of an answer); ``error_event`` (an answer that ended
        with the API's error event); ``broken`` (one that ended in any other way); ``lost``
        (nothing more came for the client's whole patience).
    began
        Whether a part of the answer had come.
    took_s
        Wall seconds from sending to the end.
    detail
        What the client was told instead.
    """

    status: str
    began: bool
    took_s: float
    detail: str = ""


@dataclass(slots=True, kw_only=True)
class Score:
    """How a scenario went.

    Parameters
    ----------
    calls, ok
        From the fault on: all, and those answered whole.
    refused, lost, broken
        From the fault on: calls that failed in a way that none may.
    error_events
        Calls cut off in the middle and told so.
    slowest_error_s
        Longest time from sending such a call to its error event, wall seconds.
    later_calls, later_attempts
        After detection: calls, and attempts that the bad endpoint was sent.
    details
        What clients were told, a few.
    """

    calls: int = 0
    ok: int = 0
    refused: int = 0
    lost: int = 0
    broken: int = 0
    error_events: int = 0
    slowest_error_s: float = 0.0
    later_calls: int = 0
    later_attempts: float = 0.0
    details: list[str] = field(default_factory=list)

    @property
    def later_share(self) -> float:
        """Attempts at the bad endpoint per call, after detection."""
        return self.later_attempts / self.later_calls if self.later_calls else 0.0

    def add(self, outcome: Outcome) -> None:
        """Count a call."""
        self.calls += 1
        if outcome.status == "ok":
            self.ok += 1
            return
        if len(self.details) < 5:
            self.details.append(f"{outcome.status}: {outcome.detail}"[:300])
        if outcome.status == "error_event" and outcome.began:
            self.error_events += 1
            self.slowest_error_s = max(self.slowest_error_s, outcome.took_s)
        elif outcome.status == "broken" and outcome.began:
            self.broken += 1
        elif outcome.status == "lost":
            self.lost += 1
        else:
            self.refused += 1


async def play(
    scenario: Scenario,
    load: Load,
    *,
    router_url: str,
    fault_url: str,
    victim: str,
    attempts: Attempts,
    detected: Callable[[], Awaitable[object]] | None = None,
) -> Score:
    """Play a scenario and return how it went; the fault is taken back at the end.

    Parameters
    ----------
    router_url
        Base address of what is judged.
    fault_url
        Base address of a mock endpoint other than the victim; it passes the fault on.
    victim
        Id of the endpoint that has the fault.
    attempts
        See `attempts_at` for a count that the mock endpoint itself keeps.
    detected
        Returns once the router leaves the endpoint out, for those who can look inside it; without
        it that may take ``load.detect_s``.
    """
    run = _Run(load, router_url)
    worker = {"worker": victim}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:
        clients = [asyncio.create_task(run.client(http, number)) for number in range(load.clients)]
        try:
            await run.until(load.warm_calls)
            run.score = Score()
            begin = http.post(f"{fault_url}/mock/faults", json=dict(scenario.fault), params=worker)
            async with begin as answer:
                answer.raise_for_status()
            await (asyncio.sleep(load.detect_s) if detected is None else detected())
            before, calls = await attempts(), run.ended
            await run.until(calls + load.later_calls)
            run.score.later_attempts = await attempts() - before
            run.score.later_calls = run.ended - calls
            run.stopping = True
            await asyncio.gather(*clients)
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            async with http.delete(f"{fault_url}/mock/faults", params=worker):
                pass
    return run.score


async def attempts_at(address: str) -> float:
    """Return the inference requests that a mock endpoint has answered or seen given up.

    0 for one that is off the network: nothing reaches it.
    """
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as http,
            http.get(f"{address}/metrics") as answer,
        ):
            text = await answer.text()
    except (aiohttp.ClientError, TimeoutError):
        return 0.0
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith('http_requests_total{handler="/v1/')
    )


class _Run:
    """The clients of one scenario."""

    def __init__(self, load: Load, router_url: str) -> None:
        self._load = load
        self._url = f"{router_url}/v1/chat/completions"
        self._ended = asyncio.Condition()
        self.score = Score()
        self.ended = 0
        self.stopping = False

    async def until(self, calls: int) -> None:
        """Wait until so many calls have ended."""
        async with self._ended:
            await self._ended.wait_for(lambda: self.ended >= calls)

    async def client(self, http: aiohttp.ClientSession, number: int) -> None:
        """Send one call after the other; every third is not streamed."""
        turn = 0
        while not self.stopping:
            turn += 1
            outcome = await self._call(http, f"client {number} call {turn}", turn % 3 != 0)
            self.score.add(outcome)
            self.ended += 1
            async with self._ended:
                self._ended.notify_all()

    async def _call(self, http: aiohttp.ClientSession, text: str, streams: bool) -> Outcome:
        load = self._load
        body = {
            "model": load.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": load.output_tokens,
            "stream": streams,
            "vllm_xargs": {"mock_output_tokens": load.output_tokens},
        }
        sent_s = time.perf_counter()
        status, detail, began = "lost", "", False
        try:
            async with (
                asyncio.timeout(load.limit_s),
                http.post(self._url, json=body) as answer,
            ):
                if answer.status != 200:
                    status, detail = "refused", f"{answer.status} {(await answer.text())[:200]}"
                elif not streams:
                    await answer.read()
                    status = "ok"
                else:
                    status = "broken"
                    async for line in answer.content:
                        began = began or line.startswith(b"data:")
                        if line.startswith(b'data: {"error"'):
                            status = "error_event"
                            detail = str(json.loads(line[6:])["error"]["message"])
                        elif line.startswith(_DONE) and status == "broken":
                            status = "ok"
        except TimeoutError:
            status = "lost"
        except aiohttp.ClientError as error:
            status, detail = ("broken" if began else "refused"), repr(error)
        return Outcome(
            status=status, began=began, took_s=time.perf_counter() - sent_s, detail=detail
        )
