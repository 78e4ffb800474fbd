"""Stragglers, crashes, impatient clients, closed loops: small enough to work out by hand."""

import math

import numpy as np
import pytest

from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.domain.blocks import Segment
from planner.domain.errors import FleetError, InvalidInput, NoEndpointAvailable
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId, NodeId, RunId, SiteId, WorkflowHash
from planner.domain.latency import LatencyRow
from planner.domain.run import RunSpec, Task
from planner.domain.trace import CallRecord, RunRecord, TraceRecord
from planner.sim.disturbance import Disturbance, uneven
from planner.sim.kernel import ClosedLoop, simulate
from planner.sim.workload import with_clients

# A decode step takes 10 ms whatever the batch, a prefill token 1 ms.
ROW = LatencyRow(
    prefill_base_ms=10,
    prefill_us_per_token=1000,
    prefill_ns_per_token_sq=0,
    decode_base_ms=10,
    decode_us_per_call=0,
    decode_ns_per_kv_token=0,
)


def fleet(count: int = 1) -> Fleet:
    return Fleet(
        name="test",
        endpoints=tuple(
            Endpoint(
                id=EndpointId(f"e{i}"),
                model="m",
                gpu="G",
                latency=ROW,
                kv_blocks=1000,
                max_num_seqs=4,
            )
            for i in range(count)
        ),
    )


def run(
    name: str, *, calls: int = 1, output: int = 11, arrival_s: float = 0.0, **values: object
) -> RunSpec:
    """Return a chain of calls of 100 prompt tokens: 110 ms to the first token, then 10 ms each."""
    tasks = tuple(
        Task(
            index=i,
            node=NodeId("n"),
            kind="llm",
            preds=(i - 1,) if i else (),
            site=SiteId("n#0"),
            prompt=(Segment(1000 * i + sum(map(ord, name)), 100),),
            output_tokens=output,
            output_key=i,
        )
        for i in range(calls)
    )
    return RunSpec(
        run_id=RunId(name),
        workflow="w",
        workflow_hash=WorkflowHash("h"),
        arrival_s=arrival_s,
        tasks=tasks,
        **values,  # type: ignore[arg-type]
    )


def play(*runs: RunSpec, count: int = 1, **values: object) -> list[TraceRecord]:
    policy = make_policy("least_expected_finish")
    return simulate(runs, fleet(count), policy, Forecaster(EstimateTable()), **values)  # type: ignore[arg-type]


def calls(records: list[TraceRecord]) -> list[CallRecord]:
    return [record for record in records if isinstance(record, CallRecord)]


def runs(records: list[TraceRecord]) -> list[RunRecord]:
    return [record for record in records if isinstance(record, RunRecord)]


def test_a_straggler_is_slower_while_it_lasts() -> None:
    """Three times slower from 0.155 s on: the step then in flight ends, 5 are left at 30 ms."""
    slow = Disturbance(endpoint="e0", kind="slow", from_s=0.155, factor=3.0)
    (record,) = calls(play(run("r"), disturbances=[slow]))
    assert record.finish_s == pytest.approx(0.160 + 5 * 0.030)
    back = Disturbance(endpoint="e0", kind="slow", from_s=0.155, to_s=0.185, factor=3.0)
    (record,) = calls(play(run("r"), disturbances=[back]))
    assert record.finish_s == pytest.approx(0.160 + 0.030 + 4 * 0.010)


def test_factors_that_overlap_multiply() -> None:
    """Twice and three times slower is six times slower."""
    both = [Disturbance(endpoint="e0", kind="slow", factor=factor) for factor in (2.0, 3.0)]
    (record,) = calls(play(run("r"), disturbances=both))
    assert record.finish_s == pytest.approx(6 * 0.210)


def test_a_ramp_rises_and_stays() -> None:
    """Half way it is half of the rise, at the end and beyond all of it."""
    factors = Disturbance(endpoint="e", kind="ramp", from_s=10, to_s=20, factor=1.4).factors()
    assert dict(factors)[15.0] == pytest.approx(1.2)
    assert dict(factors)[20.0] == pytest.approx(1.4)
    assert len(factors) == 20
    assert [factor for _, factor in factors] == sorted(factor for _, factor in factors)


def test_endpoints_of_one_type_differ() -> None:
    """The factors have mean 1 and the wanted variation, and come from the generator."""
    many = fleet(3000)
    drawn = uneven(many, 0.05, np.random.default_rng(1))
    factors = np.array([one.factor for one in drawn])
    assert factors.mean() == pytest.approx(1.0, abs=0.005)
    assert factors.std() == pytest.approx(0.05, rel=0.05)
    assert drawn == uneven(many, 0.05, np.random.default_rng(1))


def test_a_crash_fails_calls_and_they_are_tried_elsewhere() -> None:
    """The call starts again at the crash, on the endpoint that is left; both attempts are told."""
    crash = Disturbance(endpoint="e0", kind="crash", from_s=0.15)
    first, second = calls(play(run("r"), count=2, disturbances=[crash]))
    assert (first.endpoint, first.status, first.attempt) == ("e0", "failed", 0)
    assert first.finish_s == pytest.approx(0.15)
    assert (second.endpoint, second.status, second.attempt) == ("e1", "ok", 1)
    assert second.finish_s == pytest.approx(0.15 + 0.21)
    assert second.ready_s == first.ready_s


def test_calls_wait_for_a_restart_and_find_a_cold_cache() -> None:
    """Held until the endpoint is back at 5 s; what it had cached is gone."""
    crash = Disturbance(endpoint="e0", kind="crash", from_s=1.0, to_s=5.0)
    records = play(run("r"), run("r", arrival_s=2.0), run("r", arrival_s=7.0), disturbances=[crash])
    first, second, third = calls(records)
    assert first.finish_s == pytest.approx(0.21)
    assert second.finish_s == pytest.approx(5.21)
    assert (first.cached_tokens, second.cached_tokens, third.cached_tokens) == (0, 0, 96)


def test_a_crash_for_good_of_the_only_endpoint_is_an_error() -> None:
    """Calls that can never finish are named, not lost."""
    crash = Disturbance(endpoint="e0", kind="crash", from_s=0.1)
    with pytest.raises(NoEndpointAvailable, match="1 calls never finished"):
        play(run("r"), disturbances=[crash])


def test_a_run_fails_when_its_attempts_are_used_up() -> None:
    """With one attempt a crash fails the run, and nothing more of it comes."""
    crash = Disturbance(endpoint="e0", kind="crash", from_s=0.15)
    records = play(run("r", calls=3), count=2, disturbances=[crash], max_attempts=1)
    assert [record.status for record in calls(records)] == ["failed"]
    (record,) = runs(records)
    assert record.status == "failed"
    assert record.finish_s == pytest.approx(0.15)


def test_a_client_that_gives_up_frees_its_slot() -> None:
    """The first of two runs is cancelled at 0.5 s in its second call; the other is not slowed."""
    records = play(run("r", calls=9, patience_s=0.5), run("s", arrival_s=0.5))
    first, second = sorted(runs(records), key=lambda record: record.run_id)
    assert (first.status, first.calls) == ("cancelled", 3)
    assert first.finish_s == pytest.approx(0.5)
    told = [call.status for call in calls(records) if call.run_id == "r"]
    assert told == ["ok", "ok", "cancelled"]
    assert second.status == "ok"
    # The step in flight when the client went ends as planned.
    assert second.finish_s == pytest.approx(0.5 + 0.21, abs=0.05)


def test_patience_that_suffices_changes_nothing() -> None:
    """A run that ends in time is not touched by its patience or its deadline."""
    records = play(run("r", patience_s=0.3, deadline_s=0.1))
    assert runs(records)[0].status == "ok"
    assert runs(records)[0].deadline_s == 0.1


def test_a_closed_loop_has_as_many_runs_under_way_as_clients() -> None:
    """Five runs, two clients without thinking: pairs start at 0, when the first ends, and so on."""
    records = runs(play(*(run(f"r{i}") for i in range(5)), count=2, clients=ClosedLoop(clients=2)))
    starts = sorted(record.arrival_s for record in records)
    assert starts == pytest.approx([0, 0, 0.21, 0.21, 0.42])
    events = sorted(
        [(record.arrival_s, 1) for record in records]
        + [(record.finish_s, -1) for record in records]
    )
    assert max(np.cumsum([change for _, change in events])) == 2


def test_think_time_keeps_littles_law() -> None:
    """Cycle time is run latency plus think time: throughput = clients / (latency + think)."""
    many = [run(f"r{i}") for i in range(2000)]
    records = runs(play(*many, clients=ClosedLoop(clients=3, think_s=1.0), seed=4))
    latency = np.mean([record.finish_s - record.arrival_s for record in records])
    span = max(record.finish_s for record in records)
    assert len(records) / span == pytest.approx(3 / (latency + 1.0), rel=0.05)


def test_everything_at_once_repeats_and_conserves() -> None:
    """Noise, crashes, drift, cancellations and retries: same seed same records, no run is lost."""
    rng = np.random.default_rng(0)
    many = with_clients(
        [run(f"r{i}", calls=3, output=20, arrival_s=0.05 * i) for i in range(150)],
        {"light": 3.0, "heavy": 1.0}, rng, deadline_s=2.0, patience_s=5.0,
    )  # fmt: skip
    faults = [
        Disturbance(endpoint="e0", kind="crash", from_s=2.0, to_s=4.0),
        Disturbance(endpoint="e1", kind="crash", from_s=3.0, to_s=5.0),
        Disturbance(endpoint="e2", kind="ramp", from_s=1.0, to_s=6.0, factor=2.0),
    ]
    settings = {"count": 3, "disturbances": faults, "noise_cv": 0.1, "seed": 7}
    records = play(*many, **settings)  # type: ignore[arg-type]
    assert records == play(*many, **settings)  # type: ignore[arg-type]
    assert records != play(*many, **{**settings, "seed": 8})  # type: ignore[arg-type]
    ended = runs(records)
    assert sorted(record.run_id for record in ended) == sorted(one.run_id for one in many)
    assert {record.status for record in ended} >= {"ok", "cancelled"}
    assert {record.tenant for record in ended} == {"light", "heavy"}
    attempts = calls(records)
    assert len({record.call_id for record in attempts}) == len(attempts)
    for record in ended:
        good = [one for one in attempts if one.run_id == record.run_id and one.status == "ok"]
        assert len(good) == 3 or record.status != "ok"


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "flood"},
        {"kind": "slow", "factor": 0.0},
        {"kind": "slow", "from_s": 5.0, "to_s": 5.0},
        {"kind": "ramp", "factor": 2.0},
    ],
)
def test_impossible_disturbances_are_refused(wrong: dict[str, object]) -> None:
    """A kind, a window or a factor that makes no sense is an input error."""
    with pytest.raises(InvalidInput, match="disturbance"):
        Disturbance(endpoint="e0", **wrong)  # type: ignore[arg-type]


def test_an_unknown_endpoint_is_named() -> None:
    """A disturbance of an endpoint the fleet does not have is an error."""
    with pytest.raises(FleetError, match="no endpoint 'x'"):
        play(run("r"), disturbances=[Disturbance(endpoint="x", kind="slow", factor=2.0)])
    with pytest.raises(InvalidInput, match="closed loop"):
        ClosedLoop(clients=0)
    with pytest.raises(InvalidInput, match="closed loop"):
        ClosedLoop(clients=1, think_s=math.inf)
