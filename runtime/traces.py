"""Writes traces as things happen: one line per record, flushed, so that a crash costs one line.

The format is `planner.domain.trace`. A file that exists is continued: half a line left by a crash
is cut off, and its clock goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from planner.domain.errors import InvalidInput
from planner.domain.trace import TRACE_SCHEMA, TraceRecord, record_to_json

__all__ = ["TraceWriter"]

_TIMES = (
    "arrival_s", "finish_s", "ready_s", "sent_s", "first_token_s", "predicted_finish_s", "start_s",
    "time_s",
)  # fmt: skip

_BEGINS = ("arrival_s", "ready_s", "start_s", "time_s")


class TraceWriter:
    """An open trace file.

    What began before it was opened is left out, so a trace holds whole runs and calls.

    Parameters
    ----------
    path
        File to write or continue; its folder is made.
    now_s
        The clock at opening, which becomes time 0 of a new file.
    header
        Facts for the first line of a new file.

    Raises
    ------
    InvalidInput
        If the file cannot be written or is something else than a trace.
    """

    def __init__(self, path: Path, *, now_s: float = 0.0, header: dict[str, Any]) -> None:
        self.path = path
        self._opened_s = self._origin_s = now_s
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            last_s = _last_time(path)
            self._file: BinaryIO = path.open("ab")
        except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
            raise InvalidInput(
                f"cannot write the trace: {getattr(error, 'strerror', None) or error}",
                where=str(path),
                remedy="choose another path",
            ) from error
        if last_s is None:
            self._line({"schema": TRACE_SCHEMA, **header})
        else:
            self._origin_s -= last_s

    def write(self, record: TraceRecord) -> None:
        """Append one record; its times are shifted to the file's clock."""
        raw = record_to_json(record)
        if any(raw.get(name, self._opened_s) < self._opened_s for name in _BEGINS):
            return
        for name in _TIMES:
            value = raw.get(name)
            if value is not None:
                raw[name] = round(value - self._origin_s, 6)
        self._line(raw)

    def close(self) -> None:
        """Close the file; further records are an error."""
        self._file.close()

    def _line(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
        self._file.flush()


def _last_time(path: Path) -> float | None:
    """Cut off half a line at the end; return the latest time, or None if there is no file yet.

    Raises
    ------
    InvalidInput
        If the file is not a trace.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    latest = 0.0
    whole = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            try:
                raw = json.loads(line)
            except ValueError:
                raw = None
            if number == 0 and not (isinstance(raw, dict) and raw.get("schema") == TRACE_SCHEMA):
                raise InvalidInput(
                    "the file exists and is not a trace",
                    where=str(path),
                    remedy="choose another path",
                )
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            if isinstance(raw, dict):
                latest = max(latest, *(float(raw.get(name) or 0.0) for name in _TIMES))
    with path.open("rb+") as file:
        file.truncate(whole)
    return latest
