"""Where records go."""

from __future__ import annotations

from planner.domain.trace import RunRecord, load_trace
from runtime.ledger import Ledger
from runtime.recent import RecentWork
from runtime.traces import TraceWriter


def record(number: int) -> RunRecord:
    """Return the record of a run."""
    return RunRecord(
        run_id=f"r{number}",
        workflow="w",
        workflow_hash="h",
        arrival_s=float(number),
        finish_s=number + 1.0,
        status="ok",
    )


def test_a_trace_that_cannot_be_written_is_given_up(tmp_path, monkeypatch, caplog):
    """A full disk fails no call: it is logged once, and all others go on hearing of everything."""
    path = tmp_path / "t.jsonl"
    ledger, recent = Ledger(), RecentWork(60.0, 0.0)
    ledger.recent = recent
    ledger.set_trace(TraceWriter(path, header={}))
    for number in range(3):
        recent.arrived(f"r{number}", "h", float(number))
    ledger.write(record(0))
    assert ledger.path == path

    def full(_writer, _record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TraceWriter, "write", full)
    ledger.write(record(1))
    ledger.write(record(2))
    assert ledger.path is None
    assert [entry.message for entry in caplog.records] == ["trace given up"]
    assert [one.run_id for one in recent.records()] == ["r0", "r1", "r2"]
    assert all(ledger.journal.find(f"r{number}").ended for number in range(3))
    assert [one.run_id for one in load_trace(path)] == ["r0"]
