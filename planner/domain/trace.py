"""The trace format: what happened, one JSON object a line, never any prompt text.

The first line is a header ``{"schema": "almanac.trace/1", ...}``; each further line is one record
with a ``type``. Times are seconds on one clock that starts at 0 with the trace. The runtime and
the simulator write it, the estimators train on it, replay reads it.

======== =========================================================================
type     fields
======== =========================================================================
run      run_id, workflow, workflow_hash, session_id, tenant, arrival_s, finish_s,
         status (ok, failed, cancelled), predicted_s, calls
call     see `CallRecord`
tool     run_id, workflow_hash, node, start_s, finish_s, status
branch   run_id, workflow_hash, branch, outcome, visit, time_s
======== =========================================================================

Rules of the format
-------------------
* A reader ignores fields it does not know and takes defaults for fields with one, so a field may
  be added without a new version; a new meaning or unit needs one (``almanac.trace/2``).
* A row per attempt of a call, written when it ends; rows are in no particular order.
* ``status`` is ``ok``, ``failed`` or ``cancelled``; imports of logs without latencies write
  ``planned``: lengths are to be believed, times only say when the call was asked for.
* Prompt and answer text never appear. Ids are free strings; ``workflow_hash`` is the content hash
  of the graph where there is one.
* Foreign logs are read as if they were in this format: see ``models/importers/foreign.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from planner.domain.check import number
from planner.domain.errors import TraceFormatError
from planner.domain.files import atomic_write, read_jsonl
from planner.domain.records import record

__all__ = [
    "TRACE_SCHEMA",
    "BranchRecord",
    "CallRecord",
    "RunRecord",
    "ToolRecord",
    "TraceRecord",
    "load_trace",
    "record_from_json",
    "record_to_json",
    "save_trace",
]

TRACE_SCHEMA = "almanac.trace/1"


@record()
class RunRecord:
    """One run.

    ``predicted_s`` is the run latency forecast at arrival, ``deadline_s`` the hard limit after
    arrival; None if there is none.
    """

    run_id: str
    workflow: str
    workflow_hash: str
    arrival_s: float
    finish_s: float
    status: str = "ok"
    session_id: str | None = None
    tenant: str = "default"
    predicted_s: float | None = None
    calls: int = 0
    deadline_s: float | None = None


@record()
class CallRecord:
    """One attempt of a call.

    Parameters
    ----------
    ready_s, sent_s, first_token_s, finish_s
        When it became ready, was sent to an endpoint, gave its first token, ended. The last two
        are None if they never came.
    cached_tokens
        Prompt tokens found in the endpoint's cache, or None if not reported.
    predicted_finish_s
        The policy's forecast at dispatch, on the same clock, or None.
    predicted_output_tokens
        The length forecast (mean) used at dispatch, or None.
    in_flight
        Calls in flight on the endpoint when this one was sent, itself excluded.
    reason
        Decision label: ``policy``, ``plan``, ``prefix``, ``fallback`` and so on.
    decision_us
        Time the decision took, microseconds.
    prefill_endpoint
        Where the prompt was computed, if not on ``endpoint``, which then only decoded.
    runner_up, runner_up_finish_s, runner_up_excess_s
        The best other endpoint at dispatch, when the call was predicted to finish there, and by how
        many of the policy's seconds it scored worse; None where the policy does not score in
        seconds, or there was no other.
    """

    run_id: str
    call_id: str
    workflow_hash: str
    node: str
    site: str
    ready_s: float
    sent_s: float
    endpoint: str
    prompt_tokens: int
    output_tokens: int
    first_token_s: float | None = None
    finish_s: float | None = None
    cached_tokens: int | None = None
    max_tokens: int | None = None
    visit: int = 0
    attempt: int = 0
    status: str = "ok"
    policy: str = ""
    reason: str = ""
    table_version: str = ""
    predicted_finish_s: float | None = None
    predicted_output_tokens: float | None = None
    in_flight: int = 0
    decision_us: float | None = None
    prefill_endpoint: str | None = None
    runner_up: str | None = None
    runner_up_finish_s: float | None = None
    runner_up_excess_s: float | None = None


@record()
class ToolRecord:
    """One tool or code node execution."""

    run_id: str
    workflow_hash: str
    node: str
    start_s: float
    finish_s: float
    status: str = "ok"


@record()
class BranchRecord:
    """One outcome taken; ``visit`` counts earlier choices of the same branch in the run."""

    run_id: str
    workflow_hash: str
    branch: str
    outcome: str
    time_s: float
    visit: int = 0


TraceRecord = RunRecord | CallRecord | ToolRecord | BranchRecord

_TYPES: dict[str, type[RunRecord] | type[CallRecord] | type[ToolRecord] | type[BranchRecord]] = {
    "run": RunRecord,
    "call": CallRecord,
    "tool": ToolRecord,
    "branch": BranchRecord,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}


def record_to_json(record: TraceRecord) -> dict[str, Any]:
    """Return the JSON form of a record, its ``type`` first, times to the microsecond."""
    values = {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in asdict(record).items()
    }
    return {"type": _NAMES[type(record)], **values}


def record_from_json(raw: Any, where: str) -> TraceRecord:
    """Rebuild a record; fields this version does not know are ignored.

    Raises
    ------
    TraceFormatError
        If the type is unknown, a field is missing, a time is not a finite number or a count of
        tokens is below 0.
    """
    kind = _TYPES.get(raw.get("type", "")) if isinstance(raw, dict) else None
    if kind is None:
        raise TraceFormatError(
            f"record type {raw.get('type')!r}" if isinstance(raw, dict) else "not an object",
            where=where,
            remedy=f"use one of {', '.join(_TYPES)}",
        )
    known = {one.name: one.default for one in fields(kind)}
    values = {name: value for name, value in raw.items() if name in known}
    for name, value in values.items():
        if not name.endswith(("_s", "_tokens", "_us")) or (value is None and known[name] is None):
            continue
        least = 0.0 if name.endswith("_tokens") else -math.inf
        number(value, f"{where}: {name}", least=least, kind=TraceFormatError)
    try:
        return kind(**values)
    except TypeError as error:
        missing = [one for one in known if one in str(error)]
        raise TraceFormatError(
            f"field {', '.join(sorted(missing)) or error} is missing",
            where=where,
            remedy=f"a {raw['type']} record needs it",
        ) from error


def load_trace(
    path: Path, keep: Callable[[Mapping[str, Any]], bool] | None = None
) -> list[TraceRecord]:
    """Read a trace file.

    ``keep`` sees each row that is an object before it is checked; rows it refuses are left out.

    Raises
    ------
    InvalidInput, TraceFormatError
        If the file, its header or a row cannot be read.
    """
    records: list[TraceRecord] = []
    header_seen = False
    for line, raw in read_jsonl(path, what="trace"):
        where = f"{path}:{line}"
        if not header_seen:
            if not isinstance(raw, dict) or raw.get("schema") != TRACE_SCHEMA:
                raise TraceFormatError(
                    "the first line is not a trace header",
                    where=where,
                    remedy=f'begin with {{"schema": "{TRACE_SCHEMA}"}}',
                )
            header_seen = True
            continue
        if keep is None or not isinstance(raw, dict) or keep(raw):
            records.append(record_from_json(raw, where))
    if not header_seen:
        raise TraceFormatError(
            "the file is empty", where=str(path), remedy="give a trace with a header line"
        )
    return records


def save_trace(records: Iterable[TraceRecord], path: Path, **header: Any) -> None:
    """Write a trace file, atomically; ``header`` adds facts to its first line."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        out.write(json.dumps({"schema": TRACE_SCHEMA, **header}) + "\n")
        for record in records:
            out.write(json.dumps(record_to_json(record), separators=(",", ":")) + "\n")
