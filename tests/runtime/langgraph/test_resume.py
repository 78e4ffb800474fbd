"""Runs that stop at a checkpoint and go on later: the same run, in any process."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command

import almanac
from runtime.langgraph.identity import identity_headers
from runtime.langgraph.instrument import instrument
from runtime.langgraph.settings import run

PROGRAM = Path(__file__).with_name("checkpoints.py")
spec = importlib.util.spec_from_file_location("checkpoints", PROGRAM)
assert spec is not None
assert spec.loader is not None
checkpoints = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checkpoints)

THREAD = {"configurable": {"thread_id": "t"}}


class Listener:
    """Stands where the reporter stands and keeps the events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)


def resumed_elsewhere(path: Path, how: str) -> list[list[str | None]]:
    done = subprocess.run(  # noqa: S603 our own interpreter and program
        [sys.executable, str(PROGRAM), str(path), "t", how],
        env={**os.environ, "PYTHONPATH": str(Path(almanac.__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_second_and_a_third_process_go_on_with_the_run(tmp_path: Path) -> None:
    """Run, node, step, visit, session, priority: each process goes on where the last one stopped.

    The branch that was done in the step that was left is not counted twice.
    """
    calls: list[dict[str, str]] = []
    file = tmp_path / "checkpoints.sqlite"
    saver = checkpoints.FileSaver(file)
    config = {"configurable": THREAD["configurable"] | run(priority="batch")["configurable"]}
    app = checkpoints.build(saver, calls)
    app.invoke({}, config)
    saver.connection.close()
    rows = checkpoints.shown(calls)
    rows += resumed_elsewhere(file, "invoke")
    rows += resumed_elsewhere(file, "ainvoke")
    assert sorted(row[1:4] for row in rows) == [
        ["ask", "0", "2"],  # interrupted here,
        ["ask", "0", "2"],  # and entered again for the same visit
        ["ask", "1", "4"],
        ["ask", "1", "4"],
        ["side", "0", "2"],
        ["side", "1", "4"],
        ["work", "0", "1"],
        ["work", "1", "3"],
    ]
    assert {(row[0], *row[4:]) for row in rows} == {
        (rows[0][0], app.almanac.workflow_hash, "batch", "t")
    }


def test_events_say_that_a_run_goes_on() -> None:
    """An interrupt ends a run for the time being; its second start has the same id and says so."""
    saver, listener = InMemorySaver(), Listener()
    for answer in ({}, Command(resume="yes"), Command(resume="yes")):
        app = checkpoints.build(saver, [])
        app.almanac.reporter = listener
        app.invoke(answer, THREAD)
    kept = [
        {k: v for k, v in event.items() if k in ("type", "resumed", "status", "visit")}
        for event in listener.events
    ]
    assert kept == [
        {"type": "run_start"},
        {"type": "run_end", "status": "interrupted"},
        {"type": "run_start", "resumed": True},
        {"type": "branch", "visit": 0},
        {"type": "run_end", "status": "interrupted"},
        {"type": "run_start", "resumed": True},
        {"type": "branch", "visit": 1},
        {"type": "run_end", "status": "ok"},
    ]
    assert len({event["run_id"] for event in listener.events}) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_run_that_broke_goes_on(asynchronous: bool) -> None:
    """After a failure the thread is taken up again with no input: the same run.

    The node that failed is entered for the same visit as before, what was done is not done again.
    """
    seen: list[tuple[str, str, str]] = []
    failures = iter([True, False])

    def node(name: str) -> Any:
        def function(state: Any) -> dict[str, Any]:
            given = identity_headers()
            seen.append((given["x-almanac-run-id"], name, given["x-almanac-visit"]))
            if name == "second" and next(failures):
                raise OSError("the process died here")
            return {}

        return function

    graph = StateGraph(checkpoints.State)
    graph.add_node("first", node("first"))
    graph.add_node("second", node("second"))
    graph.add_edge(START, "first")
    graph.add_edge("first", "second")
    app = instrument(graph.compile(checkpointer=InMemorySaver()))
    with pytest.raises(OSError, match="died here"):
        await app.ainvoke({}, THREAD)
    if asynchronous:
        await app.ainvoke(None, THREAD)
    else:
        await asyncio.to_thread(app.invoke, None, THREAD)
    assert [row[1:] for row in seen] == [("first", "0"), ("second", "0"), ("second", "0")]
    assert len({run_id for run_id, *_ in seen}) == 1


def test_what_does_not_go_on_is_a_run_of_its_own() -> None:
    """New input, an answer to a finished thread, an older checkpoint: new runs."""
    saver = InMemorySaver()
    calls: list[dict[str, str]] = []
    app = checkpoints.build(saver, calls)

    def runs() -> set[str]:
        found = {one["x-almanac-run-id"] for one in calls}
        calls.clear()
        return found

    app.invoke({}, THREAD)
    (first,) = runs()
    app.invoke({}, THREAD)
    (second,) = runs()
    assert second != first
    older = list(app.get_state_history(THREAD))[-2]
    app.invoke(None, older.config)
    (fork,) = runs()
    assert fork not in (first, second)
    app.invoke(Command(resume="yes"), THREAD)
    app.invoke(Command(resume="yes"), THREAD)
    runs()
    app.invoke(Command(goto="work"), THREAD)
    assert runs().isdisjoint({first, second, fork})


def test_a_given_id_wins_over_the_saved_one() -> None:
    """Whoever names the run on resuming decides."""
    saver = InMemorySaver()
    calls: list[dict[str, str]] = []
    app = checkpoints.build(saver, calls)
    app.invoke({}, THREAD)
    app.invoke(
        Command(resume="yes"),
        {"configurable": THREAD["configurable"] | run(run_id="mine")["configurable"]},
    )
    assert calls[-1]["x-almanac-run-id"] == "mine"


def test_a_saver_that_cannot_be_read_gives_a_new_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trouble with reading the identity never becomes trouble of the application."""
    saver = InMemorySaver()
    calls: list[dict[str, str]] = []
    app = checkpoints.build(saver, calls)
    app.invoke({}, THREAD)
    first = calls[0]["x-almanac-run-id"]

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("disk")

    monkeypatch.setattr(type(app), "get_state_history", broken, raising=False)
    app.invoke(Command(resume="yes"), THREAD)
    assert calls[-1]["x-almanac-run-id"] != first


def test_metadata_of_the_caller_is_kept() -> None:
    """What the caller writes into checkpoints stays beside the run's id."""
    saver = InMemorySaver()
    app = checkpoints.build(saver, [])
    app.invoke({}, {**THREAD, "metadata": {"mine": 1}})
    assert app.get_state(THREAD).metadata["mine"] == 1
