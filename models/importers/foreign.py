"""Foreign logs as records of our own trace format: Dynamo's agentic rows, OpenTelemetry spans.

Dynamo ``agentic_mooncake`` (JSON lines)
    One request a line: ``session_id``, ``input_length``, ``output_length``, ``timestamp`` (ms from
    the start) or ``delay`` (ms after the session's previous request), ``hash_ids`` (prompt blocks)
    and optionally ``priority``. There is no latency: calls are written with the lengths and the
    times they were asked for, and status ``planned``, so that nothing learns a latency from them.
OpenTelemetry GenAI spans (JSON lines)
    Either one span a line, or one ``resourceSpans`` export a line. Spans named by
    ``gen_ai.operation.name`` ``chat``, ``text_completion`` or ``generate_content`` are calls,
    ``execute_tool`` spans are tools; a trace id is a run. Attributes may be a mapping or OTLP's
    list of key and value. Times are nanoseconds since 1970 (``startTimeUnixNano``), or
    ``start_time``/``end_time`` in the same unit or in ISO 8601.

Call sites are named by the agent (``gen_ai.agent.name``) or the parent span where they are known,
else by the operation. Rows that lack a length or a time are counted, not repaired.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from planner.domain.errors import TraceFormatError
from planner.domain.files import read_jsonl
from planner.domain.trace import CallRecord, RunRecord, ToolRecord, TraceRecord

__all__ = ["Imported", "foreign_kind", "import_dynamo", "import_otel", "load_any"]

_CALLS = ("chat", "text_completion", "generate_content")
_BLOCK_TOKENS = 512
_REMEDY = "give the rows as the tool wrote them"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Records, and how many rows were left out, by reason."""

    records: tuple[TraceRecord, ...]
    left_out: Mapping[str, int]


def foreign_kind(path: Path) -> str | None:
    """Return ``dynamo`` or ``otel`` if the first line looks like it, else None."""
    try:
        with path.open(encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), "")
        row = json.loads(first)
    except (OSError, ValueError, UnicodeDecodeError):
        return None
    if not isinstance(row, dict) or "schema" in row:
        return None
    if "input_length" in row and "session_id" in row:
        return "dynamo"
    if "resourceSpans" in row or "attributes" in row or "traceId" in row:
        return "otel"
    return None


def load_any(path: Path) -> Imported | None:
    """Return the records of a foreign file, or None if it is not one (ours have a header)."""
    kind = foreign_kind(path)
    if kind == "dynamo":
        return import_dynamo(path)
    return import_otel(path) if kind == "otel" else None


def import_dynamo(path: Path, workflow: str = "agentic_mooncake") -> Imported:
    """Read Dynamo ``agentic_mooncake`` rows.

    Raises
    ------
    TraceFormatError
        If a line is not an object or a number is not one.
    """
    records: list[TraceRecord] = []
    left_out: Counter[str] = Counter()
    clock: dict[str, float] = {}
    visits: Counter[str] = Counter()
    seen: set[int] = set()
    start: dict[str, float] = {}
    for number, row in read_jsonl(path, what="Dynamo trace"):
        where = f"{path}:{number}"
        if not isinstance(row, dict):
            raise TraceFormatError("not an object", where=where, remedy=_REMEDY)
        session = str(row.get("session_id") or "")
        prompt = _number(row, "input_length", where)
        output = _number(row, "output_length", where)
        if not session or prompt is None or output is None or min(prompt, output) < 1:
            left_out["session_id or a length is missing or < 1"] += 1
            continue
        at_ms, delay_ms = _number(row, "timestamp", where), _number(row, "delay", where)
        before = clock.get(session, 0.0)
        sent_s = at_ms / 1e3 if at_ms is not None else before + (delay_ms or 0.0) / 1e3
        if sent_s < before:
            left_out["earlier than the request before it in its session"] += 1
            continue
        clock[session] = sent_s
        start.setdefault(session, sent_s)
        ids = row.get("hash_ids") or []
        if not isinstance(ids, list):
            raise TraceFormatError(
                f"{ids!r:.40} is no list", where=f"{where}: hash_ids", remedy=_REMEDY
            )
        shared = next((place for place, one in enumerate(ids) if one not in seen), len(ids))
        seen.update(ids)
        records.append(
            CallRecord(
                run_id=session,
                call_id=f"{session}/{visits[session]}",
                workflow_hash=workflow,
                node="agent",
                site="agent#0",
                ready_s=sent_s,
                sent_s=sent_s,
                endpoint="",
                prompt_tokens=int(prompt),
                output_tokens=int(output),
                cached_tokens=int(min(shared * _BLOCK_TOKENS, prompt)),
                visit=visits[session],
                status="planned",
            )
        )
        visits[session] += 1
    records += [
        RunRecord(
            run_id=session, workflow=workflow, workflow_hash=workflow, arrival_s=start[session],
            finish_s=clock[session], status="planned", session_id=session, calls=visits[session],
        )
        for session in start
    ]  # fmt: skip
    return Imported(records=tuple(records), left_out=dict(left_out))


def import_otel(path: Path) -> Imported:
    """Read OpenTelemetry GenAI spans.

    Raises
    ------
    TraceFormatError
        If a line is not an object, or a number or time cannot be read.
    """
    left_out: Counter[str] = Counter()
    spans = []
    for number, row in read_jsonl(path, what="span file"):
        where = f"{path}:{number}"
        if not isinstance(row, dict):
            raise TraceFormatError("not an object", where=where, remedy=_REMEDY)
        spans += [_Span.read(one, where) for one in _flat(row)]
    named = {one.span_id: one.name for one in spans}
    timed = [one for one in spans if one.start_s is not None and one.finish_s is not None]
    left_out["span without times"] += len(spans) - len(timed)
    origin = min((one.start_s or 0.0 for one in timed), default=0.0)
    records: list[TraceRecord] = []
    visits: defaultdict[str, Counter[str]] = defaultdict(Counter)
    bounds: dict[str, tuple[float, float, int]] = {}
    for one in sorted(timed, key=lambda span: (span.start_s or 0.0, span.span_id)):
        begin, finish = (one.start_s or 0.0) - origin, (one.finish_s or 0.0) - origin
        operation = one.text("gen_ai.operation.name")
        low, high, calls = bounds.get(one.trace_id, (begin, finish, 0))
        workflow = one.text("gen_ai.workflow.name") or one.text("service.name") or "otel"
        if operation in _CALLS:
            prompt = one.count("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
            output = one.count("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
            if prompt is None or output is None or min(prompt, output) < 1:
                left_out["call without token counts"] += 1
                continue
            node = one.text("gen_ai.agent.name") or named.get(one.parent_id, "") or operation
            ttft_s = one.number("gen_ai.server.time_to_first_token")
            cached = one.count("gen_ai.usage.cache_read.input_tokens")
            records.append(
                CallRecord(
                    run_id=one.trace_id,
                    call_id=one.span_id,
                    workflow_hash=workflow,
                    node=node,
                    site=f"{node}#0",
                    ready_s=begin,
                    sent_s=begin,
                    endpoint=one.text("server.address")
                    or one.text("gen_ai.request.model")
                    or "unknown",
                    prompt_tokens=prompt,
                    output_tokens=output,
                    first_token_s=None if ttft_s is None else begin + ttft_s,
                    finish_s=finish,
                    cached_tokens=cached,
                    max_tokens=one.count("gen_ai.request.max_tokens"),
                    visit=visits[one.trace_id][node],
                    status="failed" if one.failed else "ok",
                )
            )
            visits[one.trace_id][node] += 1
            calls += 1
        elif operation == "execute_tool":
            records.append(
                ToolRecord(
                    run_id=one.trace_id,
                    workflow_hash=workflow,
                    node=one.text("gen_ai.tool.name") or one.name,
                    start_s=begin,
                    finish_s=finish,
                    status="failed" if one.failed else "ok",
                )
            )
        bounds[one.trace_id] = min(low, begin), max(high, finish), calls
    ours = {record.run_id: record.workflow_hash for record in records}
    for run_id, workflow in ours.items():
        low, high, calls = bounds[run_id]
        records.append(
            RunRecord(
                run_id=run_id, workflow=workflow, workflow_hash=workflow, arrival_s=low,
                finish_s=high, calls=calls,
            )
        )  # fmt: skip
    return Imported(
        records=tuple(records), left_out={why: rows for why, rows in left_out.items() if rows}
    )


@dataclass(frozen=True, slots=True)
class _Span:
    trace_id: str
    span_id: str
    parent_id: str
    name: str
    start_s: float | None
    finish_s: float | None
    failed: bool
    attributes: Mapping[str, Any]
    where: str

    @classmethod
    def read(cls, row: Mapping[str, Any], where: str) -> _Span:
        attributes = dict(row.get("resource_attributes") or {})
        attributes.update(_attributes(row.get("attributes")))
        status = row.get("status")
        code = status.get("code", status.get("status_code")) if isinstance(status, dict) else status
        context = row.get("context") if isinstance(row.get("context"), dict) else {}
        return cls(
            trace_id=str(row.get("traceId") or (context or {}).get("trace_id") or ""),
            span_id=str(row.get("spanId") or (context or {}).get("span_id") or ""),
            parent_id=str(row.get("parentSpanId") or row.get("parent_id") or ""),
            name=str(row.get("name") or ""),
            start_s=_time_s(row.get("startTimeUnixNano", row.get("start_time")), where),
            finish_s=_time_s(row.get("endTimeUnixNano", row.get("end_time")), where),
            failed=code in (2, "ERROR", "STATUS_CODE_ERROR"),
            attributes=attributes,
            where=where,
        )

    def text(self, key: str) -> str:
        value = self.attributes.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str) -> float | None:
        value = self.attributes.get(key)
        if value is None:
            return None
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise TraceFormatError(
                f"{value!r:.40} is not a number", where=f"{self.where}: {key}", remedy="correct it"
            )
        return found

    def count(self, *keys: str) -> int | None:
        found = next((one for key in keys if (one := self.number(key)) is not None), None)
        return None if found is None else int(found)


def _flat(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "resourceSpans" not in row:
        yield row
        return
    for resource in row["resourceSpans"]:
        shared = _attributes(resource.get("resource", {}).get("attributes"))
        for scope in resource.get("scopeSpans", ()):
            for span in scope.get("spans", ()):
                yield {**span, "resource_attributes": shared}


def _attributes(raw: Any) -> dict[str, Any]:
    if isinstance(raw, dict):
        return raw
    out = {}
    for one in raw or ():
        # OTLP: {"key": k, "value": {"intValue": "12"}}
        value = one.get("value")
        if isinstance(value, dict):
            value = next(iter(value.values()), None)
        out[str(one.get("key"))] = value
    return out


def _time_s(value: Any, where: str) -> float | None:
    if value is None:
        return None
    try:
        if isinstance(value, str) and not value.isdigit():
            return datetime.fromisoformat(value).timestamp()
        return int(value) / 1e9
    except (TypeError, ValueError) as error:
        raise TraceFormatError(
            f"{value!r:.40} is not a time", where=where, remedy="give nanoseconds or ISO 8601"
        ) from error


def _number(row: Mapping[str, Any], key: str, where: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TraceFormatError(
            f"{value!r:.40} is not a number", where=f"{where}: {key}", remedy="correct it"
        )
    return float(value)
