"""Reading of tables, with one clear error for a broken file and a count of every row set aside.

Two kinds of trouble are kept apart. A file that cannot be what its reader expects (no such file,
a column missing, text where numbers belong) stops the job with `InvalidInput`. A row that cannot
be used (a value missing, negative or absurd) is set aside, counted and reported: never dropped
in silence, never repaired.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from planner.domain.errors import InvalidInput

__all__ = ["Dataset", "SetAside", "Sieve", "file_hash", "read_table", "split_groups", "split_tail"]

HELD_OUT_SHARE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """Rows of one table that were not used, and why."""

    table: str
    reason: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What one source has to teach.

    Parameters
    ----------
    name
        Short name, used in file names and in the card.
    split
        How its held-out rows were chosen, in words.
    rows_read
        Rows of its tables before any was set aside.
    set_aside
        The rows not used, with reasons.
    data_hash
        16 hex digits of the content of its files.
    window
        The span of the training data in words (dates, runs, minutes).
    calls, delays, choices
        Step tables, see `models.features.STEP_COLUMNS`; None if the source has none.
    requests
        Latency rows, see `models.endpoint_latency.REQUEST_COLUMNS`; None if it has none.
    arrivals
        Columns ``time_s``, ``prompt_tokens``, ``output_tokens``; None if it has none.
    """

    name: str
    split: str
    rows_read: int
    set_aside: tuple[SetAside, ...]
    data_hash: str
    window: str
    calls: pd.DataFrame | None = None
    delays: pd.DataFrame | None = None
    choices: pd.DataFrame | None = None
    requests: pd.DataFrame | None = None
    arrivals: pd.DataFrame | None = None


class Sieve:
    """A table whose unusable rows are taken out one reason at a time.

    Parameters
    ----------
    frame
        The table.
    table
        Its name in reports.
    """

    def __init__(self, frame: pd.DataFrame, table: str) -> None:
        self.frame = frame
        self.table = table
        self.rows_read = len(frame)
        self._reasons: list[SetAside] = []

    def reject(self, bad: pd.Series, reason: str) -> None:
        """Set aside the rows where ``bad`` is true."""
        count = int(bad.sum())
        if count:
            self._reasons.append(SetAside(table=self.table, reason=reason, rows=count))
            self.frame = self.frame[~bad].copy()

    def require(self, column: str, least: float, most: float) -> None:
        """Set aside the rows whose ``column`` is missing or lies outside [least, most]."""
        values = self.frame[column]
        self.reject(values.isna(), f"{column} is missing")
        values = self.frame[column]
        self.reject((values < least) | (values > most), f"{column} outside [{least:g}, {most:g}]")

    @property
    def set_aside(self) -> tuple[SetAside, ...]:
        """What was set aside so far."""
        return tuple(self._reasons)


def read_table(path: Path, *, numeric: Sequence[str], text: Sequence[str] = ()) -> pd.DataFrame:
    """Return the named columns of a CSV file; numbers as floats, empty texts as ``""``.

    Raises
    ------
    InvalidInput
        If the file is missing or not a CSV table, a column is missing, or a numeric column holds
        text; the message names the file, the column, the line and the value.
    """
    try:
        # Read as text: a stray word must become an error that names it, not a change of type.
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except FileNotFoundError as error:
        raise InvalidInput(
            "no such table", where=str(path), remedy="give the whole folder of this dataset"
        ) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InvalidInput(
            f"not a readable CSV table ({reason})", where=str(path), remedy="fetch it again"
        ) from error
    missing = [column for column in (*numeric, *text) if column not in frame.columns]
    if missing:
        raise InvalidInput(
            f"column {missing[0]!r} is missing (found: {', '.join(map(str, frame.columns))})",
            where=str(path),
            remedy="give the file as its README describes it",
        )
    out: dict[str, pd.Series[Any]] = {column: frame[column].astype(str) for column in text}
    for column in numeric:
        raw = frame[column].str.strip()
        empty = raw.isin(["", "nan", "NaN", "NA", "None"])
        values = pd.to_numeric(raw.mask(empty), errors="coerce").astype(float)
        wrong = np.flatnonzero((values.isna() & ~empty).to_numpy())
        if wrong.size:
            raise InvalidInput(
                f"{raw.iloc[wrong[0]]!r} is not a number",
                where=f"{path}:{wrong[0] + 2}: {column}",
                remedy="correct the value or leave it empty",
            )
        out[column] = values.where(np.isfinite(values))
    return pd.DataFrame(out)


def file_hash(*paths: Path) -> str:
    """Return 16 hex digits of the content of the files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def split_groups(groups: pd.Series, seed: int, share: float = HELD_OUT_SHARE) -> pd.Series:
    """Return which rows are held out: whole groups, drawn by a hash of the group and the seed.

    A group is in or out whatever else the table holds, so that adding data never moves a group
    from one side to the other. If the draw leaves a side empty, one group changes sides.
    """
    names = sorted(groups.astype(str).unique())
    draws = {
        name: int(hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()[:8], 16) / 2**32
        for name in names
    }
    out = {name for name in names if draws[name] < share}
    if len(names) > 1 and not out:
        out = {min(names, key=draws.__getitem__)}
    if len(names) > 1 and len(out) == len(names):
        out.discard(max(names, key=draws.__getitem__))
    return groups.astype(str).isin(out)


def split_tail(times: pd.Series, share: float = HELD_OUT_SHARE) -> pd.Series:
    """Return which rows are held out: the last ``share`` of the rows in time (ties stay in)."""
    return times > times.quantile(1 - share)
