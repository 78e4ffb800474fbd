"""Foreign logs read as traces of ours."""

import json

import pytest

from models.importers.foreign import foreign_kind, import_dynamo, import_otel
from models.importers.own import read_own_traces
from models.training import train
from planner.domain.errors import TraceFormatError
from planner.domain.trace import CallRecord, RunRecord, ToolRecord, save_trace


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


DYNAMO = [
    {"session_id": "s1", "timestamp": 0, "input_length": 1500, "output_length": 40,
     "hash_ids": [1, 2, 3]},
    {"session_id": "s2", "timestamp": 500, "input_length": 600, "output_length": 10,
     "hash_ids": [9]},
    {"session_id": "s1", "delay": 2000, "input_length": 2100, "output_length": 70,
     "hash_ids": [1, 2, 3, 4]},
    {"session_id": "s1", "delay": 10, "input_length": 0, "output_length": 70},
]  # fmt: skip


def test_dynamo_rows_become_planned_calls(tmp_path):
    """Delays follow the session's clock, equal leading blocks are cached, bad rows are counted."""
    path = _write(tmp_path / "rows.jsonl", DYNAMO)
    assert foreign_kind(path) == "dynamo"
    found = import_dynamo(path)
    calls = [one for one in found.records if isinstance(one, CallRecord)]
    assert [(one.run_id, one.sent_s, one.cached_tokens, one.visit) for one in calls] == [
        ("s1", 0.0, 0, 0), ("s2", 0.5, 0, 0), ("s1", 2.0, 1536, 1),
    ]  # fmt: skip
    assert {one.status for one in found.records} == {"planned"}
    assert found.left_out == {"session_id or a length is missing or < 1": 1}


def _span(number, operation, start_s, finish_s, **attributes):
    return {
        "traceId": f"t{number}",
        "spanId": f"{operation}{number}",
        "name": operation,
        "startTimeUnixNano": str(int((1.7e9 + start_s) * 1e9)),
        "endTimeUnixNano": str(int((1.7e9 + finish_s) * 1e9)),
        "attributes": [
            {"key": "gen_ai.operation.name", "value": {"stringValue": operation}},
            *({"key": key.replace("__", "."), "value": value} for key, value in attributes.items()),
        ],
    }


def _spans(number):
    begin = 10.0 * number
    return [
        _span(
            number, "chat", begin, begin + 2,
            gen_ai__agent__name={"stringValue": "writer"},
            gen_ai__usage__input_tokens={"intValue": str(300 + number)},
            gen_ai__usage__output_tokens={"intValue": str(40 + number % 7)},
        ),
        _span(
            number, "execute_tool", begin + 2, begin + 2.5,
            gen_ai__tool__name={"stringValue": "search"},
        ),
    ]  # fmt: skip


def test_spans_become_runs_calls_and_tools(tmp_path):
    """OTLP exports and flat spans give the same records; a call without counts is counted."""
    rows = [*_spans(0), *_spans(1), _span(2, "chat", 30, 31)]
    flat = import_otel(_write(tmp_path / "flat.jsonl", rows))
    export = {"resourceSpans": [{"resource": {}, "scopeSpans": [{"spans": rows}]}]}
    nested = import_otel(_write(tmp_path / "export.jsonl", [export]))
    assert flat == nested
    call = next(one for one in flat.records if isinstance(one, CallRecord))
    assert (call.node, call.site, call.prompt_tokens, call.output_tokens) == (
        "writer", "writer#0", 300, 40,
    )  # fmt: skip
    assert call.finish_s == pytest.approx(2.0)
    assert {one.node for one in flat.records if isinstance(one, ToolRecord)} == {"search"}
    runs = [one for one in flat.records if isinstance(one, RunRecord)]
    assert [(one.run_id, one.calls) for one in runs] == [("t0", 1), ("t1", 1)]
    assert flat.left_out == {"call without token counts": 1}


def test_lengths_are_learned_where_times_are_missing(tmp_path):
    """Spans without a first token train the length and no latency; the card counts them."""
    folder = tmp_path / "traces"
    folder.mkdir()
    _write(folder / "spans.jsonl", [span for number in range(80) for span in _spans(number)])
    report = train(folder, tmp_path / "out")
    assert {one.predictor for one in report.results} == {"output_length", "tool_delay"}
    assert report.table is not None
    assert not report.table.endpoints
    reasons = [one["reason"] for one in report.card["datasets"][0]["set_aside"]]
    assert any("length used, latency not" in reason for reason in reasons)


def test_ours_is_not_foreign(tmp_path, make_records):
    """A trace with our header is read as such; junk is not guessed at."""
    save_trace(make_records(runs=3), tmp_path / "own.jsonl")
    assert foreign_kind(tmp_path / "own.jsonl") is None
    (tmp_path / "junk.jsonl").write_text("not json\n", encoding="utf-8")
    assert foreign_kind(tmp_path / "junk.jsonl") is None
    assert foreign_kind(tmp_path / "absent.jsonl") is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"session_id": "s", "input_length": "many", "output_length": 1}, "input_length"),
        ({"session_id": "s", "input_length": 1, "output_length": 1, "hash_ids": 3}, "hash_ids"),
        ({"traceId": "t", "attributes": {}, "start_time": "yesterday"}, "yesterday"),
        (
            {
                "traceId": "t", "start_time": 1, "end_time": 2,
                "attributes": {
                    "gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": "few"
                },
            },
            "input_tokens",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told(tmp_path, row, said):
    """A value of the wrong type names file, line and field."""
    path = _write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(TraceFormatError, match=said) as error:
        read_own_traces([path])
    assert "rows.jsonl:1" in str(error.value)
