"""Sends workflow graphs and lifecycle events to the gateway, in the background.

Rules
-----
* The application never waits and never fails because of this module: `emit` appends to a bounded
  queue, one daemon thread sends, and whatever cannot be sent is dropped and counted.
* Workflow graphs go first and are kept until the gateway has taken them; events may be lost.
* A gateway without these routes (404, 405, 501) is asked no more; after any other failure the
  thread waits, longer each time.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import httpx

__all__ = ["Reporter"]

_log = logging.getLogger(__name__)

_BATCH = 256
_EXIT_S = 0.5
"""How long the end of the process may wait for the last events."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_NOT_OURS = {404, 405, 501}

Answer = Literal["taken", "retry", "invalid", "refused"]


class Reporter:
    """A bounded queue and one sender thread, started by the first thing to send.

    Parameters
    ----------
    gateway
        Base address, ``http://host:port``; a trailing ``/v1`` is dropped.
    api_key
        Sent as bearer key; None sends none.
    capacity
        Events kept while they cannot be sent; the oldest go first.
    timeout_s
        For one request, seconds.
    transport
        HTTP transport, for tests; None for the network.

    Raises
    ------
    ValueError
        If the gateway is not an http address.
    """

    def __init__(
        self,
        gateway: str,
        *,
        api_key: str | None = None,
        capacity: int = 10_000,
        timeout_s: float = 2.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if not gateway.startswith(("http://", "https://")):
            raise ValueError(f"gateway={gateway!r}: write http://host:port")
        self._base = gateway.rstrip("/").removesuffix("/v1")
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._timeout_s, self._transport = timeout_s, transport
        self._events: deque[Mapping[str, Any]] = deque()
        self._capacity = capacity
        self._workflows: deque[Mapping[str, Any]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._refused = False
        self.sent = 0
        """Events the gateway has taken."""
        self.dropped = 0
        """Events that were lost."""

    def __repr__(self) -> str:
        return (
            f"<Reporter {self._base} queued={len(self._events)} sent={self.sent} "
            f"dropped={self.dropped}>"
        )

    def register(self, ir: Mapping[str, Any]) -> None:
        """Send a workflow graph, once."""
        self._put(self._workflows, ir)

    def emit(self, event: Mapping[str, Any]) -> None:
        """Queue one event; returns at once."""
        self._put(self._events, event)

    def _put(self, queue: deque[Mapping[str, Any]], item: Mapping[str, Any]) -> None:
        with self._changed:
            if self._refused or self._closing:
                self.dropped += queue is self._events
                return
            queue.append(item)
            if len(self._events) > self._capacity:
                self._events.popleft()
                self.dropped += 1
            # Also after a fork, which leaves the thread behind in the parent.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._send_all, name="almanac-events", daemon=True
                )
                self._thread.start()
                atexit.register(self.close, _EXIT_S)
            self._changed.notify_all()

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what is queued, for at most ``timeout_s`` seconds, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)
        atexit.unregister(self.close)

    async def aclose(self, timeout_s: float = 2.0) -> None:
        """`close` without blocking the event loop."""
        await asyncio.to_thread(self.close, timeout_s)

    def _send_all(self) -> None:
        pause_s = 0.0
        with httpx.Client(
            base_url=self._base,
            headers=self._headers,
            timeout=self._timeout_s,
            transport=self._transport,
        ) as client:
            while (work := self._next(pause_s)) is not None:
                workflow, events, last_try = work
                if workflow is not None:
                    answer = self._post(client, "/almanac/v1/workflows", workflow)
                else:
                    answer = self._post(client, "/almanac/v1/events", {"events": events})
                self._settle(workflow, len(events), answer, last_try=last_try)
                pause_s = min(max(_FIRST_PAUSE_S, 2 * pause_s), _LONGEST_PAUSE_S)
                if answer != "retry":
                    pause_s = 0.0

    def _next(
        self, pause_s: float
    ) -> tuple[Mapping[str, Any] | None, list[Mapping[str, Any]], bool] | None:
        """Wait for a workflow or some events, and whether it is the last try; None to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing, pause_s)
            self._changed.wait_for(lambda: self._closing or self._queued())
            if not self._queued():
                return None
            if self._workflows:
                return self._workflows[0], [], self._closing
            count = min(_BATCH, len(self._events))
            return None, [self._events.popleft() for _ in range(count)], self._closing

    def _settle(
        self, workflow: Mapping[str, Any] | None, events: int, answer: Answer, *, last_try: bool
    ) -> None:
        with self._changed:
            if answer == "taken":
                self.sent += events
            else:
                self.dropped += events
            if workflow is not None and answer != "retry":
                self._workflows.popleft()
            if answer == "refused" or (answer == "retry" and last_try):
                self._refused = True
                self.dropped += len(self._events)
                self._events.clear()
                self._workflows.clear()

    def _queued(self) -> bool:
        return bool(self._workflows or self._events)

    def _post(self, client: httpx.Client, path: str, body: Mapping[str, Any]) -> Answer:
        try:
            response = client.post(path, json=body)
        except (TypeError, ValueError) as error:
            _log.debug("not JSON", extra={"path": path, "error": repr(error)})
            return "invalid"
        except (httpx.HTTPError, OSError) as error:
            _log.debug("gateway not reached", extra={"path": path, "error": repr(error)})
            return "retry"
        if response.is_success:
            return "taken"
        _log.debug("gateway refused", extra={"path": path, "status": response.status_code})
        if response.status_code in _NOT_OURS:
            return "refused"
        return "retry" if response.status_code >= 500 or response.status_code == 429 else "invalid"
