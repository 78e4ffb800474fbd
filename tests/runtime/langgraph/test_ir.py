"""The workflow graph read from compiled LangGraphs that know nothing of Almanac."""

import functools
import logging
import operator
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypedDict

import openai
import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, RetryPolicy, Send

from planner.domain.workflow import Workflow, structure_hash
from runtime.langgraph import demo
from runtime.langgraph.declare import branch, llm_call, tool_call
from runtime.langgraph.ir import content_hash, walk, workflow_ir

CHAT = FakeListChatModel(responses=["yes"])


class State(TypedDict, total=False):
    x: int
    log: Annotated[list[str], operator.add]


def code(state: State) -> dict[str, Any]:
    return {"log": ["code"]}


def asks(state: State) -> dict[str, Any]:
    return {"log": [CHAT.invoke("hello").text]}


def chain_of(*names: str) -> StateGraph[Any]:
    graph = StateGraph(State)
    for name in names:
        graph.add_node(name, code)
    for source, target in zip((START, *names), (*names, END), strict=True):
        graph.add_edge(source, target)
    return graph


def conditional() -> Any:
    graph = StateGraph(State)
    for name in ("a", "b", "c"):
        graph.add_node(name, code)

    def route(state: State) -> str:
        return "left"

    graph.add_edge(START, "a")
    graph.add_conditional_edges("a", route, {"left": "b", "right": "c", "stop": END})
    return graph.compile()


def literal_router() -> Any:
    graph = StateGraph(State)
    for name in ("a", "b"):
        graph.add_node(name, code)

    def route(state: State) -> Literal["b", "__end__"]:
        return "b"

    graph.add_edge(START, "a")
    graph.add_conditional_edges("a", route)
    return graph.compile()


def unread_router() -> Any:
    graph = StateGraph(State)
    for name in ("a", "b", "c"):
        graph.add_node(name, code)
    graph.add_edge(START, "a")
    graph.add_conditional_edges("a", lambda state: "b")
    return graph.compile()


def start_router() -> Any:
    graph = StateGraph(State)
    for name in ("a", "b"):
        graph.add_node(name, code)

    def entry(state: State) -> Literal["a", "b"]:
        return "a"

    graph.add_conditional_edges(START, entry)
    return graph.compile()


def join() -> Any:
    graph = StateGraph(State)
    for name in ("x", "y", "z"):
        graph.add_node(name, code)
    graph.add_edge(START, "x")
    graph.add_edge(START, "y")
    graph.add_edge(["y", "x"], "z")
    graph.add_edge(["x", "y"], "z")
    graph.add_edge(["z"], END)
    return graph.compile()


def loop() -> Any:
    graph = StateGraph(State)
    graph.add_node("draft", asks)
    graph.add_node("critic", asks)

    def route(state: State) -> Literal["draft", "__end__"]:
        return END

    def again(state: State) -> Literal["critic", "__end__"]:
        return END

    graph.add_edge(START, "draft")
    graph.add_edge("draft", "critic")
    graph.add_conditional_edges("critic", route)
    graph.add_conditional_edges("critic", again)
    return graph.compile()


def send_listed() -> Any:
    graph = StateGraph(State)
    for name in ("plan", "work", "merge"):
        graph.add_node(name, code)

    def spread(state: State) -> list[Send]:
        return [Send("work", {"x": i}) for i in range(3)]

    graph.add_edge(START, "plan")
    graph.add_conditional_edges("plan", spread, ["work"])
    graph.add_edge("work", "merge")
    return graph.compile()


def send_unlisted() -> Any:
    graph = StateGraph(State)
    for name in ("plan", "work", "merge"):
        graph.add_node(name, code)

    def spread(state: State) -> list[Send]:
        return [Send("work", {"x": i}) for i in range(3)]

    graph.add_edge(START, "plan")
    graph.add_conditional_edges("plan", spread)
    graph.add_edge("work", "merge")
    return graph.compile()


def command() -> Any:
    def decide(state: State) -> Command[Literal["b", "__end__"]]:
        return Command(goto="b", update={"x": 1})

    graph = StateGraph(State)
    graph.add_node("a", decide)
    graph.add_node("b", code)
    graph.add_edge(START, "a")
    return graph.compile()


def command_unread() -> Any:
    def decide(state: State):  # type: ignore[no-untyped-def]  # noqa: ANN202, RUF100
        return Command(goto="b")

    graph = StateGraph(State)
    graph.add_node("a", decide)
    graph.add_node("b", code)
    graph.add_edge(START, "a")
    return graph.compile()


def command_destinations() -> Any:
    graph = StateGraph(State)
    graph.add_node("a", lambda state: Command(goto="b"), destinations={"b": "next", END: "stop"})
    graph.add_node("b", code)
    graph.add_edge(START, "a")
    return graph.compile()


def subgraph() -> Any:
    innermost = StateGraph(State)
    innermost.add_node("deepest", asks)
    innermost.add_edge(START, "deepest")
    inner = StateGraph(State)
    inner.add_node("first", asks)
    inner.add_node("second", innermost.compile(name="innermost"))
    inner.add_edge(START, "first")
    inner.add_conditional_edges("first", tools_free, ["second", END])
    graph = StateGraph(State)
    graph.add_node("before", code)
    graph.add_node("mid", inner.compile(name="inner"))
    graph.add_node("after", asks)
    graph.add_edge(START, "before")
    graph.add_edge(START, "mid")
    graph.add_edge("before", "mid")
    graph.add_edge("mid", "after")
    return graph.compile(name="outer")


def tools_free(state: State) -> str:
    return "second"


@tool
@tool_call(expected_latency_s=0.5)
def look_up(word: str) -> str:
    """Look a word up."""
    return word


@tool
@tool_call(expected_latency_s=1.5)
async def fetch(url: str) -> str:
    """Fetch a page."""
    return url


def react() -> Any:
    graph = StateGraph(MessagesState)
    graph.add_node("agent", lambda state: {"messages": [CHAT.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([look_up, fetch]))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", tools_condition)
    graph.add_edge("tools", "agent")
    return graph.compile()


class Binding(FakeListChatModel):
    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def prebuilt_react() -> Any:
    from langgraph.prebuilt import create_react_agent

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_react_agent(Binding(responses=["hi"]), [look_up])


def dead_ends() -> Any:
    graph = StateGraph(State)
    for name in ("a", "b", "spin", "round"):
        graph.add_node(name, code)
    graph.add_edge(START, "a")
    graph.add_edge("a", "b")
    graph.add_edge(START, "spin")
    graph.add_edge("spin", "round")
    graph.add_edge("round", "spin")
    return graph.compile()


def itself() -> Any:
    compiled: Any = None

    def recurse(state: State) -> dict[str, Any]:
        return dict(compiled.invoke(state))

    graph = StateGraph(State)
    graph.add_node("again", recurse)
    graph.add_edge(START, "again")
    compiled = graph.compile()
    # Bound only now: read the graph as LangGraph does when it is compiled with itself in sight.
    compiled = graph.compile()
    return compiled


def research() -> Any:
    return demo.app()


GRAPHS: list[Callable[[], Any]] = [
    conditional, literal_router, unread_router, start_router, join, loop, send_listed,
    send_unlisted, command, command_unread, command_destinations, subgraph, react,
    prebuilt_react, dead_ends, itself, research,
]  # fmt: skip


def nodes_of(ir: dict[str, Any]) -> dict[str, Any]:
    return dict(walk(ir))


def outcomes_of(ir: dict[str, Any], branch_id: str) -> dict[str, list[str]]:
    (found,) = [b for b in ir["branches"] if b["id"] == branch_id]
    return {outcome["id"]: outcome["targets"] for outcome in found["outcomes"]}


@pytest.mark.parametrize("build", GRAPHS)
def test_every_graph_is_a_canonical_valid_workflow(build: Callable[[], Any]) -> None:
    """The planner reads the JSON back to the same bytes and gives it the same content hash."""
    ir = workflow_ir(build())
    workflow = Workflow.from_json(ir)
    assert workflow.to_json() == ir
    assert structure_hash(ir) == content_hash(ir) == workflow.content_hash


@pytest.mark.parametrize("build", GRAPHS)
def test_two_builds_give_the_same_graph(build: Callable[[], Any]) -> None:
    """Nothing random and nothing of the process goes into the graph."""
    assert workflow_ir(build()) == workflow_ir(build())


def test_content_hash_is_the_same_in_every_process() -> None:
    """Another hash seed, another process: the same content hash for every kind of graph."""
    program = (
        "import sys; from planner.cli.ir import load\n"
        f"for name in {[build.__name__ for build in GRAPHS]!r}:\n"
        f"    print(name, load({__file__!r} + ':' + name).content_hash)"
    )
    here = [f"{build.__name__} {content_hash(workflow_ir(build()))}" for build in GRAPHS]
    done = subprocess.run(  # noqa: S603 our own interpreter and program
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == here, done.stderr


def test_reading_leaves_the_graph_as_it_was() -> None:
    """The graph runs as before, and its builder holds the same objects."""
    graph = subgraph()
    nodes, edges = dict(graph.builder.nodes), set(graph.builder.edges)
    workflow_ir(graph)
    assert graph.builder.nodes == nodes
    assert graph.builder.edges == edges
    assert graph.invoke({"x": 1})["x"] == 1


def test_each_label_of_a_router_is_an_outcome() -> None:
    """Labels, not targets, name outcomes; the END constant is a target like any other."""
    assert outcomes_of(workflow_ir(conditional()), "a:route") == {
        "left": ["b"],
        "right": ["c"],
        "stop": [END],
    }
    assert outcomes_of(workflow_ir(literal_router()), "a:route") == {"b": ["b"], END: [END]}
    assert outcomes_of(workflow_ir(start_router()), f"{START}:entry") == {"a": ["a"], "b": ["b"]}


def test_a_router_that_says_nothing_may_lead_anywhere() -> None:
    """Without labels the branch lists every node and the end, and says it is not exhaustive."""
    ir = workflow_ir(unread_router())
    (found,) = ir["branches"]
    assert (found["id"], found["exhaustive"]) == ("a:condition", False)
    assert sorted(outcomes_of(ir, "a:condition")) == [END, "a", "b", "c"]


def test_join_waits_for_all() -> None:
    """A waiting edge is a join, whatever the order its sources were named in."""
    ir = workflow_ir(join())
    assert ir["joins"] == [{"target": "z", "sources": ["x", "y"], "need": None}]
    assert ["z", END] in ir["edges"]


def test_cycles_are_kept() -> None:
    """Loops stay cycles, a node that repeats itself too; two routers are two branches."""
    workflow = Workflow.from_json(workflow_ir(loop()))
    assert [one.header for one in workflow.loops] == ["critic", "draft"]
    assert [one.id for one in workflow.branches] == ["critic:again", "critic:route"]


@pytest.mark.parametrize("build", [send_listed, send_unlisted])
def test_send_marks_its_targets_dynamic(build: Callable[[], Any]) -> None:
    """A node started by Send may run any number of times; others may not."""
    nodes = nodes_of(workflow_ir(build()))
    assert {name for name, node in nodes.items() if node["dynamic"]} == {"work"}


def test_command_destinations_are_a_branch() -> None:
    """``Command[Literal[...]]`` and ``destinations`` list the outcomes."""
    expected = {"b": ["b"], END: [END]}
    assert outcomes_of(workflow_ir(command()), "a:goto") == expected
    assert outcomes_of(workflow_ir(command_destinations()), "a:goto") == expected


def test_command_without_annotation_is_seen() -> None:
    """A jump that is not annotated gives an open branch instead of a missing edge."""
    ir = workflow_ir(command_unread())
    (found,) = ir["branches"]
    assert (found["id"], found["exhaustive"]) == ("a:goto", False)
    assert set(nodes_of(ir)) == {"a", "b"}


def test_subgraphs_are_nested() -> None:
    """A sub-graph is a workflow of its own; its call sites and branches carry the path to it."""
    ir = workflow_ir(subgraph())
    nodes = nodes_of(ir)
    assert nodes["mid"]["kind"] == nodes["mid|second"]["kind"] == "subgraph"
    assert nodes["mid"]["subgraph"]["name"] == "inner"
    assert [site["id"] for site in nodes["mid|second|deepest"]["call_sites"]] == [
        "mid|second|deepest#0"
    ]
    assert nodes["mid"]["subgraph"]["branches"][0]["id"] == "mid|first:tools_free"
    # Two edges lead to the sub-graph, and none is lost.
    assert [edge for edge in ir["edges"] if edge[1] == "mid"] == [
        ["__start__", "mid"],
        ["before", "mid"],
    ]


def test_a_graph_that_calls_itself_is_read_once() -> None:
    """Recursion ends: the inner mention is code."""
    assert nodes_of(workflow_ir(itself()))["again"]["kind"] == "code"


def test_react_agent_is_a_loop_of_model_and_tools() -> None:
    """Hand-made or prebuilt, an agent needs no loop bound and no list of tool sets."""
    for build in (react, prebuilt_react):
        ir = workflow_ir(build())
        nodes = nodes_of(ir)
        assert {name: node["kind"] for name, node in nodes.items()} == {
            "agent": "llm",
            "tools": "tool",
        }
        assert [one.header for one in Workflow.from_json(ir).loops] == ["agent"]
    assert nodes_of(workflow_ir(react()))["tools"]["expected_delay_s"] == 1.0


def test_paths_without_an_end_get_one() -> None:
    """A dead end and a cycle without exit lead to END, as LangGraph's limit does."""
    ir = workflow_ir(dead_ends())
    assert [edge for edge in ir["edges"] if edge[1] == END] == [
        ["b", END],
        ["round", END],
        ["spin", END],
    ]


def test_unreachable_nodes_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """What nothing leads to is dropped with a warning, and joins on it with it."""
    graph = StateGraph(State)
    for name in ("a", "ghost", "after"):
        graph.add_node(name, code)
    graph.add_edge(START, "a")
    graph.add_edge(["a", "ghost"], "after")
    with caplog.at_level(logging.WARNING):
        ir = workflow_ir(graph.compile())
    assert list(nodes_of(ir)) == ["a"]
    assert ir["joins"] == []
    assert "leaves out nodes" in caplog.text
    Workflow.from_json(ir)


def test_node_options_of_langgraph_are_no_obstacle() -> None:
    """Metadata, retry policy, deferral and error handlers: all accepted, handlers not listed."""
    graph = StateGraph(State)
    graph.add_node("a", code, metadata={"k": 1}, retry_policy=RetryPolicy())
    graph.add_node("b", code, defer=True, error_handler=lambda state, error: {})
    graph.add_edge(START, "a")
    graph.add_edge("a", "b")
    assert list(nodes_of(workflow_ir(graph.compile()))) == ["a", "b"]


class Agent:
    def __init__(self) -> None:
        self.deps = types.SimpleNamespace(chat=CHAT)

    def __call__(self, state: State) -> dict[str, Any]:
        return {"log": [self.deps.chat.invoke("x").text]}

    def method(self, state: State) -> dict[str, Any]:
        return self(state)

    def idle(self, state: State) -> dict[str, Any]:
        return {}


MODELS = {"fast": CHAT}
CLIENT = openai.AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:1/v1")
chat = CHAT  # an unrelated global with the name of an attribute


def helper() -> str:
    return CHAT.invoke("x").text


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def by_client() -> Callable[..., Any]:
    async def node(state: State) -> dict[str, Any]:
        await CLIENT.chat.completions.create(model="m", messages=[])
        return {}

    return node


def by_attribute_name_only(state: Any) -> dict[str, Any]:
    return {"x": state.chat}


@pytest.mark.parametrize(
    ("node", "kind"),
    [
        (asks, "llm"),
        ((lambda model: lambda state: {"log": [model.invoke("x").text]})(CHAT), "llm"),
        (Agent(), "llm"),
        (Agent().method, "llm"),
        (functools.partial(lambda model, state: {}, CHAT.invoke), "llm"),
        (lambda state: {"log": [helper()]}, "llm"),
        (logged(asks), "llm"),
        (lambda state: {"log": [MODELS["fast"].invoke("x").text]}, "llm"),
        (by_client(), "llm"),
        (ChatPromptTemplate.from_template("{x}") | CHAT, "llm"),
        (lambda state: FakeListChatModel(responses=["x"]).invoke("x"), "llm"),
        (code, "code"),
        (by_attribute_name_only, "code"),
    ],
)
def test_nodes_that_reach_a_model_are_found(node: Any, kind: str) -> None:
    """Globals, closures, attributes, helpers, chains and clients are followed; names are not."""
    graph = StateGraph(State)
    graph.add_node("n", node)
    graph.add_edge(START, "n")
    assert nodes_of(workflow_ir(graph.compile()))["n"]["kind"] == kind


def test_declarations_refine_without_wrapping() -> None:
    """Decorators return the function itself, sync or async, and win over inspection."""

    async def plain(state: State) -> dict[str, Any]:
        return {}

    declared = llm_call(static_prefix="You are", expected_output_tokens=8, reads=["b", "a"])(plain)
    declared = llm_call(model="big", writes=("x",))(declared)
    assert declared is plain
    search = tool_call(expected_latency_s=2)(lambda state: {"log": [CHAT.invoke("x").text]})
    graph = StateGraph(State)
    graph.add_node("two", plain)
    graph.add_node("search", search)
    graph.add_edge(START, "two")
    graph.add_edge("two", "search")
    ir = workflow_ir(graph.compile())
    nodes = nodes_of(ir)
    assert (nodes["search"]["kind"], nodes["search"]["expected_delay_s"]) == ("tool", 2.0)
    first, second = nodes["two"]["call_sites"]
    # The topmost decorator is the first call.
    assert (first["id"], first["model"], first["writes"]) == ("two#0", "big", ["x"])
    assert (second["id"], second["reads"]) == ("two#1", ["a", "b"])
    assert (second["expected_output_tokens"], len(second["static_prefix_hash"])) == (8.0, 16)
    assert "You are" not in str(ir)
    assert Workflow.from_json(ir).to_json() == ir


def declared_branch(outcomes: list[Any]) -> Any:
    @branch(outcomes=outcomes)
    def route(state: State) -> Any:
        return ["legal", "market"]

    graph = chain_of("a")
    for name in ("quick", "legal", "market"):
        graph.add_node(name, code)
    graph.add_conditional_edges("a", route, ["quick", "legal", "market"])
    return graph.compile()


def test_declared_outcomes_are_sets() -> None:
    """Nodes taken together are one outcome."""
    ir = workflow_ir(declared_branch([{"quick"}, {"market", "legal"}]))
    assert outcomes_of(ir, "a:route") == {"quick": ["quick"], "legal+market": ["legal", "market"]}


def test_wrong_declarations_are_named() -> None:
    """An outcome the router does not have, and numbers that cannot be, are refused at once."""
    with pytest.raises(ValueError, match=r"'a:route' declares the outcome 'slow'.*legal"):
        workflow_ir(declared_branch(["slow"]))
    with pytest.raises(ValueError, match="at least one outcome"):
        branch(outcomes=[])
    with pytest.raises(ValueError, match="expected_output_tokens=-1"):
        llm_call(expected_output_tokens=-1)
    with pytest.raises(ValueError, match="expected_latency_s=nan"):
        tool_call(expected_latency_s=float("nan"))


def test_name_is_given_or_the_graphs_own() -> None:
    """The name is no part of the content hash."""
    graph = subgraph()
    own, given = workflow_ir(graph), workflow_ir(graph, "other")
    assert (own["name"], given["name"]) == ("outer", "other")
    assert workflow_ir(chain_of("a").compile())["name"] == "workflow"
    assert content_hash(own) == content_hash(given)


def test_what_is_not_a_compiled_graph_is_refused() -> None:
    """The error says what it is and what to do."""

    @entrypoint()
    def functional(x: int) -> int:
        return x

    with pytest.raises(TypeError, match=r"StateGraph is not a compiled LangGraph; call .compile"):
        workflow_ir(chain_of("a"))
    with pytest.raises(TypeError, match="functional API"):
        workflow_ir(functional)
    with pytest.raises(TypeError, match="int is not"):
        workflow_ir(3)


def test_checkpointers_do_not_change_the_graph() -> None:
    """The structure is the same with and without persistence."""
    assert workflow_ir(chain_of("a").compile(checkpointer=InMemorySaver())) == workflow_ir(
        chain_of("a").compile()
    )
