"""The remaining time of a running workflow."""

import pytest

from planner.cli.self_check import finish_check
from planner.dispatch.remaining import EndpointLoad, Progress, fleet_service, remaining_s
from planner.domain.blocks import Segment
from planner.domain.estimates import load_estimates
from planner.domain.files import data_dir
from planner.domain.fleet import latency_rows, load_fleet
from planner.domain.run import RunSpec, Task
from planner.domain.workflow import load_workflow


def _run(number, delays, outcome="on"):
    """Return a chain of tools; the first one's branch took an outcome."""
    tasks = tuple(
        Task(
            index=place, node=f"t{place}", kind="tool", delay_s=delay,
            preds=(place - 1,) if place else (), outcomes=(("b", outcome),) if place == 0 else (),
        )
        for place, delay in enumerate(delays)
    )  # fmt: skip
    return RunSpec(run_id=f"r{number}", workflow="w", workflow_hash="h", arrival_s=0.0, tasks=tasks)


RUNS = [
    *(_run(number, (1.0, 2.0, 4.0)) for number in range(30)),
    *(_run(number, (1.0,), "off") for number in range(30, 60)),
]


def test_at_the_start_all_runs_count():
    """Half the runs take 7 s and half 1 s."""
    found = remaining_s(RUNS, lambda _: 0.0, Progress())
    assert (found.values[0], found.values[-1], found.mean) == (1.0, 7.0, 4.0)


def test_what_happened_rules_runs_out():
    """After the outcome only the runs that took it are left, without what is done."""
    progress = Progress(done={"t0": 1}, outcomes={"b": ("on",)})
    assert set(remaining_s(RUNS, lambda _: 0.0, progress).values) == {6.0}
    ended = Progress(done={"t0": 1}, outcomes={"b": ("off",)})
    assert set(remaining_s(RUNS, lambda _: 0.0, ended).values) == {0.0}


def test_what_is_under_way_counts_for_what_is_left_of_it():
    """A tool of 2 s that has run for half a second has a second and a half to go."""
    progress = Progress(done={"t0": 1}, running={"t1": 0.5}, outcomes={"b": ("on",)})
    assert remaining_s(RUNS, lambda _: 0.0, progress).at(0.5) == pytest.approx(5.5)


def test_a_run_like_no_sampled_one_gets_the_closest():
    """An outcome that no sampled run took does not end in an error."""
    progress = Progress(done={"t0": 1, "t1": 1}, outcomes={"b": ("never",)})
    assert set(remaining_s(RUNS, lambda _: 0.0, progress).values) == {4.0}
    with pytest.raises(ValueError, match="at least one sampled run"):
        remaining_s([], lambda _: 0.0, progress)


def test_a_call_goes_where_it_ends_first():
    """The service time is that of the best endpoint, and grows with load beyond the slots."""
    row = latency_rows()["8b-a100-1-bf16"]
    task = Task(
        index=0, node="n", kind="llm", site="n#0", prompt=(Segment(1, 500),), output_tokens=100
    )

    def load(calls, factor=1.0):
        return EndpointLoad(row=row.scaled(factor), calls=calls, kv_tokens=1000 * calls, slots=8)

    alone = fleet_service([load(0)])(task)
    assert fleet_service([load(0), load(0, 3.0)])(task) == alone
    assert alone < fleet_service([load(7)])(task) < fleet_service([load(20)])(task)


def test_promises_hold_on_simulated_runs():
    """On the demo workflow the corrected 0.9 quantile covers about 0.9 at each point."""
    demo = data_dir() / "demo"
    truth = load_estimates(demo / "truth.json")
    for check in finish_check(
        load_workflow(demo / "research.json"),
        truth,
        truth,
        load_fleet(data_dir() / "fleets" / "demo.yaml"),
        rate_rps=0.5,
        runs=120,
        seed=0,
        samples=60,
    ):
        assert 0.82 <= check.coverage(0.9, corrected=True) <= 0.98
        assert 0.35 <= check.coverage(0.5, corrected=True) <= 0.65
        assert len(check.observed_s) == 80
