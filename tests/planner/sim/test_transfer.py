"""Links shared by flows, and prefill/decode pools, on cases worked out by hand."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.domain.blocks import Segment
from planner.domain.errors import IllegalEvent, InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId, NodeId, RunId, SiteId, WorkflowHash
from planner.domain.latency import LatencyRow
from planner.domain.run import RunSpec, Task
from planner.domain.trace import CallRecord, RunRecord, TraceRecord
from planner.sim.blockpool import SharedLast
from planner.sim.disturbance import Disturbance
from planner.sim.engine import (
    Engine,
    EngineConfig,
    EngineEvent,
    EngineRequest,
    Finished,
    PullStarted,
)
from planner.sim.kernel import simulate
from planner.sim.steptime import RowStepTime
from planner.sim.transfer import Links, Transfers

# A decode step takes 10 ms whatever the batch, a prefill token 1 ms.
ROW = LatencyRow(
    prefill_base_ms=10,
    prefill_us_per_token=1000,
    prefill_ns_per_token_sq=0,
    decode_base_ms=10,
    decode_us_per_call=0,
    decode_ns_per_kv_token=0,
)
MB = 1_000_000


def test_a_flow_alone_has_the_slower_of_its_links() -> None:
    """100 MB over links of 200 and 50 MB/s take 2 s."""
    links = Links({"a": 200 * MB, "b": 50 * MB})
    links.start("x", ["a", "b"], 100 * MB, 1.0)
    assert links.next_event_s() == pytest.approx(3.0)
    assert links.advance(3.0) == ["x"]
    assert links.next_event_s() == float("inf")


def test_flows_share_a_link_evenly_and_speed_up_when_one_ends() -> None:
    """Two flows of 100 and 50 MB over 100 MB/s: the small one ends at 1 s, the other at 1.5 s."""
    links = Links({"a": 100 * MB})
    links.start("big", ["a"], 100 * MB, 0.0)
    links.start("small", ["a"], 50 * MB, 0.0)
    assert links.next_event_s() == pytest.approx(1.0)
    assert links.advance(links.next_event_s()) == ["small"]
    assert links.next_event_s() == pytest.approx(1.5)


def test_what_a_flow_cannot_use_goes_to_the_others() -> None:
    """Max-min: x is held to 10 by its far link, so y gets 90 of the 100 MB/s they share."""
    links = Links({"shared": 100 * MB, "slow": 10 * MB, "fast": 1000 * MB})
    links.start("x", ["shared", "slow"], 100 * MB, 0.0)
    links.start("y", ["shared", "fast"], 90 * MB, 0.0)
    assert links.advance(links.next_event_s()) == ["y"]
    assert links.now_s == pytest.approx(1.0)
    assert links.next_event_s() == pytest.approx(10.0)


def test_a_cancelled_flow_gives_its_share_back() -> None:
    """After 1 s of sharing, 50 of 100 MB are left and go on at full speed."""
    links = Links({"a": 100 * MB})
    links.start("x", ["a"], 100 * MB, 0.0)
    links.start("y", ["a"], 100 * MB, 0.0)
    assert links.cancel("y", 1.0)
    assert not links.cancel("y", 1.0)
    assert links.next_event_s() == pytest.approx(1.5)
    with pytest.raises(IllegalEvent, match="'x'"):
        links.start("x", ["a"], 1, 1.0)


def engine(blocks: int = 11) -> Engine:
    config = EngineConfig(kv_blocks=blocks, block_tokens=16, max_num_seqs=4, max_model_len=1000)
    return Engine(config, RowStepTime(ROW))


def request(name: str, prompt: int, output: int, **rest: object) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_tokens=prompt, output_tokens=output, **rest)  # type: ignore[arg-type]


def test_a_pull_takes_all_blocks_no_slot_and_leaves_one_token() -> None:
    """64 pulled tokens hold 4 blocks while waiting; then one token of 1 ms after a 10 ms base."""
    made = engine()
    made.submit(request("d", 64, 1, remote_tokens=64), 0.0)
    (event,) = made.advance(0.0)
    assert isinstance(event, PullStarted)
    assert event.tokens == 64
    assert (made.num_running, made.num_waiting, made.free_blocks) == (0, 1, 6)
    assert made.next_event_s() == float("inf")
    made.pulled("d", 2.0)
    (_, finished) = made.advance(10.0)
    assert isinstance(finished, Finished)
    assert finished.time_s == pytest.approx(2.011)
    assert finished.request.cached_tokens == 63
    assert (made.num_waiting, made.queued_prefill_tokens, made.free_blocks) == (0, 0, 10)


def test_local_hits_shorten_the_pull() -> None:
    """The second call of a text pulls only what its engine does not hold."""
    made = engine()
    chain = tuple(range(1, 5))
    made.submit(request("first", 33, 1, block_hashes=chain[:2]), 0.0)
    made.advance(1.0)
    made.submit(request("second", 64, 1, block_hashes=chain, remote_tokens=64), 1.0)
    (event,) = made.advance(1.0)
    assert isinstance(event, PullStarted)
    assert event.tokens == 32


def test_a_failed_pull_is_computed_here() -> None:
    """Without the KV the whole prompt is prefilled: 10 + 64 ms."""
    made = engine()
    made.submit(request("d", 64, 1, remote_tokens=64), 0.0)
    made.advance(0.0)
    made.pulled("d", 1.0, ok=False)
    finished = made.advance(10.0)[-1]
    assert finished.time_s == pytest.approx(1.074)
    assert made.free_blocks == 10
    with pytest.raises(IllegalEvent, match="does not wait"):
        made.pulled("d", 10.0)


@pytest.mark.parametrize("ready", [False, True])
def test_a_pulling_call_can_be_aborted(ready: bool) -> None:
    """Its blocks are free at once, before and after the KV has come."""
    made = engine()
    made.submit(request("run", 16, 100), 0.0)
    made.submit(request("d", 64, 5, remote_tokens=64), 0.0)
    made.advance(0.1)
    if ready:
        made.pulled("d", 0.1)
    free = made.free_blocks
    assert made.abort("d", 0.1)
    assert made.free_blocks == free + 4
    assert made.num_waiting == made.queued_prefill_tokens == 0
    made.advance(float("inf"))
    assert made.free_blocks == 10


def test_kept_blocks_hold_the_queue_until_released() -> None:
    """With 8 of 10 blocks kept a call of 5 blocks stalls, and starts when they are given back."""
    made = engine()
    made.submit(request("p", 128, 1, keep_blocks=True), 0.0)
    assert isinstance(made.advance(1.0)[-1], Finished)
    assert made.free_blocks == 2
    made.submit(request("next", 80, 1), 1.0)
    assert made.advance(5.0) == []
    assert made.next_event_s() == float("inf")
    assert made.release("p", 5.0)
    assert not made.release("p", 5.0)
    assert made.advance(6.0)[-1].time_s == pytest.approx(5.09)


def test_pins_survive_pressure_but_never_starve() -> None:
    """A pinned prefix outlives calls that would evict it, and falls when nothing else can run."""
    made = engine()
    chain = tuple(range(1, 5))
    made.submit(request("a", 65, 1, block_hashes=chain), 0.0)
    made.advance(1.0)
    assert made.pin("session", chain, 1.0) == 4
    made.submit(request("b", 90, 1), 1.0)  # 6 blocks: all that is left
    made.advance(2.0)
    assert made.cached_prefix_tokens(chain) == 64
    made.submit(request("c", 160, 1), 2.0)  # 10 blocks
    assert isinstance(made.advance(3.0)[-1], Finished)
    assert made.cached_prefix_tokens(chain) == 0
    assert not made.unpin("session", 3.0)


def test_dropped_blocks_are_gone_and_free() -> None:
    """Forgetting a prefix changes no count of free blocks, and the next call computes it again."""
    made = engine()
    chain = tuple(range(1, 5))
    made.submit(request("a", 65, 1, block_hashes=chain), 0.0)
    made.advance(1.0)
    assert made.forget(chain, 2, 1.0) == 2
    assert (made.free_blocks, made.cached_prefix_tokens(chain)) == (10, 32)
    made.submit(request("b", 160, 1), 1.0)
    made.advance(2.0)
    assert (made.free_blocks, made.cached_prefix_tokens(chain)) == (10, 0)


@pytest.mark.parametrize(
    "wrong", [{"remote_tokens": 65}, {"keep_blocks": True, "stops_at_eos": True}]
)
def test_impossible_requests_are_refused(wrong: dict[str, object]) -> None:
    """Pulling more than the prompt, or keeping the blocks of a call of unknown end, is an error."""
    with pytest.raises(InvalidInput, match="remote_tokens"):
        engine().submit(request("x", 64, 1, **wrong), 0.0)


# -- pools in the kernel ----------------------------------------------------------------------

LINK_GB_S = 0.1
SETUP_S = 0.001


def endpoint(name: str, role: Literal["both", "prefill", "decode"], **values: object) -> Endpoint:
    settings = {"kv_blocks": 1000, "max_num_seqs": 4, "kv_bytes_per_token": 100_000, **values}
    return Endpoint(
        id=EndpointId(name), model="m", gpu="G", latency=ROW, role=role, link_gb_s=LINK_GB_S,
        **settings,  # type: ignore[arg-type]
    )  # fmt: skip


POOLS = Fleet(name="pools", endpoints=(endpoint("p", "prefill"), endpoint("d", "decode")))


def run(name: str, *, prompt: int = 160, output: int = 11, arrival_s: float = 0.0) -> RunSpec:
    task = Task(
        index=0,
        node=NodeId("n"),
        kind="llm",
        site=SiteId("n#0"),
        prompt=(Segment(sum(map(ord, name)), prompt),),
        output_tokens=output,
        output_key=7,
    )
    return RunSpec(
        run_id=RunId(name),
        workflow="w",
        workflow_hash=WorkflowHash("h"),
        arrival_s=arrival_s,
        tasks=(task,),
    )


def play(*runs: RunSpec, fleet: Fleet = POOLS, **values: object) -> list[TraceRecord]:
    transfers = values.pop("transfers", Transfers(setup_s=SETUP_S))
    policy = make_policy("least_expected_finish")
    return simulate(runs, fleet, policy, Forecaster(EstimateTable()), transfers=transfers, **values)  # type: ignore[arg-type]


def calls(records: list[TraceRecord]) -> list[CallRecord]:
    return [record for record in records if isinstance(record, CallRecord)]


def test_a_split_call_takes_prefill_pull_and_decode() -> None:
    """By hand: 170 ms prefill, 1 ms set-up, 16 MB at 0.1 GB/s, 11 ms first token, 10 x 10 ms."""
    (record,) = calls(play(run("r")))
    assert (record.prefill_endpoint, record.endpoint) == ("p", "d")
    assert record.first_token_s == pytest.approx(0.170 + 0.001 + 0.160 + 0.011)
    assert record.finish_s == pytest.approx(0.442)


def test_two_pulls_share_the_link() -> None:
    """Prompts of two prefillers reach one decoder together: its link is split, 320 ms for both."""
    fleet = Fleet(name="f", endpoints=(*POOLS.endpoints, endpoint("p2", "prefill")))
    records = calls(play(run("r"), run("s"), fleet=fleet))
    assert {record.prefill_endpoint for record in records} == {"p", "p2"}
    for record in records:
        assert record.first_token_s == pytest.approx(0.170 + 0.001 + 0.320 + 0.012)


def test_the_decode_side_is_chosen_by_expected_time() -> None:
    """Of a fast and a slow decoder the fast one is taken, until its slots are full."""
    slow = replace(endpoint("slow", "decode"), latency=ROW.scaled(3.0))
    fleet = Fleet(name="f", endpoints=(POOLS.endpoints[0], slow, POOLS.endpoints[1]))
    (record,) = calls(play(run("r"), fleet=fleet))
    assert record.endpoint == "d"
    many = calls(play(*(run(f"r{k}", output=200) for k in range(40)), fleet=fleet))
    assert {record.endpoint for record in many} == {"d", "slow"}
    assert len(many) == 40


def test_pools_conserve_calls_and_repeat() -> None:
    """Under load, with crashes and failing pulls, every run ends once, the same each time."""
    fleet = Fleet(
        name="f",
        endpoints=(
            endpoint("p1", "prefill", kv_blocks=60), endpoint("p2", "prefill", kv_blocks=60),
            endpoint("d1", "decode", kv_blocks=60), endpoint("d2", "decode", kv_blocks=60),
        ),
    )  # fmt: skip
    runs = [
        run(f"r{k}", prompt=100 + 37 * k % 300, output=1 + 13 * k % 90, arrival_s=0.1 * k)
        for k in range(100)
    ]
    settings = {
        "fleet": fleet,
        "noise_cv": 0.1,
        "disturbances": [
            Disturbance(endpoint="d1", kind="crash", from_s=3.0, to_s=8.0),
            Disturbance(endpoint="p2", kind="crash", from_s=5.03, to_s=6.0),
        ],
        "max_attempts": 10,
    }
    for on_failure in ("fail", "recompute"):
        settings["transfers"] = Transfers(failure_ratio=0.1, on_failure=on_failure)
        records = play(*runs, **settings)  # type: ignore[arg-type]
        assert records == play(*runs, **settings)  # type: ignore[arg-type]
        ended = [record.run_id for record in records if isinstance(record, RunRecord)]
        assert sorted(ended) == sorted(one.run_id for one in runs)
        done = [record for record in calls(records) if record.status == "ok"]
        assert len(done) == 100
        assert any(record.status == "failed" for record in calls(records))


def test_a_dead_decoder_strands_blocks_until_the_lease_ends() -> None:
    """The pull dies with its decoder; the prefill endpoint has room again after the lease."""
    fleet = Fleet(
        name="f",
        endpoints=(
            endpoint("p", "prefill", kv_blocks=12),
            endpoint("d1", "decode"), endpoint("d2", "decode"),
        ),
    )  # fmt: skip
    # At 0.25 s the first call is in its pull, whose 10 blocks leave one free.
    crash = Disturbance(endpoint="d1", kind="crash", from_s=0.25)
    records = calls(
        play(run("r"), fleet=fleet, disturbances=[crash], transfers=Transfers(lease_s=5.0))
    )
    assert [(record.endpoint, record.status, record.attempt) for record in records] == [
        ("d1", "failed", 0), ("d2", "ok", 1),
    ]  # fmt: skip
    # Blocks that are kept cannot be taken; but the retry finds its own prefix in them, and needs
    # one more block for its last token. A call of another text must wait for the lease.
    other = run("other", arrival_s=0.3)
    records = calls(
        play(
            run("r"), other, fleet=fleet, disturbances=[crash],
            transfers=Transfers(lease_s=5.0, setup_s=SETUP_S),
        )
    )  # fmt: skip
    late = next(record for record in records if record.run_id == "other")
    assert late.first_token_s == pytest.approx(5.25 + 0.170 + 0.001 + 0.160 + 0.011, abs=0.01)


@pytest.mark.parametrize("on_failure", ["fail", "recompute"])
def test_a_dead_prefiller_fails_or_recomputes(on_failure: str) -> None:
    """KV that will not come costs another attempt, or a prefill where the call decodes."""
    fleet = Fleet(name="f", endpoints=(*POOLS.endpoints, endpoint("p2", "prefill")))
    records = calls(
        play(
            run("r"), fleet=fleet,
            transfers=Transfers(setup_s=SETUP_S, on_failure=on_failure),  # type: ignore[arg-type]
            disturbances=[Disturbance(endpoint="p", kind="crash", from_s=0.2)],
        )
    )  # fmt: skip
    if on_failure == "fail":
        assert [(r.status, r.prefill_endpoint) for r in records] == [("failed", "p"), ("ok", "p2")]
    else:
        assert [(r.status, r.attempt) for r in records] == [("ok", 0)]
        assert records[0].first_token_s == pytest.approx(0.2 + 0.170)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("eviction", [None, SharedLast()])
def test_blocks_are_conserved_whatever_happens(seed: int, eviction: SharedLast | None) -> None:
    """Random pulls, aborts, pins, drops and kept blocks: in the end every block is free again."""
    rng = np.random.default_rng(seed)
    config = EngineConfig(
        kv_blocks=31, block_tokens=16, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=400
    )
    made = Engine(config, RowStepTime(ROW), eviction=eviction)
    pulling: set[str] = set()
    keeping: set[str] = set()
    ended: set[str] = set()
    aborted: set[str] = set()
    names: list[str] = []
    now_s = 0.0

    def see(events: list[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, PullStarted):
                pulling.add(event.request.request_id)
            elif isinstance(event, Finished):
                ended.add(event.request.request_id)

    def pick(some: set[str]) -> str:
        return sorted(some)[int(rng.integers(len(some)))]

    for number in range(400):
        now_s += float(rng.exponential(0.02))
        see(made.advance(now_s))
        # One of three texts up to somewhere, then something else or the same again.
        fork, family, other = int(rng.integers(21)), int(rng.integers(3)), int(rng.integers(6))
        text = [family] * fork + [other] * (20 - fork)
        chain = tuple(hash(tuple(text[:end])) for end in range(1, 21))
        match int(rng.integers(8)):
            case 0 | 1 | 2:
                prompt = int(rng.integers(1, 300))
                keep = rng.random() < 0.2
                names.append(f"r{number}")
                made.submit(
                    request(
                        names[-1], prompt, 1 if keep else int(rng.integers(1, 90)),
                        block_hashes=chain, keep_blocks=keep,
                        remote_tokens=int(rng.integers(prompt + 1)) if rng.random() < 0.4 else 0,
                    ),
                    now_s,
                )  # fmt: skip
                if keep:
                    keeping.add(names[-1])
            case 3 if pulling:
                name = pick(pulling)
                pulling.discard(name)
                made.pulled(name, now_s, ok=bool(rng.random() < 0.7))
            case 4 if names:
                name = names[int(rng.integers(len(names)))]
                if made.abort(name, now_s):
                    aborted.add(name)
                    pulling.discard(name)
            case 5:
                made.pin(f"pin{rng.integers(3)}", chain[: int(rng.integers(20))], now_s)
            case 6:
                made.unpin(f"pin{rng.integers(3)}", now_s)
                made.forget(chain, int(rng.integers(20)), now_s)
            case 7 if keeping & ended:
                name = pick(keeping & ended)
                keeping.discard(name)
                assert made.release(name, now_s)
        assert 0 <= made.free_blocks <= 30
    for _ in range(1000):
        now_s += 0.1
        see(made.advance(now_s))
        for name in sorted(pulling):
            made.pulled(name, now_s)
        pulling.clear()
        for name in sorted(keeping & ended):
            made.release(name, now_s)
        keeping -= ended
        if not (made.num_running or made.num_waiting):
            break
    assert ended | aborted == set(names)
    assert not ended & aborted
    for number in range(3):
        made.unpin(f"pin{number}", now_s)
    assert (made.free_blocks, made.num_waiting, made.queued_prefill_tokens) == (30, 0, 0)
    assert made.reset_prefix_cache()
