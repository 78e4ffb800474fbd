"""What a checkpoint tells of the run that wrote it, so that a resumed run keeps its identity.

A run leaves its id, and what `runtime.langgraph.settings.run` declared, in the metadata of its
checkpoints. A graph that is invoked with None or a `Command` goes on where a thread stopped, in
this process or in another one: the same run, session and visits. Starting from an older checkpoint
of a thread is another run, and so is new input.

Visits are restored for the nodes of the graph itself, from the checkpoints that were kept (the
last 500 of the run at most: each is read with its state); in sub-graphs they begin at 0 again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.types import Command, StateSnapshot

from runtime.langgraph.settings import RUN_ID_KEY

__all__ = ["Resumption", "aresumption", "persists", "resumption"]

_log = logging.getLogger(__name__)

_MOST_CHECKPOINTS = 500

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """An unfinished run that goes on.

    Parameters
    ----------
    saved
        Metadata of its last checkpoint, with the run's id and settings.
    visits
        Node to the number of times the run has entered it and finished it.
    """

    saved: Mapping[str, Any]
    visits: Mapping[str, int]


def persists(graph: Any) -> bool:
    """Return whether a graph writes checkpoints by a saver of its own."""
    return isinstance(getattr(graph, "checkpointer", None), BaseCheckpointSaver)


def resumption(graph: Any, given: Any, *configs: Config | None) -> Resumption | None:
    """Return the run that an invocation goes on with, or None if it starts one.

    Parameters
    ----------
    graph
        Compiled graph.
    given
        Its input.
    configs
        LangChain configs, the later ones winning.

    Notes
    -----
    Never raises: a run under a new id is better than none.
    """
    if not _goes_on(graph, given, configs):
        return None
    try:
        latest = graph.get_state(configs[-1])
        history = list(graph.get_state_history(configs[-1], **_of_the_run(latest)))
    except Exception:  # noqa: BLE001 the application comes first
        _log.debug("no identity in the checkpoint", exc_info=True)
        return None
    return _resumption(latest, history)


async def aresumption(graph: Any, given: Any, *configs: Config | None) -> Resumption | None:
    """`resumption` for savers that are read asynchronously."""
    if not _goes_on(graph, given, configs):
        return None
    try:
        latest = await graph.aget_state(configs[-1])
        rows = graph.aget_state_history(configs[-1], **_of_the_run(latest))
        history = [one async for one in rows]
    except Exception:  # noqa: BLE001 as above
        _log.debug("no identity in the checkpoint", exc_info=True)
        return None
    return _resumption(latest, history)


def _goes_on(graph: Any, given: Any, configs: Iterable[Config | None]) -> bool:
    return (
        (given is None or isinstance(given, Command))
        and persists(graph)
        and not any((one or {}).get("configurable", {}).get("checkpoint_id") for one in configs)
    )


def _of_the_run(latest: StateSnapshot) -> dict[str, Any]:
    run_id = (latest.metadata or {}).get(RUN_ID_KEY, "")
    return {"filter": {RUN_ID_KEY: run_id}, "limit": _MOST_CHECKPOINTS}


def _resumption(latest: StateSnapshot, history: Iterable[StateSnapshot]) -> Resumption | None:
    saved: Mapping[str, Any] = dict(latest.metadata or {})
    if not latest.next or not saved.get(RUN_ID_KEY):
        return None
    visits: Counter[str] = Counter()
    for snapshot in history:
        if snapshot.config == latest.config:
            # Of the step that was left, what is done is not done again.
            visits.update(task.name for task in snapshot.tasks if task.result is not None)
        else:
            visits.update(snapshot.next)
    return Resumption(saved=saved, visits=visits)
