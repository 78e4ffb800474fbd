"""The simulation kernel on runs small enough to work out by hand."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from planner.dispatch.events import Call, CallArrived, Event
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.dispatch.policies.base import Choice, Ready, Wait
from planner.dispatch.view import FleetView
from planner.domain.blocks import Segment
from planner.domain.errors import InvalidInput, NoEndpointAvailable
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId, NodeId, RunId, SiteId, WorkflowHash
from planner.domain.latency import LatencyRow
from planner.domain.run import RunSpec, Task
from planner.domain.trace import BranchRecord, CallRecord, RunRecord, ToolRecord, TraceRecord
from planner.sim.experiment import GRIDS, PolicySetup, mean_latency_s, tune
from planner.sim.kernel import simulate
from planner.sim.workload import (
    SessionCall,
    poisson_arrivals,
    replayed_arrivals,
    run_from_session,
)

# A decode step takes 10 ms whatever the batch, a prefill token 1 ms: sums are easy.
ROW = LatencyRow(
    prefill_base_ms=10,
    prefill_us_per_token=1000,
    prefill_ns_per_token_sq=0,
    decode_base_ms=10,
    decode_us_per_call=0,
    decode_ns_per_kv_token=0,
)


def fleet(count: int = 1, **values: object) -> Fleet:
    settings = {"kv_blocks": 1000, "max_num_seqs": 4, **values}
    return Fleet(
        name="test",
        endpoints=tuple(
            Endpoint(id=EndpointId(f"e{i}"), model="m", gpu="G", latency=ROW, **settings)  # type: ignore[arg-type]
            for i in range(count)
        ),
    )


def call(index: int, *preds: int, prompt: int = 100, output: int = 11, **values: object) -> Task:
    return Task(
        index=index,
        node=NodeId(f"n{index}"),
        kind="llm",
        preds=preds,
        site=SiteId(f"n{index}#0"),
        prompt=(Segment(1000 + index, prompt),),
        output_tokens=output,
        output_key=index,
        **values,  # type: ignore[arg-type]
    )


def spec(*tasks: Task, name: str = "r", arrival_s: float = 0.0) -> RunSpec:
    return RunSpec(
        run_id=RunId(name),
        workflow="w",
        workflow_hash=WorkflowHash("h"),
        arrival_s=arrival_s,
        tasks=tasks,
    )


def play(*runs: RunSpec, count: int = 1, **values: object) -> list[TraceRecord]:
    policy = make_policy("least_expected_finish")
    return simulate(runs, fleet(count), policy, Forecaster(EstimateTable()), **values)  # type: ignore[arg-type]


def run_record(records: list[TraceRecord], name: str = "r") -> RunRecord:
    return next(r for r in records if isinstance(r, RunRecord) and r.run_id == name)


def test_one_call_takes_its_prefill_and_its_steps() -> None:
    """100 prompt tokens at 1 ms after a base of 10 ms, then 10 more tokens at 10 ms: 210 ms."""
    records = play(spec(call(0), arrival_s=2.0))
    (record,) = (r for r in records if isinstance(r, CallRecord))
    assert record.first_token_s == pytest.approx(2.11)
    assert record.finish_s == pytest.approx(2.21)
    assert run_record(records).finish_s == pytest.approx(2.21)


def test_a_chain_waits_and_a_tool_takes_its_time() -> None:
    """Call, tool of 1 s, call: 0.21 + 1 + 0.21 s, and the tool is in the trace."""
    tool = Task(index=1, node=NodeId("t"), kind="tool", preds=(0,), delay_s=1.0)
    records = play(spec(call(0), tool, call(2, 1)))
    assert run_record(records).finish_s == pytest.approx(1.42)
    (seen,) = (r for r in records if isinstance(r, ToolRecord))
    assert (seen.start_s, seen.finish_s) == (pytest.approx(0.21), pytest.approx(1.21))


def test_a_join_waits_for_the_slower_branch() -> None:
    """Two calls in parallel on two endpoints, then one: the longer branch counts."""
    records = play(spec(call(0, output=11), call(1, output=51), call(2, 0, 1)), count=2)
    assert run_record(records).finish_s == pytest.approx(0.61 + 0.21)


def test_decision_time_is_charged_to_every_call() -> None:
    """Two calls in a row with 5 ms of decision each make the run 10 ms longer."""
    chain = spec(call(0), call(1, 0))
    plain, charged = play(chain), play(chain, dispatch_s=0.005)
    assert run_record(charged).finish_s - run_record(plain).finish_s == pytest.approx(0.01)


def test_a_prefix_seen_before_is_not_prefilled_again() -> None:
    """The second call repeats 96 of 100 tokens (6 full blocks) and prefills the other four."""
    again = Task(
        index=1,
        node=NodeId("n1"),
        kind="llm",
        preds=(0,),
        site=SiteId("n1#0"),
        prompt=(Segment(1000, 100),),
        output_tokens=1,
        output_key=9,
    )
    records = play(spec(call(0), again))
    last = [r for r in records if isinstance(r, CallRecord)][-1]
    assert last.cached_tokens == 96
    assert last.first_token_s is not None
    assert last.first_token_s - last.sent_s == pytest.approx(0.014)


def test_outcomes_are_recorded_when_they_are_taken() -> None:
    """A branch record carries the instant its source finished, and counts visits."""
    records = play(spec(call(0, outcomes=(("b", "yes"),)), call(1, 0, outcomes=(("b", "no"),))))
    taken = [r for r in records if isinstance(r, BranchRecord)]
    assert [(r.outcome, r.visit) for r in taken] == [("yes", 0), ("no", 1)]
    assert taken[0].time_s == pytest.approx(0.21)


def test_same_seed_same_records() -> None:
    """Noise is seeded: a repetition gives the same records, another seed others."""
    runs = [spec(call(0), call(1, 0), name=f"r{i}", arrival_s=0.1 * i) for i in range(20)]
    one = play(*runs, count=2, noise_cv=0.1, seed=3)
    assert one == play(*runs, count=2, noise_cv=0.1, seed=3)
    assert one != play(*runs, count=2, noise_cv=0.1, seed=4)


def test_a_call_that_fits_nowhere_is_an_error() -> None:
    """A prompt longer than every KV pool is named, not lost."""
    with pytest.raises(NoEndpointAvailable, match="never finished"):
        play(spec(call(0, prompt=20_000)))


def test_arrivals_have_the_wanted_rate() -> None:
    """Poisson and replayed arrivals are sorted and have the mean rate asked for."""
    rng = np.random.default_rng(0)
    times = poisson_arrivals(2.0, 4000, rng)
    assert np.all(np.diff(times) >= 0)
    assert 4000 / times[-1] == pytest.approx(2.0, rel=0.05)
    recorded = np.array([0.0, 1.0, 1.0, 5.0, 30.0])
    replayed = replayed_arrivals(recorded, 0.5, 10, rng)
    assert np.all(np.diff(replayed) >= 0)
    assert replayed[-1] == pytest.approx(20.0)


@pytest.mark.parametrize(("rate", "count"), [(0.0, 5), (-1.0, 5), (float("nan"), 5), (1.0, 0)])
def test_impossible_arrivals_are_refused(rate: float, count: int) -> None:
    """A rate or count that makes no sense is an input error."""
    with pytest.raises(InvalidInput, match="arrivals"):
        poisson_arrivals(rate, count, np.random.default_rng(0))


def test_a_recorded_session_keeps_lengths_gaps_and_shared_text() -> None:
    """The next prompt begins with the recorded shared part and, where it fits, the answer."""
    calls = [
        SessionCall(node="a", prompt_tokens=100, output_tokens=30, shared_prefix_tokens=0, gap_s=0),
        SessionCall(
            node="a", prompt_tokens=200, output_tokens=5, shared_prefix_tokens=100, gap_s=2.5
        ),
        SessionCall(
            node="b", prompt_tokens=50, output_tokens=5, shared_prefix_tokens=10, gap_s=0.5
        ),
    ]
    run = run_from_session(
        calls,
        run_id="s",
        arrival_s=1.0,
        workflow="w",
        workflow_hash=WorkflowHash("h"),
        static_tokens=40,
        most_prompt_tokens=150,
    )
    assert [task.prompt_tokens for task in run.tasks] == [100, 150, 50]
    assert [task.delay_s for task in run.tasks] == [0.0, 2.5, 0.5]
    assert [task.visit for task in run.tasks] == [0, 1, 0]
    first, second, third = (task.prompt for task in run.tasks)
    assert second[: len(first)] == first
    assert second[len(first)] == Segment(run.tasks[0].output_key, 30)
    assert third[0] == Segment(first[0].key, 10)


def test_tuning_finds_the_best_of_the_grid_with_equal_budgets() -> None:
    """Coordinate search keeps what scores best; every tuned policy has 12 or 13 trials."""
    asked: list[float] = []

    def score(setups):  # type: ignore[no-untyped-def]
        thetas = [setup.parameters["theta"] for setup in setups]
        asked.extend(thetas)
        return [abs(theta - 2.0) for theta in thetas]

    best = tune(PolicySetup(policy="marginal_cost"), score)
    assert best.parameters == {"theta": 2.0}
    assert len(asked) == 12
    for grid in GRIDS.values():
        trials = sum(len(values) for _, values in grid) - (len(grid) - 1)
        assert 10 <= trials <= 13
    assert tune(PolicySetup(policy="round_robin"), score) == PolicySetup(policy="round_robin")


def test_no_finished_run_scores_infinitely_bad() -> None:
    """A policy under which nothing finishes can never win a tuning."""
    assert mean_latency_s([]) == float("inf")


class OneByOne:
    """Sends a call once the endpoint is idle, and notes what it is told."""

    name = "one_by_one"

    def __init__(self) -> None:
        self.seen: list[Event] = []

    def observe(self, event: Event, fleet: FleetView) -> None:
        self.seen.append(event)

    def order(self, held: Sequence[Call], fleet: FleetView, now_s: float) -> Sequence[Call]:
        return held

    def choose(self, ready: Ready) -> Choice | Wait:
        if ready.candidates[0].in_flight:
            return Wait("busy", until_s=ready.now_s + 0.05)
        return Choice(0, "idle")


def test_calls_that_a_policy_holds_are_sent_later_and_all_end() -> None:
    """Held calls go one after the other, and every event a policy may see is told in order."""
    tool = Task(index=1, node=NodeId("t"), kind="tool", preds=(0,), delay_s=0.5)
    runs = [spec(call(0), tool, call(2, 1), name=name) for name in ("r0", "r1")]
    policy = OneByOne()
    records = simulate(runs, fleet(), policy, Forecaster(EstimateTable()))
    calls = sorted(
        (record for record in records if isinstance(record, CallRecord)),
        key=lambda record: record.sent_s,
    )
    assert len(calls) == 4
    assert all(a.finish_s <= b.sent_s for a, b in pairwise(calls))
    kinds = [type(event).__name__ for event in policy.seen]
    assert {"ToolStarted", "ToolFinished", "Tick", "RunStarted", "RunEnded"} <= set(kinds)
    arrived = [event.call for event in policy.seen if isinstance(event, CallArrived)]
    assert {ready.parents for ready in arrived} == {(), ("r0/0",), ("r1/0",)}
