"""What went wrong in an earlier annotation SDK for agent graphs, each as a promise of ours.

`PROMISES` names the test that keeps each one; those without a better place are below.
"""

import ast
import asyncio
import operator
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

import almanac
from planner.domain.workflow import Workflow
from runtime.langgraph.declare import llm_call
from runtime.langgraph.identity import aclose_clients, identity_headers, openai_client_kwargs
from runtime.langgraph.instrument import instrument
from runtime.langgraph.ir import walk, workflow_ir

PROMISES = {
    "a node without a config parameter runs": (
        "test_identity::test_parallel_sync_nodes_without_thread_id"
    ),
    "a chat model in a global sends the headers": (
        "test_defects::test_a_chat_model_in_a_global_sends_the_headers"
    ),
    "async nodes run": "test_identity::test_parallel_async_nodes",
    "parallel branches need no thread_id": (
        "test_identity::test_parallel_sync_nodes_without_thread_id"
    ),
    "concurrent runs with one thread_id do not mix": (
        "test_identity::test_concurrent_runs_with_the_same_thread_id_do_not_mix"
    ),
    "a sub-graph keeps its parent's run, and its names are those of the graph": (
        "test_identity::test_subgraphs_keep_the_run_of_their_parent"
    ),
    "a sub-graph keeps all its edges and branches": "test_ir::test_subgraphs_are_nested",
    "add_edge(START, x) starts a run, and none is stale": (
        "test_defects::test_no_run_leaves_an_identity_behind"
    ),
    "wait-for-all joins are read": "test_ir::test_join_waits_for_all",
    "ToolNode is a tool": "test_ir::test_react_agent_is_a_loop_of_model_and_tools",
    "metadata, retry policy and defer are accepted": (
        "test_ir::test_node_options_of_langgraph_are_no_obstacle"
    ),
    "a model in a closure is found": "test_ir::test_nodes_that_reach_a_model_are_found",
    "bind_tools, astream, batch send the headers": (
        "test_identity::test_chat_models_over_http"
    ),
    "Command(goto=) is in the graph": "test_ir::test_command_destinations_are_a_branch",
    "a Command without annotation is in the graph": (
        "test_ir::test_command_without_annotation_is_seen"
    ),
    "a router without annotation is in the graph": (
        "test_ir::test_a_router_that_says_nothing_may_lead_anywhere"
    ),
    "END may be a target": "test_ir::test_each_label_of_a_router_is_an_outcome",
    "a loop on itself reads nothing it writes": (
        "test_defects::test_no_data_dependency_is_made_up"
    ),
    "the same graph is the same twice": "test_ir::test_two_builds_give_the_same_graph",
    "the same graph is the same in every process": (
        "test_ir::test_content_hash_is_the_same_in_every_process"
    ),
    "parallel calls match the graph": (
        "test_identity::test_parallel_calls_of_one_node_match_the_graph"
    ),
    "a join makes no dependency on what nothing writes": (
        "test_defects::test_no_data_dependency_is_made_up"
    ),
    "a tool does not wait for its sibling": (
        "test_defects::test_sibling_tools_do_not_wait_for_each_other"
    ),
    "duplicate and partial tool calls run": (
        "test_defects::test_any_combination_of_tool_calls_runs"
    ),
    "loops and sub-agents are not unrolled": "test_defects::test_graphs_grow_with_the_program_only",
    "a clean install imports": "test_defects::test_only_what_is_installed_is_imported",
    "LangGraph's own limit on steps holds": "test_defects::test_the_limit_on_steps_holds",
    "nothing is kept after a run": "test_identity::test_nothing_is_kept_after_a_run",
    "run ids do not collide": "test_defects::test_no_run_leaves_an_identity_behind",
    "a resumed run keeps its identity in another process": (
        "test_resume::test_a_second_and_a_third_process_go_on_with_the_run"
    ),
    "several calls of a node have sites": "test_identity::test_retries_of_a_node_are_attempts",
    "retries are attempts, loops are visits": (
        "test_identity::test_loops_and_jumps_count_visits"
    ),
}  # fmt: skip

HERE = Path(__file__).parent


class State(TypedDict, total=False):
    x: int
    log: Annotated[list[str], operator.add]


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_has_its_test(promise: str) -> None:
    """The test that is named exists and says what it promises."""
    module, _, name = PROMISES[promise].partition("::")
    tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    (found,) = [node for node in tree.body if isinstance(node, kinds) and node.name == name]
    assert ast.get_docstring(found)


CHAT: Any = None


def asks_a_global(state: State) -> dict[str, Any]:
    CHAT.invoke("hi")
    return {}


async def test_a_chat_model_in_a_global_sends_the_headers(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that a declared node finds among its globals is not replaced, and is known."""
    clients = openai_client_kwargs()
    chat = ChatOpenAI(base_url=f"{stub.url}/v1", api_key="none", model="m", **clients)  # type: ignore[arg-type]
    monkeypatch.setattr(sys.modules[__name__], "CHAT", chat)
    graph = StateGraph(State)
    graph.add_node("n", llm_call()(asks_a_global))
    graph.add_edge(START, "n")
    app = instrument(graph.compile())
    await app.ainvoke({"x": 1})
    assert stub.headers("x-almanac-site") == ["n#0"]
    assert stub.headers("x-almanac-workflow") == [app.almanac.workflow_hash]
    assert CHAT is chat
    await aclose_clients(clients)


def test_no_run_leaves_an_identity_behind() -> None:
    """Each run started by an edge from START has an id of 128 bits of its own; outside is none."""
    seen: list[str] = []

    def node(state: State) -> dict[str, Any]:
        seen.append(identity_headers()["x-almanac-run-id"])
        return {}

    graph = StateGraph(State)
    graph.add_node("n", node)
    graph.add_edge(START, "n")
    app = instrument(graph.compile())
    for _ in range(50):
        app.invoke({"x": 1})
        assert identity_headers() == {}
    assert len(set(seen)) == 50
    assert {len(bytes.fromhex(one)) for one in seen} == {16}


def test_no_data_dependency_is_made_up() -> None:
    """Loops, branches and joins are structure: no call site reads or writes what is undeclared."""

    def route(state: State) -> Literal["a", "b", "c"]:
        return "a"

    def node(state: State) -> dict[str, Any]:
        return {"log": [FakeListChatModel(responses=["x"]).invoke("x").text]}

    graph = StateGraph(State)
    for name in ("a", "b", "c", "z"):
        graph.add_node(name, node)
    graph.add_edge(START, "a")
    graph.add_conditional_edges("a", route)
    graph.add_edge(["b", "c"], "z")
    sites = [site for _, one in walk(workflow_ir(graph.compile())) for site in one["call_sites"]]
    assert len(sites) == 4
    assert all(site["reads"] == site["writes"] == [] for site in sites)


async def test_sibling_tools_do_not_wait_for_each_other() -> None:
    """A tool that calls a model ends when it is done, whatever its sibling still does."""
    done: list[str] = []
    fast_is_done = asyncio.Event()

    @tool
    async def slow() -> str:
        """Wait for the other one."""
        await fast_is_done.wait()
        done.append("slow")
        return "slow"

    @tool
    async def fast() -> str:
        """Be quick."""
        done.append("fast")
        fast_is_done.set()
        return "fast"

    app = react([slow, fast], [["slow", "fast"]])
    await app.ainvoke({"messages": []})
    assert done == ["fast", "slow"]


def react(tools: list[Any], turns: list[list[str]]) -> Any:
    """Return an instrumented agent that calls the tools named, turn by turn, and then stops."""
    left = iter(turns)

    def agent(state: MessagesState) -> dict[str, Any]:
        names = next(left, [])
        calls = [{"name": name, "args": {}, "id": f"{n}"} for n, name in enumerate(names)]
        return {"messages": [AIMessage("done", tool_calls=calls)]}

    graph = StateGraph(MessagesState)
    graph.add_node("agent", agent)
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", tools_condition)
    graph.add_edge("tools", "agent")
    return instrument(graph.compile())


async def test_any_combination_of_tool_calls_runs() -> None:
    """A tool twice, one of two, none: nothing has to be listed beforehand."""

    @tool
    def one() -> str:
        """Answer."""
        return "1"

    @tool
    def other() -> str:
        """Answer, too."""
        return "2"

    app = react([one, other], [["one", "one"], ["other"], ["one", "other", "one"]])
    state = await app.ainvoke({"messages": []})
    answers = [message.content for message in state["messages"] if message.type == "tool"]
    assert answers == ["1", "1", "2", "1", "2", "1"]


@pytest.mark.parametrize("levels", [1, 3])
def test_graphs_grow_with_the_program_only(levels: int) -> None:
    """Agents with five tools, inside each other: two nodes a level, however long they may loop."""

    @tool
    def act() -> str:
        """Act."""
        return "done"

    tools = [act.model_copy(update={"name": f"act{n}"}) for n in range(5)]
    compiled: Any = None
    for _ in range(levels):
        graph = StateGraph(MessagesState)
        graph.add_node("agent", lambda state: {"messages": []})
        graph.add_node("tools", ToolNode(tools))
        graph.add_edge(START, "agent")
        graph.add_conditional_edges("agent", tools_condition)
        if compiled is not None:
            graph.add_node("helper", compiled)
            graph.add_edge("tools", "helper")
            graph.add_edge("helper", "agent")
        else:
            graph.add_edge("tools", "agent")
        compiled = graph.compile()
    ir = workflow_ir(compiled)
    assert len(list(walk(ir))) == 3 * levels - 1
    assert [loop.header for loop in Workflow.from_json(ir).loops] == ["agent"]


def test_the_limit_on_steps_holds() -> None:
    """The caller's recursion limit reaches the graph as it would without us."""
    from langgraph.errors import GraphRecursionError

    graph = StateGraph(State)
    graph.add_node("n", lambda state: {"x": 1})
    graph.add_edge(START, "n")
    graph.add_conditional_edges("n", lambda state: "n", {"n": "n", "end": END})
    with pytest.raises(GraphRecursionError, match="limit of 7"):
        instrument(graph.compile()).invoke({"x": 1}, {"recursion_limit": 7})


def test_only_what_is_installed_is_imported() -> None:
    """What the app-side package imports at its top is the standard library or a dependency."""
    root = Path(almanac.__file__).parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # LangGraph itself requires langchain-core.
    allowed = {"langgraph", "langchain_core", "httpx", "runtime"}
    declared = {one.split(">")[0] for one in project["dependencies"]}
    assert {"langgraph", "httpx"} <= declared
    for path in (root / "runtime" / "langgraph").glob("*.py"):
        if path.name == "demo.py":
            continue  # needs the extra of that name
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [one.name for one in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in names:
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or top in allowed, f"{path.name}: {name}"
