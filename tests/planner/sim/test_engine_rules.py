"""The rules of the scheduler, one small case each.

A step takes 1 ms per decoding call and 1 ms per prefill token here, so times can be counted on
the fingers; blocks hold 4 tokens.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from planner.domain.blocks import Segment, block_hashes
from planner.domain.errors import IllegalEvent, InvalidInput
from planner.domain.fleet import Endpoint
from planner.domain.ids import EndpointId
from planner.domain.latency import LatencyRow
from planner.sim.engine import (
    Engine,
    EngineConfig,
    EngineEvent,
    EngineRequest,
    Finished,
    FirstToken,
    Preempted,
)
from planner.sim.steptime import RowStepTime, standard_normals

MS = 1e-3
ROW = LatencyRow(
    prefill_base_ms=0.0,
    prefill_us_per_token=1000.0,
    prefill_ns_per_token_sq=0.0,
    decode_base_ms=1e-9,
    decode_us_per_call=1000.0,
    decode_ns_per_kv_token=0.0,
)
CONFIG = EngineConfig(
    kv_blocks=101, block_tokens=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=1000
)


def engine(**changes: object) -> Engine:
    return Engine(replace(CONFIG, **changes), RowStepTime(ROW))  # type: ignore[arg-type]


def call(name: str, prompt: int, output: int, **rest: object) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_tokens=prompt, output_tokens=output, **rest)  # type: ignore[arg-type]


def shared(name: str, prompt: int, output: int, key: int = 1) -> EngineRequest:
    """Return a call whose whole text, output included, is the beginning of text ``key``."""
    chain = block_hashes((Segment(key, prompt + output),), CONFIG.block_tokens)
    return call(name, prompt, output, block_hashes=chain)


def submit(target: Engine, *calls: EngineRequest, now_s: float = 0.0) -> None:
    for one in calls:
        target.submit(one, now_s)


def names(events: list[EngineEvent]) -> list[tuple[str, str]]:
    return [(type(event).__name__, event.request.request_id) for event in events]


def ms(time_s: float | None) -> float:
    assert time_s is not None
    return round(time_s / MS, 3)


def test_a_call_alone_takes_its_prefill_and_then_one_step_per_token() -> None:
    """Five prompt tokens give the first token, each further token takes a step."""
    target, one = engine(), call("a", 5, 3)
    submit(target, one)
    events = target.advance(math.inf)
    assert names(events) == [("FirstToken", "a"), ("Finished", "a")]
    assert (ms(one.first_scheduled_s), ms(one.first_token_s), ms(one.finish_s)) == (0, 5, 7)
    assert (target.generation_tokens_total, target.steps_total) == (3, 3)


def test_a_single_token_ends_with_the_prefill() -> None:
    """A call of one output token has its first token and its end in the same step."""
    target, one = engine(), call("a", 5, 1)
    submit(target, one)
    assert names(target.advance(1.0)) == [("FirstToken", "a"), ("Finished", "a")]
    assert one.first_token_s == one.finish_s
    assert target.free_blocks == 100


def test_a_long_prompt_is_chopped_by_the_budget_that_decodes_leave() -> None:
    """Beside one decode, 20 prompt tokens take three steps of budget 8: 7, 7 and 6."""
    target = engine(max_num_batched_tokens=8)
    one, two = call("a", 4, 10), call("b", 20, 1)
    submit(target, one)
    target.advance(0.5 * MS)  # the step with a's prefill is under way
    submit(target, two, now_s=0.5 * MS)
    target.advance(math.inf)
    assert ms(two.first_scheduled_s) == 4
    assert ms(two.first_token_s) == 4 + (7 + 1) + (7 + 1) + (6 + 1)


def test_prompts_share_a_step_as_far_as_the_budget_goes() -> None:
    """Of two prompts of 6 with budget 8, the second gets 2 tokens and the rest a step later."""
    target = engine(max_num_batched_tokens=8)
    one, two = call("a", 6, 1), call("b", 6, 1)
    submit(target, one, two)
    target.advance(math.inf)
    assert (ms(one.first_token_s), ms(two.first_token_s)) == (8, 12)
    assert ms(two.first_scheduled_s) == 0


def test_slots_limit_who_runs() -> None:
    """With one slot the second call starts when the first has finished."""
    target = engine(max_num_seqs=1)
    one, two = call("a", 4, 3), call("b", 4, 1)
    submit(target, one, two)
    target.advance(0.0)
    assert (target.num_running, target.num_waiting) == (1, 1)
    target.advance(math.inf)
    assert two.first_scheduled_s == one.finish_s


def test_an_arrival_is_seen_at_the_next_step_boundary() -> None:
    """A call that comes in the middle of a step waits for its end, not longer."""
    target = engine()
    one, two = call("a", 4, 10), call("b", 4, 1)
    submit(target, one)
    target.advance(6.4 * MS)
    submit(target, two, now_s=6.4 * MS)
    target.advance(math.inf)
    assert ms(two.first_scheduled_s) == 7


def test_submissions_of_one_instant_share_the_step_unless_it_was_planned() -> None:
    """Advancing to an instant plans its step; what is submitted afterwards is in the next."""
    target = engine()
    one, two, three = call("a", 4, 2), call("b", 4, 2), call("c", 4, 2)
    submit(target, one, two)
    target.advance(0.0)
    submit(target, three)
    target.advance(math.inf)
    assert one.first_scheduled_s == two.first_scheduled_s == 0.0
    assert ms(three.first_scheduled_s) == 8


def test_full_reservation_admits_only_what_fits_as_a_whole() -> None:
    """With it, a prompt of 5 blocks waits for 5 free ones; without, its first chunk is enough."""
    for reserve, scheduled_ms in ((True, 12.0), (False, 8.0)):
        target = engine(kv_blocks=7, max_num_batched_tokens=10, reserve_full_isl=reserve)
        one, two = call("a", 8, 5), call("b", 20, 1)  # a holds 2 to 3 of 6 blocks
        submit(target, one)
        target.advance(1 * MS)
        submit(target, two, now_s=1 * MS)
        target.advance(math.inf)
        assert ms(two.first_scheduled_s) == scheduled_ms


def test_a_blocked_head_blocks_those_behind_it() -> None:
    """A small call does not overtake a big one that has to wait for memory."""
    target = engine(kv_blocks=7)
    one, two, three = call("a", 8, 5), call("b", 20, 1), call("c", 1, 1)
    submit(target, one)
    target.advance(1 * MS)
    submit(target, two, three, now_s=1 * MS)
    target.advance(math.inf)
    assert two.first_scheduled_s == three.first_scheduled_s == one.finish_s


def test_the_watermark_holds_only_while_something_runs() -> None:
    """Admission leaves the watermark free, except on an empty engine."""
    target = engine(kv_blocks=10, watermark=0.5)  # 4 of 9 blocks stay free
    one, two = call("a", 30, 1), call("b", 4, 1)
    submit(target, one, two)
    target.advance(math.inf)
    assert one.first_scheduled_s == 0.0
    assert two.first_scheduled_s == one.finish_s


def test_fcfs_preempts_the_last_admitted_and_keeps_its_output() -> None:
    """When blocks run out the youngest gives way, returns first, and computes its output again."""
    target = engine(kv_blocks=5, prefix_caching=False)
    one, two, three = call("a", 7, 8), call("b", 7, 3), call("c", 1, 1)
    submit(target, one, two)
    target.advance(1 * MS)
    submit(target, three, now_s=1 * MS)
    events = target.advance(math.inf)
    # 14 ms prefill; at 16 ms both hold 8 tokens in 2 of 4 blocks and need a third.
    assert [event for event in events if isinstance(event, Preempted)] == [Preempted(
        pytest.approx(16 * MS), two
    )]  # fmt: skip
    assert (two.preemptions, one.preemptions, target.preemptions_total) == (1, 0, 1)
    assert ms(two.first_token_s) == 14
    assert two.finish_s is not None
    assert one.finish_s is not None
    # It resumes with 7 prompt and 2 output tokens, and before c, when a is through.
    assert two.finish_s - one.finish_s >= 9 * MS
    assert three.first_scheduled_s is not None
    assert three.first_scheduled_s >= one.finish_s


def test_priority_preempts_the_least_urgent() -> None:
    """Under the priority policy the call with the largest priority value gives way."""
    target = engine(kv_blocks=5, policy="priority", prefix_caching=False)
    one, two = call("a", 7, 8, priority=5), call("b", 7, 3, priority=1)
    submit(target, one, two)
    target.advance(math.inf)
    assert (one.preemptions, two.preemptions) == (1, 0)


def test_priority_orders_the_queue() -> None:
    """Waiting calls are admitted by priority, then by arrival."""
    target = engine(max_num_seqs=1, policy="priority")
    calls = [
        call("a", 4, 2, priority=9, arrival_s=0.0),
        call("b", 4, 2, priority=2, arrival_s=0.2),
        call("c", 4, 2, priority=1, arrival_s=0.3),
        call("d", 4, 2, priority=2, arrival_s=0.1),
    ]
    submit(target, calls[0])
    target.advance(0.0)
    submit(target, *calls[1:])
    done = [e.request.request_id for e in target.advance(math.inf) if isinstance(e, Finished)]
    assert done == ["a", "c", "d", "b"]


def test_a_prefix_is_computed_once() -> None:
    """The second call with the same 16 tokens finds 4 blocks and computes the rest."""
    target = engine()
    one, two = shared("a", 16, 1), shared("b", 20, 1)
    submit(target, one)
    target.advance(1.0)
    submit(target, two, now_s=1.0)
    target.advance(math.inf)
    assert two.cached_tokens == 16
    assert two.first_token_s == pytest.approx(1.0 + 4 * MS)
    assert (target.prefix_queries_total, target.prefix_hits_total) == (36, 16)


def test_at_least_one_token_is_computed() -> None:
    """A fully cached prompt of whole blocks computes its last block again."""
    target = engine()
    submit(target, one := shared("a", 16, 1))
    target.advance(1.0)
    submit(target, two := shared("b", 16, 1), now_s=1.0)
    target.advance(math.inf)
    assert (one.cached_tokens, two.cached_tokens) == (0, 12)


def test_calls_of_one_step_share_their_prefix() -> None:
    """Hashes are known when a step is planned, so the second of a pair already hits."""
    target = engine()
    one, two = shared("a", 16, 1), shared("b", 16, 1)
    submit(target, one, two)
    target.advance(math.inf)
    assert two.cached_tokens == 12
    assert ms(one.first_token_s) == 16 + 4


def test_output_is_cached_for_the_next_turn() -> None:
    """The blocks of an answer are found by the call whose prompt contains it."""
    target = engine()
    submit(target, shared("a", 8, 9))  # 17 tokens, of which 16 have their KV
    target.advance(1.0)
    submit(target, two := shared("b", 30, 1), now_s=1.0)
    target.advance(math.inf)
    assert two.cached_tokens == 16


def test_prefix_caching_can_be_switched_off() -> None:
    """Without it nothing is found, and nothing counted."""
    target = engine(prefix_caching=False)
    submit(target, shared("a", 16, 1))
    target.advance(1.0)
    submit(target, two := shared("b", 16, 1), now_s=1.0)
    target.advance(math.inf)
    assert two.cached_tokens == 0
    assert target.prefix_queries_total == 0


def test_the_cache_can_be_asked_and_reset() -> None:
    """A look at the cache takes nothing; it is emptied only when no block is in use."""
    target = engine()
    submit(target, one := shared("a", 16, 9))
    target.advance(20 * MS)  # 16 prompt tokens and 4 steps: 20 tokens, 5 blocks
    assert target.cached_prefix_tokens(one.block_hashes) == 20
    assert not target.reset_prefix_cache()
    target.advance(1.0)
    assert target.cached_prefix_tokens(one.block_hashes) == 24
    assert target.reset_prefix_cache()
    assert target.cached_prefix_tokens(one.block_hashes) == 0


def test_labelling_late_changes_nothing() -> None:
    """Two calls write the same text, the later one ends first: the block of the first is found."""
    free: dict[bool, list[int]] = {}
    for at_once in (True, False):
        target = engine()
        target._alike = at_once
        submit(target, shared("a", 5, 40), shared("b", 5, 8))
        target.advance(30 * MS)
        submit(target, shared("c", 13, 2), now_s=30 * MS)
        free[at_once] = []
        for now_ms in range(31, 60):
            target.advance(now_ms * MS)
            free[at_once].append(target.free_blocks)
    assert free[True] == free[False]


def test_a_call_that_stops_by_eos_wastes_one_step_under_async_scheduling() -> None:
    """Its slot and blocks are held for the step that was planned before its end was known."""
    for flag, running in ((True, 1), (False, 0)):
        target = engine(async_scheduling=flag)
        submit(target, one := call("a", 4, 2, stops_at_eos=True))
        events = target.advance(5.1 * MS)
        assert [e.reason for e in events if isinstance(e, Finished)] == ["stop"]
        assert (ms(one.finish_s), target.num_running) == (5, running)
        target.advance(math.inf)
        assert (target.num_running, target.free_blocks) == (0, 100)
        assert target.generation_tokens_total == 2


def test_abort_frees_blocks_at_once_and_leaves_the_step_in_flight() -> None:
    """The aborted call gets no more tokens; the other's next token comes when it was due."""
    target = engine()
    one, two = call("a", 8, 50), call("b", 8, 50)
    submit(target, one, two)
    target.advance(20.5 * MS)  # 16 ms of prefill, two steps of 2 ms, and a quarter of the third
    assert target.free_blocks == 100 - 6
    assert target.abort("b", 20.5 * MS)
    assert target.free_blocks == 100 - 3
    assert two.generated_tokens == 3
    assert target.next_event_s() == pytest.approx(22 * MS)
    target.advance(math.inf)
    assert ms(one.finish_s) == 16 + 2 * 3 + 46
    assert two.finish_s is None
    assert not target.abort("b", target.now_s)
    assert target.free_blocks == 100


def test_abort_takes_a_call_out_of_the_queue_and_out_of_its_prefill() -> None:
    """Waiting calls and half-computed prompts can go too; those behind them move up."""
    target = engine(max_num_batched_tokens=8, kv_blocks=8)
    submit(target, call("a", 20, 2), call("b", 20, 2), three := call("c", 8, 2))
    target.advance(10 * MS)  # in a's second chunk; b and c wait for memory
    assert (target.num_running, target.num_waiting) == (1, 2)
    assert target.abort("b", 10 * MS)
    assert target.abort("a", 10 * MS)
    assert (target.num_running, target.num_waiting, target.free_blocks) == (0, 1, 7)
    assert target.queued_prefill_tokens == 8
    target.advance(math.inf)
    assert ms(three.first_scheduled_s) == 16


def test_usage_leaves_out_the_null_block_and_counts_cached_blocks_as_free() -> None:
    """Usage is blocks in use over blocks that can be used, at the instant asked for."""
    target = engine(kv_blocks=11)
    submit(target, shared("a", 8, 12))
    target.advance(8.1 * MS)  # the step that takes the third block has begun
    assert target.kv_usage == pytest.approx(0.3)
    assert target.kv_usage_at(12.5 * MS) == pytest.approx(0.4)
    target.advance(12.5 * MS)
    assert target.kv_usage == pytest.approx(0.4)
    target.advance(math.inf)
    assert target.kv_usage == 0.0


def test_queued_prefill_counts_what_is_still_to_compute() -> None:
    """Prompts count until they are computed, and a preempted call counts with its output."""
    target = engine(max_num_batched_tokens=8)
    submit(target, call("a", 20, 2), call("b", 10, 2))
    assert target.queued_prefill_tokens == 30
    target.advance(0.0)
    assert target.queued_prefill_tokens == 22
    target.advance(math.inf)
    assert target.queued_prefill_tokens == 0


def test_scale_slows_the_steps_that_start_after_it() -> None:
    """A straggler's next step is slower; the step in flight ends as planned."""
    target = engine()
    submit(target, one := call("a", 4, 5))
    target.advance(5.5 * MS)
    target.scale = 3.0
    target.advance(math.inf)
    assert ms(one.finish_s) == 6 + 3 * 2


def test_noise_repeats_with_its_seed_and_keeps_the_mean() -> None:
    """The same generator gives the same times; noise of mean 1 moves the total little."""

    def finish_s(seed: int) -> float:
        normals = standard_normals(np.random.default_rng(seed))
        target = Engine(CONFIG, RowStepTime(ROW), normals=normals, noise_cv=0.02)
        submit(target, one := call("a", 4, 390))
        target.advance(math.inf)
        assert one.finish_s is not None
        return one.finish_s

    assert finish_s(1) == finish_s(1) != finish_s(2)
    assert np.mean([finish_s(seed) for seed in range(20)]) == pytest.approx(0.393, rel=0.01)


def test_events_come_in_order_with_first_tokens_before_their_ends() -> None:
    """Times never go back, whatever pieces the engine is advanced in."""
    whole, pieces = engine(), engine()
    for target in (whole, pieces):
        submit(target, *(call(f"r{i}", 3 + i, 1 + 5 * i) for i in range(7)))
    expected = [(type(e), e.time_s, e.request.request_id) for e in whole.advance(math.inf)]
    found: list[EngineEvent] = []
    for instant in np.arange(0.0, 0.2, 0.00031):
        found += pieces.advance(float(instant))
    assert [(type(e), e.time_s, e.request.request_id) for e in found] == expected
    assert [time_s for _kind, time_s, _name in expected] == sorted(
        time_s for _kind, time_s, _name in expected
    )
    assert sum(kind is FirstToken for kind, _time_s, _name in expected) == 7


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"kv_blocks": 1}, "kv_blocks"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 7}, "max_num_batched_tokens"),
        ({"policy": "lifo"}, "policy"),
        ({"watermark": 1.0}, "watermark"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, object], place: str) -> None:
    """A value that vLLM would refuse is named."""
    with pytest.raises(InvalidInput, match=place):
        engine(**changes)


def test_a_call_that_can_never_run_is_refused() -> None:
    """Too long for the model, too big for the cache, or empty: an error at submission."""
    target = engine(kv_blocks=11, max_model_len=60)
    submit(target, call("fits", 36, 5))  # the last token's KV is never needed
    with pytest.raises(InvalidInput, match="KV blocks"):
        submit(target, call("big", 36, 6))
    with pytest.raises(InvalidInput, match="max_model_len"):
        submit(target, call("long", 1, 60))
    with pytest.raises(InvalidInput, match="at least one"):
        submit(target, call("empty", 0, 1))
    assert target.num_waiting == 1


def test_misuse_is_refused() -> None:
    """Ids are unique, requests are used once, and time does not run backwards."""
    target = engine()
    submit(target, one := call("a", 4, 4))
    with pytest.raises(IllegalEvent, match="before"):
        submit(target, call("a", 4, 4))
    target.advance(1.0)
    with pytest.raises(IllegalEvent, match="before"):
        submit(target, one, now_s=1.0)
    with pytest.raises(IllegalEvent, match="reach"):
        submit(target, call("b", 4, 4), now_s=0.5)
    submit(target, call("b", 4, 4), now_s=1.0)
    target.advance(1.0)
    with pytest.raises(IllegalEvent, match="advance"):
        submit(target, call("c", 4, 4), now_s=2.0)
    with pytest.raises(InvalidInput, match="scale"):
        target.scale = 0.0
    with pytest.raises(InvalidInput, match="noise"):
        Engine(CONFIG, RowStepTime(ROW), noise_cv=0.1)


def test_a_step_cannot_start_before_the_last_one_ends() -> None:
    """A live endpoint is told when it is too early, and None when there is nothing to do."""
    target = engine()
    assert target.step(0.0) is None
    submit(target, call("a", 4, 2))
    result = target.step(0.0)
    assert result is not None
    with pytest.raises(IllegalEvent, match="not that far"):
        target.step(0.5 * result.end_s)
    late = target.step(1.0)  # after a hang the next step starts late
    assert late is not None
    assert late.end_s == pytest.approx(1.0 + 1 * MS)
    assert [(t.request_id, t.finished, t.finish_reason) for t in late.tokens] == [
        ("a", True, "length")
    ]


def test_the_configuration_follows_the_endpoint() -> None:
    """Blocks, slots, budget, policy and context come from the fleet file."""
    endpoint = Endpoint(
        id=EndpointId("e"), model="m", gpu="g", latency=ROW, kv_blocks=50, max_num_seqs=3,
        block_tokens=8, max_num_batched_tokens=99, max_model_len=77, scheduling="priority",
    )  # fmt: skip
    assert EngineConfig.from_endpoint(endpoint) == EngineConfig(
        kv_blocks=50, block_tokens=8, max_num_seqs=3, max_num_batched_tokens=99,
        policy="priority", max_model_len=77,
    )  # fmt: skip


def test_a_live_endpoint_sees_aborts_and_submissions_at_the_next_step() -> None:
    """Between two steps of `step`, a call can go or come; the next step has it out or in."""
    target = engine()
    submit(target, call("a", 8, 50), call("b", 8, 50))
    end_s = 0.0
    for _ in range(4):  # 16 ms of prefill, then steps of 2 ms
        result = target.step(end_s)
        assert result is not None
        end_s = result.end_s
    assert ms(end_s) == 22
    assert target.abort("b", 21 * MS)
    assert target.free_blocks == 100 - 3
    submit(target, call("c", 4, 5), now_s=21.5 * MS)
    result = target.step(end_s)
    assert result is not None
    assert [token.request_id for token in result.tokens] == ["a", "c"]
    assert ms(result.end_s) == 22 + 1 + 4
    assert (target.generation_tokens_total, target.steps_total) == (2 * 4 + 2, 5)
