"""Public logs as plain records for replay: agent sessions and arrivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.importers import agents, services
from models.tables import Dataset
from planner.domain.errors import InvalidInput

__all__ = ["AgentCall", "AgentSession", "Arrivals", "agent_sessions", "arrivals"]

_AGENTS: dict[str, tuple[str, Callable[[Path, int], Dataset]]] = {
    "claude_code_sessions": ("claude_code", agents.read_claude_code),
    "lmcache_agents": ("lmcache_agents", agents.read_lmcache),
    "miniswe_swebench_verified": ("miniswe", agents.read_miniswe),
}
_SERVICES: dict[str, tuple[str, Callable[[Path], Dataset]]] = {
    "azure_code": ("azure_llm_2023", lambda folder: services.read_azure(folder, "code")),
    "azure_conv": ("azure_llm_2023", lambda folder: services.read_azure(folder, "conv")),
    "mooncake_conversation": ("mooncake_fast25", services.read_mooncake),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentCall:
    """One call of a recorded agent session.

    Parameters
    ----------
    site
        Node or call site.
    prompt_tokens, output_tokens
        Lengths, >= 1.
    shared_prefix_tokens
        Leading prompt tokens in common with the previous call of the session, >= 0.
    gap_s
        Seconds between the end of the previous call and this one (tool run, and people's thinking
        time where people take part), >= 0; 0 for the first call and where the log has no times.
    next_action
        What the answer asked for (tool, command class, next speaker), or ``""``.
    """

    site: str
    prompt_tokens: int
    output_tokens: int
    shared_prefix_tokens: int
    gap_s: float
    next_action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSession:
    """A recorded session; sessions of one ``family`` may repeat parts of each other."""

    source: str
    session_id: str
    family: str
    calls: tuple[AgentCall, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Arrivals of a service, sorted; three arrays of equal length."""

    name: str
    time_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]


def agent_sessions(folder: Path) -> list[AgentSession]:
    """Return the sessions of one public agent dataset, sorted by id.

    Parameters
    ----------
    folder
        ``lmcache_agents``, ``miniswe_swebench_verified`` or ``claude_code_sessions``, recognised
        by name. Sources are called ``lmcache_agents/<agent>``, ``miniswe``, ``claude_code``.

    Raises
    ------
    InvalidInput
        If the folder is not one of these or its table is broken.

    Notes
    -----
    Claude Code logs the client's own delay. The other two log only the time between calls, so
    ``gap_s`` is that time less an estimate of the generation: a first-token time and a decode
    speed read from the fast edge of the log (`models.importers.agents.answer_seconds`). Rows
    without usable token counts are left out.
    """
    if folder.name not in _AGENTS:
        raise InvalidInput(
            f"{folder.name!r} is not an agent dataset",
            where=str(folder),
            remedy=f"give one of {', '.join(sorted(_AGENTS))}",
        )
    source, read = _AGENTS[folder.name]
    table = read(folder, 0).calls
    if table is None:  # pragma: no cover - agent readers always give calls
        return []
    return [
        _session(source, str(identity), rows)
        for identity, rows in table.groupby("session_id", sort=True)
    ]


def _session(source: str, identity: str, rows: pd.DataFrame) -> AgentSession:
    gaps = rows["delay_s"].shift(1).fillna(0.0)
    shared = rows["shared_prefix_tokens"].fillna(0.0)
    if source == "lmcache_agents":
        source = f"{source}/{rows['kind'].iloc[0]}"
    calls = zip(
        rows["site"], rows["prompt_tokens"], rows["output_tokens"], shared, gaps, rows["action"],
        strict=True,
    )  # fmt: skip
    return AgentSession(
        source=source,
        session_id=identity,
        family=str(rows["family"].iloc[0]),
        calls=tuple(
            AgentCall(
                site=str(site),
                prompt_tokens=int(prompt),
                output_tokens=int(output),
                shared_prefix_tokens=int(prefix) if position else 0,
                gap_s=float(gap) if position else 0.0,
                next_action=str(action),
            )
            for position, (site, prompt, output, prefix, gap, action) in enumerate(calls)
        ),
    )


def arrivals(folder: Path, name: str) -> Arrivals:
    """Return the arrivals of a service.

    Parameters
    ----------
    folder
        The folder of the dataset, or the one that holds all datasets.
    name
        ``azure_code``, ``azure_conv`` or ``mooncake_conversation``.

    Raises
    ------
    InvalidInput
        If the name is unknown or the file is missing or broken.
    """
    if name not in _SERVICES:
        raise InvalidInput(
            f"{name!r} is not a known arrival trace",
            where="arrivals",
            remedy=f"use one of {', '.join(sorted(_SERVICES))}",
        )
    home, read = _SERVICES[name]
    rows = read(folder if folder.name == home else folder / home).arrivals
    if rows is None or rows.empty:
        raise InvalidInput("no usable row", where=str(folder), remedy="fetch the dataset again")
    return Arrivals(
        name=name,
        time_s=rows["time_s"].to_numpy(float) - float(rows["time_s"].iloc[0]),
        prompt_tokens=rows["prompt_tokens"].to_numpy(np.int64),
        output_tokens=rows["output_tokens"].to_numpy(np.int64),
    )
