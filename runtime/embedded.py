"""The router in the application's own process: no gateway, requests go straight to the endpoints.

One thread with an event loop does what the gateway does, without a port: it decides, forwards,
tries again elsewhere before the first byte, learns, looks after endpoints and writes the trace.
Clients reach it through transports (`runtime.inprocess`), so what they send is what they would
send to a gateway; the host of their base address does not matter.

Without a router in common, processes do not see each other's load: use the gateway where several
processes share a fleet.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any, Self, TypeVar

from planner.dispatch.table import DispatchTable, load_table
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable, load_estimates
from planner.domain.fleet import Fleet, load_fleet
from planner.domain.workflow import Workflow, load_workflow
from runtime.config import GatewayConfig
from runtime.control import Control
from runtime.diagnostics import diagnostics
from runtime.gateway import Gateway, model_card
from runtime.inference import INFERENCE, KEPT_BACK
from runtime.inprocess import Deliver, Failure, Head, Pipe, Transports, transports
from runtime.links import Answer, ClientGone
from runtime.wire import ApiError

__all__ = ["BASE_URL", "EmbeddedRouter", "embed"]

_log = logging.getLogger(__name__)

BASE_URL = "http://almanac.invalid/v1"
"""For clients that want a base address; nothing is ever looked up or sent there."""

T = TypeVar("T")


def embed(
    fleet: Fleet | Path | str,
    *,
    policy: str = "almanac",
    table: DispatchTable | Path | str | None = None,
    estimates: EstimateTable | Path | str | None = None,
    workflows: Iterable[Workflow | Path | str] = (),
    trace: Path | str | None = None,
    config: GatewayConfig | None = None,
) -> EmbeddedRouter:
    """Start a router in this process and return it; close it, or use it as a context manager.

    It returns when every endpoint was looked at once, two seconds at most: call it before an event
    loop runs, or by ``asyncio.to_thread``.

    Parameters
    ----------
    fleet
        A fleet whose endpoints have addresses, or its file.
    policy
        ``name`` or ``name:key=value,...``, as for ``almanac serve``.
    table, estimates, workflows
        Dispatch table, forecasts and graphs known from the start, or their files.
    trace
        File to which what happens is appended.
    config
        Settings of the router, which are those of the gateway.

    Raises
    ------
    InvalidInput
        If a file or value is wrong, an endpoint has no address, or policy or table do not fit;
        nothing stays open.
    """
    control = Control(
        load_fleet(Path(fleet)) if isinstance(fleet, (str, Path)) else fleet,
        policy=policy,
        table=load_table(Path(table)) if isinstance(table, (str, Path)) else table,
        estimates=load_estimates(Path(estimates))
        if isinstance(estimates, (str, Path))
        else estimates,
        workflows=[
            load_workflow(Path(one)) if isinstance(one, (str, Path)) else one for one in workflows
        ],
        config=config,
    )
    if trace is not None:
        control.set_trace(Path(trace))
    router = EmbeddedRouter(control)
    router.start()
    return router


class EmbeddedRouter:
    """A router on a thread of its own; a context manager.

    Parameters
    ----------
    control
        Its state, closed with it; used by nobody else.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._gateway = Gateway(control)
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="almanac-router", daemon=True)
        self._started: Future[list[str]] = Future()
        self._closing = asyncio.Event()
        self._closed = False
        self._lock = threading.Lock()
        self._drain_s = control.config.drain_s
        self._requests: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._requests)} requests"
        return f"<EmbeddedRouter {self._control.fleet.name} {state}>"

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    def start(self) -> list[str]:
        """Look at all endpoints once and go on looking after them.

        Returns
        -------
        list of str
            Ids of the endpoints that did not answer; they are down until a probe succeeds.
        """
        self._thread.start()
        try:
            missing = self._started.result()
        except Exception:
            self._thread.join()
            raise
        atexit.register(self.close, drain_s=0.0)
        if missing:
            _log.warning("endpoints do not answer", extra={"endpoints": missing})
        return missing

    def close(self, drain_s: float | None = None) -> None:
        """Let requests in flight end, then close connections, trace and thread.

        Parameters
        ----------
        drain_s
            Seconds they are given, >= 0; the setting of that name if None.
        """
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            if drain_s is not None:
                self._drain_s = drain_s
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()
        atexit.unregister(self.close)

    async def aclose(self, drain_s: float | None = None) -> None:
        """`close` without blocking the event loop."""
        await asyncio.to_thread(self.close, drain_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_details: object) -> None:
        await self.aclose()

    # Clients

    def openai_client_kwargs(self) -> dict[str, Any]:
        """Return ``base_url``, ``http_client`` and ``http_async_client`` for ``ChatOpenAI``.

        Requests carry the identity of the LangGraph node that makes them. For OpenAI's own
        clients use ``http_client`` or ``http_async_client`` as their ``http_client``.

        Raises
        ------
        ImportError
            If the ``openai`` package is not installed.
        """
        from runtime.langgraph.identity import openai_client_kwargs

        return {"base_url": BASE_URL, **openai_client_kwargs(transports=self.transports)}

    def transports(self, library: ModuleType | None = None) -> Transports:
        """Return transports for any client of ``httpx``, or of the library given."""
        return transports(self, library or importlib.import_module("httpx"))

    # What `instrument(graph, gateway=router)` tells

    def register(self, ir: Mapping[str, Any]) -> None:
        """Learn a workflow graph; one that is not valid is logged and left out."""
        try:
            workflow = Workflow.from_json(ir)
        except InvalidInput as error:
            _log.warning("workflow graph refused", extra={"error": str(error)})
            return
        self._soon(lambda: self._control.add_workflow(workflow))

    def emit(self, event: Mapping[str, Any]) -> None:
        """Take one lifecycle event; returns at once."""
        self._soon(lambda: self._control.reports.take([dict(event)]))

    # State

    def set_table(self, table: DispatchTable | Path | str) -> None:
        """Swap the dispatch table.

        Raises
        ------
        InvalidInput
            If it was made for another fleet; the old table stays.
        """
        fresh = load_table(Path(table)) if isinstance(table, (str, Path)) else table
        self._ask(lambda: self._control.set_table(fresh))

    def diagnostics(self) -> dict[str, Any]:
        """Return what the router knows and how good its forecasts are, JSON-ready."""
        return self._ask(lambda: diagnostics(self._control))

    # Serving; the coroutines of this part run on the router's loop

    def submit(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], deliver: Deliver
    ) -> Future[None]:
        """Start to answer a request; see `runtime.inprocess.Server`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the embedded router was closed")
            return asyncio.run_coroutine_threadsafe(
                self._answer(method, path, body, headers, Pipe(deliver)), self._loop
            )

    async def _answer(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], pipe: Pipe
    ) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - it runs as one
        self._requests.add(task)
        try:
            answer = await self._reply(method, path, body, headers, pipe)
            if answer is not None:
                pipe.put(Head(answer.status, answer.headers))
                pipe.put(answer.body)
            pipe.put(None)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            with contextlib.suppress(ClientGone):
                pipe.put(Failure("the request was cancelled, or the embedded router closed"))
            raise
        finally:
            self._requests.discard(task)

    async def _reply(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], pipe: Pipe
    ) -> Answer | None:
        """Return the answer, or None if it was streamed; every error becomes an error body."""
        try:
            if (method, path) == ("GET", "/v1/models"):
                cards = [model_card(model) for model in self._control.models]
                return _json(200, json.dumps({"object": "list", "data": cards}).encode())
            _check_route(method, path)
            passed_on = {n: v for n, v in headers.items() if n.lower() not in KEPT_BACK}
            return await self._gateway.forwarder.serve(path, body, headers, passed_on, pipe)
        except ApiError as error:
            refused = error
        except InvalidInput as error:
            refused = ApiError(400, str(error))
        except ClientGone:
            raise
        except Exception:  # noqa: BLE001 - the last resort; the log has the traceback
            _log.exception("internal error", extra={"path": path})
            if pipe.begun:
                pipe.put(Failure("internal error of the embedded router"))
                return None
            refused = ApiError(500, "Internal error of the router.")
        return _json(refused.status, refused.body, refused.headers)

    def _soon(self, action: Callable[[], object]) -> None:
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(action)

    def _ask(self, action: Callable[[], T]) -> T:
        async def asked() -> T:
            return action()

        with self._lock:
            if self._closed:
                raise RuntimeError("the embedded router was closed")
            answer = asyncio.run_coroutine_threadsafe(asked(), self._loop)
        return answer.result()

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            missing = await self._gateway.open()
            self._started.set_result(missing)
            await self._closing.wait()
            if self._requests:
                _, late = await asyncio.wait(self._requests, timeout=self._drain_s)
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)
        finally:
            with self._lock:
                self._closed = True
            await self._gateway.aclose()


def _check_route(method: str, path: str) -> None:
    if path not in INFERENCE:
        raise ApiError(404, "Not Found")
    if method != "POST":
        raise ApiError(405, "Method Not Allowed")


def _json(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, body, {"content-type": "application/json", **(headers or {})})
