"""The demo application follows its script, through real HTTP."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from runtime.langgraph.demo import build, run_once, script_from_tasks
from runtime.langgraph.identity import aclose_clients, openai_client_kwargs
from runtime.langgraph.instrument import instrument

LENGTHS = {"prompt_tokens": 40, "static_tokens": 12, "output_tokens": 9}


def task(node: str, visit: int = 0, outcome: str | None = None, **changes: Any) -> dict[str, Any]:
    branch = {"triage": "triage:route_depth", "critic": "critic:route_critic"}.get(node, "")
    outcomes = [[branch, outcome]] if outcome else []
    return {"node": node, "visit": visit, **LENGTHS, "outcomes": outcomes, **changes}


QUICK = [task("triage", outcome="quick"), task("quick_answer", output_tokens=2)]
DEEP = [
    task("triage", outcome="deep"),
    task("outline"),
    task("search", delay_s=0.5),
    task("market"),
    task("legal"),
    task("read"),
    task("draft"),
    task("critic", outcome="revise"),
    task("draft", 1, prompt_tokens=90),
    task("critic", 1, outcome="accept"),
]


def words(call: tuple[dict[str, str], dict[str, Any]]) -> int:
    return sum(len(message["content"].split()) for message in call[1]["messages"])


@pytest_asyncio.fixture
async def app(stub: Any) -> AsyncIterator[Any]:
    """Give the application on the stub; the tool's delays pass at once."""
    clients = openai_client_kwargs()
    yield build(f"{stub.url}/v1", script_dilation=1e6, clients=clients)
    await aclose_clients(clients)


async def test_quick_run(stub: Any, app: Any) -> None:
    """Triage says quick: two calls, with the identity of the run."""
    app = instrument(app, gateway=stub.url)
    done = await run_once(app, {"tasks": QUICK}, run_id="r1", session_id="s1")
    await app.almanac.aclose()
    assert stub.headers("x-almanac-site") == ["triage#0", "quick_answer#0"]
    assert set(stub.headers("x-almanac-run-id")) == {"r1"}
    assert set(stub.headers("x-session-id")) == {"s1"}
    assert [row[:2] for row in done["timeline"]] == [("triage", 0), ("quick_answer", 0)]
    assert done["start_s"] <= done["timeline"][0][2] <= done["finish_s"]
    assert len(done["state"]["replies"]["quick_answer"][0].split()) == 2
    choices = [(e["branch"], e["outcome"]) for e in stub.events if e["type"] == "branch"]
    assert choices == [("triage:route_depth", "quick")]


async def test_deep_run_with_a_revision(stub: Any, app: Any) -> None:
    """Fan-out, tool, join and loop as scripted: node and visit of each call, and prompt lengths."""
    done = await run_once(app, {"tasks": DEEP}, run_id="r2", session_id=None)
    visited = [(node, visit) for node, visit, *_ in done["timeline"]]
    assert sorted(visited) == sorted((t["node"], t["visit"]) for t in DEEP)
    assert visited[-4:] == [("draft", 0), ("critic", 0), ("draft", 1), ("critic", 1)]
    assert visited.index(("search", 0)) < visited.index(("read", 0))
    assert sorted(map(words, stub.calls)) == [40] * 8 + [90]
    body = stub.calls[0][1]
    assert (body["max_tokens"], body["temperature"], body["stream"]) == (1024, 0, True)
    assert body["vllm_xargs"] == {"mock_output_tokens": 9, "mock_reply": "deep"}


async def test_a_revision_continues_the_conversation(stub: Any, app: Any) -> None:
    """The second draft's prompt begins with all of the first one and its answer."""
    await run_once(app, {"tasks": DEEP}, run_id="r", session_id=None)
    first, second = (
        body["messages"] for headers, body in stub.calls if headers["x-almanac-node"] == "draft"
    )
    assert second[: len(first)] == first
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert second[-1]["content"].startswith("revise")


async def test_prompts_repeat_and_differ_where_they_should(stub: Any, app: Any) -> None:
    """Instructions are those of the node; the rest depends on run, node and visit, nothing else."""
    for run_id in ("a", "a", "b"):
        await run_once(app, {"tasks": QUICK}, run_id=run_id, session_id=None)
    bodies = [body["messages"] for _, body in stub.calls]
    assert bodies[0:2] == bodies[2:4]
    assert bodies[0][0] == bodies[4][0]
    assert bodies[0][1] != bodies[4][1]


async def test_a_script_that_is_too_short_is_named(app: Any) -> None:
    """A run that leaves its script stops with the node and the visit."""
    tasks = [t for t in DEEP if t["visit"] == 0]
    with pytest.raises(ValueError, match=r"enters node 'draft' for visit 1.*has 1"):
        await run_once(app, {"tasks": tasks}, run_id="r", session_id=None)
    with pytest.raises(ValueError, match="script_dilation=0"):
        build("http://127.0.0.1:1/v1", script_dilation=0)


def test_script_from_tasks() -> None:
    """Entries are in order of visit; the outcome becomes the answer's first word."""
    script = script_from_tasks([task("draft", 1, output_tokens=5), task("draft"), QUICK[0]])
    assert [entry["output_tokens"] for entry in script["draft"]] == [9, 5]
    assert script["triage"][0]["text"] == "quick"
    assert script_from_tasks([{"node": "x"}])["x"][0]["delay_s"] == 0.0
