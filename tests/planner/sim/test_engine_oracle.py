"""The engine against a slow, literal transcription of vLLM's rules: one step, block and token."""

import math
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.domain.blocks import Segment, block_hashes
from planner.domain.latency import LatencyRow
from planner.sim.engine import Engine, EngineConfig, EngineRequest
from planner.sim.steptime import Batch, RowStepTime, standard_normals

ROW = LatencyRow(
    prefill_base_ms=7.3,
    prefill_us_per_token=311.0,
    prefill_ns_per_token_sq=1700.0,
    decode_base_ms=5.9,
    decode_us_per_call=430.0,
    decode_ns_per_kv_token=9100.0,
)


@dataclass(eq=False)
class Call:
    """A request with a list of real block numbers."""

    spec: EngineRequest
    out: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    preemptions: int = 0
    cached: int = 0
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finish_s: float | None = None
    gone: bool = False
    lingers: bool = False
    decoding: bool = False  # its prefill has ended since its admission

    @property
    def known(self) -> int:
        return self.spec.prompt_tokens + self.out


class LiteralEngine:
    """vLLM's scheduler written down rule by rule, with no regard for speed."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.time = RowStepTime(ROW)
        self.free = list(range(config.kv_blocks - 1))  # the head is taken first
        self.refs = dict.fromkeys(self.free, 0)
        self.content: dict[int, int] = {}
        self.found: dict[int, list[int]] = {}
        self.waiting: list[Call] = []
        self.running: list[Call] = []
        self.hits = self.queries = self.generated = 0

    # blocks

    def take(self) -> int:
        block = self.free.pop(0)
        if block in self.content:
            content = self.content.pop(block)
            self.found[content].remove(block)
            if not self.found[content]:
                del self.found[content]
        self.refs[block] = 1
        return block

    def give_back(self, call: Call) -> None:
        for block in reversed(call.blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                if block in self.content:
                    self.free.append(block)
                else:
                    self.free.insert(0, block)
        call.blocks = []

    def cover(self, call: Call, tokens: int) -> None:
        """Give blocks for ``tokens`` tokens, and hash those that are full."""
        size = self.config.block_tokens
        while len(call.blocks) * size < tokens:
            call.blocks.append(self.take())
        if self.config.prefix_caching and not call.lingers:
            for position in range(min(tokens // size, len(call.spec.block_hashes))):
                block = call.blocks[position]
                if block not in self.content:
                    content = call.spec.block_hashes[position]
                    self.content[block] = content
                    self.found.setdefault(content, []).append(block)

    def missing(self, call: Call, tokens: int) -> int:
        return max(math.ceil(tokens / self.config.block_tokens) - len(call.blocks), 0)

    # one step

    def key(self, call: Call) -> tuple[int, float, str]:
        return call.spec.priority, call.spec.arrival_s, call.spec.request_id

    def arrive(self, call: Call) -> None:
        self.waiting.append(call)

    def head(self) -> Call:
        return self.waiting[0] if self.config.policy == "fcfs" else min(self.waiting, key=self.key)

    def schedule(self, now_s: float) -> dict[Call, int]:
        config = self.config
        budget = config.max_num_batched_tokens
        tokens: dict[Call, int] = {}
        preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            call = self.running[index]
            count = 1 if call.lingers else min(call.known - call.computed, budget)
            fits = True
            while self.missing(call, call.computed + count) > len(self.free):
                preempted = True
                if config.policy == "fcfs":
                    victim = self.running.pop()
                else:
                    victim = max(self.running, key=lambda c: (c.spec.priority, c.spec.arrival_s))
                    at = self.running.index(victim)
                    del self.running[at]
                    if victim in tokens:
                        budget += tokens.pop(victim)
                        index -= 1
                self.give_back(victim)
                victim.computed = 0
                victim.decoding = False
                if not victim.lingers:
                    victim.preemptions += 1
                    self.waiting.insert(0, victim)
                if victim is call:
                    fits = False
                    break
            if fits:
                self.cover(call, call.computed + count)
                tokens[call] = count
                budget -= count
                index += 1
        while (
            self.waiting
            and not preempted
            and budget > 0
            and len(self.running) < config.max_num_seqs
        ):
            call = self.head()
            hits: list[int] = []
            if config.prefix_caching:
                for content in call.spec.block_hashes[: (call.known - 1) // config.block_tokens]:
                    if content not in self.found:
                        break
                    hits.append(self.found[content][0])
            cached = len(hits) * config.block_tokens
            count = min(call.known - cached, budget)
            reach = call.known if config.reserve_full_isl else cached + count
            need = math.ceil(reach / config.block_tokens) - len(hits)
            need += sum(self.refs[block] == 0 for block in hits)
            if self.running:
                need += math.floor(config.watermark * config.kv_blocks)
            if need > len(self.free):
                break
            self.waiting.remove(call)
            for block in hits:
                if self.refs[block] == 0:
                    self.free.remove(block)
                self.refs[block] += 1
            call.blocks = hits
            call.computed = cached
            self.cover(call, cached + count)
            self.running.append(call)
            tokens[call] = count
            budget -= count
            if call.first_scheduled_s is None:
                call.first_scheduled_s = now_s
                call.cached = cached
                if config.prefix_caching:
                    self.queries += call.known
                    self.hits += cached
        return tokens

    def seconds(self, tokens: dict[Call, int]) -> float:
        decodes = [call for call in tokens if call.decoding]
        chunks = [(count, call.computed) for call, count in tokens.items() if not call.decoding]
        return self.time.seconds(
            Batch(
                decodes=len(decodes),
                context_tokens=sum(call.computed + 1 for call in decodes),
                chunks=chunks,
                yields=0,
                used_blocks=0,
            )
        )

    def finish_step(self, tokens: dict[Call, int], now_s: float) -> None:
        for call, count in tokens.items():
            if call.gone:
                continue
            if call.lingers:
                self.running.remove(call)
                self.give_back(call)
                continue
            call.computed += count
            if call.computed < call.known:
                continue
            call.decoding = True
            call.out += 1
            self.generated += 1
            if call.first_token_s is None:
                call.first_token_s = now_s
            if call.out == call.spec.output_tokens:
                call.finish_s = now_s
                if call.spec.stops_at_eos and self.config.async_scheduling:
                    call.lingers = True
                else:
                    self.running.remove(call)
                    self.give_back(call)

    def abort(self, call: Call) -> None:
        if call.finish_s is None:
            call.gone = True
            if call in self.waiting:
                self.waiting.remove(call)
            elif call in self.running:
                self.running.remove(call)
                self.give_back(call)

    def run(self, arrivals: list[Call], aborts: list[tuple[float, Call]]) -> list[tuple[int, ...]]:
        """Serve everything; return the gauges at each arrival."""
        gauges: list[tuple[int, ...]] = []
        happenings: list[tuple[float, int, Call]] = sorted(
            [(call.spec.arrival_s, 0, call) for call in arrivals]
            + [(time_s, 1, call) for time_s, call in aborts],
            key=lambda item: item[:2],
        )

        def happen(until_s: float) -> None:
            while happenings and happenings[0][0] <= until_s:
                _time_s, is_abort, call = happenings.pop(0)
                if is_abort:
                    self.abort(call)
                else:
                    gauges.append(
                        (len(self.free), len(self.running), len(self.waiting), self.generated)
                    )
                    self.arrive(call)

        now_s = 0.0
        while happenings or self.waiting or self.running:
            if not self.waiting and not self.running:
                now_s = max(now_s, happenings[0][0])
            happen(now_s)
            if not self.waiting and not self.running:
                continue
            tokens = self.schedule(now_s)
            assert tokens
            end_s = now_s + self.seconds(tokens)
            happen(end_s)
            self.finish_step(tokens, end_s)
            now_s = end_s
        return gauges


@st.composite
def cases(draw: st.DrawFn) -> tuple[EngineConfig, list[EngineRequest]]:
    """Small engines under memory pressure; requests of one family share their whole text."""
    size = draw(st.sampled_from([2, 4, 5]))
    slots = draw(st.integers(1, 6))
    config = EngineConfig(
        kv_blocks=draw(st.integers(12, 40)),
        block_tokens=size,
        max_num_seqs=slots,
        max_num_batched_tokens=slots + draw(st.integers(0, 30)),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        prefix_caching=draw(st.booleans()),
        reserve_full_isl=draw(st.booleans()),
        watermark=draw(st.sampled_from([0.0, 0.1])),
        async_scheduling=draw(st.booleans()),
    )
    most = (config.kv_blocks - 1) * size
    requests = []
    arrival_s = 0.0
    for index in range(draw(st.integers(1, 12))):
        arrival_s += draw(st.integers(1, 60)) * 0.00137
        prompt = draw(st.integers(1, min(40, most - 1)))
        output = draw(st.integers(1, min(25, most - prompt)))
        family = draw(st.integers(0, 4))
        chain = block_hashes((Segment(family, prompt + output),), size)
        requests.append(
            EngineRequest(
                request_id=f"r{index:02}",
                prompt_tokens=prompt,
                output_tokens=output,
                # Family 0 has no hashes; in family 4 only the prompt has.
                block_hashes=()
                if family == 0
                else chain[: prompt // size]
                if family == 4
                else chain,
                priority=draw(st.integers(0, 2)),
                arrival_s=arrival_s,
                stops_at_eos=draw(st.booleans()),
            )
        )
    return config, requests


def fresh(requests: list[EngineRequest]) -> list[EngineRequest]:
    return [
        EngineRequest(
            request_id=r.request_id,
            prompt_tokens=r.prompt_tokens,
            output_tokens=r.output_tokens,
            block_hashes=r.block_hashes,
            priority=r.priority,
            arrival_s=r.arrival_s,
            stops_at_eos=r.stops_at_eos,
        )
        for r in requests
    ]


@settings(max_examples=300, deadline=None)
@given(cases(), st.lists(st.tuples(st.integers(0, 11), st.integers(1, 300)), max_size=3))
def test_engine_equals_the_literal_transcription(
    case: tuple[EngineConfig, list[EngineRequest]], cancels: list[tuple[int, int]]
) -> None:
    """Every time, hit, preemption and gauge is what the rules give when followed one by one."""
    config, requests = case
    literal = LiteralEngine(config)
    calls = [Call(request) for request in fresh(requests)]
    chosen = {at % len(requests): delay for at, delay in cancels}
    aborts = [
        (requests[at].arrival_s + delay * 0.00100003, at) for at, delay in sorted(chosen.items())
    ]
    expected_gauges = literal.run(calls, [(time_s, calls[at]) for time_s, at in aborts])

    engine = Engine(config, RowStepTime(ROW))
    gauges = []
    happenings = sorted([(r.arrival_s, 0, i) for i, r in enumerate(requests)] + [
        (time_s, 1, at) for time_s, at in aborts
    ])  # fmt: skip
    for time_s, is_abort, at in happenings:
        engine.advance(time_s)
        if is_abort:
            engine.abort(requests[at].request_id, time_s)
        else:
            gauges.append(
                (
                    engine.free_blocks,
                    engine.num_running,
                    engine.num_waiting,
                    engine.generation_tokens_total,
                )
            )
            engine.submit(requests[at], time_s)
    engine.advance(math.inf)

    for call, request in zip(calls, requests, strict=True):
        for name in ("first_scheduled_s", "first_token_s", "finish_s"):
            expected, found = getattr(call, name), getattr(request, name)
            if expected is None or found is None:
                assert expected is found, (request, name)
            else:
                assert abs(expected - found) < 1e-9, (request, name)
        assert request.cached_tokens == call.cached
        assert request.preemptions == call.preemptions
        assert request.generated_tokens == call.out
    assert gauges == expected_gauges
    assert engine.free_blocks == config.kv_blocks - 1 == len(literal.free)
    assert engine.prefix_hits_total == literal.hits
    assert engine.prefix_queries_total == literal.queries
    assert engine.generation_tokens_total == literal.generated
    assert engine.queued_prefill_tokens == 0


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.3]))
def test_step_by_step_gives_the_same_bits_as_advance(
    case: tuple[EngineConfig, list[EngineRequest]], noise_cv: float
) -> None:
    """A live endpoint that steps sees exactly the times that a simulation sees."""
    config, requests = case

    def engine() -> Engine:
        return Engine(
            config,
            RowStepTime(ROW),
            normals=standard_normals(np.random.default_rng(7)),
            noise_cv=noise_cv,
        )

    advanced = engine()
    for request in requests:
        advanced.advance(request.arrival_s)
        advanced.submit(request, request.arrival_s)
    advanced.advance(math.inf)

    stepped, again = engine(), fresh(requests)
    coming = deque(again)
    tokens: Counter[str] = Counter()
    finish_s: dict[str, float] = {}
    now_s = 0.0
    while True:
        result = stepped.step(now_s)
        if result is None:
            if not coming:
                break
            now_s = coming[0].arrival_s
            stepped.submit(coming.popleft(), now_s)
            continue
        for token in result.tokens:
            tokens[token.request_id] += token.new_tokens
            if token.finished:
                finish_s[token.request_id] = result.end_s
        now_s = result.end_s
        while coming and coming[0].arrival_s <= now_s:
            request = coming.popleft()
            stepped.submit(request, request.arrival_s)

    for one, other in zip(requests, again, strict=True):
        assert one.first_scheduled_s == other.first_scheduled_s
        assert one.first_token_s == other.first_token_s
        assert one.finish_s == other.finish_s == finish_s[other.request_id]
        assert one.preemptions == other.preemptions
        assert tokens[other.request_id] == other.output_tokens
    assert advanced.steps_total == stepped.steps_total
    assert advanced.generation_tokens_total == stepped.generation_tokens_total
    assert stepped.free_blocks == config.kv_blocks - 1
