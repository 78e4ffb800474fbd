"""KV between calls: kept, pinned, offloaded, dropped; eviction orders; Belady's bound."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.domain.blocks import Segment
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId, NodeId, RunId, SiteId, WorkflowHash
from planner.domain.latency import LatencyRow
from planner.domain.run import RunSpec, Task
from planner.domain.trace import CallRecord
from planner.sim.belady import Prompt, belady_hits, lru_hits, recorded_prompts
from planner.sim.blockpool import Holding, RankedPool, SharedLast
from planner.sim.kernel import simulate
from planner.sim.retention import Fate, FixedRetention, Idle

# A decode step takes 10 ms whatever the batch, a prefill token 1 ms.
ROW = LatencyRow(
    prefill_base_ms=10,
    prefill_us_per_token=1000,
    prefill_ns_per_token_sq=0,
    decode_base_ms=10,
    decode_us_per_call=0,
    decode_ns_per_kv_token=0,
)
ENDPOINT = Endpoint(
    id=EndpointId("e"),
    model="m",
    gpu="G",
    latency=ROW,
    kv_blocks=21,
    max_num_seqs=4,
    kv_bytes_per_token=1_000_000,
    pcie_gb_s=1.0,
)
FLEET = Fleet(name="test", endpoints=(ENDPOINT,))


def call(index: int, key: int, prompt: int, *, delay_s: float = 0.0) -> Task:
    return Task(
        index=index,
        node=NodeId("n"),
        kind="llm",
        preds=(index - 1,) if index else (),
        site=SiteId("n#0"),
        prompt=(Segment(key, prompt),),
        output_tokens=1,
        output_key=99,
        delay_s=delay_s,
    )


def run(name: str, *tasks: Task, arrival_s: float = 0.0) -> RunSpec:
    return RunSpec(
        run_id=RunId(name),
        workflow="w",
        workflow_hash=WorkflowHash("h"),
        arrival_s=arrival_s,
        tasks=tasks,
    )


# A session of 160 tokens waits 2 s for its tool; meanwhile another run takes 12 of the 20 blocks.
SESSION = run("session", call(0, 1, 160), call(1, 1, 176, delay_s=2.0))
OTHER = run("other", call(0, 2, 192), arrival_s=1.0)


def second_call(
    fate: Fate | None, *runs: RunSpec, fleet: Fleet = FLEET, eviction: object = None
) -> CallRecord:
    records = simulate(
        runs or (SESSION, OTHER), fleet, make_policy("least_expected_finish"),
        Forecaster(EstimateTable()), eviction=eviction,  # type: ignore[arg-type]
        retention=FixedRetention(fate=fate) if fate else None,
    )  # fmt: skip
    return next(
        one for one in records if isinstance(one, CallRecord) and one.call_id == "session/1"
    )


def ttft_s(record: CallRecord) -> float:
    assert record.first_token_s is not None
    return record.first_token_s - record.sent_s


def test_lru_keeps_what_it_can() -> None:
    """The other run takes 10 blank blocks and evicts the last two of ten: 128 tokens are left."""
    record = second_call(None)
    assert record.cached_tokens == 128
    assert ttft_s(record) == pytest.approx(0.010 + 0.048)


def test_a_pin_keeps_all_until_its_time_is_up() -> None:
    """With 10 blocks pinned the other run's 192 tokens do not fit, so the pin falls; 160 do."""
    small = replace(OTHER, tasks=(call(0, 2, 160),))
    evicting = run("more", call(0, 3, 160), arrival_s=1.5)
    assert second_call(None, SESSION, small, evicting).cached_tokens == 0
    assert second_call(Fate(action="pin"), SESSION, small, evicting).cached_tokens == 160
    assert second_call(Fate(action="pin", ttl_s=0.5), SESSION, small, evicting).cached_tokens == 0
    assert second_call(Fate(action="pin"), SESSION, OTHER).cached_tokens == 128


def test_dropped_kv_is_computed_again() -> None:
    """Nothing is left of a dropped session even without pressure."""
    record = second_call(Fate(action="drop"), SESSION)
    assert record.cached_tokens == 0
    assert ttft_s(record) == pytest.approx(0.010 + 0.176)


def test_offloaded_kv_comes_back_over_pcie() -> None:
    """160 tokens x 1 MB at 1 GB/s take 160 ms back, then 16 tokens are computed: 26 ms."""
    record = second_call(Fate(action="offload"), SESSION, OTHER)
    assert record.cached_tokens == 160
    assert ttft_s(record) == pytest.approx(0.160 + 0.026)


def test_a_call_that_comes_before_the_copy_is_done_finds_its_kv() -> None:
    """The tool takes 0.1 s, the copy 0.16 s: nothing has left the GPU."""
    quick = replace(SESSION, tasks=(SESSION.tasks[0], replace(SESSION.tasks[1], delay_s=0.1)))
    record = second_call(Fate(action="offload"), quick)
    assert record.cached_tokens == 160
    assert ttft_s(record) == pytest.approx(0.026)


def test_a_pin_is_judged_again_when_another_run_begins_to_wait() -> None:
    """What was kept while there was room is dropped once a second run waits too."""
    asked: list[str] = []

    class Second:
        """Pins whatever comes first; drops it when asked again."""

        def decide(self, idle: Idle) -> Fate:
            again = idle.call.call_id in asked
            asked.append(idle.call.call_id)
            return Fate(action="drop") if again else Fate(action="pin", again=True)

    waiting = run("waiting", call(0, 2, 64), call(1, 2, 80, delay_s=5.0), arrival_s=0.5)

    def record(*runs: RunSpec) -> CallRecord:
        asked.clear()
        records = simulate(
            runs, FLEET, make_policy("least_expected_finish"), Forecaster(EstimateTable()),
            retention=Second(),
        )  # fmt: skip
        return next(
            one for one in records if isinstance(one, CallRecord) and one.call_id == "session/1"
        )

    assert record(SESSION).cached_tokens == 160
    assert record(SESSION, waiting).cached_tokens == 0
    assert asked == ["session/0", "session/0", "waiting/0"]


def test_what_others_share_is_not_dropped() -> None:
    """A prefix that another run has used stays when one of them drops its KV."""
    twin = run("twin", call(0, 1, 80), arrival_s=0.5)
    early = replace(twin, arrival_s=0.0)
    later = replace(SESSION, arrival_s=0.5)
    assert second_call(Fate(action="drop"), early, later).cached_tokens == 80


def test_offloading_needs_the_kv_size() -> None:
    """A fleet that does not say how large its KV is cannot move it: an input error."""
    unknown = Fleet(name="u", endpoints=(replace(ENDPOINT, kv_bytes_per_token=None),))
    with pytest.raises(InvalidInput, match="kv_bytes_per_token"):
        second_call(Fate(action="offload"), fleet=unknown)
    with pytest.raises(InvalidInput, match="retention"):
        Fate(action="pin", ttl_s=float("inf"))


def test_a_policy_sees_the_call_and_the_load_only() -> None:
    """It is asked once per call that its run outlives, with what the answer has revealed."""
    seen: list[Idle] = []

    class Watching:
        def decide(self, idle: Idle) -> Fate:
            seen.append(idle)
            return Fate()

    simulate(
        [SESSION], FLEET, make_policy("least_expected_finish"), Forecaster(EstimateTable()),
        retention=Watching(),
    )  # fmt: skip
    (idle,) = seen
    assert (idle.call.call_id, idle.context_tokens, idle.kv_usage) == ("session/0", 161, 0.0)


# -- eviction orders --------------------------------------------------------------------------


class Oldest:
    """LRU as a rank, to hold the ranked pool against the plain one."""

    reads_uses = False

    def ranks(self, contents: Sequence[int], uses: object) -> Sequence[float]:
        return [0.0] * len(contents)


def test_rank_zero_is_lru() -> None:
    """Equal ranks go oldest first: the same records as vLLM's own order."""
    runs = [
        run(f"r{k}", *(call(i, k % 5, 64 + 32 * i, delay_s=0.3) for i in range(3)), arrival_s=k / 9)
        for k in range(30)
    ]

    def records(eviction: object) -> object:
        return simulate(
            runs, FLEET, make_policy("least_expected_finish"), Forecaster(EstimateTable()),
            eviction=eviction,  # type: ignore[arg-type]
        )  # fmt: skip

    assert records(Oldest) == records(None)
    assert records(SharedLast) != records(None)


def test_shared_content_outlives_private_content() -> None:
    """Block 1 is older than block 2, but two requests have used it: block 2 goes first."""
    pool = RankedPool(2, SharedLast())
    pool.take(1)
    shared, private = Holding(), Holding()
    pool.label(shared, [1])
    again = pool.lookup([1], 1)
    pool.acquire(again)
    pool.release(shared, 0)
    pool.release(again, 0)
    pool.take(1)
    pool.label(private, [2])
    pool.release(private, 0)
    pool.take(1)
    assert pool.lookup([1], 1).blocks == 1
    assert pool.lookup([2], 1).blocks == 0
    pool.release(Holding(), 1)
    assert pool.clear()
    assert (pool.free, pool.idle) == (2, 0)


# -- Belady -----------------------------------------------------------------------------------


def prompts(*texts: str) -> list[Prompt]:
    """Return prompts of one block per letter, all looked for; equal beginnings are equal blocks."""
    return [
        Prompt(
            tuple(int(text[:end].encode().hex(), 16) for end in range(1, len(text) + 1)), len(text)
        )
        for text in texts
    ]


def test_belady_keeps_what_is_used_next() -> None:
    """A B C A B C with room for two: LRU finds nothing, Belady keeps A and finds A, then C."""
    cyclic = prompts(*"abcabc")
    assert lru_hits(cyclic, 2).hits == 0
    assert belady_hits(cyclic, 2).hits == 2


def test_belady_keeps_prefixes_whole() -> None:
    """With room for two of x y z the tail goes and x y are found; p is never used again."""
    found = belady_hits(prompts("xyz", "p", "xyz"), 2)
    assert (found.hits, found.sought) == (2, 7)
    assert found.ratio == pytest.approx(2 / 7)


def test_without_limits_all_caches_agree() -> None:
    """With room for all, only first uses miss; with none, everything does."""
    some = prompts("abc", "abd", "abc", "x", "abd")
    assert belady_hits(some, 100) == lru_hits(some, 100)
    assert belady_hits(some, 100).hits == 2 + 3 + 3
    assert belady_hits(some, 0).hits == lru_hits(some, 0).hits == 0
    assert belady_hits([], 5).ratio == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_no_eviction_order_beats_belady(seed: int) -> None:
    """Small cases by enumeration: the best of all choices of what to keep is what Belady gets."""
    rng = np.random.default_rng(seed)
    heads = ["ab", "c", "ac" if seed % 2 else "de"]
    some = prompts(*(heads[int(rng.integers(3))] for _ in range(6)))
    found = belady_hits(some, 2).hits
    assert found == _best(some, frozenset(), 2)
    assert lru_hits(some, 2).hits <= found


def _best(some: list[Prompt], held: frozenset[int], capacity: int) -> int:
    """Return the most hits of any choice of what to keep after each prompt."""
    if not some:
        return 0
    prompt, *rest = some
    hits = 0
    while hits < prompt.sought and prompt.blocks[hits] in held:
        hits += 1
    known = sorted(held | set(prompt.blocks))
    keep = min(capacity, len(known))
    return hits + max(_best(rest, frozenset(kept), capacity) for kept in combinations(known, keep))


def test_a_recorded_run_is_replayed_per_endpoint() -> None:
    """The session's second prompt of 176 tokens seeks (176 - 1) // 16 = 10 blocks and finds 10."""
    runs = [SESSION, OTHER]
    records = simulate(
        runs, FLEET, make_policy("least_expected_finish"), Forecaster(EstimateTable())
    )
    (replayed,) = recorded_prompts(runs, records).values()
    assert [prompt.sought for prompt in replayed] == [9, 11, 10]
    assert belady_hits(replayed, 20).hits == 10
    assert lru_hits(replayed, 20).hits == 8
    real = sum(one.cached_tokens or 0 for one in records if isinstance(one, CallRecord)) // 16
    assert real == 8
