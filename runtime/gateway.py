"""The gateway's HTTP side: one port, the OpenAI routes, lifecycle events, and admin routes.

============================================  ====================================================
route                                         purpose
============================================  ====================================================
POST /v1/chat/completions, /v1/completions,   scheduled and passed on; unknown fields untouched
/v1/embeddings, /v1/responses
GET /v1/models, /v1/models/{id}               the fleet's models
GET /health, /healthz, /liveness, /readiness  alive; the last one 503 until an endpoint is up
GET /version, /metrics, /openapi.json         versions; Prometheus text; these routes
POST /almanac/v1/workflows                    register a workflow graph
POST /almanac/v1/events                       run, tool and branch events
POST /finish_session                          {"session_id": ...}: its runs are over
GET /almanac/v1/diagnostics,                  (admin) what the router knows
/scheduling/diagnostics
GET /almanac/v1/live, runs/{id}               (admin) the live view's facts, a run call by call
GET /dashboard                                the live view's page, where it is asked for
GET, POST /workers, DELETE /workers/{id}      (admin) list, add, remove endpoints
POST, DELETE /workers/{id}/drain              (admin) send an endpoint no new calls, or again
POST /almanac/v1/policy, table, trace         (admin) switch policy, swap table, open a trace
============================================  ====================================================

Admin routes need ``authorization: Bearer <key>`` and are off without a configured key.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from aiohttp import ClientSession, web

from planner import __version__
from planner.dispatch.table import DispatchTable
from planner.domain.errors import InvalidInput
from planner.domain.fleet import Fleet, read_endpoint
from planner.domain.workflow import Workflow
from runtime.control import Control
from runtime.dashboard.live import LiveView
from runtime.dashboard.page import UNCACHED, page_routes
from runtime.desk import LocalDesk
from runtime.diagnostics import diagnostics, metrics_text
from runtime.endpoints import EndpointLink
from runtime.fleets import FleetChange, present
from runtime.forwarding import Forwarder
from runtime.inference import INFERENCE, errors, infer, is_admin, limit_headers, open_runner
from runtime.openapi import openapi
from runtime.prometheus import CONTENT_TYPE
from runtime.state import Restored, StateFile
from runtime.transport import bind_problem, open_session
from runtime.wire import ApiError

__all__ = ["Gateway", "model_card", "tls_context"]

_log = logging.getLogger(__name__)

_EXPIRE_EVERY_S = 1.0


class Gateway:
    """A running gateway; an async context manager.

    Parameters
    ----------
    control
        Its state; closed with the gateway.
    host, port
        Where to listen; port 0 takes a free one.
    tls
        See `tls_context`; None serves plain HTTP.
    state, state_interval_s
        Where to keep what is learned across restarts, and how often, wall seconds; or None.
    table_made_s
        See `StateFile.load`.

    Attributes
    ----------
    restored
        What came back from the state file at the start.
    """

    def __init__(
        self,
        control: Control,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        tls: ssl.SSLContext | None = None,
        state: StateFile | None = None,
        state_interval_s: float = 5.0,
        table_made_s: float | None = None,
    ) -> None:
        self.control = control
        self._state = state
        self._state_interval_s = state_interval_s
        self._table_made_s = table_made_s
        self._serving = False
        self.restored = Restored()
        self._tls = tls
        self._host = host
        self._port = port
        self._runner: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._exits = contextlib.AsyncExitStack()
        self._links: list[EndpointLink] = []
        self._view = LiveView(control)
        self._session: ClientSession
        self.forwarder: Forwarder

    @property
    def address(self) -> str:
        """Base address, once started."""
        assert self._runner is not None  # noqa: S101 - documented
        host, port, *_ = self._runner.addresses[0]
        return f"{'https' if self._tls else 'http'}://{host}:{port}"

    async def start(self, site: Callable[[web.AppRunner], web.BaseSite] | None = None) -> list[str]:
        """Look at all endpoints once, start listening, and go on looking after them.

        Parameters
        ----------
        site
            Makes what to listen on instead of host and port.

        Returns
        -------
        list of str
            Ids of the endpoints that did not answer; they are down until a probe succeeds.

        Raises
        ------
        InvalidInput
            If the port cannot be bound; nothing stays open.
        """
        try:
            missing = await self._reach()
            runner = self._runner = await open_runner(self.app(), self.control.config)
            self._exits.push_async_callback(runner.cleanup)
            if site is not None:
                await site(runner).start()
            else:
                await self._listen(runner)
            self._watch()
        except BaseException:
            await self.aclose()
            raise
        return missing

    async def _listen(self, runner: web.AppRunner) -> None:
        try:
            await web.TCPSite(runner, self._host, self._port, ssl_context=self._tls).start()
        except OSError as error:
            raise InvalidInput(
                f"port {self._port} on {self._host} cannot be bound ({bind_problem(error)})",
                where="--port",
                remedy="check --host, stop what uses the port or choose another",
            ) from error

    async def open(self) -> list[str]:
        """Do all of `start` but listen: the router of a process that has no port.

        Whatever happens, `aclose` gives back what was taken.
        """
        missing = await self._reach()
        self._watch()
        return missing

    async def _reach(self) -> list[str]:
        """Make the links and look at all endpoints once; return those that did not answer."""
        config = self.control.config
        self._exits.callback(self.control.close)
        self._exits.callback(self._save_state)
        session = self._session = await self._exits.enter_async_context(
            open_session(
                connect_timeout_s=config.connect_timeout_s,
                read_timeout_s=config.read_timeout_s,
            )
        )
        self._links = [EndpointLink(endpoint, session) for endpoint in self.control.fleet.endpoints]
        self.forwarder = Forwarder(LocalDesk(self.control), self._links)
        answers = await asyncio.gather(*(link.healthy() for link in self._links))
        if self._state is not None:
            # Whether an endpoint still is the process it was decides about its cache.
            await self._scrape()
            self.restored = self._state.load(table_made_s=self._table_made_s)
        missing = []
        for index, well in enumerate(answers):
            if not well:
                self.control.endpoint_failed(index, "silent at start", unreachable=True)
                missing.append(str(self._links[index].endpoint.id))
        return missing

    def _save_state(self) -> None:
        # One that never got to serve has nothing to say, and the file may be another's.
        if self._state is not None and self._serving:
            try:
                self._state.save()
            except InvalidInput as error:
                _log.error("state not written", extra={"why": str(error)})

    def _watch(self) -> None:
        self._serving = True
        jobs = [self._probe_loop(), self._expire_loop(), self._scrape_loop()]
        if self._state is not None:
            jobs.append(self._state.keep(self._state_interval_s))
        self._tasks += [asyncio.create_task(job) for job in jobs]

    def set_fleet(self, wanted: Fleet) -> FleetChange:
        """Serve with these endpoints from now on; new ones are taken up once they are well.

        Raises
        ------
        InvalidInput
            See `Control.set_fleet`; nothing is changed.
        """
        change = self.control.set_fleet(wanted)
        for index in change.moved:
            endpoint = change.fleet.endpoints[index]
            if index == len(self._links):
                self._links.append(EndpointLink(endpoint, self._session))
            else:
                self._links[index] = EndpointLink(endpoint, self._session)
            self.control.endpoint_failed(index, "not asked yet", unreachable=True)
        return change

    async def aclose(self) -> None:
        """Stop listening, let calls in flight end (``drain_s``), then close everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self._exits.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_details: object) -> None:
        await self.aclose()

    def app(self) -> web.Application:
        """Return the routes."""
        app = web.Application(
            client_max_size=self.control.config.max_body_bytes,
            middlewares=[errors, limit_headers(lambda: self.control.config)],
        )
        app.add_routes([web.post(path, self._infer) for path in INFERENCE])
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.get("/v1/models/{id:.+}", self._model),
                *(web.get(path, self._health) for path in ("/health", "/healthz", "/liveness")),
                web.post("/finish_session", self._finish_session),
                web.get("/readiness", self._readiness),
                web.get("/version", self._version),
                web.get("/openapi.json", self._openapi),
                web.get("/metrics", self._metrics),
                web.post("/almanac/v1/workflows", self._workflows),
                web.post("/almanac/v1/events", self._events),
                web.get("/almanac/v1/diagnostics", self._admin(self._diagnostics)),
                web.get("/scheduling/diagnostics", self._admin(self._diagnostics)),
                web.get("/almanac/v1/live", self._admin(self._live)),
                web.get("/almanac/v1/runs/{id:.+}", self._admin(self._run)),
                web.get("/workers", self._admin(self._workers)),
                web.post("/workers", self._admin(self._add_worker)),
                web.delete("/workers/{id}", self._admin(self._remove_worker)),
                web.post("/workers/{id}/drain", self._admin(self._drain)),
                web.delete("/workers/{id}/drain", self._admin(self._undrain)),
                web.post("/almanac/v1/policy", self._admin(self._policy)),
                web.post("/almanac/v1/table", self._admin(self._table)),
                web.post("/almanac/v1/trace", self._admin(self._trace)),
            ]
        )
        if self.control.config.dashboard:
            app.add_routes(page_routes())
        return app

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        return await infer(request, self.forwarder)

    # Facts

    async def _models(self, _request: web.Request) -> web.Response:
        cards = [model_card(model) for model in self.control.models]
        return web.json_response({"object": "list", "data": cards})

    async def _model(self, request: web.Request) -> web.Response:
        model = request.match_info["id"]
        if model not in self.control.models:
            raise ApiError(404, f"The model `{model[:200]}` does not exist.", param="model")
        return web.json_response(model_card(model))

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _readiness(self, _request: web.Request) -> web.Response:
        if not self.control.ready:
            raise ApiError(503, "No endpoint is up.", retry_after_s=self.control.retry_after_s())
        return web.Response()

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": __version__})

    async def _openapi(self, _request: web.Request) -> web.Response:
        return web.json_response(openapi(__version__))

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=metrics_text(self.control).encode(), headers={"Content-Type": CONTENT_TYPE}
        )

    # Workflows and events

    async def _workflows(self, request: web.Request) -> web.Response:
        self.control.tenancy.of(request.headers)
        workflow = Workflow.from_json(await _json(request))
        self.control.add_workflow(workflow)
        return web.json_response({"workflow": workflow.name, "hash": workflow.content_hash})

    async def _events(self, request: web.Request) -> web.Response:
        tenant = self.control.tenancy.of(request.headers)
        document = await _json(request)
        events = document.get("events")
        if not isinstance(events, list):
            raise ApiError(400, 'Write {"events": [...]}.', param="events")
        taken = self.control.reports.take(events, tenant)
        return web.json_response({"taken": taken, "ignored": len(events) - taken})

    async def _finish_session(self, request: web.Request) -> web.Response:
        tenant = self.control.tenancy.of(request.headers)
        document = await _json(request)
        named = (document.get(field) for field in ("session_id", "run_id", "program_id"))
        name = next(filter(None, named), None)
        if not isinstance(name, str):
            raise ApiError(400, 'Write {"session_id": "..."}.', param="session_id")
        return web.json_response({"ended": self.control.lifecycle.end_session(name, tenant)})

    # Admin

    def _admin(
        self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return the handler behind the key."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            if self.control.config.admin_key is None:
                raise ApiError(403, "Admin routes are off; start the gateway with an admin key.")
            if not self._is_admin(request):
                raise ApiError(401, "Wrong or missing admin key.")
            return await handler(request)

        return guarded

    def _is_admin(self, request: web.Request) -> bool:
        return is_admin(request, self.control.config)

    async def _diagnostics(self, _request: web.Request) -> web.Response:
        return web.json_response(diagnostics(self.control))

    async def _live(self, _request: web.Request) -> web.Response:
        return web.json_response(await self._view.facts(), headers=UNCACHED)

    async def _run(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        facts = self._view.run(name)
        if facts is None:
            raise ApiError(404, f"There is no run `{name[:200]}`, or it is forgotten.", param="id")
        return web.json_response(facts, headers=UNCACHED)

    async def _workers(self, _request: web.Request) -> web.Response:
        return web.json_response({"workers": diagnostics(self.control)["endpoints"]})

    async def _add_worker(self, request: web.Request) -> web.Response:
        endpoint = read_endpoint(await _json(request), "worker")
        here = present(self.control.fleet, self.control.absent)
        if any(one.id == endpoint.id for one in here.endpoints):
            raise ApiError(409, f"There is a worker `{endpoint.id[:200]}` already.", param="id")
        self.set_fleet(replace(here, endpoints=(*here.endpoints, endpoint)))
        return web.json_response({"id": endpoint.id}, status=201)

    async def _remove_worker(self, request: web.Request) -> web.Response:
        index = self._worker(request)
        here = present(self.control.fleet, self.control.absent)
        gone = self.control.fleet.endpoints[index].id
        rest = tuple(one for one in here.endpoints if one.id != gone)
        if not rest:
            raise ApiError(409, "The last worker cannot be removed; drain it instead.")
        self.set_fleet(replace(here, endpoints=rest))
        return web.json_response({"id": gone})

    async def _drain(self, request: web.Request) -> web.Response:
        index = self._worker(request)
        self.control.drain(index)
        state = self.control.router.view.states[index]
        return web.json_response({"id": state.endpoint.id, "in_flight": state.in_flight})

    async def _undrain(self, request: web.Request) -> web.Response:
        index = self._worker(request)
        self.control.undrain(index)
        return web.json_response({"id": self.control.fleet.endpoints[index].id})

    def _worker(self, request: web.Request) -> int:
        """Return the index of the worker that a path names."""
        name = request.match_info["id"]
        for index, endpoint in enumerate(self.control.fleet.endpoints):
            if endpoint.id == name and index not in self.control.absent:
                return index
        raise ApiError(404, f"There is no worker `{name[:200]}`.", param="id")

    async def _policy(self, request: web.Request) -> web.Response:
        text = (await _json(request)).get("policy")
        if not isinstance(text, str):
            raise ApiError(400, 'Write {"policy": "name:key=value"}.', param="policy")
        self.control.set_policy(text)
        return web.json_response({"policy": text})

    async def _table(self, request: web.Request) -> web.Response:
        table = DispatchTable.from_json(await _json(request))
        self.control.set_table(table)
        return web.json_response({"version": table.version, "rows": len(table.rows)})

    async def _trace(self, request: web.Request) -> web.Response:
        document = await _json(request)
        path = document.get("path")
        header = document.get("header", {})
        if not (path is None or (isinstance(path, str) and path)) or not isinstance(header, dict):
            raise ApiError(400, 'Write {"path": "file.jsonl"}, or null to stop.', param="path")
        self.control.set_trace(None if path is None else Path(path), **header)
        return web.json_response({"path": path})

    # Background

    async def _probe_loop(self) -> None:
        """Look after the health of endpoints: of those that are down, and now and then of all."""
        while True:
            await asyncio.sleep(self.control.config.probe_interval_s)
            await asyncio.gather(*(self._probe(index) for index in self.control.to_probe()))

    async def _probe(self, index: int) -> None:
        link = self._links[index]
        well = await link.healthy()
        boot_s = await link.booted_s() if well else None
        if link is self._links[index]:  # else it was replaced meanwhile
            self.control.endpoint_probed(index, well=well, boot_s=boot_s)

    async def _scrape_loop(self) -> None:
        """Read what the engines say of themselves."""
        while True:
            every_s = self.control.config.scrape_interval_s
            await asyncio.sleep(every_s or _EXPIRE_EVERY_S)
            if every_s:
                await self._scrape()

    async def _scrape(self) -> None:
        control = self.control
        here = [i for i in range(len(self._links)) if i not in control.absent]
        await asyncio.gather(
            *(
                control.scraper.scrape(
                    index,
                    self._links[index],
                    control.clock.now_s(),
                    pool_tokens=float(control.fleet.endpoints[index].kv_tokens),
                )
                for index in here
            )
        )

    async def _expire_loop(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_S)
            self.control.lifecycle.expire()


def tls_context(certificate: str, key: str) -> ssl.SSLContext:
    """Return what serves HTTPS with a certificate chain and its key (PEM files).

    Raises
    ------
    InvalidInput
        If a file cannot be read or they do not belong together.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(
            f"certificate {certificate} and key {key} cannot be used ({error})",
            where="tls",
            remedy="give PEM files that belong together",
        ) from error
    return context


async def _json(request: web.Request) -> dict[str, Any]:
    try:
        document = json.loads(await request.read())
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return document


def model_card(model: str) -> dict[str, Any]:
    """Return a model as ``GET /v1/models`` lists it."""
    return {"id": model, "object": "model", "created": 0, "owned_by": "almanac"}
