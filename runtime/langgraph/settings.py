"""What a caller may say about one run, as a LangGraph config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.langgraph.declare import positive_s

__all__ = ["RUN_ID_KEY", "keys_of", "run", "settings_of"]

RUN_ID_KEY = "almanac_run_id"
"""Of the run's id in configs and checkpoints."""
_PREFIX = "almanac_"
_NAMES = ("run_id", "session_id", "deadline_s", "priority")


def run(
    *,
    session_id: str | None = None,
    deadline_s: float | None = None,
    priority: str | int | None = None,
    run_id: str | None = None,
) -> dict[str, Any]:
    """Return a config for ``app.ainvoke(inputs, config=...)``; merge your own keys as you like.

    Parameters
    ----------
    session_id
        Id shared by runs with a common history; LangGraph's ``thread_id`` if None.
    deadline_s
        Hard limit, seconds after the start of the run, > 0.
    priority
        ``"critical"``, ``"interactive"``, ``"normal"``, ``"low"`` or ``"batch"``, or a number; a
        higher number is more urgent.
    run_id
        Unique id of the run; made up if None.

    Raises
    ------
    ValueError
        If ``deadline_s`` is not a positive number.
    """
    positive_s(deadline_s, "deadline_s")
    given = keys_of(run_id=run_id, session_id=session_id, deadline_s=deadline_s, priority=priority)
    return {"configurable": given}


def keys_of(**settings: Any) -> dict[str, Any]:
    """Return settings under their keys in configs and checkpoints, without those that are None."""
    return {_PREFIX + name: value for name, value in settings.items() if value is not None}


def settings_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `run` put into a config's ``configurable``; None for what is absent.

    LangGraph copies it to the metadata of the run's checkpoints, where it is found too.
    """
    return {name: saved.get(_PREFIX + name) for name in _NAMES}
