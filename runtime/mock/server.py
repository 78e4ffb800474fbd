"""The HTTP side of the mock endpoints: one process, one port and one engine per endpoint.

Routes as in vLLM 0.33.0, plus ``GET /mock/stats``. Only what schedulers and clients need is
there; embeddings and the like answer 404.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
from aiohttp import web

from planner.domain.errors import InvalidInput
from planner.domain.fleet import Endpoint, Fleet
from planner.sim.engine import Engine, EngineConfig, EngineRequest
from planner.sim.steptime import RowStepTime
from runtime.clock import Clock
from runtime.mock.metrics import EngineMetrics
from runtime.mock.pacing import Answer, EngineDead, PacedEngine
from runtime.mock.protocol import (
    Limits,
    MockRequest,
    Writer,
    check_model,
    read_object,
    read_request,
    usage_json,
)
from runtime.mock.text import chat_tokens, prompt_tokens
from runtime.prometheus import CONTENT_TYPE
from runtime.transport import bind_problem
from runtime.wire import DONE, ApiError, sse

__all__ = ["MockConfig", "MockEndpoint", "MockFleet"]

_log = logging.getLogger(__name__)

_VERSION = "0.33.0"
_SSE = "text/event-stream; charset=utf-8"
_LARGEST_BODY = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MockConfig:
    """Settings of a mock fleet.

    Parameters
    ----------
    dilation
        Engine seconds per wall second, > 0.
    stream_interval
        Tokens per chunk after the first, >= 1.
    seed
        Of answers and noise.
    noise_cv
        Coefficient of variation of step times, >= 0.
    prompt_tokens_details
        Whether usage tells the cached tokens (off in vLLM unless asked for, on here).
    """

    dilation: float = 1.0
    stream_interval: int = 1
    seed: int = 0
    noise_cv: float = 0.0
    prompt_tokens_details: bool = True

    def __post_init__(self) -> None:
        if self.stream_interval < 1:
            raise InvalidInput(
                f"{self.stream_interval!r}", where="stream_interval", remedy="use 1 or more"
            )
        if not 0 <= self.noise_cv < 10:
            raise InvalidInput(f"{self.noise_cv!r}", where="noise_cv", remedy="use 0 to 10")


class MockEndpoint:
    """One endpoint: routes, engine and metrics.

    Parameters
    ----------
    endpoint
        From the fleet file.
    config, clock
        Shared by the fleet.
    rng
        For the engine's noise.
    """

    def __init__(
        self, endpoint: Endpoint, config: MockConfig, clock: Clock, rng: np.random.Generator
    ) -> None:
        self.endpoint = endpoint
        self.config = config
        engine_config = EngineConfig.from_endpoint(endpoint)
        engine = Engine(
            engine_config, RowStepTime(endpoint.latency), rng=rng, noise_cv=config.noise_cv
        )
        self.metrics = EngineMetrics(endpoint, engine)
        self.paced = PacedEngine(engine, clock, self._on_tokens)
        # vLLM refuses to start with a context its cache cannot hold; here the context shrinks.
        held = (engine_config.kv_blocks - 1) * engine_config.block_tokens
        self.limits = Limits(
            model=endpoint.model,
            max_model_len=min(endpoint.max_model_len, held),
            block_tokens=endpoint.block_tokens,
        )
        self._clock = clock
        self._ids = count(1)
        self._started = int(time.time())

    def app(self) -> web.Application:
        """Return the routes."""
        app = web.Application(client_max_size=_LARGEST_BODY)
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._guarded(self._chat)),
                web.post("/v1/completions", self._guarded(self._completions)),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
                web.get("/ping", self._health),
                web.post("/ping", self._health),
                web.get("/version", self._version),
                web.get("/metrics", self._metrics),
                web.post("/tokenize", self._guarded(self._tokenize)),
                web.post("/reset_prefix_cache", self._reset),
                web.get("/mock/stats", self._stats),
            ]
        )
        return app

    def stats(self) -> dict[str, Any]:
        """Return counters and the lateness of tokens, JSON-ready."""
        engine, lateness = self.paced.engine, self.paced.lateness
        return {
            "id": self.endpoint.id,
            "live": self.paced.live,
            "running": engine.num_running,
            "waiting": engine.num_waiting,
            "generation_tokens": engine.generation_tokens_total,
            "prefix_queries": engine.prefix_queries_total,
            "prefix_hits": engine.prefix_hits_total,
            "preemptions": engine.preemptions_total,
            "tokens_handed_out": lateness.total,
            "late_p50_ms": round(lateness.quantile(0.5) * 1e3, 3),
            "late_p99_ms": round(lateness.quantile(0.99) * 1e3, 3),
        }

    def _on_tokens(self, answer: Answer, tokens: int, gap_s: float | None) -> None:
        self.metrics.tokens(tokens, gap_s)
        if answer.finish_reason is not None:
            request = answer.request
            self.metrics.ended(request, answer.finish_reason, request.finish_s or 0.0)

    def _guarded(
        self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return the handler with `ApiError` turned into an answer."""

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except ApiError as error:
                return web.Response(
                    status=error.status, body=error.body, content_type="application/json"
                )

        return handle

    # Inference

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, chat=True)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, chat=False)

    async def _infer(self, http: web.Request, *, chat: bool) -> web.StreamResponse:
        arrival_s = self._clock.now_s()
        request = read_request(await http.read(), self.limits, chat=chat, seed=self.config.seed)
        number = next(self._ids)
        name = http.headers.get("X-Request-Id") or f"{self._started:x}{number:08x}"
        call = EngineRequest(
            # Clients may use an id twice; the engine's own is unique.
            request_id=f"{name}-{number}",
            prompt_tokens=request.prompt_tokens,
            output_tokens=len(request.words),
            block_hashes=request.block_hashes,
            priority=request.priority,
            arrival_s=arrival_s,
            stops_at_eos=request.stops_at_eos,
        )
        interval = self.config.stream_interval if request.stream else len(request.words)
        try:
            answer = self.paced.submit(call, interval)
        except EngineDead:
            raise _engine_error() from None
        try:
            writer = Writer(request, name)
            if request.stream:
                return await self._stream(http, request, writer, answer)
            return await self._whole(request, writer, answer)
        finally:
            self.paced.drop(answer)
            if answer.finish_reason is None:
                reason = "error" if answer.dead else "abort"
                self.metrics.ended(call, reason, self._clock.now_s())

    async def _whole(
        self, request: MockRequest, writer: Writer, answer: Answer
    ) -> web.StreamResponse:
        while answer.finish_reason is None:
            try:
                await answer.more()
            except EngineDead:
                raise _engine_error() from None
        usage = usage_json(request, answer.produced, self._cached(answer))
        return web.Response(
            body=writer.whole(answer.finish_reason, usage), content_type="application/json"
        )

    async def _stream(
        self, http: web.Request, request: MockRequest, writer: Writer, answer: Answer
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": _SSE, "Cache-Control": "no-cache"})
        await response.prepare(http)  # headers go out before the first token, as vLLM's do
        sent = 0
        data = writer.first()
        while answer.finish_reason is None or sent < answer.produced:
            try:
                await answer.more()
            except EngineDead:
                await response.write(sse(_engine_error().body) + DONE)
                return response
            produced, reason = answer.produced, answer.finish_reason
            usage = None
            if request.continuous_usage:
                usage = usage_json(request, produced, self._cached(answer))
            data += writer.chunk(sent, produced, reason, usage)
            sent = produced
            if reason is not None:
                if request.include_usage:
                    data += writer.usage(usage_json(request, produced, self._cached(answer)))
                data += DONE
            await response.write(data)
            data = b""
        await response.write_eof()
        return response

    def _cached(self, answer: Answer) -> int | None:
        return answer.request.cached_tokens if self.config.prompt_tokens_details else None

    # The other routes

    async def _models(self, _request: web.Request) -> web.Response:
        model = self.endpoint.model
        permission = {
            "id": f"modelperm-{model}",
            "object": "model_permission",
            "created": self._started,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        card = {
            "id": model,
            "object": "model",
            "created": self._started,
            "owned_by": "vllm",
            "root": model,
            "parent": None,
            "max_model_len": self.limits.max_model_len,
            "permission": [permission],
        }
        return web.json_response({"object": "list", "data": [card]})

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=503 if self.paced.dead else 200)

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": _VERSION})

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=self.metrics.render().encode(), headers={"Content-Type": CONTENT_TYPE}
        )

    async def _tokenize(self, request: web.Request) -> web.Response:
        raw = read_object(await request.read())
        check_model(raw, self.limits)
        if isinstance(raw.get("messages"), list):
            words = chat_tokens(raw["messages"], raw.get("tools"))
        elif isinstance(raw.get("prompt"), str):
            words = prompt_tokens(raw["prompt"])
        else:
            raise ApiError(400, "Field required: prompt or messages", kind="Bad Request")
        return web.json_response(
            {
                "count": len(words),
                "max_model_len": self.limits.max_model_len,
                # Ids name positions, not words: there is no vocabulary to look them up in.
                "tokens": list(range(len(words))),
                "token_strs": words if raw.get("return_token_strs") else None,
            }
        )

    async def _reset(self, _request: web.Request) -> web.Response:
        done = self.paced.engine.reset_prefix_cache()
        return web.Response(status=200 if done else 409)

    async def _stats(self, _request: web.Request) -> web.Response:
        return web.json_response(self.stats())


def _engine_error() -> ApiError:
    return ApiError(500, "The server had an error while processing your request.")


class MockFleet:
    """All endpoints of a fleet in one process; an async context manager.

    Parameters
    ----------
    fleet
        Each endpoint needs an address; its port is bound.
    config
        Settings.
    host
        Interface to bind; the address in the fleet file only gives the port.
    any_port
        Bind a free port per endpoint instead (tests); see `addresses`.

    Raises
    ------
    InvalidInput
        On construction, if an endpoint has no address and ``any_port`` is off.
    """

    def __init__(
        self,
        fleet: Fleet,
        config: MockConfig | None = None,
        *,
        host: str = "127.0.0.1",
        any_port: bool = False,
    ) -> None:
        self.config = config or MockConfig()
        self.clock = Clock(self.config.dilation)
        self._host = host
        self._ports = [0 if any_port else _port(endpoint) for endpoint in fleet.endpoints]
        streams = np.random.default_rng(self.config.seed).spawn(len(fleet.endpoints))
        self.endpoints = [
            MockEndpoint(endpoint, self.config, self.clock, rng)
            for endpoint, rng in zip(fleet.endpoints, streams, strict=True)
        ]
        self._runners: list[web.AppRunner] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def addresses(self) -> Sequence[str]:
        """Base addresses in fleet order, once started."""
        return [f"http://{runner.addresses[0][0]}:{runner.addresses[0][1]}"
                for runner in self._runners]  # fmt: skip

    async def start(self) -> None:
        """Bind all ports and start the engines.

        Raises
        ------
        InvalidInput
            If a port cannot be bound; the ones bound before are given back.
        """
        try:
            for mock, port in zip(self.endpoints, self._ports, strict=True):
                # A client that leaves cancels its handler, which aborts the request.
                runner = web.AppRunner(
                    mock.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1
                )
                await runner.setup()
                self._runners.append(runner)
                try:
                    await web.TCPSite(runner, self._host, port).start()
                except OSError as error:
                    raise InvalidInput(
                        f"port {port} cannot be bound ({bind_problem(error)})",
                        where=f"worker {mock.endpoint.id!r}: url",
                        remedy="stop what uses it, or change the port in the fleet file or --host",
                    ) from error
            for mock in self.endpoints:
                task = asyncio.create_task(mock.paced.run(), name=f"engine {mock.endpoint.id}")
                task.add_done_callback(_log_death)
                self._tasks.append(task)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Close ports and engines; requests in flight are aborted."""
        for runner in self._runners:
            await runner.cleanup()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._runners.clear()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_details: object) -> None:
        for mock in self.endpoints:
            _log.info("mock endpoint closed: %s", json.dumps(mock.stats()))
        await self.aclose()


def _port(endpoint: Endpoint) -> int:
    if endpoint.url is None:
        raise InvalidInput(
            "no address to serve",
            where=f"worker {endpoint.id!r}: url",
            remedy="add url: http://127.0.0.1:<port>",
        )
    port = urlsplit(endpoint.url).port
    assert port is not None  # noqa: S101 - the fleet reader demands one
    return port


def _log_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("engine died", extra={"engine": task.get_name()}, exc_info=error)
