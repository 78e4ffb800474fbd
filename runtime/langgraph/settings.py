"""What a caller may say about one run, as a LangGraph config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["run", "settings_of"]

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
        Priority class, for example ``"interactive"``.
    run_id
        Unique id of the run; made up if None.

    Raises
    ------
    ValueError
        If ``deadline_s`` is not a positive number.
    """
    if deadline_s is not None and not (math.isfinite(deadline_s) and deadline_s > 0):
        raise ValueError(f"deadline_s={deadline_s!r}: use seconds > 0")
    given = {
        "run_id": run_id,
        "session_id": session_id,
        "deadline_s": deadline_s,
        "priority": priority,
    }
    return {"configurable": {_PREFIX + k: v for k, v in given.items() if v is not None}}


def settings_of(configurable: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `run` put into a config's ``configurable``; None for what is absent."""
    return {name: configurable.get(_PREFIX + name) for name in _NAMES}
