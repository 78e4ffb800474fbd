"""A graph that asks a human twice, and a checkpoint saver in a SQLite file, for two processes.

Run as a program it resumes a thread of such a file and prints what identity each call had.
"""

import asyncio
import json
import operator
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    get_checkpoint_metadata,
)
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, interrupt

from runtime.langgraph.identity import identity_headers
from runtime.langgraph.instrument import instrument

SCHEMA = """
create table if not exists checkpoints (
    thread text, ns text, id text, parent text, kind text, body blob, metadata text,
    primary key (thread, ns, id));
create table if not exists writes (
    thread text, ns text, id text, task text, position integer, channel text, kind text, body blob,
    primary key (thread, ns, id, task, position));
"""


class FileSaver(BaseCheckpointSaver[str]):
    """Checkpoints in one SQLite file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.connection = sqlite3.connect(path, check_same_thread=False)
        self.connection.executescript(SCHEMA)
        self.lock = threading.Lock()  # LangGraph writes on threads of its own

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return next(self.list(config, limit=1), None)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        assert config is not None
        place = config["configurable"]
        thread, ns = str(place["thread_id"]), place.get("checkpoint_ns", "")
        rows = self.connection.execute(
            "select id, parent, kind, body, metadata from checkpoints "
            "where thread = ? and ns = ? order by id desc",
            (thread, ns),
        ).fetchall()
        for key, parent, kind, body, text in rows:
            metadata = json.loads(text)
            if place.get("checkpoint_id") not in (None, key):
                continue
            if filter and not filter.items() <= metadata.items():
                continue
            if limit is not None:
                if limit == 0:
                    return
                limit -= 1
            yield CheckpointTuple(
                config=_at(thread, ns, key),
                checkpoint=self.serde.loads_typed((kind, body)),
                metadata=metadata,
                parent_config=None if parent is None else _at(thread, ns, parent),
                pending_writes=[
                    (task, channel, self.serde.loads_typed((write_kind, write)))
                    for task, channel, write_kind, write in self.connection.execute(
                        "select task, channel, kind, body from writes "
                        "where thread = ? and ns = ? and id = ? order by task, position",
                        (thread, ns, key),
                    )
                ],
            )

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        place = config["configurable"]
        thread, ns = str(place["thread_id"]), place.get("checkpoint_ns", "")
        kind, body = self.serde.dumps_typed(checkpoint)
        text = json.dumps(get_checkpoint_metadata(config, metadata))
        row = (thread, ns, checkpoint["id"], place.get("checkpoint_id"), kind, body, text)
        with self.lock, self.connection:
            self.connection.execute("replace into checkpoints values (?, ?, ?, ?, ?, ?, ?)", row)
        return _at(thread, ns, checkpoint["id"])

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        place = config["configurable"]
        thread, ns = str(place["thread_id"]), place.get("checkpoint_ns", "")
        with self.lock, self.connection:
            for position, (channel, value) in enumerate(writes):
                row = (thread, ns, place["checkpoint_id"], task_id, position, channel)
                self.connection.execute(
                    "replace into writes values (?, ?, ?, ?, ?, ?, ?, ?)",
                    (*row, *self.serde.dumps_typed(value)),
                )

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return self.get_tuple(config)

    async def alist(
        self, config: RunnableConfig | None, **options: Any
    ) -> AsyncIterator[CheckpointTuple]:
        for one in self.list(config, **options):
            yield one

    async def aput(self, *arguments: Any) -> RunnableConfig:
        return self.put(*arguments)

    async def aput_writes(self, *arguments: Any) -> None:
        self.put_writes(*arguments)


def _at(thread: str, ns: str, key: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ns, "checkpoint_id": key}}


class State(TypedDict, total=False):
    answers: Annotated[list[str], operator.add]


SHOWN = ("run-id", "node", "visit", "step", "workflow", "priority")


def build(saver: BaseCheckpointSaver[str] | None, calls: list[dict[str, str]]) -> Any:
    """Return the instrumented graph; each entry of a node appends its identity to ``calls``."""

    def call() -> None:
        calls.append(identity_headers())

    def work(state: State) -> dict[str, Any]:
        call()
        return {}

    def side(state: State) -> dict[str, Any]:
        call()
        return {}

    def ask(state: State) -> dict[str, Any]:
        call()
        return {"answers": [interrupt("go on?")]}

    def route(state: State) -> str:
        return "again" if len(state["answers"]) < 2 else "done"

    graph = StateGraph(State)
    for node in (work, side, ask):
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "work")
    graph.add_edge("work", "ask")
    graph.add_edge("work", "side")
    graph.add_conditional_edges("ask", route, {"again": "work", "done": END})
    return instrument(graph.compile(checkpointer=saver))


def shown(calls: list[dict[str, str]]) -> list[list[str | None]]:
    """Return what the tests look at: run, node, visit, step, workflow, priority, session."""
    names = [f"x-almanac-{name}" for name in SHOWN] + ["x-session-id"]
    return [[one.get(name) for name in names] for one in calls]


def main(path: str, thread: str, how: str) -> None:
    """Resume a thread once, by ``invoke`` or ``ainvoke``, and print the identities as JSON."""
    calls: list[dict[str, str]] = []
    app = build(FileSaver(Path(path)), calls)
    config: RunnableConfig = {"configurable": {"thread_id": thread}}
    if how == "invoke":
        app.invoke(Command(resume="yes"), config)
    else:
        asyncio.run(app.ainvoke(Command(resume="yes"), config))
    print(json.dumps(shown(calls)))  # noqa: T201 read by the test


if __name__ == "__main__":
    main(*sys.argv[1:])
