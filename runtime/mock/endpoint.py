"""One mock endpoint: its engine, what faults do to it, and how it answers inference requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any
from urllib.parse import urlsplit
from zlib import crc32

import numpy as np
from aiohttp import web

from planner.domain.errors import InvalidInput
from planner.domain.faults import FAULT_KINDS, Fault
from planner.domain.fleet import Endpoint
from planner.domain.ids import EndpointId
from planner.sim.engine import Engine, EngineConfig, EngineRequest
from planner.sim.steptime import RowStepTime, standard_normals
from runtime.clock import Clock
from runtime.mock.answers import Writer, usage_json
from runtime.mock.ballast import Ballast
from runtime.mock.config import MockConfig
from runtime.mock.exchange import KvExchange
from runtime.mock.faults import FaultBoard
from runtime.mock.metrics import EngineMetrics
from runtime.mock.network import Port
from runtime.mock.pacing import Answer, Bell, EngineDead, PacedEngine
from runtime.mock.protocol import Limits, MockRequest, invalid, read_request
from runtime.mock.text import Vocabulary
from runtime.wire import DONE, ApiError, sse

__all__ = ["MockEndpoint"]

_log = logging.getLogger(__name__)

_SSE = "text/event-stream; charset=utf-8"
_WARM_UP_STEPS, _WARM_UP_FACTOR = 2, 2.1  # of a cold process, from logs of vLLM 0.19


class MockEndpoint:
    """One endpoint; a `runtime.mock.pacing.Listener` and a `runtime.mock.faults.Host`.

    Parameters
    ----------
    endpoint
        From the fleet file.
    config, clock, exchange
        Shared by the fleet.
    rng
        For the engine's noise.

    Attributes
    ----------
    paced, metrics
        Of the present process; a restart makes new ones.
    board
        Its faults.
    port
        Set by the fleet before it starts.
    """

    port: Port

    def __init__(
        self,
        endpoint: Endpoint,
        config: MockConfig,
        clock: Clock,
        exchange: KvExchange,
        rng: np.random.Generator,
    ) -> None:
        self.endpoint = endpoint
        self.config = config
        self.clock = clock
        self.vocabulary = Vocabulary()
        self.board = FaultBoard(self, clock, seed=crc32(endpoint.id.encode()) ^ config.seed)
        self._exchange = exchange
        self._normals = standard_normals(rng)
        self._engine_config = EngineConfig.from_endpoint(endpoint)
        # vLLM refuses to start with a context its cache cannot hold; here the context shrinks.
        held = (self._engine_config.kv_blocks - 1) * self._engine_config.block_tokens
        self.limits = Limits(
            models=(endpoint.model, *config.lora),
            max_model_len=min(endpoint.max_model_len, held),
            block_tokens=endpoint.block_tokens,
        )
        self._ids = count(1)
        self._task: asyncio.Task[None] | None = None
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._calls: dict[str, _Call] = {}
        self._boots = 0
        self._warm_up_left = 0
        self._closed = False
        self.draining = False
        self.load = 0
        self._boot()

    def __repr__(self) -> str:
        return f"MockEndpoint({self.endpoint.id}, live={self.paced.live}, boots={self._boots})"

    # Life

    def _boot(self) -> None:
        """Make a cold process."""
        engine = Engine(
            self._engine_config,
            RowStepTime(self.endpoint.latency),
            normals=self._normals,
            noise_cv=self.config.noise_cv,
        )
        self.metrics = EngineMetrics(
            self.endpoint, engine, lora=self.config.lora, old_names=self.config.old_metrics
        )
        self.paced = PacedEngine(engine, self.clock, self, self._scale)
        self._ballast = Ballast(engine)
        self.started = int(time.time())
        self.draining = False
        # The process of the fleet file is taken to be warm.
        self._warm_up_left = _WARM_UP_STEPS if self._boots else 0
        self._boots += 1

    def start_engine(self) -> None:
        """Let the engine run."""
        self._task = asyncio.create_task(self.paced.run(), name=f"engine {self.endpoint.id}")
        self._task.add_done_callback(_log_death)

    async def aclose(self) -> None:
        """Undo all faults, close the port and stop the engine; requests in flight are aborted."""
        self._closed = True
        await self.board.clear()
        await self.port.aclose()
        await self._stop_engine()

    async def _stop_engine(self) -> None:
        self.paced.dead = True
        self._exchange.forget(self.endpoint.id)
        tasks = [task for task in (self._task, *self._pulls.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = None

    # What faults do

    async def go_down(self, *, abort: bool, keep_engine: bool = False) -> None:
        """Leave the network; the process ends unless its engine is kept."""
        await self.port.close()
        self.port.hang_up(reset=abort)
        if not keep_engine:
            await self._stop_engine()

    async def come_up(self) -> None:
        """Come back, with a cold process unless the old one lives."""
        if self._closed:
            return
        if self._task is None or self.paced.dead:
            await self._stop_engine()
            self._boot()
            self.start_engine()
        self.draining = False
        await self.port.open()

    def die(self) -> None:
        """Let the engine die with the server alive."""
        self.paced.kill()

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests and let those under way end for ``grace_s`` engine seconds."""
        self.draining = True
        await self.port.close()
        self.port.finish()
        end_s = self.clock.now_s() + grace_s
        # The engine has ended an answer a moment before its client has all of it.
        while self.port.connected and self.clock.now_s() < end_s:  # noqa: ASYNC110 - as vLLM
            await asyncio.sleep(self.clock.wall_s(min(0.1, grace_s)))

    def pause(self, why: str) -> None:
        """Stop stepping."""
        self.paced.pause(why)

    def resume(self, why: str) -> None:
        """Step again."""
        self.paced.resume(why)

    def occupy(self, share: float) -> None:
        """Take a share of the KV blocks away."""
        self.paced.alter(lambda _engine, now_s: self._ballast.set(share, now_s))
        self.metrics.hidden = len(self._ballast)

    def inject(self, fault: Fault) -> None:
        """Schedule a fault.

        Raises
        ------
        InvalidInput
            If it overlaps another one that takes the endpoint off the network.
        """
        if FAULT_KINDS[fault.kind].outage:
            for other in self.board.faults():
                if (
                    FAULT_KINDS[other.kind].outage
                    and other.at_s < fault.end_s
                    and fault.at_s < other.end_s
                ):
                    raise InvalidInput(
                        f"{fault.kind} overlaps {other.kind} from {other.at_s:g} s on",
                        where=f"worker {self.endpoint.id!r}",
                        remedy="clear that one, or let this one begin later",
                    )
        self.board.add(fault)

    def _scale(self, now_s: float) -> float:
        factor = self.board.scale(now_s)
        if self._warm_up_left:
            self._warm_up_left -= 1
            factor *= _WARM_UP_FACTOR
        return factor

    # What the engine tells

    def tokens(self, answer: Answer, count: int, gap_s: float | None) -> None:
        """Count tokens; keep the blocks of a prefill that ended."""
        self.metrics.tokens(answer, count, gap_s)
        request = answer.request
        if answer.finish_reason is not None and request.keep_blocks:
            paced, metrics, name = self.paced, self.metrics, request.request_id
            self._exchange.keep(
                self.endpoint.id,
                name,
                release=lambda: paced.release(name),
                expired=metrics.lease_expired,
            )

    def stepped(self, tokens: int) -> None:
        """Count a step."""
        self.metrics.deferred = len(self._pulls)
        self.metrics.stepped(tokens)

    def pull(self, answer: Answer, tokens: int) -> None:
        """Fetch the KV that a request waits for."""
        name = answer.request.request_id
        task = asyncio.create_task(self._fetch(answer, tokens), name=f"pull {name}")
        self._pulls[name] = task
        task.add_done_callback(lambda _done: self._pulls.pop(name, None))

    async def _fetch(self, answer: Answer, tokens: int) -> None:
        name = answer.request.request_id
        source = self._calls[name].source
        assert source is not None  # noqa: S101 - only calls with a source pull
        begin_s = self.clock.now_s()
        ok = self._exchange.reserve(*source)
        if ok:
            await self._exchange.move(name, source[0], self.endpoint.id, tokens)
            # The sender may have died meanwhile.
            failed = self.board.hits("kv_transfer_failure") is not None
            ok = not failed and self._exchange.done(*source)
        if ok:
            size_bytes = self._exchange.size_bytes(source[0], tokens)
            self.metrics.pulled(name, tokens, size_bytes, self.clock.now_s() - begin_s)
        else:
            self.metrics.pull_failed()
        if ok or self.config.kv_load_failure_policy == "recompute":
            self.paced.pulled(answer, ok=ok)
        else:
            self.paced.drop(answer)
            answer.die()

    # Inference

    async def infer(self, http: web.Request, *, chat: bool) -> web.StreamResponse:
        """Answer a request to one of the two inference routes.

        Raises
        ------
        ApiError
            With vLLM's status and body.
        """
        arrival_s = self.clock.now_s()
        body = await http.read()
        self._refuse_by_fault()
        if http.content_type != "application/json":
            raise invalid("['Unsupported Media Type: Only 'application/json' is allowed']")
        request = read_request(
            body,
            self.limits,
            chat=chat,
            seed=self.config.seed,
            vocabulary=self.vocabulary,
            priority=_header_priority(http),
        )
        if self.paced.dead:
            raise _engine_error()
        most = self.config.max_queued
        if most is not None and self.paced.engine.num_waiting - len(self._ballast) >= most:
            self.metrics.rejected()
            raise ApiError(503, "The server is overloaded: its queue is full.")
        name = http.headers.get("X-Request-Id") or request.request_id or self._new_id()
        paced, metrics = self.paced, self.metrics
        lora = request.model if request.model in self.config.lora else None
        metrics.accepted(n=request.n, max_tokens=request.max_tokens, lora=lora)
        self.load += 1
        try:
            call = self._submit(request, name, arrival_s)
            try:
                if request.stream:
                    return await self._stream(http, call)
                return await self._whole(call)
            finally:
                # Of the process that took it: there may be another by now.
                self._leave(call, paced, metrics)
        finally:
            self.load -= 1
            metrics.left(lora)

    def _leave(self, call: _Call, paced: PacedEngine, metrics: EngineMetrics) -> None:
        """Give back all that a request took, whether it ended or not."""
        for answer in call.bell.answers:
            own = answer.request.request_id
            self._calls.pop(own, None)
            pull = self._pulls.get(own)
            if pull is not None:
                pull.cancel()
            paced.drop(answer)
            if answer.finish_reason is not None:
                if call.source is not None:
                    # Also if nothing was pulled, because all of it was here.
                    self._exchange.done(*call.source)
                continue
            if call.source is not None:
                self._exchange.give_up(*call.source)
            reason = "error" if answer.dead else "abort"
            metrics.ended(answer.request, reason, self.clock.now_s())

    def _refuse_by_fault(self) -> None:
        if self.draining:
            raise ApiError(503, "The server is shutting down.")
        if self.board.hits("http_500") is not None:
            raise _engine_error()
        if self.board.hits("http_503") is not None:
            raise ApiError(503, "The server is overloaded.")
        fault = self.board.hits("http_429")
        if fault is not None:
            raise ApiError(
                429,
                "Rate limit reached; retry later.",
                retry_after_s=fault.settings["retry_after_s"],
            )

    def _new_id(self) -> str:
        return f"{self.started:x}{next(self._ids):08x}"

    def _submit(self, request: MockRequest, name: str, arrival_s: float) -> _Call:
        transfer = request.transfer or {}
        alone = len(request.samples) == 1
        keeps = alone and transfer.get("do_remote_decode") is True
        source: tuple[EndpointId, str] | None = None
        if alone and transfer.get("do_remote_prefill") is True:
            owner, kept = (str(transfer.get(f"remote_{one}_id")) for one in ("engine", "request"))
            source = EndpointId(owner), kept
            self._exchange.reserve(*source)
        bell = Bell()
        call = _Call(
            request=request,
            bell=bell,
            source=source,
            writer=Writer(request, name, self.vocabulary),
        )
        interval = request.stream_interval or self.config.stream_interval
        for sample in request.samples:
            # Clients may use an id twice; the engine's own is unique.
            own = f"{name}-{next(self._ids)}"
            length = len(sample.tokens)
            engine_request = EngineRequest(
                request_id=own,
                prompt_tokens=len(sample.prompt),
                output_tokens=length,
                block_hashes=sample.block_hashes,
                priority=request.priority,
                arrival_s=arrival_s,
                stops_at_eos=sample.stops_at_eos,
                # vLLM keeps the blocks of a prefill that its limit ended, of no other.
                keep_blocks=keeps and not sample.stops_at_eos,
                remote_tokens=0 if source is None else len(sample.prompt),
            )
            self._calls[own] = call
            self.paced.submit(engine_request, interval if request.stream else length, bell)
        return call

    async def _whole(self, call: _Call) -> web.StreamResponse:
        while any(answer.finish_reason is None for answer in call.bell.answers):
            try:
                await call.bell.more()
            except EngineDead:
                raise _engine_error() from None
        usage = usage_json(call.request, call.produced, self._cached(call))
        return web.Response(
            body=call.writer.whole(usage, self._kept(call)), content_type="application/json"
        )

    async def _stream(self, http: web.Request, call: _Call) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": _SSE, "Cache-Control": "no-cache"})
        # A client that has left, or a fault that has torn the connection, is no error here.
        with suppress(ConnectionResetError):
            await response.prepare(http)  # headers go out before the first token, as vLLM's do
            await self._write_chunks(response, call)
        return response

    async def _write_chunks(self, response: web.StreamResponse, call: _Call) -> None:
        request, writer, answers = call.request, call.writer, call.bell.answers
        sent = [0] * len(answers)
        left = len(answers)
        data = writer.first()
        while left:
            try:
                await call.bell.more()
            except EngineDead:
                await self._send(response, sse(_engine_error().body) + DONE)
                return
            for index, answer in enumerate(answers):
                produced = answer.produced
                if produced == sent[index]:
                    continue
                ended = answer.finish_reason is not None
                data += writer.chunk(
                    index,
                    sent[index],
                    produced,
                    ended=ended,
                    usage=usage_json(request, call.produced, self._cached(call))
                    if request.continuous_usage
                    else None,
                    transfer=self._kept(call) if ended else None,
                )
                sent[index] = produced
                left -= ended
            if not left:
                if request.include_usage:
                    data += writer.usage(usage_json(request, call.produced, self._cached(call)))
                data += DONE
            await self._send(response, data)
            data = b""

    async def _send(self, response: web.StreamResponse, data: bytes) -> None:
        if self.board.active("blackhole") is not None:
            await self.board.until_over("blackhole")
        await response.write(data)

    def _cached(self, call: _Call) -> int | None:
        if not self.config.prompt_tokens_details:
            return None
        return sum(answer.request.cached_tokens for answer in call.bell.answers[:: call.request.n])

    def _kept(self, call: _Call) -> Mapping[str, Any] | None:
        """Return where a decoding endpoint finds the KV of a prefill."""
        request = call.bell.answers[0].request
        if not request.keep_blocks:
            return None
        url = urlsplit(self.port.address)
        blocks = -(-request.prompt_tokens // self.endpoint.block_tokens)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": list(range(1, blocks + 1)),
            "remote_engine_id": self.endpoint.id,
            "remote_request_id": request.request_id,
            "remote_host": url.hostname,
            "remote_port": url.port,
            "tp_size": self.endpoint.tp,
            "remote_num_tokens": request.prompt_tokens,
        }

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


@dataclass(slots=True, kw_only=True)
class _Call:
    """A request under way.

    Parameters
    ----------
    source
        Endpoint and request whose KV it pulls, or None.
    """

    request: MockRequest
    bell: Bell
    writer: Writer
    source: tuple[EndpointId, str] | None

    @property
    def produced(self) -> int:
        """Tokens of all its answers so far."""
        return sum(answer.produced for answer in self.bell.answers)


def _header_priority(http: web.Request) -> int | None:
    text = http.headers.get("X-Vllm-Priority")
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise invalid("X-Vllm-Priority should be a valid integer") from None


def _engine_error() -> ApiError:
    return ApiError(500, "The server had an error while processing your request.")


def _log_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("engine died", extra={"engine": task.get_name()}, exc_info=error)
