"""One vLLM V1 engine: its scheduler, its KV blocks and its clock.

Rules
1. A step first serves the running calls in the order of their admission, then admits waiting
   calls; each takes tokens from one budget. There are no phases: a call gets tokens until what is
   computed has caught up with what is known.
2. Blocks are taken when a step is planned, and full blocks get their hash at that moment.
3. A running call that finds no block preempts: the last admitted (fcfs), or the one with the
   largest (priority, arrival) (priority). Its blocks are freed and it starts again from what the
   prefix cache still holds; its output so far is kept.
4. Nothing is admitted in a step that preempted. The head of the queue blocks those behind it.
5. Step k+1 starts when step k ends. A call is seen by the first step that starts after it came.
6. A call whose KV lies elsewhere (`EngineRequest.remote_tokens`: another engine, host memory)
   takes all its blocks when it reaches the head, then waits without a slot until whoever drives
   the engine says that the KV is there (`Engine.pulled`); it is served before the queue.
7. Blocks can be held for others: a finished prefill's until it is read (``keep_blocks``), a
   prefix between two calls (`Engine.pin`). If nothing runs and the head finds no room, pins fall,
   oldest first; blocks to be read do not, and the engine stalls until they are given back.

What makes it fast
Calls that decode advance in lockstep, one token a step, so they are kept as sums: how many, their
total context, and how many cross a block boundary at each step modulo the block size. A *stretch*
is a number of steps that only decode and need no decision: it ends at the first finish, at the
step that finds no blocks, or at the boundary after something arrives. Its end is known in closed
form, because the time of a decode step is a line in the context. The cost of a simulation thus
grows with arrivals, prefill chunks, finishes and preemptions, not with tokens.

The blocks that a decoding call fills get their hash late: when it leaves, or when somebody looks
for one of them. What is found is the same. Only where two calls write the same text at the same
time would it matter whose block came first; an engine that has seen this labels at once.

Since a step's token budget covers every slot (checked), all decoding calls get their token in
each step, and at most one running call, the last admitted, is in the middle of its prefill.

Two ways to drive it, with the same times to the last bit
- `Engine.advance` for simulations: runs to an instant and returns what happened. Whoever drives
  several engines advances each at its `Engine.next_event_s`, which never runs anything.
- `Engine.step` for a live endpoint: one step at a time, committed at once.

References
----------
vllm 0.33.0: vllm/v1/core/sched/scheduler.py, vllm/v1/core/kv_cache_manager.py,
vllm/distributed/kv_transfer/kv_connector/v1/nixl/pull_scheduler.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from heapq import heapify, heappop, heappush
from typing import Literal, NamedTuple

from planner.domain.errors import IllegalEvent, InvalidInput
from planner.domain.fleet import Endpoint
from planner.sim.blockpool import BlockPool, Eviction, Holding, RankedPool
from planner.sim.steptime import Batch, StepTime

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineEvent",
    "EngineRequest",
    "FinishReason",
    "Finished",
    "FirstToken",
    "Preempted",
    "PullStarted",
    "StepResult",
    "StepToken",
]

FinishReason = Literal["stop", "length"]

# A call that lingers has stopped by EOS, but was planned into one more step.
_WAITING, _PREFILLING, _DECODING, _LINGERING, _PULLING = range(5)

_NOISE_STEPS = 32  # most steps that share one draw of the noise


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What ``vllm serve`` would be given.

    Parameters
    ----------
    kv_blocks
        KV blocks as vLLM reports them, >= 2; one of them is the null block.
    block_tokens
        Tokens per block, >= 1.
    max_num_seqs
        Slots, >= 1.
    max_num_batched_tokens
        Token budget of a step, >= ``max_num_seqs`` as in vLLM.
    policy
        ``fcfs``, or ``priority`` (smaller priority first).
    prefix_caching
        Reuse blocks by hash.
    reserve_full_isl
        Admit a call only if blocks for everything known of it are free.
    watermark
        Share of the blocks that admission leaves free while anything runs, in [0, 1).
    max_model_len
        Longest prompt plus output, tokens, >= 1.
    async_scheduling
        Steps are planned one ahead: a call that stops by EOS costs one step more.
    """

    kv_blocks: int
    block_tokens: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    policy: Literal["fcfs", "priority"] = "fcfs"
    prefix_caching: bool = True
    reserve_full_isl: bool = True
    watermark: float = 0.0
    max_model_len: int = 131072
    async_scheduling: bool = True

    def __post_init__(self) -> None:
        least = {"kv_blocks": 2, "max_num_batched_tokens": self.max_num_seqs}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "int" and (
                isinstance(value, bool)
                or not isinstance(value, int)
                or value < least.get(item.name, 1)
            ):
                raise InvalidInput(
                    f"{value!r} is not an integer >= {least.get(item.name, 1)}",
                    where=f"engine.{item.name}",
                    remedy="a step's token budget must cover every slot"
                    if item.name == "max_num_batched_tokens"
                    else "correct it",
                )
        if self.policy not in ("fcfs", "priority"):
            raise InvalidInput(
                f"unknown policy {self.policy!r}",
                where="engine.policy",
                remedy="use fcfs or priority",
            )
        if not 0.0 <= self.watermark < 1.0:
            raise InvalidInput(
                f"{self.watermark!r} is no share",
                where="engine.watermark",
                remedy="use a number in [0, 1)",
            )

    @classmethod
    def from_endpoint(cls, endpoint: Endpoint) -> EngineConfig:
        """Return the configuration of a fleet's endpoint; the rest are vLLM's defaults.

        Raises
        ------
        InvalidInput
            If the endpoint breaks a limit of the engine, naming the field.
        """
        return cls(
            kv_blocks=endpoint.kv_blocks,
            block_tokens=endpoint.block_tokens,
            max_num_seqs=endpoint.max_num_seqs,
            max_num_batched_tokens=endpoint.max_num_batched_tokens,
            max_model_len=endpoint.max_model_len,
            policy=endpoint.scheduling,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class EngineRequest:
    """One call on one engine; it is submitted once, and a retry is a new request.

    Parameters
    ----------
    request_id
        Unique among the engine's live requests.
    prompt_tokens
        >= 1.
    output_tokens
        Tokens after which it stops, >= 1.
    block_hashes
        Chain of the full blocks of the prompt and of the output to come
        (`planner.domain.blocks.block_hashes`). A shorter chain leaves the rest unshared; an
        empty one shares nothing.
    priority
        Smaller is served first; read by the priority policy only.
    arrival_s
        When it arrived; breaks ties of the priority policy. `Engine.submit` says when the engine
        gets it.
    stops_at_eos
        It ends because the model says so, not because a limit was reached: finish reason
        ``stop``, and one wasted step under async scheduling.
    remote_tokens
        Leading prompt tokens whose KV can be pulled from elsewhere, 0 to ``prompt_tokens``.
    keep_blocks
        When it finishes its blocks stay in use until `Engine.release`; not with ``stops_at_eos``.

    Attributes
    ----------
    first_scheduled_s, first_token_s, finish_s
        Instants, or None if not reached.
    cached_tokens
        Prompt tokens found in the prefix cache, or pulled, when first scheduled.
    preemptions
        Times it was preempted.
    generated_tokens
        Output tokens so far; exact once it has finished, was aborted or waits again.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...] = ()
    priority: int = 0
    arrival_s: float = 0.0
    stops_at_eos: bool = False
    remote_tokens: int = 0
    keep_blocks: bool = False

    first_scheduled_s: float | None = field(default=None, init=False)
    first_token_s: float | None = field(default=None, init=False)
    finish_s: float | None = field(default=None, init=False)
    cached_tokens: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)
    generated_tokens: int = field(default=0, init=False)


class _Call:
    """What the engine knows of one request.

    Attributes
    ----------
    state
        One of the constants above.
    known
        Tokens to compute before it yields its next one, while it waits or prefills.
    serial
        Number of its admission, -1 without a slot.
    computed
        Tokens whose KV exists, while it prefills.
    offset
        While it decodes: engine tick minus tokens whose KV exists, a constant.
    last_tick
        While it decodes: engine tick after its last token.
    hashes
        Those of the request, or () without prefix caching.
    answer
        The first block that ends in its answer.
    held
        Its blocks with a hash, from the first one on.
    remote
        Leading tokens that may yet be pulled.
    spare
        Blocks taken for tokens not computed yet, while it pulls or prefills.
    """

    __slots__ = (
        "answer", "computed", "hashes", "held", "known", "last_tick", "offset", "remote", "request",
        "serial", "spare", "state",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, hashes: tuple[int, ...], answer: int) -> None:
        self.request = request
        self.answer = answer
        self.state = _WAITING
        self.known = request.prompt_tokens
        self.serial = -1
        self.computed = 0
        self.offset = 0
        self.last_tick = 0
        self.hashes = hashes
        self.held = Holding()
        self.remote = request.remote_tokens
        self.spare = 0


# Events are named tuples, because they are made by the hundred thousand.
class FirstToken(NamedTuple):
    """A request's first token is there."""

    time_s: float
    request: EngineRequest


class Finished(NamedTuple):
    """A request's last token is there."""

    time_s: float
    request: EngineRequest
    reason: FinishReason


class Preempted(NamedTuple):
    """A request lost its blocks and waits again."""

    time_s: float
    request: EngineRequest


class PullStarted(NamedTuple):
    """A request has its blocks and waits for ``tokens`` of KV; answer with `Engine.pulled`."""

    time_s: float
    request: EngineRequest
    tokens: int


EngineEvent = FirstToken | Finished | Preempted | PullStarted


class StepToken(NamedTuple):
    """What a request got from one step."""

    request_id: str
    new_tokens: int
    finished: bool
    finish_reason: FinishReason | None


class StepResult(NamedTuple):
    """One step: when it ends, and the tokens it yields, in the order of admission."""

    end_s: float
    tokens: tuple[StepToken, ...]


def _urgency(call: _Call) -> tuple[int, float]:
    return call.request.priority, call.request.arrival_s


class Engine:
    """A vLLM engine in simulated time.

    Parameters
    ----------
    config
        Its limits.
    step_time
        How long steps take.
    normals, noise_cv
        Multiply steps by lognormal noise of mean 1 and this coefficient of variation (>= 0; 0
        needs no normals). One of the normals, standard and without end, covers one prefill step, or
        up to 32 decode steps.
    eviction
        Which cached blocks go first; None is vLLM's own order, least recently freed first.

    Attributes
    ----------
    now_s
        The instant up to which it has been advanced.
    num_running, num_waiting
        Calls with a slot, calls without (those that pull included).
    queued_prefill_tokens
        Tokens to be computed before every call in the engine decodes; a waiting call counts in
        full, since its cache hits are known only when it is admitted.
    prompt_tokens_total, prefix_queries_total, prefix_hits_total, preemptions_total
        Counters as vLLM keeps them: prompts count at their first token, queries and hits (tokens)
        at the first admission.

    Notes
    -----
    The step that starts at t is planned when the engine is advanced to t or later. So requests
    submitted at t before that are in it, and a request sent in answer to a token of t is not.
    """

    __slots__ = (
        "_alike",
        "_boundary_s",
        "_context",
        "_cv",
        "_decodes",
        "_done",
        "_end_s",
        "_finishes",
        "_first_s",
        "_generated",
        "_growing",
        "_growth_s",
        "_kept",
        "_live",
        "_normals",
        "_partial",
        "_phases",
        "_pins",
        "_pool",
        "_prefilled",
        "_pulled",
        "_running",
        "_scale",
        "_serials",
        "_shift",
        "_spread",
        "_stalled",
        "_start_s",
        "_steps",
        "_steps_done",
        "_taken",
        "_tick",
        "_waiting",
        "_watermark_blocks",
        "config",
        "now_s",
        "num_running",
        "num_waiting",
        "preemptions_total",
        "prefix_hits_total",
        "prefix_queries_total",
        "prompt_tokens_total",
        "queued_prefill_tokens",
        "step_time",
    )  # fmt: skip

    def __init__(
        self,
        config: EngineConfig,
        step_time: StepTime,
        *,
        normals: Iterator[float] | None = None,
        noise_cv: float = 0.0,
        eviction: Eviction | None = None,
    ) -> None:
        if noise_cv < 0 or (noise_cv > 0 and normals is None):
            raise InvalidInput(
                f"noise of cv {noise_cv!r}",
                where="noise_cv",
                remedy="use a number >= 0 and pass normals",
            )
        self.config = config
        self.step_time = step_time
        self.now_s = 0.0
        self._normals = normals
        self._cv = noise_cv
        variance = math.log1p(noise_cv * noise_cv)
        self._spread, self._shift = math.sqrt(variance), 0.5 * variance
        self._scale = 1.0
        self._pool = (
            BlockPool(config.kv_blocks - 1)
            if eviction is None
            else RankedPool(config.kv_blocks - 1, eviction)
        )
        self._watermark_blocks = math.floor(config.watermark * config.kv_blocks)

        self._live: dict[str, _Call] = {}
        # Heap of (key..., request); keys never tie.
        self._waiting: list[tuple[int, float, int | str, _Call]] = []
        self._running: dict[_Call, None] = {}  # in the order of admission
        self._pulled: deque[_Call] = deque()  # have their KV and blocks, wait for a slot
        self._stalled = False  # nothing runs and the head waits for blocks held for others
        # Blocks held for others, by name: with a hash, and how many more.
        self._kept: dict[str, tuple[Holding, int]] = {}
        self._pins: dict[str, Holding] = {}  # oldest first
        self._serials = 0
        self.num_running = 0
        self.num_waiting = 0
        self.queued_prefill_tokens = 0

        # Calls that decode, as sums. `_tick` counts steps; a call has computed tick - offset.
        self._tick = 0
        self._decodes = 0
        self._context = 0  # sum of (computed + 1)
        self._phases = [0] * config.block_tokens  # calls by offset modulo block size
        self._growing: dict[_Call, None] = {}  # will fill blocks that get a hash
        self._alike = False  # whether two running calls have ever written the same text
        self._finishes: list[tuple[int, int, _Call]] = []  # heap: tick, serial

        # The planned stretch: `_steps` steps from `_start_s`; 0 when none is planned. `_done` are
        # committed, for `_taken` the blocks are taken. It ends at `_end_s`.
        self._steps = 0
        self._done = 0
        self._taken = 0
        self._start_s = 0.0
        self._first_s = 0.0  # length of its first step
        self._growth_s = 0.0  # how much longer each next step is
        self._end_s = 0.0
        self._partial: _Call | None = None  # in the middle of its prefill
        self._prefilled: list[_Call] = []  # whose prefill the planned step ends
        self._boundary_s = 0.0  # when nothing is planned: where the next step starts

        self._generated = 0
        self._steps_done = 0
        self.prompt_tokens_total = 0
        self.prefix_queries_total = 0
        self.prefix_hits_total = 0
        self.preemptions_total = 0

    def __repr__(self) -> str:
        return (
            f"Engine(now_s={self.now_s:.6g}, running={self.num_running}, "
            f"waiting={self.num_waiting}, free_blocks={self.free_blocks})"
        )

    # -- what can be read ------------------------------------------------------------------

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken at ``now_s``, those of the prefix cache included."""
        return self.free_blocks_at(self.now_s)

    def free_blocks_at(self, now_s: float) -> int:
        """Return the free blocks at an instant between ``now_s`` and ``next_event_s()``."""
        free = self._pool.free
        if self._steps > 1:
            started = min(self._completed(now_s) + 1, self._steps)
            if started > self._taken:
                free -= self._blocks_for(self._taken - self._done, started - self._done)
        return free

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks in use at ``now_s``, 0 to 1; cached, unused blocks are free."""
        return 1.0 - self.free_blocks_at(self.now_s) / self._pool.total

    def kv_usage_at(self, now_s: float) -> float:
        """Return `kv_usage` at an instant between ``now_s`` and ``next_event_s()``."""
        return 1.0 - self.free_blocks_at(now_s) / self._pool.total

    @property
    def generation_tokens_total(self) -> int:
        """Output tokens so far, up to ``now_s``."""
        if self._steps > 1:
            return self._generated + self._decodes * self._uncommitted()
        return self._generated

    @property
    def steps_total(self) -> int:
        """Steps that ended, up to ``now_s``."""
        return self._steps_done + (self._uncommitted() if self._steps > 1 else 0)

    @property
    def scale(self) -> float:
        """Factor on all step times (drift, stragglers); set, it holds from the next step on.

        Set it after advancing to the instant of the change.
        """
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if not (value > 0.0 and math.isfinite(value)):
            raise InvalidInput(f"scale {value!r}", where="scale", remedy="use a number > 0")
        if value != self._scale:
            self._scale = value
            self._cut(self.now_s)

    def cached_prefix_tokens(self, block_hashes: Sequence[int]) -> int:
        """Return how many tokens of a prompt the prefix cache holds now; takes nothing."""
        if self._steps > 1:
            self._take(self._started(self.now_s))
        return self._lookup(block_hashes, len(block_hashes)).blocks * self.config.block_tokens

    # -- what can be done ------------------------------------------------------------------

    def submit(self, request: EngineRequest, now_s: float) -> None:
        """Queue a request; the first step that starts after ``now_s`` can see it.

        Raises
        ------
        InvalidInput
            If it could never run (too long, more blocks than there are), or a field is wrong.
        IllegalEvent
            If it was submitted before, its id is live here, ``now_s`` lies in the past, or the
            engine has not been advanced to ``now_s``.
        """
        self._check(request)
        self._check_instant(now_s)
        idle = not self._busy()
        hashes = request.block_hashes if self.config.prefix_caching else ()
        call = _Call(request, hashes, request.prompt_tokens // self.config.block_tokens)
        self._live[request.request_id] = call
        self._queue(call)
        if idle:
            self._stalled = False
            self._boundary_s = max(self._boundary_s, now_s)
        elif self._waiting[0][3] is call and self.num_running < self.config.max_num_seqs:
            # Elsewhere in the queue, or with no slot free, it changes nothing yet.
            self._cut(now_s)

    def abort(self, request_id: str, now_s: float) -> bool:
        """Take a request out; its blocks are free at once. False if it is not live.

        The step in flight ends when it would have ended, and has no token for it.

        Raises
        ------
        IllegalEvent
            If ``now_s`` lies in the past or the engine has not been advanced to it.
        """
        self._check_instant(now_s)
        call = self._live.pop(request_id, None)
        if call is None:
            return False
        self._settle(now_s)
        if call.state == _WAITING:
            self.num_waiting -= 1
            self.queued_prefill_tokens -= call.known
            self._waiting = [entry for entry in self._waiting if entry[3] is not call]
            heapify(self._waiting)
        elif call.state == _PULLING:
            self._stop_pulling(call)
            if call in self._pulled:
                self._pulled.remove(call)
        else:
            self._leave(call, in_flight=self._taken - self._done if self._steps else 0)
        self._wake(now_s)
        return True

    def pulled(self, request_id: str, now_s: float, *, ok: bool = True) -> None:
        """Say that the KV a call waited for is there, or (``ok`` False) that it never will be.

        Without it the call goes back to the head of the queue and is prefilled here.

        Raises
        ------
        IllegalEvent
            If the call does not wait for KV, or ``now_s`` is out of reach.
        """
        self._check_instant(now_s)
        call = self._live.get(request_id)
        if call is None or call.state != _PULLING or call in self._pulled:
            raise IllegalEvent(f"request {request_id!r} does not wait for KV")
        self._settle(now_s)
        call.remote = 0
        if ok:
            if not self._alike:
                self._compare(call)
            self._label(call, call.computed // self.config.block_tokens)
            self._pulled.append(call)
        else:
            self._stop_pulling(call)
            self._queue(call, in_front=True)
        self._wake(now_s)

    def release(self, request_id: str, now_s: float) -> bool:
        """Give back the blocks that a finished call kept; False if it keeps none (any more)."""
        self._check_instant(now_s)
        kept = self._kept.pop(request_id, None)
        if kept is None:
            return False
        self._settle(now_s)
        self._pool.release(*kept)
        self._wake(now_s)
        return True

    def pin(self, name: str, block_hashes: Sequence[int], now_s: float) -> int:
        """Keep what is cached of a prefix from eviction until `unpin`.

        Returns
        -------
        Blocks pinned. A pin of the same name is replaced.
        """
        self._check_instant(now_s)
        self._settle(now_s)
        hits = self._lookup(block_hashes, len(block_hashes))
        self._pool.acquire(hits)
        old = self._pins.pop(name, None)
        if old is not None:
            self._pool.release(old, 0)
        self._pins[name] = hits
        return hits.blocks

    def unpin(self, name: str, now_s: float) -> bool:
        """Let a pinned prefix be evicted again; False if there is no such pin (any more)."""
        self._check_instant(now_s)
        blocks = self._pins.pop(name, None)
        if blocks is None:
            return False
        self._settle(now_s)
        self._pool.release(blocks, 0)
        self._wake(now_s)
        return True

    def forget(self, block_hashes: Sequence[int], start: int, now_s: float) -> int:
        """Drop the cached blocks of a chain that nobody uses, so that they are taken first.

        Parameters
        ----------
        start
            Blocks at its beginning that are left alone.

        Returns
        -------
        How many were dropped.
        """
        self._check_instant(now_s)
        self._settle(now_s)
        return self._pool.forget(block_hashes, start)

    def next_event_s(self) -> float:
        """Return when the engine must next be advanced; inf when it has nothing to do.

        It is the end of the planned step or stretch: the next first token or finish, or a
        boundary at which something may be admitted. Just after a submission to an idle engine it
        is that instant, since its step is not planned yet.
        """
        if self._steps:
            return self._end_s
        return self._boundary_s if self._busy() else math.inf

    def advance(self, until_s: float) -> list[EngineEvent]:
        """Run to ``until_s`` (>= ``now_s``; inf runs dry) and return what happened, in order.

        Steps that start at ``until_s`` or before are planned, and seen by no later request.
        """
        events: list[EngineEvent] = []
        while True:
            if not self._steps:
                if self._boundary_s > until_s or not self._busy():
                    break
                self._plan(self._boundary_s, events)
                if not self._steps:
                    break
            if self._end_s > until_s:
                break
            self._commit(self._steps)
            self._close(events)
        if until_s > self.now_s:
            self.now_s = until_s if until_s < math.inf else max(self.now_s, self._boundary_s)
        return events

    def step(self, now_s: float) -> StepResult | None:
        """Run the step that starts at ``now_s`` and commit it; None if there is nothing to run.

        While the engine is busy, pass the ``end_s`` of the step before, also when the caller is
        a little late; after a pause, the present. Requests and aborts that come before ``end_s``
        are seen by the next step.

        Raises
        ------
        IllegalEvent
            If the step before ends after ``now_s``.
        """
        if now_s < max(self.now_s, self._time(self._done) if self._steps else self._boundary_s):
            raise IllegalEvent(f"a step cannot start at {now_s} s: {self!r} is not that far")
        if not self._busy():
            return None
        events: list[EngineEvent] = []
        if self._steps and now_s != self._time(self._done):
            self._steps = 0
        if not self._steps:
            self._plan(now_s, events)
        self.now_s = now_s
        if not self._steps:
            return None
        done = self._done + 1
        end_s = self._time(done)
        yielding = [call.request for call in self._running if call.state == _DECODING]
        yielding += [call.request for call in self._prefilled]
        self._commit(done)
        if done == self._steps:
            self._close(events)
        reasons = {event.request: event.reason for event in events if isinstance(event, Finished)}
        return StepResult(
            end_s,
            tuple(
                StepToken(request.request_id, 1, request in reasons, reasons.get(request))
                for request in yielding
            ),
        )

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; refused (False) while any block is in use."""
        return self._pool.clear()

    # -- the plan of a step (rules 1 to 4) -------------------------------------------------

    def _plan(self, start_s: float, events: list[EngineEvent]) -> None:
        config = self.config
        pool = self._pool
        self._start_s = start_s
        self._done = self._taken = 0

        partial = self._partial
        need = self._phases[self._tick % config.block_tokens]
        chunk = 0
        if partial is not None:
            chunk, chunk_need = self._chunk(partial)
            need += chunk_need
        look_again = need > pool.free  # whether the next step may admit what this one cannot
        if look_again:
            chunk = self._take_or_preempt(start_s, events)
            partial = self._partial
        else:
            pool.take(need)
            if self._alike:
                self._label_filled(self._tick + 1)
        self._taken = 1

        budget = config.max_num_batched_tokens - self._decodes
        chunks: list[tuple[int, int]] = []
        if partial is not None:
            budget -= chunk
            chunks.append((chunk, partial.computed))
            self._compute(partial, chunk)
        if self.num_waiting and (not look_again or not self.num_running):
            look_again = self._admit(start_s, budget, chunks, events)
        if not chunks and not self._decodes:
            while self._waiting and self._pins and not chunks:
                self._pool.release(self._pins.pop(next(iter(self._pins))), 0)
                self._admit(start_s, budget, chunks, events)
            if not chunks:
                self._steps = 0
                self._stalled = True
                return

        self._steps = 1
        factor = self._scale
        if self._cv > 0.0:
            factor *= self._noise()
        if not chunks:
            line = self.step_time.decode_line(self._decodes)
            if line is not None:
                base_s, slope_s = line
                self._first_s = factor * (base_s + slope_s * self._context)
                self._growth_s = factor * slope_s * self._decodes
                if not look_again:
                    self._steps = self._stretch()
                self._end_s = self._time(self._steps)
                return
        self._growth_s = 0.0
        self._first_s = factor * self.step_time.seconds(
            Batch(
                decodes=self._decodes,
                context_tokens=self._context,
                chunks=chunks,
                yields=self._decodes + len(self._prefilled),
                used_blocks=pool.total - pool.free,
            )
        )
        self._end_s = start_s + self._first_s

    def _busy(self) -> bool:
        """Whether a step can be planned."""
        if self.num_running:
            return True
        return (bool(self._waiting) or bool(self._pulled)) and not self._stalled

    def _settle(self, now_s: float) -> None:
        """Bring the pool up to ``now_s``: what has ended is done, the step in flight ends all."""
        if self._steps > 1:
            self._commit(self._completed(now_s))
            self._cut(now_s)
            if self._steps:
                self._take(self._steps)

    def _wake(self, now_s: float) -> None:
        """Plan again if the engine stood still, because something became possible."""
        self._stalled = False
        if not self._steps and not self.num_running:
            self._boundary_s = max(self._boundary_s, now_s)

    def _admit(
        self,
        now_s: float,
        budget: int,
        chunks: list[tuple[int, int]],
        events: list[EngineEvent],
    ) -> bool:
        """Admit from the head of the queue; True if the cache may yet help a blocked head."""
        config = self.config
        pool = self._pool
        size = config.block_tokens
        waiting = self._waiting
        slots = config.max_num_seqs - self.num_running
        while self._pulled and budget > 0 and slots > 0:
            call = self._pulled.popleft()
            chunk = min(call.known - call.computed, budget)
            slots -= 1
            budget -= chunk
            chunks.append((chunk, call.computed))
            self._start(call, chunk, now_s)
        while waiting and budget > 0 and slots > 0:
            call = waiting[0][3]
            known = call.known
            # At least one token is computed, so that there is something to sample from.
            hits = self._lookup(call.hashes, (known - 1) // size)
            held = hits.blocks
            cached = held * size
            chunk = min(known - cached, budget)
            pulls = min(call.remote, known - 1) > cached
            reach = known if config.reserve_full_isl or pulls else cached + chunk
            need = -(-reach // size) - held + hits.idle
            if self.num_running:
                need += self._watermark_blocks
            if need > pool.free:
                return self._may_gain(call, held)
            heappop(waiting)
            pool.acquire(hits)
            call.held = hits
            if config.prefix_caching and call.request.first_scheduled_s is None:
                self.prefix_queries_total += known
                self.prefix_hits_total += cached
            if pulls:
                self._pull(call, cached, now_s, events)
                continue
            pool.take(-(-(cached + chunk) // size) - held)
            call.computed = cached
            slots -= 1
            budget -= chunk
            self.queued_prefill_tokens -= cached
            chunks.append((chunk, cached))
            self._start(call, chunk, now_s)
        return False

    def _start(self, call: _Call, chunk: int, now_s: float) -> None:
        """Give a call its slot and its first chunk, whose blocks are taken."""
        self.num_waiting -= 1
        self._serials += 1
        call.serial = self._serials
        call.state = _PREFILLING
        if not self._alike:
            self._compare(call)
        self._running[call] = None
        self.num_running += 1
        request = call.request
        if request.first_scheduled_s is None:
            request.first_scheduled_s = now_s
            request.cached_tokens = call.computed
        self._compute(call, chunk)

    def _pull(self, call: _Call, cached: int, now_s: float, events: list[EngineEvent]) -> None:
        """Take all blocks of a call whose first ``cached`` tokens are here, and ask for KV."""
        size = self.config.block_tokens
        total = -(-call.known // size)
        self._pool.take(total - call.held.blocks)
        # At least one token is computed here, as after a prefix hit.
        call.computed = min(call.remote, call.known - 1)
        call.spare = total - -(-call.computed // size)
        call.state = _PULLING
        self.queued_prefill_tokens -= call.computed
        events.append(PullStarted(now_s, call.request, call.remote - cached))

    def _stop_pulling(self, call: _Call) -> None:
        """Take a pulling call out, and its blocks back."""
        self.num_waiting -= 1
        self.queued_prefill_tokens -= call.known - call.computed
        held = -(-call.known // self.config.block_tokens)
        self._pool.release(call.held, held - call.held.blocks)
        call.held = Holding()
        call.spare = 0
        call.remote = 0

    def _chunk(self, call: _Call) -> tuple[int, int]:
        """Return tokens and blocks that a running prefill gets in the step being planned."""
        computed = call.computed
        size = self.config.block_tokens
        chunk = min(call.known - computed, self.config.max_num_batched_tokens - self._decodes)
        need = -(-(computed + chunk) // size) - -(-computed // size)
        return chunk, max(0, need - call.spare)

    def _compute(self, call: _Call, chunk: int) -> None:
        """Count a prefill chunk as computed; its blocks are already taken."""
        computed = call.computed + chunk
        if call.spare:
            size = self.config.block_tokens
            used = -(-computed // size) - -(-call.computed // size)
            call.spare = max(0, call.spare - used)
        call.computed = computed
        self.queued_prefill_tokens -= chunk
        if call.hashes:
            self._label(call, computed // self.config.block_tokens)
        if computed == call.known:
            self._prefilled.append(call)
            self._partial = None
        else:
            self._partial = call

    def _may_gain(self, head: _Call, held: int) -> bool:
        """Whether a running call is about to write the next block that a blocked head lacks."""
        if held >= min((head.known - 1) // self.config.block_tokens, len(head.hashes)):
            return False
        missing = head.hashes[held]
        # Equal hashes mean equal prefixes, so the block has the same position in both.
        return any(
            len(call.hashes) > held and call.hashes[held] == missing for call in self._growing
        )

    def _stretch(self) -> int:
        """Return how many decode-only steps can run without a decision, >= 1."""
        finishes = self._finishes
        while finishes[0][2].serial != finishes[0][1]:
            heappop(finishes)  # preempted or aborted since
        steps = finishes[0][0] - self._tick
        if self._cv > 0.0:
            steps = min(steps, _NOISE_STEPS)
        free = self._pool.free
        size = self.config.block_tokens
        # Blocks for the first step are taken; no call takes more than one in `size` steps.
        if self._decodes * (-(-(steps - 1) // size)) > free:
            phases = self._phases
            cycles, free = divmod(free, self._decodes)
            most = 1 + cycles * size
            tick = self._tick + 1
            while (need := phases[tick % size]) <= free:
                free -= need
                most += 1
                tick += 1
            steps = min(steps, most)
        return steps

    def _take_or_preempt(self, now_s: float, events: list[EngineEvent]) -> int:
        """Give the running calls their blocks one by one, preempting where none is left.

        Returns
        -------
        Tokens for the call in the middle of its prefill; 0 if there is none (any more).
        """
        pool = self._pool
        size = self.config.block_tokens
        tick = self._tick
        fcfs = self.config.policy == "fcfs"
        order = list(self._running)
        position = 0  # calls before it are served
        chunk = 0
        while position < len(order):
            call = order[position]
            if call is self._partial:
                chunk, need = self._chunk(call)
            else:
                need = 1 if (tick - call.offset) % size == 0 else 0
            while need > pool.free:
                victim = order[-1] if fcfs else max(order, key=_urgency)
                at = order.index(victim)
                del order[at]
                served = at < position
                position -= served
                self._preempt(victim, now_s, events, in_flight=int(served))
                if victim is call:
                    chunk = 0
                    break
            else:
                pool.take(need)
                if self._alike and call in self._growing:
                    self._label(call, self._filled(call, tick + 1))
                position += 1
        return chunk

    def _preempt(
        self, call: _Call, now_s: float, events: list[EngineEvent], *, in_flight: int
    ) -> None:
        lingers = call.state == _LINGERING
        self._leave(call, in_flight=in_flight)
        if not lingers:
            call.request.preemptions += 1
            self.preemptions_total += 1
            self._queue(call, in_front=True)
            events.append(Preempted(now_s, call.request))

    def _queue(self, call: _Call, *, in_front: bool = False) -> None:
        call.state = _WAITING
        self.num_waiting += 1
        self.queued_prefill_tokens += call.known
        request = call.request
        key: tuple[int, float, int | str]
        if self.config.policy == "priority":
            key = (request.priority, request.arrival_s, request.request_id)
        else:
            self._serials += 1
            key = (-1, 0.0, -self._serials) if in_front else (0, 0.0, self._serials)
        heappush(self._waiting, (*key, call))

    # -- the passage of steps ---------------------------------------------------------------

    def _take(self, upto: int) -> None:
        """Take and label the blocks of the stretch's steps before index ``upto``."""
        first = self._taken
        if upto > first:
            done = self._done
            self._pool.take(self._blocks_for(first - done, upto - done))
            if self._alike:
                self._label_filled(self._tick + upto - done)
            self._taken = upto

    def _blocks_for(self, first: int, last: int) -> int:
        """Return the blocks that decoding calls take in the ticks [first, last) from now."""
        size = self.config.block_tokens
        cycles, rest = divmod(last - first, size)
        need = cycles * self._decodes
        if rest:
            start = (self._tick + first) % size
            end = start + rest
            phases = self._phases
            if end <= size:
                need += sum(phases[start:end])
            else:
                need += sum(phases[start:]) + sum(phases[: end - size])
        return need

    def _lookup(self, hashes: Sequence[int], most: int) -> Holding:
        """Return `BlockPool.lookup`, with what decoding calls have filled up to now."""
        hits = self._pool.lookup(hashes, most)
        at = hits.blocks
        if at < min(most, len(hashes)) and any(
            call.held.blocks <= at < len(call.hashes) and call.hashes[at] == hashes[at]
            for call in self._growing
        ):
            self._label_filled(self._tick + self._taken - self._done)
            hits = self._pool.lookup(hashes, most)
        return hits

    def _label(self, call: _Call, blocks: int) -> None:
        """Give a call's first ``blocks`` blocks their hashes, as far as they have any."""
        first = call.held.blocks
        if blocks > first:
            self._pool.label(call.held, call.hashes[first:blocks])

    def _label_filled(self, tick: int) -> None:
        """Label the blocks that decoding calls fill before ``tick``, in the order they do."""
        size = self.config.block_tokens
        due = sorted(
            (call.offset + (block + 1) * size, place, block)
            for place, call in enumerate(self._growing)
            for block in range(call.held.blocks, self._filled(call, tick))
        )
        calls = tuple(self._growing)
        for _, place, block in due:
            call = calls[place]
            self._pool.label(call.held, call.hashes[block : block + 1])

    def _filled(self, call: _Call, tick: int) -> int:
        """Return how many blocks with a hash a decoding call has filled before ``tick``."""
        return min((tick - call.offset) // self.config.block_tokens, len(call.hashes))

    def _compare(self, call: _Call) -> None:
        """Label at once from now on if a running call writes what is in this one's text, too."""
        hashes, answer = call.hashes, call.answer
        for other in self._running:
            # Equal hashes mean equal prefixes: if they share any of an answer, then its beginning.
            at = min(answer, other.answer)
            if at < len(hashes) and at < len(other.hashes) and hashes[at] == other.hashes[at]:
                self._label_filled(self._tick + self._taken - self._done)
                self._alike = True
                return

    def _commit(self, done: int) -> None:
        """Let the stretch have ``done`` of its steps behind it."""
        steps = done - self._done
        if steps > 0:
            self._take(done)
            tokens = steps * self._decodes
            self._tick += steps
            self._context += tokens
            self._generated += tokens
            self._steps_done += steps
            self._done = done

    def _close(self, events: list[EngineEvent]) -> None:
        """End the stretch: calls finish, prefills turn into decodes."""
        now_s = self._boundary_s = self._end_s
        self._steps = 0
        tick = self._tick
        finishes = self._finishes
        while finishes and finishes[0][0] <= tick:
            _tick, serial, call = heappop(finishes)
            if call.serial != serial:
                continue  # preempted or aborted since
            if call.state == _LINGERING:
                self._generated -= 1  # the token nobody wanted
                self._leave(call)
            else:
                self._finish(call, now_s, events)
        if not self._prefilled:
            return
        size = self.config.block_tokens
        for call in self._prefilled:
            request = call.request
            self._generated += 1
            if request.first_token_s is None:
                request.first_token_s = now_s
                self.prompt_tokens_total += request.prompt_tokens
                events.append(FirstToken(now_s, request))
            call.state = _DECODING
            offset = call.offset = tick - call.computed
            call.last_tick = tick + request.prompt_tokens + request.output_tokens - (call.known + 1)
            self._decodes += 1
            self._context += call.computed + 1
            self._phases[offset % size] += 1
            if len(call.hashes) > call.held.blocks:
                self._growing[call] = None
            if call.last_tick == tick:
                self._finish(call, now_s, events)
            else:
                heappush(finishes, (call.last_tick, call.serial, call))
        self._prefilled.clear()

    def _finish(self, call: _Call, now_s: float, events: list[EngineEvent]) -> None:
        request = call.request
        request.finish_s = now_s
        del self._live[request.request_id]
        stop = request.stops_at_eos
        events.append(Finished(now_s, request, "stop" if stop else "length"))
        if stop and self.config.async_scheduling:
            # The next step was planned with it, before its last token was known.
            request.generated_tokens = request.output_tokens
            call.state = _LINGERING
            self._stop_growing(call, self._tick)
            heappush(self._finishes, (self._tick + 1, call.serial, call))
        else:
            self._leave(call, keep=request.keep_blocks)

    def _stop_growing(self, call: _Call, tick: int) -> None:
        """Label what a decoding call has filled before ``tick``, if that has not been done."""
        if call in self._growing:
            del self._growing[call]
            filled = self._filled(call, tick)
            self._pool.label(call.held, call.hashes[call.held.blocks : filled])

    def _leave(self, call: _Call, *, in_flight: int = 0, keep: bool = False) -> None:
        """Take a running call off its slot and give its blocks back, or ``keep`` them.

        ``in_flight`` is 1 if the blocks of a step not yet committed are taken.
        """
        size = self.config.block_tokens
        if call.state == _PREFILLING:
            computed = call.computed
            self.queued_prefill_tokens -= call.known - computed
            if self._partial is call:
                self._partial = None
            else:
                self._prefilled.remove(call)
        else:
            computed = self._tick - call.offset
            phase = call.offset % size
            self._decodes -= 1
            self._context -= computed + 1
            self._phases[phase] -= 1
            self._stop_growing(call, self._tick + in_flight)
            if call.state == _DECODING:
                call.known = computed + 1
                call.request.generated_tokens = computed + 1 - call.request.prompt_tokens
            computed += in_flight
        blank = -(-computed // size) - call.held.blocks + call.spare
        if keep:
            self._kept[call.request.request_id] = (call.held, blank)
        else:
            self._pool.release(call.held, blank)
        call.held = Holding()
        call.spare = call.remote = 0
        call.serial = -1
        del self._running[call]
        self.num_running -= 1

    # -- clock --------------------------------------------------------------------------------

    def _time(self, steps: int) -> float:
        """Return when ``steps`` steps of the stretch have ended."""
        return self._start_s + steps * self._first_s + self._growth_s * (steps * (steps - 1) // 2)

    def _completed(self, now_s: float) -> int:
        """Return how many steps of the stretch have ended at ``now_s``."""
        steps = self._steps
        if now_s >= self._end_s:
            return steps
        elapsed = now_s - self._start_s
        if elapsed <= 0.0:
            return 0
        # Smaller root of growth/2 k^2 + (first - growth/2) k - elapsed, in the stable form;
        # rounding is put right with the exact times.
        half = self._first_s - 0.5 * self._growth_s
        root = math.sqrt(half * half + 2.0 * self._growth_s * elapsed)
        done = min(int(2.0 * elapsed / (half + root)), steps)
        while done > 0 and self._time(done) > now_s:
            done -= 1
        while done < steps and self._time(done + 1) <= now_s:
            done += 1
        return done

    def _uncommitted(self) -> int:
        return max(self._completed(self.now_s) - self._done, 0)

    def _started(self, now_s: float) -> int:
        """Return how many steps of the stretch have started at ``now_s``.

        A step that would start at ``now_s`` itself has, if the engine was advanced to there.
        """
        started = self._completed(now_s)
        if self._time(started) < now_s or self.now_s == now_s:
            started += 1
        return min(max(started, self._taken), self._steps)

    def _cut(self, now_s: float) -> None:
        """End the stretch with the last step that has started at ``now_s``."""
        if self._steps > 1:
            steps = self._started(now_s)
            if steps < self._steps:
                self._steps = steps
                self._end_s = self._time(steps)
            if steps == self._done:  # driven by `step`: no step is in flight
                self._boundary_s = self._end_s
                self._steps = 0

    def _check_instant(self, now_s: float) -> None:
        """Refuse an instant that the engine has left behind or not been advanced to."""
        in_flight = self._steps > 0 and self._taken > self._done
        if not now_s >= self.now_s or (in_flight and now_s > self._end_s):
            raise IllegalEvent(f"{now_s} s is not within reach of {self!r}; advance it first")

    def _noise(self) -> float:
        assert self._normals is not None  # noqa: S101 - checked by the constructor
        return math.exp(self._spread * next(self._normals) - self._shift)

    def _check(self, request: EngineRequest) -> None:
        config = self.config
        name = request.request_id
        if name in self._live or request.first_scheduled_s is not None:
            raise IllegalEvent(f"request {name!r} was submitted before")
        prompt, output = request.prompt_tokens, request.output_tokens
        if name in self._kept:
            raise IllegalEvent(f"blocks of request {name!r} are still kept")
        if not 0 <= request.remote_tokens <= prompt or (
            request.keep_blocks and request.stops_at_eos
        ):
            raise InvalidInput(
                f"remote_tokens {request.remote_tokens}, keep_blocks {request.keep_blocks}",
                where=f"request {name!r}",
                remedy="pull at most the prompt, and keep blocks of calls with a length limit only",
            )
        if prompt < 1 or output < 1:
            raise InvalidInput(
                f"{prompt} prompt and {output} output tokens",
                where=f"request {name!r}",
                remedy="give at least one of each",
            )
        if prompt + output > config.max_model_len:
            raise InvalidInput(
                f"{prompt} + {output} tokens exceed max_model_len {config.max_model_len}",
                where=f"request {name!r}",
                remedy="shorten it",
            )
        # The last token's own KV is never needed.
        if -(-(prompt + output - 1) // config.block_tokens) > self._pool.total:
            raise InvalidInput(
                f"{prompt} + {output} tokens need more than the {self._pool.total} KV blocks",
                where=f"request {name!r}",
                remedy="shorten it or give the engine more blocks",
            )
