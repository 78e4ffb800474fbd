"""Agents without a graph: sequences, and the graph mined from them."""

import numpy as np
import pytest

from models.importers import AgentCall, AgentSession
from models.mining import mine_workflow, session_symbols
from models.sequences import END_SYMBOL, SequenceModel
from planner.domain.workflow import Workflow
from planner.graph.sampling import scenarios


def _second_order(rng, length=30):
    """Return a sequence where the next symbol repeats the one before last."""
    out = ["a", "b"] if rng.random() < 0.5 else ["a", "a"]
    while len(out) < length:
        out.append(out[-2] if rng.random() < 0.95 else "ab"[int(rng.integers(2))])
    return out


def test_probabilities_are_probabilities():
    """After any history, seen or not, all outcomes have a chance and they sum to one."""
    model = SequenceModel(order=3).fit([["a", "b"], ["a"], []])
    for history in ([], ["a"], ["a", "b"], ["never", "seen"]):
        chances = model.probabilities(history)
        assert set(chances) == {"a", "b", END_SYMBOL}
        assert sum(chances.values()) == pytest.approx(1.0)
        assert min(chances.values()) > 0


def test_longer_contexts_pay_where_they_matter():
    """A second-order chain is told apart from a first-order one."""
    rng = np.random.default_rng(0)
    model = SequenceModel(order=3).fit([_second_order(rng) for _ in range(40)])
    assert model.probabilities(["a", "b", "a", "b"])["a"] > 0.8
    assert model.probabilities(["b", "b", "a", "a"])["a"] > 0.8
    found = model.informative_contexts()
    assert ("b", "a") in found
    # Where order one is all there is, no context earns a state of its own.
    coin = [["ab"[int(flip)] for flip in rng.integers(2, size=30)] for _ in range(40)]
    assert len(SequenceModel(order=2).fit(coin).informative_contexts()) <= 2


def _session(number, actions):
    return AgentSession(
        source="agent",
        session_id=f"s{number}",
        family=f"s{number}",
        calls=tuple(
            AgentCall(
                site="loop",
                prompt_tokens=1000 + 200 * place,
                output_tokens=50,
                shared_prefix_tokens=1000 if place else 0,
                gap_s=1.0 if place else 0.0,
                next_action=action,
            )
            for place, action in enumerate(actions)
        ),
    )


def test_a_loop_without_a_graph_becomes_a_graph():
    """Actions become states; sampled runs have the recorded lengths and action shares."""
    rng = np.random.default_rng(0)
    sessions = [_session(number, _second_order(rng, 12)) for number in range(60)]
    plain, _ = mine_workflow(sessions)
    assert sum(node.kind == "llm" for node in plain.nodes) == 1
    assert session_symbols(sessions[0], actions=True)[0] == "agent/loop"
    mined, estimate = mine_workflow(sessions, order=3, actions=True)
    assert isinstance(mined, Workflow)
    names = {str(node.id) for node in mined.nodes if node.kind == "llm"}
    assert {name.split(" < ")[0] for name in names} == {
        "agent/loop", "agent/loop@a", "agent/loop@b",
    }  # fmt: skip
    assert any(" < " in name for name in names)
    runs = scenarios(mined, estimate, 80, seed=0, max_visits=50)
    calls = [sum(task.kind == "llm" for task in run.tasks) for run in runs]
    assert np.mean(calls) == pytest.approx(12, rel=0.25)
    assert Workflow.from_json(mined.to_json()).content_hash == mined.content_hash
