"""Metrics of run sets: definitions checked on figures worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.domain.errors import InvalidInput
from planner.domain.trace import CallRecord, RunRecord, TraceRecord
from planner.metrics import (
    RunMetrics,
    paired_bootstrap,
    relative_difference,
    spread,
    summarise,
)


def run(name: str, arrival_s: float, latency_s: float, status: str = "ok") -> RunRecord:
    """Return a run."""
    return RunRecord(
        run_id=name,
        workflow="w",
        workflow_hash="h",
        arrival_s=arrival_s,
        finish_s=arrival_s + latency_s,
        status=status,
    )


def call(
    run_id: str, prompt: int, cached: int | None, decision_us: float | None = None
) -> CallRecord:
    """Return a finished call that became ready at 5 s."""
    return CallRecord(
        run_id=run_id,
        call_id=f"{run_id}/{prompt}",
        workflow_hash="h",
        node="n",
        site="n#0",
        ready_s=5.0,
        sent_s=5.0,
        endpoint="e",
        prompt_tokens=prompt,
        output_tokens=10,
        cached_tokens=cached,
        decision_us=decision_us,
    )


def test_figures_by_hand() -> None:
    """Latency, throughput, hit ratio and dispatch time follow their stated definitions."""
    records: list[TraceRecord] = [
        run("a", 0.0, 2.0),
        run("b", 1.0, 4.0),
        run("c", 2.0, 6.0),
        run("d", 3.0, 9.0, status="failed"),
        run("e", 3.0, 1.0, status="cancelled"),
        call("a", 100, 25, 4.0),
        call("b", 300, 75, 8.0),
        call("c", 500, None),
    ]
    metrics = summarise(records)
    assert (metrics.runs, metrics.failed_runs, metrics.cancelled_runs) == (3, 1, 1)
    assert metrics.latencies_s == (2.0, 4.0, 6.0)
    assert metrics.mean_s == metrics.p50_s == 4.0
    # Type 7: position 0.95 * (3 - 1) = 1.9 between the second and the third value.
    assert metrics.p95_s == pytest.approx(4.0 + 0.9 * 2.0)
    assert metrics.p99_s == pytest.approx(4.0 + 0.98 * 2.0)
    # Three runs from the first arrival (0 s) to the last finish of a good run (8 s).
    assert metrics.throughput_rps == pytest.approx(3 / 8)
    assert metrics.prefix_hit_ratio == pytest.approx(100 / 400)
    assert metrics.prefilled_tokens == 300
    assert metrics.dispatch_p50_us == 6.0


def test_warm_up_leaves_out_runs_and_their_calls() -> None:
    """Runs that arrive before the end of the warm-up count in no figure, nor do their calls."""
    records = [run("a", 0.0, 100.0), run("b", 10.0, 2.0), call("a", 100, 100), call("b", 100, 0)]
    metrics = summarise(records, warmup_s=10.0)
    assert (metrics.runs, metrics.mean_s, metrics.prefix_hit_ratio) == (1, 2.0, 0.0)
    assert metrics.throughput_rps == pytest.approx(0.5)


def test_calls_without_a_run_count_by_their_ready_time() -> None:
    """A plain client's calls are left out only if they became ready during the warm-up."""
    assert summarise([call("", 10, 5)], warmup_s=5.0).prefix_hit_ratio == 0.5
    assert summarise([call("", 10, 5)], warmup_s=6.0).prefix_hit_ratio is None


def test_nothing_observed_is_none_not_zero() -> None:
    """An empty trace gives counts of zero and no figure."""
    metrics = summarise([])
    assert metrics == RunMetrics(runs=0)
    assert metrics.mean_s is None


def test_json_round_trip() -> None:
    """The JSON form rebuilds the same metrics."""
    metrics = summarise([run("a", 0.0, 2.0), call("a", 100, 25, 4.0)])
    assert RunMetrics.from_json(json.loads(json.dumps(metrics.to_json()))) == metrics


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"runs": 1, "speed": 3}, "speed"),
        ({"mean_s": 1.0}, "runs"),
        ({"runs": "many"}, "metrics.runs"),
        ({"runs": 1, "mean_s": "fast"}, "metrics.mean_s"),
    ],
)
def test_bad_json_names_the_field(raw: dict[str, object], field: str) -> None:
    """An unknown, missing or malformed field is named."""
    with pytest.raises(InvalidInput, match=field):
        RunMetrics.from_json(raw)


def test_spread_by_hand() -> None:
    """Mean, sample standard deviation, least and most; no spread in a single value."""
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 1.0, 3.0)
    assert spread([5.0]) == (5.0, 0.0, 5.0, 5.0)
    with pytest.raises(InvalidInput, match="no value"):
        spread([])


def test_relative_difference_needs_a_positive_baseline() -> None:
    """A tenth less reads -0.1; zero cannot be a baseline."""
    assert relative_difference(10.0, 9.0) == pytest.approx(-0.1)
    with pytest.raises(InvalidInput, match="baseline"):
        relative_difference(0.0, 1.0)


def test_bootstrap_of_a_constant_difference_has_no_width() -> None:
    """If every seed shows the same relative difference, the interval is that difference."""
    found = paired_bootstrap([10.0, 20.0, 40.0], [9.0, 18.0, 36.0], seed=1)
    assert found == pytest.approx((-0.1, -0.1, -0.1))


def test_bootstrap_is_paired() -> None:
    """Differences between seeds cancel: a small steady gain shows among unlike seeds."""
    found = paired_bootstrap([1.0, 100.0, 7.0, 55.0], [0.97, 98.0, 6.7, 54.0], seed=2)
    assert found.high < 0


def test_bootstrap_of_one_pair_claims_nothing() -> None:
    """One seed gives a mean and an unbounded interval."""
    assert paired_bootstrap([2.0], [1.0], seed=0) == (-0.5, -math.inf, math.inf)


def test_bootstrap_refuses_unpaired_values() -> None:
    """Unlike lengths and empty input are errors."""
    for pair in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(InvalidInput, match="as many"):
            paired_bootstrap(*pair, seed=0)


@given(
    st.lists(st.tuples(st.floats(0.1, 1e3), st.floats(0.1, 1e3)), min_size=2, max_size=8),
    st.integers(0, 5),
)
def test_bootstrap_interval_holds_within_the_data(
    pairs: list[tuple[float, float]], seed: int
) -> None:
    """The interval lies within the observed differences, and equal seeds give equal intervals."""
    before, after = zip(*pairs, strict=True)
    found = paired_bootstrap(before, after, seed=seed, draws=200)
    differences = [b / a - 1 for a, b in pairs]
    slack = 1e-9 * max(1.0, *map(abs, differences))
    assert min(differences) - slack <= found.low <= found.high <= max(differences) + slack
    assert found == paired_bootstrap(before, after, seed=seed, draws=200)
