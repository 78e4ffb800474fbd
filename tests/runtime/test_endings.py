"""When a run that never says goodbye is over."""

from __future__ import annotations

import numpy as np
import pytest

from planner.domain.blocks import Segment
from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.run import RunSpec, Task
from planner.domain.workflow import END, START, Branch, CallSite, Node, Outcome, Workflow
from planner.graph.sampling import scenarios
from runtime.endings import EndForecast
from runtime.runs import Run, RunBook


def llm(name):
    return Node(id=name, kind="llm", call_sites=(CallSite(id=f"{name}#0"),))


# plan -> search (tool) -> write -> save (code of unknown length) -> check -> END
WORKFLOW = Workflow(
    name="flow",
    nodes=(
        llm("plan"),
        Node(id="search", kind="tool"),
        llm("write"),
        Node(id="save", kind="code"),
        llm("check"),
    ),
    edges=(
        (START, "plan"),
        ("plan", "search"),
        ("search", "write"),
        ("write", "save"),
        ("save", "check"),
        ("check", END),
    ),
)
SITE = SiteEstimate(output_tokens=Quantiles.constant(20.0), prompt_tokens=Quantiles.constant(50.0))
ESTIMATES = EstimateTable(
    workflows={
        WORKFLOW.content_hash: WorkflowEstimate(
            name="flow",
            sites={f"{name}#0": SITE for name in ("plan", "write", "check")},
            tools={"search": Quantiles.from_samples(np.full(50, 8.0))},
        )
    }
)


def run(node="", **values):
    facts = {
        "run_id": "r", "workflow": "", "workflow_hash": WORKFLOW.content_hash, "session_id": None,
        "arrival_s": 0.0, "predicted_s": None, "last_s": 0.0, "node": node,
    }  # fmt: skip
    return Run(**{**facts, **values})


@pytest.fixture
def endings():
    forecast = EndForecast(ESTIMATES)
    estimate = ESTIMATES.workflows[WORKFLOW.content_hash]
    forecast.add_workflow(WORKFLOW, scenarios(WORKFLOW, estimate, 16, seed=0, defaults=ESTIMATES))
    return forecast


def patience(endings, one, idle_s=900.0):
    return endings.patience_s(one, idle_s=idle_s, done_s=5.0)


def test_after_the_last_node_a_run_is_over_soon(endings):
    """Where the graph has no further call, a few seconds of silence end the run."""
    assert patience(endings, run("check")) == 5.0


def test_a_tool_gets_the_time_it_usually_takes(endings):
    """While a tool runs, or lies before the next call, its delay's quantile says how long."""
    assert patience(endings, run("plan")) == pytest.approx(5.0 + 16.0, rel=0.1)
    assert patience(endings, run("plan", tools={("search", 0): 1.0})) == pytest.approx(16, rel=0.1)


def test_what_is_not_known_gets_the_default(endings):
    """Unknown workflows, nodes and tools are waited for by default, and never longer."""
    assert patience(endings, run("plan", workflow_hash="x")) == 900.0
    assert patience(endings, run("elsewhere")) == 900.0
    assert patience(endings, run("write")) == 900.0  # the length of the code is unknown
    assert patience(endings, run("plan", tools={("odd", 0): 1.0})) == 900.0
    assert patience(endings, run("plan"), idle_s=10.0) == 10.0


def test_pauses_of_other_runs_are_learned(endings):
    """Where runs have paused before, three times their longest usual pause is allowed."""
    one = run(workflow_hash="", source="session")
    for _ in range(20):
        assert patience(endings, one) == 900.0
        endings.paused(one, 7.0)
    assert patience(endings, one) == 21.0
    assert patience(endings, run(workflow_hash="", source="content")) == 900.0


def test_a_loop_ends_when_sampled_runs_do():
    """After the visit that no sampled run goes on from, the run is over; before, it is not."""
    loop = Workflow(
        name="loop",
        nodes=(llm("a"), Node(id="t", kind="tool")),
        edges=((START, "a"), ("t", "a")),
        branches=(
            Branch(
                id="more",
                source="a",
                outcomes=(Outcome(id="yes", targets=("t",)), Outcome(id="no", targets=(END,))),
            ),
        ),
    )
    prompt = (Segment(key=1, tokens=9),)

    def task(index, node, visit):
        return Task(
            index=index, node=node, kind="llm" if node == "a" else "tool", visit=visit,
            preds=(index - 1,) if index else (), site="a#0", prompt=prompt, output_tokens=3,
        )  # fmt: skip

    tasks = (task(0, "a", 0), task(1, "t", 0), task(2, "a", 1))
    key = loop.content_hash
    sampled = RunSpec(run_id="s", workflow="loop", workflow_hash=key, arrival_s=0.0, tasks=tasks)
    endings = EndForecast(EstimateTable())
    endings.add_workflow(loop, [sampled])
    assert patience(endings, run("a", workflow_hash=key, visit=0)) == 900.0
    assert patience(endings, run("a", workflow_hash=key, visit=1)) == 5.0
    assert patience(endings, run("a", workflow_hash=key, visit=7)) == 5.0


def test_graphs_that_do_not_tell_are_not_believed():
    """Open branches, several calls in a node and calls in a row leave the default."""
    several = tuple(CallSite(id=f"a#{number}") for number in range(2))
    open_branch = Branch(
        id="any", source="a", outcomes=(Outcome(id="end", targets=(END,)),), exhaustive=False
    )
    for workflow in (
        Workflow(
            name="several",
            nodes=(Node(id="a", kind="llm", call_sites=several),),
            edges=((START, "a"), ("a", END)),
        ),
        Workflow(name="open", nodes=(llm("a"),), edges=((START, "a"),), branches=(open_branch,)),
        Workflow(
            name="row",
            nodes=(llm("a"), llm("b")),
            edges=((START, "a"), ("a", "b"), ("b", END)),
        ),
    ):
        endings = EndForecast(EstimateTable())
        endings.add_workflow(workflow, ())
        assert patience(endings, run("a", workflow_hash=workflow.content_hash)) == 900.0


class TestBook:
    def test_silent_runs_are_new_when_they_come_back(self):
        """A run that fell silent is forgotten; one that was said to end is remembered."""
        book = RunBook()
        book.add(run(run_id="silent"))
        book.add(run(run_id="said"))
        book.end("said", 1.0, "ok")
        assert [record.run_id for record in book.expire(10.0, lambda _run: 5.0)] == ["silent"]
        assert book.find("silent") is None
        assert book.find("said") is not None

    def test_a_parent_waits_for_its_children(self):
        """A run does not fall silent while one it started goes on."""
        book = RunBook()
        book.add(run(run_id="top"))
        book.add(run(run_id="child", parent_id="top", last_s=8.0))
        book.add(run(run_id="grandchild", parent_id="child", last_s=8.0))
        assert [one.run_id for one in book.below("top")] == ["child", "grandchild"]
        assert book.expire(10.0, 5.0) == []
        assert [record.run_id for record in book.expire(20.0, 5.0)] == ["grandchild"]

    def test_open_calls_are_no_silence(self):
        """A run with a call under way does not expire, however long it takes."""
        book = RunBook()
        book.add(run(open_calls=1))
        assert book.expire(1e9, 0.0) == []
