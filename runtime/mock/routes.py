"""The HTTP routes of a mock endpoint.

Routes as in vLLM 0.33.0; embeddings and the like answer 404. Beside them, for whoever experiments
    GET    /mock/stats      counters, and how late tokens were handed out
    GET    /mock/faults     faults under way and scheduled
    POST   /mock/faults     begin a fault, ``at_s`` engine seconds from now; or a list of them
    DELETE /mock/faults     end those of a ``kind``, or all
Faults do not touch these routes, and ``?worker=ID`` reaches any endpoint of the fleet through
any of its ports.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

from aiohttp import web

from planner.domain.errors import InvalidInput
from planner.domain.faults import read_fault
from planner.domain.ids import EndpointId
from runtime.mock.endpoint import MockEndpoint
from runtime.mock.protocol import check_model, invalid, read_object
from runtime.mock.text import chat_tokens, prompt_tokens
from runtime.prometheus import CONTENT_TYPE
from runtime.wire import ApiError

__all__ = ["VLLM_VERSION", "make_app"]

VLLM_VERSION = "0.33.0"
_LARGEST_BODY = 64 * 2**20
_UNAUTHORIZED = b'{"error":"Unauthorized"}'

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(mock: MockEndpoint, fleet: Mapping[EndpointId, MockEndpoint]) -> web.Application:
    """Return the application of an endpoint.

    Parameters
    ----------
    mock
        The endpoint.
    fleet
        All endpoints of the process, for the routes that steer faults.
    """
    routes = _Routes(mock, fleet)
    app = web.Application(client_max_size=_LARGEST_BODY, middlewares=[routes.middleware])
    app.on_response_prepare.append(routes.echo_request_id)
    app.add_routes(routes.table())
    return app


class _Routes:
    def __init__(self, mock: MockEndpoint, fleet: Mapping[EndpointId, MockEndpoint]) -> None:
        self._mock = mock
        self._fleet = fleet
        self._metrics_text: bytes | None = None
        self._metrics_s = 0.0

    def table(self) -> list[web.RouteDef]:
        table = [
            web.post("/v1/chat/completions", self._chat),
            web.post("/v1/completions", self._completions),
            web.get("/v1/models", self._models),
            web.get("/health", self._health),
            web.get("/ping", self._health),
            web.post("/ping", self._health),
            web.get("/version", self._version),
            web.get("/load", self._load),
            web.get("/metrics", self._metrics),
            web.post("/tokenize", self._tokenize),
            web.post("/detokenize", self._detokenize),
            web.get("/mock/stats", self._stats),
            web.get("/mock/faults", self._faults),
            web.post("/mock/faults", self._add_faults),
            web.delete("/mock/faults", self._clear_faults),
        ]
        if self._mock.config.dev_mode:
            table += [
                web.post("/reset_prefix_cache", self._reset),
                web.post("/sleep", self._sleep),
                web.post("/wake_up", self._wake_up),
                web.get("/is_sleeping", self._is_sleeping),
                web.get("/server_info", self._server_info),
            ]
        return table

    # Around every request

    @web.middleware
    async def middleware(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if request.path.startswith("/mock/"):
            return await self._answer(request, handler)
        board = self._mock.board
        delay = board.active("network_delay")
        if delay is not None:
            # The whole round trip is spent here: a client cannot tell which way took it.
            await asyncio.sleep(self._mock.clock.wall_s(delay.settings["delay_s"]))
        await board.until_over("blackhole")
        began_s = time.monotonic()
        status = 499
        try:
            response = await self._answer(request, handler)
            status = response.status
        finally:
            resource = request.match_info.route.resource
            self._mock.metrics.answered(
                "none" if resource is None else resource.canonical,
                request.method,
                status,
                time.monotonic() - began_s,
            )
        if not response.prepared:
            await board.until_over("blackhole")
        return response

    async def _answer(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Return the handler's answer; whatever it raises becomes a body as vLLM's."""
        try:
            if not self._admits(request):
                return web.Response(status=401, body=_UNAUTHORIZED, content_type="application/json")
            return await handler(request)
        except ApiError as error:
            return _error(error)
        except InvalidInput as error:  # of the fault routes
            return _error(ApiError(400, str(error)))
        except web.HTTPException as error:
            phrase = HTTPStatus(error.status).phrase
            return _error(ApiError(error.status, phrase, kind=phrase))

    def _admits(self, request: web.Request) -> bool:
        keys = self._mock.config.api_keys
        if not keys or request.method == "OPTIONS" or not request.path.startswith(("/v1", "/v2")):
            return True
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and key in keys

    async def echo_request_id(self, request: web.Request, response: web.StreamResponse) -> None:
        name = request.headers.get("X-Request-Id")
        if name and self._mock.config.request_id_headers:
            response.headers["X-Request-Id"] = name

    # Inference

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._mock.infer(request, chat=True)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._mock.infer(request, chat=False)

    # State of the server

    async def _models(self, _request: web.Request) -> web.Response:
        limits, created = self._mock.limits, self._mock.started
        base = limits.models[0]
        permission = {
            "id": f"modelperm-{base}",
            "object": "model_permission",
            "created": created,
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
        cards = [
            {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "vllm",
                "root": name,
                "parent": None if name == base else base,
                "max_model_len": limits.max_model_len if name == base else None,
                "permission": [permission],
            }
            for name in limits.models
        ]
        return web.json_response({"object": "list", "data": cards})

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=503 if self._mock.paced.dead else 200)

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": VLLM_VERSION})

    async def _load(self, _request: web.Request) -> web.Response:
        load = self._mock.load if self._mock.config.track_load else 0
        return web.json_response({"server_load": load})

    async def _metrics(self, _request: web.Request) -> web.Response:
        board = self._mock.board
        if board.active("missing_metrics") is not None:
            raise ApiError(500, "Internal server error")
        stale = board.active("stale_metrics")
        now_s = self._mock.clock.now_s()
        if stale is not None and self._metrics_text is not None:
            every_s = stale.settings["every_s"]
            fresh = every_s > 0 and now_s - self._metrics_s >= every_s
        else:
            fresh = True
        if fresh or self._metrics_text is None:
            self._metrics_text = self._mock.metrics.render().encode()
            self._metrics_s = now_s
        return web.Response(body=self._metrics_text, headers={"Content-Type": CONTENT_TYPE})

    # Tokens

    async def _tokenize(self, request: web.Request) -> web.Response:
        raw = read_object(await request.read())
        check_model(raw, self._mock.limits)
        messages, prompt = raw.get("messages"), raw.get("prompt")
        if isinstance(messages, list) and all(isinstance(one, dict) for one in messages):
            words = chat_tokens(messages, raw.get("tools"))
        elif isinstance(prompt, str):
            words = prompt_tokens(prompt)
        else:
            raise invalid("Field required: prompt or messages")
        return web.json_response(
            {
                "count": len(words),
                "max_model_len": self._mock.limits.max_model_len,
                "tokens": self._mock.vocabulary.ids(words),
                "token_strs": words if raw.get("return_token_strs") is True else None,
            }
        )

    async def _detokenize(self, request: web.Request) -> web.Response:
        raw = read_object(await request.read())
        check_model(raw, self._mock.limits)
        tokens = raw.get("tokens")
        if not isinstance(tokens, list) or not all(type(one) is int for one in tokens):
            raise invalid("Input should be a list of integers: tokens")
        return web.json_response({"prompt": " ".join(self._mock.vocabulary.words(tokens))})

    # Developer mode

    async def _reset(self, _request: web.Request) -> web.Response:
        done = self._mock.paced.engine.reset_prefix_cache()
        return web.Response(status=200 if done else 409)

    async def _sleep(self, request: web.Request) -> web.Response:
        level = request.query.get("level", "1")
        if level not in ("1", "2"):
            raise invalid("Input should be 1 or 2: level")
        self._mock.pause("sleep")
        self._mock.paced.engine.reset_prefix_cache()
        self._mock.metrics.sleep_level = int(level)
        self._mock.stepped(0)
        return web.Response()

    async def _wake_up(self, _request: web.Request) -> web.Response:
        self._mock.metrics.sleep_level = 0
        self._mock.stepped(0)
        self._mock.resume("sleep")
        return web.Response()

    async def _is_sleeping(self, _request: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": self._mock.metrics.sleep_level > 0})

    async def _server_info(self, _request: web.Request) -> web.Response:
        endpoint, config = self._mock.endpoint, self._mock.config
        return web.json_response(
            {
                "vllm_config": {
                    "model": endpoint.model,
                    "max_model_len": self._mock.limits.max_model_len,
                    "tensor_parallel_size": endpoint.tp,
                    "dtype": endpoint.dtype,
                    "block_size": endpoint.block_tokens,
                    "num_gpu_blocks": endpoint.kv_blocks,
                    "max_num_seqs": endpoint.max_num_seqs,
                    "max_num_batched_tokens": endpoint.max_num_batched_tokens,
                    "scheduling_policy": endpoint.scheduling,
                    "stream_interval": config.stream_interval,
                    "enable_prefix_caching": True,
                },
                "mock": {"gpu": endpoint.gpu, "dilation": config.dilation, "pid": os.getpid()},
            }
        )

    # For whoever experiments

    async def _stats(self, _request: web.Request) -> web.Response:
        return web.json_response(self._mock.stats())

    async def _faults(self, request: web.Request) -> web.Response:
        return web.json_response({"faults": self._target(request).board.to_json()})

    async def _add_faults(self, request: web.Request) -> web.Response:
        mock = self._target(request)
        try:
            raw = json.loads(await request.read())
        except (ValueError, RecursionError) as error:
            raise invalid(f"JSON decode error: {error}") from error
        listed = raw if isinstance(raw, list) else [raw]
        now_s = mock.clock.now_s()
        faults = []
        for position, one in enumerate(listed):
            fault = read_fault(one, f"faults[{position}]")
            faults.append(fault.moved(now_s))
        for fault in faults:
            mock.inject(fault)
        return web.json_response({"faults": [fault.to_json() for fault in faults]})

    async def _clear_faults(self, request: web.Request) -> web.Response:
        ended = await self._target(request).board.clear(request.query.get("kind"))
        return web.json_response({"ended": ended})

    def _target(self, request: web.Request) -> MockEndpoint:
        worker = request.query.get("worker")
        if worker is None:
            return self._mock
        mock = self._fleet.get(EndpointId(worker))
        if mock is None:
            known = ", ".join(self._fleet)
            raise ApiError(404, f"no worker {worker[:80]!r}; known: {known}", param="worker")
        return mock


def _error(error: ApiError) -> web.Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = f"{error.retry_after_s:g}"
    return web.Response(
        status=error.status, body=error.body, content_type="application/json", headers=headers
    )
