"""Who is calling."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict

from runtime.fingerprint import read_prompt
from runtime.identity import SESSION_HEADERS, identify

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PROMPT = read_prompt({"messages": [{"role": "user", "content": "hello"}]})


def who(headers=None, payload=None):
    return identify(CIMultiDict(headers or {}), payload or {}, PROMPT)


def test_our_headers_give_everything():
    """All of our headers are read, whatever their case."""
    identity = who(
        {
            "X-Almanac-Run-Id": "run1",
            "x-almanac-workflow": "abc",
            "x-almanac-node": "outer|inner",
            "x-almanac-site": "outer|inner#1",
            "x-almanac-step": "4",
            "x-almanac-visit": "2",
            "x-almanac-attempt": "1",
            "x-session-id": "s1",
        }
    )
    assert identity.run_id == "run1"
    assert (identity.workflow, identity.node) == ("abc", "outer|inner")
    assert identity.site == "outer|inner#1"
    assert (identity.step, identity.visit, identity.attempt) == (4, 2, 1)
    assert (identity.session_id, identity.source) == ("s1", "run")


@pytest.mark.parametrize(("run", "node"), [("X-Run-Id", "X-Node-Name"), ("rid", "node-name")])
def test_programs_of_agentir_are_known(run, node):
    """Both header schemes of AgentIR name run and node; our own headers win."""
    identity = who({run: "r", node: "triage"})
    assert (identity.run_id, identity.source) == ("r", "run")
    assert (identity.node, identity.site) == ("triage", "triage#0")
    ours = {"x-almanac-run-id": "mine", "x-almanac-node": "n"}
    identity = who({run: "r", node: "triage", **ours})
    assert (identity.run_id, identity.node) == ("mine", "n")


def test_the_first_site_of_a_node_is_assumed():
    """A node without a site means its first call site."""
    assert who({"x-almanac-node": "n"}).site == "n#0"


@pytest.mark.parametrize("name", [name for name in SESSION_HEADERS if name != "traceparent"])
def test_session_headers_of_others_stand_for_the_run(name):
    """Without a run id, any known session header names the run."""
    identity = who({name: "abc"})
    assert (identity.run_id, identity.session_id, identity.source) == ("abc", "abc", "session")


@pytest.mark.parametrize(
    "payload",
    [
        {"session_params": {"session_id": "abc"}},
        {"prompt_cache_key": "abc"},
        {"previous_response_id": "abc"},
        {"user": "abc"},
    ],
)
def test_body_fields_stand_for_the_run(payload):
    """Without headers, the body fields of other routers name the run."""
    assert who(payload=payload).run_id == "abc"


def test_an_agent_program_is_a_run():
    """The program of vLLM's agentic context is the run; the session stays."""
    payload = {"vllm_xargs": {"agentic_context": {"program_id": "p"}}, "user": "u"}
    identity = who(payload=payload)
    assert (identity.run_id, identity.session_id, identity.source) == ("p", "u", "program")


def test_silent_clients_are_known_by_their_conversation():
    """Without any name, turns of one conversation are one run and others are not."""
    one = read_prompt({"messages": [{"role": "user", "content": "a"}]})
    next_turn = read_prompt(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    other = read_prompt({"messages": [{"role": "user", "content": "c"}]})
    ids = [identify(CIMultiDict(), {}, prompt).run_id for prompt in (one, next_turn, other)]
    assert ids[0] == ids[1] != ids[2]


def test_the_end_of_a_session_is_heard():
    """Dynamo's header says that a run ends with this call."""
    assert who({"x-dynamo-session-final": "True"}).final
    assert who({"x-almanac-run-final": "true"}).final
    assert not who().final


@pytest.mark.parametrize("value", ["-1", "abc", "1e3", "", "٣", "9" * 30])
def test_odd_counters_are_zero(value):
    """A counter that is no plain number is taken as 0."""
    assert who({"x-almanac-visit": value}).visit == 0


def test_long_names_are_cut():
    """An identity has a bounded length, whatever a client sends."""
    assert len(who({"x-almanac-run-id": "x" * 5000}).run_id) == 200
    assert who(payload={"user": 5, "session_params": [1], "vllm_xargs": "x"}).source == "content"


@pytest.mark.parametrize(
    ("value", "run"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01", TRACE),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", None),
        (TRACE, None),
    ],
)  # fmt: skip
def test_a_trace_is_a_run(value, run):
    """The trace id of a valid W3C traceparent names the run; whatever else is there does not."""
    identity = who({"traceparent": value})
    assert (identity.run_id if run else identity.source) == (run or "content")


def test_sub_agents_are_runs_below_their_parents():
    """Agents of one session are told apart, and each knows who started it."""
    base = {"x-claude-code-session-id": "s"}
    main = who(base)
    child = who({**base, "x-claude-code-agent-id": "a"})
    grandchild = who({**base, "x-claude-code-agent-id": "b", "x-claude-code-parent-agent-id": "a"})
    assert (main.run_id, main.parent_id) == ("s", "")
    assert (child.run_id, child.parent_id, child.agent_id) == ("s/a", "s", "a")
    assert (grandchild.run_id, grandchild.parent_id) == ("s/b", "s/a")
    assert who({"session-id": "c", "x-parent-session-id": "p"}).parent_id == "p"
    assert {one.session_id for one in (main, child, grandchild)} == {"s"}


def test_the_agentic_context_gives_node_step_and_parent():
    """The context of vLLM names program, parent, task and step; odd values are nothing."""
    context = {"program_id": "p", "parent_program_id": "q", "task_id": "plan", "step_id": 3}
    identity = who(payload={"vllm_xargs": {"agentic_context": context}})
    assert (identity.run_id, identity.parent_id) == ("p", "q")
    assert (identity.node, identity.site, identity.step) == ("plan", "plan#0", 3)
    odd = who(payload={"vllm_xargs": {"agentic_context": {"program_id": 5, "step_id": "x"}}})
    assert (odd.source, odd.step) == ("content", 0)


def test_what_is_looked_at_is_a_setting():
    """Configured headers and fields are read in their order, first hit wins, and no others."""
    headers = CIMultiDict({"X-Team-Run": "mine", "x-session-id": "other"})
    payload = {"metadata": {"thread": "t"}, "user": "u"}

    def run(names, fields):
        return identify(
            headers, payload, PROMPT, session_headers=names, session_fields=fields
        ).run_id

    assert run(("x-team-run", "x-session-id"), ()) == "mine"
    assert run(("x-session-id", "x-team-run"), ()) == "other"
    assert run((), ("metadata.thread", "user")) == "t"
    assert run((), ()).startswith("content-")
