"""Ranks, slack, critical paths and visits of sampled runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.domain.blocks import Segment
from planner.domain.ids import NodeId, RunId, SiteId, WorkflowHash
from planner.domain.run import RunSpec, Task
from planner.graph.analysis import (
    allowances_s,
    completion_s,
    criticality,
    expected_completion_s,
    expected_visits,
    finish_times,
    reach_probability,
    remaining_s,
    slacks,
    upward_ranks,
)
from planner.graph.sampling import scenarios

from .research import research_estimate, research_workflow


def diamond() -> RunSpec:
    """Return a -> {b, c} -> d."""
    preds: tuple[tuple[int, ...], ...] = ((), (0,), (0,), (1, 2))
    return RunSpec(
        run_id=RunId("r"),
        workflow="w",
        workflow_hash=WorkflowHash("h"),
        arrival_s=0.0,
        tasks=tuple(
            Task(index=i, node=NodeId("abcd"[i]), kind="code", preds=preds[i]) for i in range(4)
        ),
    )


def test_diamond_by_hand() -> None:
    """With durations 1, 2, 5, 1 the path a-c-d takes 7 s and b may grow by 3 s."""
    durations = (1.0, 2.0, 5.0, 1.0)
    assert finish_times(diamond(), durations) == [1.0, 3.0, 6.0, 7.0]
    assert upward_ranks(diamond(), durations) == [7.0, 3.0, 6.0, 1.0]
    assert slacks(diamond(), durations) == [0.0, 3.0, 0.0, 0.0]
    assert completion_s(diamond(), durations) == 7.0
    assert allowances_s(diamond(), durations) == [0.0, 5.0, 2.0, 0.0]


def test_what_remains_is_the_mean_longest_chain_to_the_end() -> None:
    """A call met with 7 s, and in a shorter run with 4 s, to go has 5.5 s to go on average."""
    site = SiteId("a#0")
    first = Task(
        index=0, node=NodeId("a"), kind="llm", site=site, prompt=(Segment(1, 10),), output_tokens=1
    )
    long = replace(diamond(), tasks=(first, *diamond().tasks[1:]))
    runs = [long, replace(long, tasks=(first, *diamond().tasks[1:2]))]
    assert remaining_s(runs, lambda run: (1.0, 3.0, 5.0, 1.0)[: len(run.tasks)]) == {site: 5.5}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_growing_a_task_by_its_slack_leaves_the_run_as_long(seed: int, data: st.DataObject) -> None:
    """Slack is exact: growth within it costs nothing, growth beyond it costs the excess."""
    run = scenarios(research_workflow(), research_estimate(), 1, seed)[0]
    durations = [
        data.draw(st.floats(0.01, 10.0), label=f"duration of {task.index}") for task in run.tasks
    ]
    total = completion_s(run, durations)
    assert max(upward_ranks(run, durations)) == pytest.approx(total)
    for position, slack in enumerate(slacks(run, durations)):
        grown = list(durations)
        grown[position] += slack
        assert completion_s(run, grown) == pytest.approx(total)
        grown[position] += 1.0
        assert completion_s(run, grown) == pytest.approx(total + 1.0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_a_task_delays_its_run_by_what_exceeds_its_allowance(
    seed: int, data: st.DataObject
) -> None:
    """Whatever a task takes: the run is longer than with none of it by the excess, exactly."""
    run = scenarios(research_workflow(), research_estimate(), 1, seed)[0]
    durations = [
        data.draw(st.floats(0.01, 10.0), label=f"duration of {task.index}") for task in run.tasks
    ]
    for position, allowance in enumerate(allowances_s(run, durations)):
        without = list(durations)
        without[position] = 0.0
        least = completion_s(run, without)
        for seconds in (0.5 * allowance, allowance, allowance + 3.0):
            taken = [*durations[:position], seconds, *durations[position + 1 :]]
            assert completion_s(run, taken) == pytest.approx(least + max(0.0, seconds - allowance))


def test_serial_sites_are_always_critical_and_parallel_ones_share() -> None:
    """Serial call sites have criticality 1; of a fan-out only the longest member is critical."""

    def by_output(run: RunSpec) -> Sequence[float]:
        return [task.output_tokens + task.delay_s for task in run.tasks]

    runs = scenarios(research_workflow(), research_estimate(), 60, 0)
    share = criticality(runs, by_output)
    assert share["triage#0"] == share["draft#0"] == share["read#0"] == 1.0
    assert 0.0 < share["legal#0"] < share["market#0"] < 1.0
    assert share["legal#0"] + share["market#0"] == pytest.approx(1.0)
    assert expected_completion_s(runs, by_output) > 0


def test_visits_and_reach_follow_the_branch_probabilities() -> None:
    """The critic is reached by 70 % of runs and visited more often than that."""
    runs = scenarios(research_workflow(), research_estimate(), 400, 3)
    reach, visits = reach_probability(runs), expected_visits(runs)
    assert reach["triage"] == visits["triage"] == 1.0
    assert reach["critic"] == pytest.approx(0.7, abs=0.07)
    assert visits["critic"] > reach["critic"] * 1.3
