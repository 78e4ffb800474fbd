"""Programs and contracts of AgentIR: what they declare arrives in our terms."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph

from planner.cli import ir as command
from planner.domain.errors import InvalidInput
from planner.domain.workflow import Workflow
from runtime.langgraph.agentir import llm_call, workflow_from_contract, writes
from runtime.langgraph.declare import declared_calls
from runtime.langgraph.ir import content_hash, workflow_ir

PROMPT = "You are a helpful assistant."


class State(TypedDict, total=False):
    x: int


def call(model: str | None = None, reads: Any = (), static_vars: Any = ()) -> dict[str, Any]:
    return {"model": model, "reads": list(reads), "static_vars": list(static_vars)}


def node(*calls: dict[str, Any], writes: Any = ()) -> dict[str, Any]:
    return {"writes": list(writes), "llm_calls": list(calls)}


def edge(src: str, dst: str, label: str | None = None) -> dict[str, Any]:
    return {"src": src, "dst": dst, "label": label}


PYTHON = {
    "entry": "__gp_ensure_rid",
    "end": "END",
    "nodes": {
        "START": node(),
        "END": node(),
        "__gp_ensure_rid": node(),
        "triage": node(
            call("small", ["question"], ["SYSTEM", "Answer with one word."]),
            writes=["topic", "seq_0badcafe"],
        ),
        "deep": node(
            call("big", ["topic", "seq_0badcafe"]), call(reads=["found"]), writes=["found"]
        ),
        "market": node(call(reads=["topic", "seq_0badcafe"])),
        "look": node(writes=["page"]),
    },
    "edges": [
        edge("START", "__gp_ensure_rid"),
        edge("__gp_ensure_rid", "triage"),
        edge("triage", "deep", "conditional_0"),
        edge("triage", "market", "conditional_0"),
        edge("triage", "look", "conditional_1"),
        edge("look", "triage", "again"),
        edge("deep", "END"),
        edge("market", "END"),
    ],
}

TYPESCRIPT = {
    "entry": "bot.iter_1.step",
    "end": "bot.done",
    "nodes": {
        "bot.iter_1.step": node(call("m", ["result::missing"]), writes=["result::bot.iter_1.step"]),
        "bot.iter_1.finish": node(writes=["result::bot.iter_1.finish"]),
        "bot.iter_1.choice_0": node(),
        "bot.iter_1.choice_0.tool.search": node(writes=["result::s"]),
        "bot.iter_1.choice_0.tool.fetch": node(writes=["result::f"]),
        "bot.iter_1.join_0": node(),
        "bot.done": node(call(reads=["result::s"])),
    },
    "edges": [
        edge("bot.iter_1.step", "bot.iter_1.finish", "conditional::bot.iter_1.step::finish"),
        edge("bot.iter_1.step", "bot.iter_1.choice_0", "conditional::bot.iter_1.step::choice_0"),
        edge(
            "bot.iter_1.choice_0",
            "bot.iter_1.choice_0.tool.search",
            "all_or_nothing::bot.iter_1.choice_0::all",
        ),
        edge(
            "bot.iter_1.choice_0",
            "bot.iter_1.choice_0.tool.fetch",
            "all_or_nothing::bot.iter_1.choice_0::all",
        ),
        edge("bot.iter_1.choice_0.tool.search", "bot.iter_1.join_0"),
        edge("bot.iter_1.choice_0.tool.fetch", "bot.iter_1.join_0"),
        edge("bot.iter_1.join_0", "bot.done"),
        edge("bot.iter_1.finish", "bot.done"),
    ],
}


def test_decorators_become_declarations() -> None:
    """Models, keys and static texts of stacked decorators, in any order, on one node."""
    local = "Be brief."

    @writes("answer")
    @llm_call(model="small", reads=["question"], static_vars=["PROMPT", "local", "nowhere"])
    @llm_call(reads=["notes"], static_vars=["Literal text, as it is."])
    @writes("score")
    def triage(state: State) -> dict[str, Any]:
        return {"x": len(local)}

    first, second = declared_calls(triage)
    assert (first.model, first.reads, first.writes) == ("small", ("question",), ("answer", "score"))
    assert first.static_prefix == f"{PROMPT}\n{local}"
    assert (second.static_prefix, second.writes) == ("Literal text, as it is.", first.writes)

    graph = StateGraph(State)
    graph.add_node("triage", triage)
    graph.add_edge(START, "triage")
    document = workflow_ir(graph.compile())
    assert [site["id"] for site in document["nodes"][0]["call_sites"]] == ["triage#0", "triage#1"]
    assert Workflow.from_json(document).to_json() == document


def test_a_name_that_is_bound_later_is_left_out() -> None:
    """Nothing is guessed about a variable that has no value when the function is decorated."""

    @llm_call(static_vars=["later"])
    def function(state: State) -> str:
        return later

    later = "too late"
    assert declared_calls(function)[0].static_prefix is None
    assert function({}) == later


@pytest.mark.parametrize("contract", [PYTHON, TYPESCRIPT])
def test_contracts_become_canonical_workflows(contract: dict[str, Any]) -> None:
    """The planner reads the result back to the same bytes and the same content hash."""
    document = workflow_from_contract(contract, "mine")
    workflow = Workflow.from_json(document)
    assert workflow.to_json() == document
    assert workflow.content_hash == content_hash(document)
    assert workflow.name == "mine"


def test_python_contract() -> None:
    """Guard and synthetic variables are gone; equal labels are one outcome, user labels none."""
    document = workflow_from_contract(PYTHON)
    assert [(one["id"], one["kind"]) for one in document["nodes"]] == [
        ("deep", "llm"),
        ("look", "code"),
        ("market", "llm"),
        ("triage", "llm"),
    ]
    assert document["edges"] == [
        [START, "triage"],
        ["deep", END],
        ["look", "triage"],
        ["market", END],
    ]
    (branch,) = document["branches"]
    assert (branch["id"], branch["exhaustive"]) == ("triage:conditional", True)
    assert {one["id"]: one["targets"] for one in branch["outcomes"]} == {
        "0": ["deep", "market"],
        "1": ["look"],
    }
    (triage,) = document["nodes"][3]["call_sites"]
    assert (triage["model"], triage["reads"], triage["writes"]) == (
        "small",
        ["question"],
        ["topic"],
    )
    text = b"Answer with one word."
    assert triage["static_prefix_hash"] == hashlib.sha256(text).hexdigest()[:16]
    assert [one["reads"] for one in document["nodes"][0]["call_sites"]] == [["topic"], ["found"]]
    assert document["execution"] == "supersteps"


def test_typescript_contract() -> None:
    """Choices are branches, a fan-out taken as a whole is one, and a join waits for all of it."""
    document = workflow_from_contract(TYPESCRIPT)
    (branch,) = document["branches"]
    assert {one["id"]: one["targets"] for one in branch["outcomes"]} == {
        "finish": ["bot.iter_1.finish"],
        "choice_0": ["bot.iter_1.choice_0"],
    }
    tools = ["bot.iter_1.choice_0.tool.fetch", "bot.iter_1.choice_0.tool.search"]
    assert document["joins"] == [{"target": "bot.iter_1.join_0", "sources": tools, "need": None}]
    kinds = {one["id"]: one["kind"] for one in document["nodes"]}
    assert {kinds[tool] for tool in tools} == {"tool"}
    assert kinds["bot.iter_1.join_0"] == "code"
    sites = {site["id"]: site["reads"] for one in document["nodes"] for site in one["call_sites"]}
    # A result that nothing writes is no dependency.
    assert sites == {"bot.iter_1.step#0": [], "bot.done#0": ["result::s"]}
    assert document["execution"] == "dataflow"


def test_several_fan_outs_are_alternatives() -> None:
    """Of two fan-outs taken as a whole exactly one is taken."""
    contract = {
        "entry": "a",
        "end": None,
        "nodes": {name: node(call()) for name in "abcd"},
        "edges": [
            edge("a", "b", "all_or_nothing::a::x"),
            edge("a", "c", "all_or_nothing::a::x"),
            edge("a", "d", "all_or_nothing::a::y"),
        ],
    }
    (branch,) = workflow_from_contract(contract)["branches"]
    assert [one["targets"] for one in branch["outcomes"]] == [["b", "c"], ["d"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": []}, r"nodes is \[\]; it must be a JSON object"),
        ({"edges": {}}, "edges is {}; it must be a list"),
        ({"entry": "nobody"}, "entry is 'nobody'; it must be one of the nodes deep"),
        ({"edges": [edge("deep", "gone")]}, r"edges\[0\].dst is 'gone'"),
        ({"edges": [{"src": "deep", "dst": "END", "label": 3}]}, r"edges\[0\].label is 3"),
        ({"nodes": {"deep": 1}}, "nodes.deep is 1"),
        ({"entry": "a", "nodes": {"a": {"llm_calls": 1}}, "edges": []}, "a.llm_calls is 1"),
        (
            {"entry": "a", "nodes": {"a": node({"reads": "x"})}, "edges": []},
            r"a.llm_calls\[0\].reads is 'x'; it must be a list of texts",
        ),
        (
            {"entry": "a", "nodes": {"a": node({"model": 1})}, "edges": []},
            r"a.llm_calls\[0\].model is 1",
        ),
    ],
)
def test_what_is_no_contract_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One clear error with the field, what was found and what it must be; from the command too."""
    broken = PYTHON | change
    with pytest.raises(ValueError, match=message):
        workflow_from_contract(broken)
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(broken))
    with pytest.raises(InvalidInput, match=message):
        command.load(str(file))


def test_the_command_reads_contracts(tmp_path: Path) -> None:
    """``almanac ir contract.json`` takes a contract where it takes a workflow."""
    file = tmp_path / "contract.json"
    file.write_text(json.dumps(PYTHON))
    assert command.load(str(file)).to_json() == workflow_from_contract(PYTHON, "contract")
