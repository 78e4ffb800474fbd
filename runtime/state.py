"""What a gateway has learned, kept in a file, so that a restart costs nothing but the restart.

In the file: dispatch table, registered workflows, latency rows and length corrections, bytes per
token, the runs in progress, and which prompt prefixes each endpoint holds. It holds hashes and
counts, never text and never keys.

House rules
-----------
* The file is replaced as a whole, so a crash leaves the one before.
* A file that cannot be read costs one warning and a fresh start, never a refusal to serve.
* What does not fit any more (an endpoint that is gone, a row that was edited, a table of another
  fleet) is left out, part by part.
* An endpoint whose process started anew meanwhile, or does not tell, starts with a cold cache.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planner.dispatch.table import DispatchTable
from planner.domain.errors import InvalidInput, PlannerError
from planner.domain.files import atomic_write, read_json
from planner.domain.latency import LatencyRow
from planner.domain.workflow import Workflow
from runtime.control import Control
from runtime.runs import Run

__all__ = ["STATE_SCHEMA", "Restored", "StateFile", "restore", "snapshot"]

_log = logging.getLogger(__name__)

STATE_SCHEMA = "almanac.state/1"
_MOST_ITEMS = 10_000
"""Prefix items kept per endpoint, the most recently used ones."""
_MOST_RUNS = 10_000
_RUN_FIELDS = (
    "run_id", "workflow", "workflow_hash", "session_id", "predicted_s", "forecast_s", "calls",
    "tenant", "parent_id", "source", "node", "visit",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What came back.

    Parameters
    ----------
    rows, runs, workflows
        How many.
    warm, cold
        Endpoints whose cache is believed in again, and those that start without.
    table
        Version of the dispatch table, or an empty string.
    """

    rows: int = 0
    runs: int = 0
    workflows: int = 0
    warm: tuple[str, ...] = ()
    cold: tuple[str, ...] = ()
    table: str = ""


def snapshot(control: Control, *, wall_s: float) -> dict[str, Any]:
    """Return the state of a gateway, JSON-ready.

    Parameters
    ----------
    wall_s
        Seconds since the epoch.
    """
    router, now_s = control.router, control.clock.now_s()
    endpoints = [
        {
            "id": state.endpoint.id,
            "url": state.endpoint.url,
            "given": asdict(state.endpoint.latency),
            "row": asdict(state.latency),
            "started_s": control.scraper.started_s(state.index),
            "prefix": state.prefix.newest(_MOST_ITEMS),
        }
        for state in router.view.states
        if state.index not in control.absent
    ]
    table = control.table
    return {
        "schema": STATE_SCHEMA,
        "saved_s": wall_s,
        "endpoints": endpoints,
        "lengths": router.lengths.to_json() if router.lengths else [],
        "scale": control.scale.to_json(),
        "workflows": [workflow.to_json() for workflow in control.workflows],
        "table": None if table is None else table.to_json(),
        "runs": [
            {
                **{name: getattr(run, name) for name in _RUN_FIELDS},
                "age_s": now_s - run.arrival_s,
                "family_age_s": now_s - run.since_s,
                "silent_s": 0.0 if run.open_calls else now_s - run.last_s,
            }
            for run in control.runs.active()[-_MOST_RUNS:]
        ],
    }


def restore(control: Control, document: Any, *, wall_s: float, with_table: bool = True) -> Restored:
    """Take up what `snapshot` returned, as far as it still fits.

    Parameters
    ----------
    control
        Fresh; its endpoints have been scraped once.
    wall_s
        Seconds since the epoch.
    with_table
        Whether the table is taken, too.

    Raises
    ------
    InvalidInput
        If the document is no state; what was restored by then stays.
    """
    if not isinstance(document, dict) or document.get("schema") != STATE_SCHEMA:
        raise InvalidInput(
            "not a state file of this version", where="state", remedy="delete the file"
        )
    try:
        for raw in document["workflows"]:
            control.add_workflow(Workflow.from_json(raw))
        rows, warm, cold = _restore_endpoints(control, document["endpoints"])
        if control.router.lengths is not None:
            control.router.lengths.restore(document["lengths"])
        control.scale.restore(document["scale"])
        down_s = max(0.0, wall_s - float(document["saved_s"])) * control.clock.dilation
        for raw in document["runs"]:
            control.lifecycle.resume(_run(raw, control.clock.now_s(), down_s))
        table = _restore_table(control, document["table"]) if with_table else ""
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(
            f"a part of the state cannot be read ({type(error).__name__}: {error!s:.200})",
            where="state",
            remedy="delete the file",
        ) from error
    return Restored(
        rows=rows,
        runs=len(document["runs"]),
        workflows=len(document["workflows"]),
        warm=tuple(warm),
        cold=tuple(cold),
        table=table,
    )


def _restore_endpoints(
    control: Control, saved: list[Mapping[str, Any]]
) -> tuple[int, list[str], list[str]]:
    by_id = {raw["id"]: raw for raw in saved}
    router = control.router
    rows, warm, cold = 0, [], []
    for state in router.view.states:
        endpoint = state.endpoint
        raw = by_id.get(endpoint.id)
        if raw is None or raw["url"] != endpoint.url:
            continue
        if router.learner is not None and raw["given"] == asdict(endpoint.latency):
            router.learner.restore(state.index, LatencyRow(**raw["row"]))
            rows += 1
        started_s = control.scraper.started_s(state.index)
        if started_s is not None and started_s == raw["started_s"]:
            state.prefix.restore((int(item), float(tokens)) for item, tokens in raw["prefix"])
            warm.append(str(endpoint.id))
        else:
            cold.append(str(endpoint.id))
    return rows, warm, cold


def _run(raw: Mapping[str, Any], now_s: float, down_s: float) -> Run:
    run = Run(
        **{name: raw[name] for name in _RUN_FIELDS},
        arrival_s=now_s - down_s - float(raw["age_s"]),
        since_s=now_s - down_s - float(raw["family_age_s"]),
        # The time the gateway was away is nobody's silence.
        last_s=now_s - float(raw["silent_s"]),
    )
    run.admitted = run.calls > 0
    return run


def _restore_table(control: Control, raw: Any) -> str:
    if raw is None:
        return ""
    table = DispatchTable.from_json(raw)
    try:
        control.set_table(table)
    except InvalidInput:
        return ""  # the fleet is another one
    return table.version


class StateFile:
    """The file behind a gateway.

    Parameters
    ----------
    path
        It need not exist.
    control
        Whose state it is.
    wall
        Seconds since the epoch; replaced in tests.
    """

    def __init__(
        self, path: Path, control: Control, *, wall: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self._control = control
        self._wall = wall

    def load(self, *, table_made_s: float | None = None) -> Restored:
        """Restore what the file holds; nothing if there is none, or with one warning.

        Parameters
        ----------
        table_made_s
            When the table given at the start was made, seconds since the epoch: the newer table
            wins. None if none was given.
        """
        if not self.path.exists():
            return Restored()
        try:
            document = read_json(self.path, what="state file")
            saved_s = document.get("saved_s", 0.0) if isinstance(document, dict) else 0.0
            newer = table_made_s is None or table_made_s < float(saved_s)
            return restore(self._control, document, wall_s=self._wall(), with_table=newer)
        except (PlannerError, TypeError, ValueError, RecursionError) as error:
            _log.warning(
                "state not restored, starting fresh", extra={"path": str(self.path), "why": error}
            )
            return Restored()

    def save(self) -> None:
        """Write the state now.

        Raises
        ------
        InvalidInput
            If the file cannot be written.
        """
        _write(self.path, snapshot(self._control, wall_s=self._wall()))

    async def keep(self, every_s: float) -> None:
        """Write the state again and again; taken between two decisions, written beside them."""
        well = True
        while True:
            await asyncio.sleep(every_s)
            document = snapshot(self._control, wall_s=self._wall())
            try:
                await asyncio.to_thread(_write, self.path, document)
                well = True
            except (PlannerError, OSError) as error:
                if well:  # a full disk is told once
                    _log.error(
                        "state not written", extra={"path": str(self.path), "why": str(error)}
                    )
                well = False


def _write(path: Path, document: Mapping[str, Any]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(_pieces(document))


def _pieces(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the JSON text in small pieces, so that no encoding of one holds up the event loop."""
    for number, (name, value) in enumerate(document.items()):
        yield f"{',' if number else '{'}{json.dumps(name)}:"
        if isinstance(value, list) and value:
            for place, one in enumerate(value):
                yield f"{',' if place else '['}{json.dumps(one, separators=(',', ':'))}"
            yield "]"
        else:
            yield json.dumps(value, separators=(",", ":"))
    yield "}"
