"""Scenario sampling."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from planner.domain.blocks import block_hashes
from planner.domain.errors import WorkflowError
from planner.domain.estimates import Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.ids import NodeId, SiteId
from planner.domain.run import RunSpec, Task
from planner.domain.workflow import END, START, CallSite, Join, Node, Workflow
from planner.graph.sampling import (
    outcome_weights,
    sample_run,
    scenarios,
    site_estimate,
    stable_key,
    tool_estimate,
)

from .research import branch, edge, llm, research_estimate, research_workflow


def draw(workflow: Workflow, estimate: WorkflowEstimate | None = None, seed: int = 0) -> RunSpec:
    """Draw one run with the given seed."""
    return sample_run(
        workflow, estimate or WorkflowEstimate(), np.random.default_rng(seed), run_id=f"r{seed}"
    )


def names(run: RunSpec) -> list[str]:
    """Return the nodes of a run in order."""
    return [task.node for task in run.tasks]


def forced(outcome: str) -> WorkflowEstimate:
    """Return the research forecasts with the triage branch fixed."""
    other = "deep" if outcome == "quick" else "quick"
    estimate = research_estimate()
    return replace(
        estimate, branches={**estimate.branches, "route": {outcome: (1.0,), other: (0.0,)}}
    )


def test_same_seed_gives_the_same_run() -> None:
    """The same generator state draws the same run, and another seed another one."""
    workflow, estimate = research_workflow(), research_estimate()
    assert draw(workflow, estimate, 3) == draw(workflow, estimate, 3)
    assert len({names(draw(workflow, estimate, s)).__repr__() for s in range(20)}) > 1


def test_keys_are_the_same_in_every_process() -> None:
    """Segment keys do not depend on the process."""
    code = "from planner.graph.sampling import stable_key; print(stable_key('a', 1))"
    out = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) == stable_key("a", 1) < 2**62


def test_short_way_runs_triage_then_quick() -> None:
    """The outcome taken decides what follows, and is recorded on the task it follows."""
    run = draw(research_workflow(), forced("quick"))
    assert names(run) == ["triage", "quick"]
    assert run.tasks[0].outcomes == (("route", "quick"),)
    assert run.tasks[1].preds == (0,)


def test_supersteps_wait_for_the_whole_step() -> None:
    """A node of one step waits for all nodes of the step before, and the join for its sources."""
    run = draw(research_workflow(), forced("deep"))
    at = {task.node: task.index for task in reversed(run.tasks)}
    fan = {at["search"], at["market"], at["legal"]}
    assert set(run.tasks[at["read"]].preds) == fan
    assert run.tasks[at["draft"]].preds == (at["read"],)
    assert names(run)[2:5] == ["legal", "market", "search"]


def test_dataflow_starts_a_node_when_it_is_triggered() -> None:
    """With dataflow execution the reader waits for the search alone, the join for its sources."""
    workflow = replace(research_workflow(), execution="dataflow")
    run = draw(workflow, forced("deep"))
    at = {task.node: task.index for task in reversed(run.tasks)}
    assert run.tasks[at["read"]].preds == (at["search"],)
    assert set(run.tasks[at["draft"]].preds) == {at["read"], at["market"], at["legal"]}


def test_two_triggers_in_one_step_run_a_node_once() -> None:
    """In supersteps a node triggered by two sources of one step runs once."""
    nodes = tuple(map(llm, ("a", "b", "c")))
    edges = (edge(START, "a"), edge(START, "b"), edge("a", "c"), edge("b", "c"), edge("c", END))
    assert names(draw(Workflow(name="w", nodes=nodes, edges=edges))) == ["a", "b", "c"]


def test_join_with_need_fires_after_that_many() -> None:
    """A join that needs one of two sources fires for each source that fires alone."""
    workflow = Workflow(
        name="w",
        nodes=tuple(map(llm, ("a", "b", "c"))),
        edges=(edge(START, "a"), edge("a", "b"), edge("c", END)),
        joins=(Join(target=NodeId("c"), sources=(NodeId("a"), NodeId("b")), need=1),),
    )
    assert Counter(names(draw(workflow))) == {"a": 1, "b": 1, "c": 2}


def test_unfinished_join_ends_the_run() -> None:
    """A join whose second source is never taken never fires."""
    workflow = Workflow(
        name="w",
        nodes=tuple(map(llm, ("a", "b", "c"))),
        edges=(edge(START, "a"), edge("c", END), edge("b", END), edge("a", END)),
        joins=(Join(target=NodeId("c"), sources=(NodeId("a"), NodeId("b"))),),
        branches=(branch("x", "a", yes=("b",), no=()),),
    )
    estimate = WorkflowEstimate(branches={"x": {"yes": (0.0,), "no": (1.0,)}})
    assert names(draw(workflow, estimate)) == ["a"]


def test_revisits_grow_the_previous_prompt() -> None:
    """With growth a later prompt is the earlier one, its answer and fresh text, in this order."""
    estimate = forced("deep")
    estimate = replace(
        estimate,
        branches={**estimate.branches, "verdict": {"revise": (1.0, 0.0), "accept": (0.0, 1.0)}},
    )
    critics = [t for t in draw(research_workflow(), estimate).tasks if t.node == "critic"]
    first, second = critics
    assert second.visit == 1
    assert second.prompt[: len(first.prompt)] == first.prompt
    answer = second.prompt[len(first.prompt)]
    assert (answer.key, answer.tokens) == (first.output_key, first.output_tokens)
    assert len(second.prompt) == len(first.prompt) + 2
    shared = block_hashes(first.prompt)
    assert block_hashes(second.prompt)[: len(shared)] == shared


def test_static_prefix_is_shared_by_runs_and_the_rest_is_not() -> None:
    """Two runs share exactly the static prefix of a site's prompt."""
    workflow, estimate = research_workflow(), research_estimate()
    one, two = (draw(workflow, estimate, seed).tasks[0].prompt for seed in (1, 2))
    assert one[0] == two[0]
    assert one[0].tokens == 200
    assert one[1].key != two[1].key


def test_declared_static_prefix_is_shared_between_sites() -> None:
    """Sites that declare the same prefix hash share its text."""
    site = CallSite(
        id=SiteId("a#0"), static_prefix_hash="p", static_prefix_tokens=64, expected_output_tokens=9
    )
    nodes = (Node(id=NodeId("a"), kind="llm", call_sites=(site, replace(site, id=SiteId("a#1")))),)
    run = draw(Workflow(name="w", nodes=nodes, edges=(edge(START, "a"), edge("a", END))))
    assert run.tasks[0].prompt[0] == run.tasks[1].prompt[0]
    assert run.tasks[0].prompt[0].tokens == 64
    assert run.tasks[1].preds == (0,)


def test_loops_are_left_after_max_visits() -> None:
    """A loop that would never end is left at the bound."""
    estimate = forced("deep")
    estimate = replace(
        estimate, branches={**estimate.branches, "verdict": {"revise": (1.0,), "accept": (0.0,)}}
    )
    run = sample_run(
        research_workflow(), estimate, np.random.default_rng(0), run_id="r", max_visits=3
    )
    assert Counter(names(run))["critic"] == 3


def test_changing_one_forecast_leaves_the_other_draws() -> None:
    """Common random numbers: doubling one site's output changes nothing else of a run."""
    workflow, estimate = research_workflow(), research_estimate()
    draft = estimate.sites["draft#0"]
    longer = replace(draft, output_tokens=Quantiles.constant(5000.0))
    changed = replace(estimate, sites={**estimate.sites, "draft#0": longer})

    def facts(task: Task) -> tuple[object, ...]:
        return task.node, task.prompt_tokens, task.delay_s, task.outcomes

    for seed in range(5):
        before, after = draw(workflow, estimate, seed), draw(workflow, changed, seed)
        assert list(map(facts, before.tasks)) == list(map(facts, after.tasks))
        assert all(
            b.output_tokens == a.output_tokens or b.node == "draft"
            for b, a in zip(before.tasks, after.tasks, strict=True)
        )


def test_a_branch_of_probability_zero_changes_nothing() -> None:
    """An outcome that is never taken leaves every draw as it was."""
    plain = Workflow(
        name="w",
        nodes=tuple(map(llm, ("a", "b", "c"))),
        edges=(edge(START, "a"), edge("b", END), edge("c", END)),
        branches=(branch("x", "a", p=("b",), q=("c",)),),
    )
    more = replace(plain, branches=(branch("x", "a", p=("b",), q=("c",), o=("b", "c")),))
    odds = {"p": (0.4,), "q": (0.6,)}
    for seed in range(20):
        one = draw(plain, WorkflowEstimate(branches={"x": odds}), seed)
        two = draw(more, WorkflowEstimate(branches={"x": {**odds, "o": (0.0,)}}), seed)
        assert [(t.node, t.output_tokens) for t in one.tasks] == [
            (t.node, t.output_tokens) for t in two.tasks
        ]


def test_branch_frequencies_follow_the_probabilities_by_visit() -> None:
    """Over many runs each outcome is taken as often as its probability for that visit says."""
    taken: Counter[tuple[int, str]] = Counter()
    for run in scenarios(research_workflow(), forced("deep"), 600, seed=1):
        for task in run.tasks:
            if task.node == "critic":
                taken[min(task.visit, 1), task.outcomes[0][1]] += 1
    first = taken[0, "revise"] / (taken[0, "revise"] + taken[0, "accept"])
    later = taken[1, "revise"] / (taken[1, "revise"] + taken[1, "accept"])
    assert first == pytest.approx(0.5, abs=0.06)
    assert later == pytest.approx(0.2, abs=0.06)


def test_scenarios_do_not_depend_on_how_many_are_drawn() -> None:
    """The first scenarios of a larger sample are those of a smaller one."""
    workflow, estimate = research_workflow(), research_estimate()
    assert scenarios(workflow, estimate, 6, 4)[:3] == scenarios(workflow, estimate, 3, 4)


def test_subgraph_is_walked_inside_its_step() -> None:
    """Inner nodes and sites are named by path, and what follows waits for the inner end."""
    inner = Workflow(
        name="inner",
        nodes=tuple(map(llm, ("x", "y"))),
        edges=(edge(START, "x"), edge("x", "y"), edge("y", END)),
    )
    outer = Workflow(
        name="outer",
        nodes=(Node(id=NodeId("sub"), kind="subgraph", subgraph=inner), llm("z")),
        edges=(edge(START, "sub"), edge("sub", "z"), edge("z", END)),
    )
    run = draw(outer)
    assert names(run) == ["sub/x", "sub/y", "z"]
    assert [t.site for t in run.tasks] == ["sub/x#0", "sub/y#0", "z#0"]
    assert [t.preds for t in run.tasks] == [(), (0,), (1,)]


def test_routers_take_no_time_and_carry_their_choice() -> None:
    """A router is a task of zero seconds that records its outcome."""
    workflow = Workflow(
        name="w",
        nodes=(Node(id=NodeId("r"), kind="router"), llm("a")),
        edges=(edge(START, "r"), edge("a", END)),
        branches=(branch("x", "r", go=("a",)),),
    )
    router, call = draw(workflow).tasks
    assert (router.kind, router.delay_s, router.outcomes) == ("code", 0.0, (("x", "go"),))
    assert call.preds == (0,)


def test_conditional_entry_is_chosen_too() -> None:
    """A branch at the start decides the first node."""
    workflow = Workflow(
        name="w",
        nodes=tuple(map(llm, ("a", "b"))),
        edges=(edge("a", END), edge("b", END)),
        branches=(branch("x", START, a=("a",), b=("b",)),),
    )
    assert {names(draw(workflow, seed=s))[0] for s in range(20)} == {"a", "b"}


def test_cycle_without_a_branch_is_refused() -> None:
    """A cycle of plain edges has no way out: the error names a node on it."""
    workflow = Workflow(
        name="w",
        nodes=tuple(map(llm, ("a", "b"))),
        edges=(edge(START, "a"), edge("a", "b"), edge("b", "a"), edge("b", END)),
    )
    with pytest.raises(WorkflowError, match="cycle"):
        draw(workflow)


def test_forecasts_fall_back_from_estimate_to_declaration_to_prior() -> None:
    """An estimate wins over a declaration, and a declaration over the prior."""
    empty = WorkflowEstimate()
    declared = CallSite(id=SiteId("a#0"), static_prefix_tokens=50, expected_output_tokens=70.0)
    assert site_estimate(declared, "a#0", empty).output_tokens.mean == pytest.approx(70.0)
    assert site_estimate(declared, "a#0", empty).shared_prefix_tokens == 50.0
    flat = Quantiles.constant(5.0)
    known = SiteEstimate(output_tokens=flat, prompt_tokens=flat)
    assert site_estimate(declared, "a#0", WorkflowEstimate(sites={"a#0": known})) is known
    tool = Node(id=NodeId("t"), kind="tool", expected_delay_s=2.0)
    assert tool_estimate(tool, "t", empty).mean == 2.0
    assert tool_estimate(replace(tool, expected_delay_s=None), "t", empty).mean > 0
    assert tool_estimate(tool, "t", WorkflowEstimate(tools={"t": flat})) is flat


def test_outcome_weights_sum_to_one_and_share_what_is_unknown() -> None:
    """Outcomes without a probability share what the declared ones leave."""
    x = branch("x", "a", p=("b",), q=("b",), r=("b",))
    x = replace(x, outcomes=(replace(x.outcomes[0], probability=0.5), *x.outcomes[1:]))
    assert outcome_weights(x, "x", WorkflowEstimate(), 0) == {"p": 0.5, "q": 0.25, "r": 0.25}
