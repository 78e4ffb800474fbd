"""Runs taken apart: the critical path by hand, seconds that add up, shares of a graph."""

from __future__ import annotations

import pytest

from planner.domain.errors import InvalidInput
from planner.domain.ids import NodeId
from planner.domain.trace import BranchRecord, CallRecord, RunRecord, ToolRecord, TraceRecord
from planner.domain.workflow import END, START, Workflow
from planner.report.anatomy import graph_weights, mean_parts, run_anatomy
from tests.planner.graph.research import branch, edge, llm

WORKFLOW = Workflow(
    name="w",
    nodes=(llm("a"), llm("b"), llm("c"), llm("d")),
    edges=(edge(START, "a"), edge("a", "b"), edge("a", "c"), edge("c", "d"), edge("b", "d")),
    branches=(branch("stop", "d", more=("d",), enough=(END,)),),
)


def call(
    node: str, ready: float, sent: float, first: float, finish: float, **more: object
) -> CallRecord:
    """Return a call of run ``r`` that arrived at 100 s; times are from then."""
    values: dict[str, object] = {
        "run_id": "r",
        "call_id": f"{node}/{more.get('attempt', 0)}",
        "workflow_hash": WORKFLOW.content_hash,
        "node": node,
        "site": f"{node}#0",
        "ready_s": 100 + ready,
        "sent_s": 100 + sent,
        "first_token_s": 100 + first,
        "finish_s": 100 + finish,
        "endpoint": "h100",
        "prompt_tokens": 10,
        "output_tokens": 5,
    }
    return CallRecord(**(values | more))  # type: ignore[arg-type]


def trace() -> list[TraceRecord]:
    """Return a -> (b, c) -> d, where c is the longer one and d begins 0.5 s late."""
    return [
        RunRecord(
            run_id="r", workflow="w", workflow_hash=WORKFLOW.content_hash,
            arrival_s=100.0, finish_s=110.0, predicted_s=8.0,
        ),
        call("a", 0.0, 0.25, 1.0, 2.0),
        call("b", 2.0, 2.0, 2.5, 3.0),
        call("c", 2.0, 2.0, 3.0, 6.0),
        call("d", 6.5, 6.5, 7.0, 10.0),
        BranchRecord(
            run_id="r", workflow_hash=WORKFLOW.content_hash, branch="stop", outcome="enough",
            time_s=110.0,
        ),
    ]  # fmt: skip


def test_the_critical_path_by_hand() -> None:
    """Each step waited for the one that ended last before it; the shorter branch is not on it."""
    run = run_anatomy(trace(), "r")
    assert [one.name for one in run.critical_path] == ["a", "c", "d"]
    assert run.latency_s == 10.0
    assert "4 steps, 10.00 s, 8.00 s predicted" in str(run)


def test_the_seconds_add_up() -> None:
    """Router 0.25, to first token 0.75 + 1 + 0.5, decoding 1 + 3 + 3, half a second between."""
    parts = run_anatomy(trace()).parts_s
    assert parts == pytest.approx(
        {"router": 0.25, "prefill": 2.25, "decode": 7.0, "tool": 0.0, "between": 0.5}
    )
    assert mean_parts(trace()) == pytest.approx(parts)


def test_a_further_attempt_waits_for_the_one_before() -> None:
    """Both attempts of a call are on the path: the second began when the first had failed."""
    records = [one for one in trace() if not (isinstance(one, CallRecord) and one.node == "d")] + [
        call("d", 6.0, 6.0, 7.0, 7.0, status="failed"),
        call("d", 6.0, 7.0, 8.0, 10.0, attempt=1),
    ]
    path = run_anatomy(records, "r").critical_path
    assert [one.name for one in path] == ["a", "c", "d", "d try 2"]


def test_a_late_sibling_does_not_wait_for_an_early_one() -> None:
    """With the graph, nodes of one layer do not come before each other; without, they may."""
    records = [one for one in trace() if not (isinstance(one, CallRecord) and one.node == "b")]
    records.append(
        ToolRecord(
            run_id="r", workflow_hash=WORKFLOW.content_hash, node="b", start_s=102.0,
            finish_s=102.1,
        )
    )  # fmt: skip
    late = [
        call("c", 2.2, 2.2, 3.0, 6.0) if isinstance(one, CallRecord) and one.node == "c" else one
        for one in records
    ]
    assert "b" in [one.name for one in run_anatomy(late, "r").critical_path]
    known = run_anatomy(late, "r", workflow=WORKFLOW)
    assert [one.name for one in known.critical_path] == ["a", "c", "d"]


def test_a_run_has_a_table() -> None:
    """Notebooks get a row per step, with the endpoint and the seconds."""
    run = run_anatomy(trace(), "r")
    frame = run.to_frame().set_index("step")
    assert list(frame.index) == ["a", "b", "c", "d"]
    assert frame.loc["c", "decode_s"] == pytest.approx(3.0)
    assert "<td>h100</td>" in run._repr_html_()


def test_shares_of_the_graph() -> None:
    """Reached, critical, followed and taken are shares of the runs of this workflow."""
    weights = graph_weights(WORKFLOW, trace())
    assert weights.runs == 1
    assert weights.reached[NodeId("b")] == 1.0
    assert NodeId("b") not in weights.critical
    assert set(weights.followed) == {(START, "a"), ("a", "c"), ("c", "d"), ("d", END)}
    assert weights.taken == {("stop", "enough"): 1.0}


def test_what_is_not_there_is_an_error() -> None:
    """A run, a run that ended well, a run of the workflow: each is asked for in words."""
    with pytest.raises(InvalidInput, match="no run 'x'"):
        run_anatomy(trace(), "x")
    with pytest.raises(InvalidInput, match="no run ended well"):
        run_anatomy([])
    with pytest.raises(InvalidInput, match="no run ended well"):
        mean_parts([])
    other = Workflow(name="v", nodes=(llm("a"),), edges=(edge(START, "a"), edge("a", END)))
    with pytest.raises(InvalidInput, match="no run of workflow 'v'"):
        graph_weights(other, trace())
