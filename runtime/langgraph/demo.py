"""The demo application "research": an ordinary LangGraph app whose every run follows a script.

::

    triage -> quick_answer -> END                                  (triage says "quick")
    triage -> outline -> search -> read ----+                      (triage says "deep")
                      -> market ------------+-> draft -> critic -> END     (critic says "accept")
                      -> legal -------------+     ^--------+               (critic says "revise")

Calls go through ``ChatOpenAI`` to whatever address `build` is given. The script fixes how long
prompts and answers are, what the answers begin with and how long the tool takes, so that the same
runs can be repeated under every policy; the mock vLLM server honours the two extra fields that
carry it (``mock_output_tokens``, ``mock_reply``) and counts a word as a token. The routers read the
answers' text, as in any agent.
"""

from __future__ import annotations

import asyncio
import hashlib
import operator
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, TypedDict

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from pydantic import SecretStr

from runtime.langgraph.declare import tool_call
from runtime.langgraph.identity import openai_client_kwargs
from runtime.langgraph.settings import run as run_config

__all__ = ["app", "build", "run_once", "script_from_tasks"]

_TOKEN_LIMIT = 1024
"""Least ``max_tokens`` of a request: the same for all calls, so that it tells nothing."""

Entry = Mapping[str, Any]


def _merge(old: dict[str, list[str]], new: dict[str, list[str]]) -> dict[str, list[str]]:
    return {**old, **{node: [*old.get(node, ()), *texts] for node, texts in new.items()}}


class State(TypedDict, total=False):
    """What the nodes share.

    ``script`` maps a node to its entries by visit; ``replies`` collects the answers of each node;
    ``conversation`` is what the writer has said and heard; ``timeline`` holds (node, visit,
    start_s, finish_s) on the process's monotonic clock.
    """

    run_id: str
    script: Mapping[str, Sequence[Entry]]
    replies: Annotated[dict[str, list[str]], _merge]
    conversation: list[BaseMessage]
    timeline: Annotated[list[tuple[str, int, float, float]], operator.add]


def build(
    base_url: str,
    *,
    script_dilation: float = 1.0,
    model: str = "llama-3.1-8b",
    api_key: str = "none",
    clients: Mapping[str, Any] | None = None,
) -> Any:
    """Return the compiled graph; pass it to `instrument` to give its runs an identity.

    Parameters
    ----------
    base_url
        OpenAI-compatible address, ``http://host:port/v1``.
    script_dilation
        How much faster than scripted the tool's delays pass, > 0.
    model, api_key
        Sent with every request.
    clients
        HTTP clients from `openai_client_kwargs`, which the caller closes with `aclose_clients`;
        None makes some that live as long as the graph.

    Raises
    ------
    ValueError
        If the dilation is not positive.
    """
    if not script_dilation > 0:
        raise ValueError(f"script_dilation={script_dilation!r}: use a number > 0")
    # One model and one connection pool for the whole process: making them is not cheap.
    chat = ChatOpenAI(
        base_url=base_url,
        model=model,
        api_key=SecretStr(api_key),
        temperature=0,
        streaming=True,
        max_retries=0,
        **(openai_client_kwargs() if clients is None else clients),
    )

    def asks(name: str) -> Any:
        async def node(state: State) -> dict[str, Any]:
            visit, entry = _entry(state, name)
            start_s = time.monotonic()
            await _pause(entry, script_dilation)
            answer = await _ask(chat, entry, _prompt(state["run_id"], name, visit, entry))
            return {
                "replies": {name: [answer]},
                "timeline": [(name, visit, start_s, time.monotonic())],
            }

        return node

    async def draft(state: State) -> dict[str, Any]:
        """Write, or write again with the critic's remarks; the conversation grows."""
        visit, entry = _entry(state, "draft")
        start_s = time.monotonic()
        await _pause(entry, script_dilation)
        said = state.get("conversation", [])
        remarks = (state["replies"].get("critic") or [""])[-1]
        prompt = _prompt(state["run_id"], "draft", visit, entry, said=said, remarks=remarks)
        answer = await _ask(chat, entry, prompt)
        return {
            "replies": {"draft": [answer]},
            "conversation": [*said, prompt[-1], AIMessage(answer)],
            "timeline": [("draft", visit, start_s, time.monotonic())],
        }

    @tool_call()
    async def search(state: State) -> dict[str, Any]:
        """Stand for a web search: takes its time, calls no model."""
        visit, entry = _entry(state, "search")
        start_s = time.monotonic()
        await _pause(entry, script_dilation)
        return {
            "replies": {"search": [""]},
            "timeline": [("search", visit, start_s, time.monotonic())],
        }

    def route_depth(state: State) -> Literal["quick", "deep"]:
        return "quick" if state["replies"]["triage"][-1].startswith("quick") else "deep"

    def route_critic(state: State) -> Literal["revise", "accept"]:
        return "revise" if state["replies"]["critic"][-1].startswith("revise") else "accept"

    graph = StateGraph(State)
    for name in ("triage", "quick_answer", "outline", "read", "market", "legal", "critic"):
        graph.add_node(name, asks(name))
    graph.add_node("search", search)
    graph.add_node("draft", draft)
    graph.add_edge(START, "triage")
    graph.add_conditional_edges("triage", route_depth, {"quick": "quick_answer", "deep": "outline"})
    graph.add_edge("quick_answer", END)
    for name in ("search", "market", "legal"):
        graph.add_edge("outline", name)
    graph.add_edge("search", "read")
    graph.add_edge(["read", "market", "legal"], "draft")
    graph.add_edge("draft", "critic")
    graph.add_conditional_edges("critic", route_critic, {"revise": "draft", "accept": END})
    return graph.compile(name="research")


def app() -> Any:
    """Return the graph for a gateway on this machine, for ``almanac ir`` and a first try."""
    return build("http://127.0.0.1:8000/v1")


def script_from_tasks(tasks: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the script that makes a run unfold like the given tasks.

    Parameters
    ----------
    tasks
        Mappings with ``node``, ``visit``, ``prompt_tokens``, ``static_tokens``,
        ``output_tokens``, ``delay_s`` (seconds) and ``outcomes`` ([branch, outcome] pairs); all
        but ``node`` may be absent.

    Returns
    -------
    dict
        Node to its entries in order of visit. The answer of a node that decides a branch begins
        with the outcome's id.
    """
    script: dict[str, list[dict[str, Any]]] = {}
    for task in sorted(tasks, key=lambda task: int(task.get("visit", 0))):
        outcomes = task.get("outcomes") or ()
        script.setdefault(str(task["node"]), []).append(
            {
                "prompt_tokens": int(task.get("prompt_tokens", 0)),
                "static_tokens": int(task.get("static_tokens", 0)),
                "output_tokens": int(task.get("output_tokens", 0)),
                "delay_s": float(task.get("delay_s", 0.0)),
                "text": str(outcomes[0][1]) if outcomes else "",
            }
        )
    return script


async def run_once(
    graph: Any, run: Mapping[str, Any], *, run_id: str, session_id: str | None
) -> dict[str, Any]:
    """Execute one run and say how long it took.

    Parameters
    ----------
    graph
        From `build`, instrumented or not.
    run
        A run with its ``tasks``, see `script_from_tasks`.

    Returns
    -------
    dict
        ``run_id``, ``start_s`` and ``finish_s`` (process's monotonic clock), ``latency_s``,
        ``timeline`` as (node, visit, start_s, finish_s), and the final ``state``.

    Raises
    ------
    ValueError
        If the run enters a node more often than the script foresees.
    """
    script = script_from_tasks(run["tasks"])
    config = {**run_config(run_id=run_id, session_id=session_id), "recursion_limit": 1_000}
    start_s = time.monotonic()
    state = await graph.ainvoke({"run_id": run_id, "script": script}, config)
    finish_s = time.monotonic()
    return {
        "run_id": run_id,
        "start_s": start_s,
        "finish_s": finish_s,
        "latency_s": finish_s - start_s,
        "timeline": state["timeline"],
        "state": state,
    }


def _entry(state: State, node: str) -> tuple[int, Entry]:
    visit = len(state.get("replies", {}).get(node, ()))
    entries = state["script"].get(node, ())
    if visit >= len(entries):
        raise ValueError(
            f"run {state['run_id']!r} enters node {node!r} for visit {visit}, but its script has "
            f"{len(entries)}; add an entry"
        )
    return visit, entries[visit]


async def _pause(entry: Entry, dilation: float) -> None:
    if entry["delay_s"] > 0:
        await asyncio.sleep(entry["delay_s"] / dilation)


async def _ask(chat: ChatOpenAI, entry: Entry, prompt: list[BaseMessage]) -> str:
    tokens = max(1, entry["output_tokens"])
    mock: dict[str, Any] = {"mock_output_tokens": tokens}
    if entry["text"]:
        mock["mock_reply"] = entry["text"]
    answer = await chat.ainvoke(
        prompt,
        # ``max_tokens`` here, because ChatOpenAI would rename its own parameter.
        extra_body={"max_tokens": max(_TOKEN_LIMIT, tokens), "vllm_xargs": mock},
    )
    return answer.text


def _prompt(
    run_id: str,
    node: str,
    visit: int,
    entry: Entry,
    *,
    said: Sequence[BaseMessage] = (),
    remarks: str = "",
) -> list[BaseMessage]:
    """Return a prompt of the scripted length: fixed instructions, what was said, new words."""
    total = max(1, entry["prompt_tokens"])
    static = min(entry["static_tokens"], total - 1)
    new = max(1, total - static - sum(len(message.text.split()) for message in said))
    words = [*remarks.split(), *_words(f"{run_id}/{node}/{visit}", new)][:new]
    prompt: list[BaseMessage] = [SystemMessage(_instructions(node, static))] if static else []
    return [*prompt, *said, HumanMessage(" ".join(words))]


@lru_cache(maxsize=1024)
def _instructions(node: str, tokens: int) -> str:
    return " ".join(_words(f"instructions of {node}", tokens))


def _words(seed: str, count: int) -> list[str]:
    stem = hashlib.sha256(seed.encode()).hexdigest()[:6]
    return [f"{stem}{position:x}" for position in range(count)]
