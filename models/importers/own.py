"""Reader of our own traces (schema ``almanac.trace/1``), and of foreign ones as if they were."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from models.features import steps
from models.importers.foreign import load_any
from models.tables import Dataset, SetAside, Sieve, file_hash, split_tail
from planner.domain.trace import (
    BranchRecord,
    CallRecord,
    RunRecord,
    ToolRecord,
    TraceRecord,
    load_trace,
)

__all__ = ["OwnTraces", "read_own_traces"]

MAX_TOKENS = 5e6
MAX_TIME_S = 1e9
_NUMERIC = ("_s", "_tokens", "_us", "visit", "in_flight")
HISTORY_VISITS = 4
"""Visits from this one on count as the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnTraces:
    """The usable records of some traces, as tables.

    Parameters
    ----------
    dataset
        The step tables for the predictors, and what was set aside.
    runs, calls, tools, branches
        The fields of the records of `planner.domain.trace`, plus ``file`` (position of the trace;
        each has its own clock), ``run`` (unique over all traces) and ``held_out``.
    """

    dataset: Dataset
    runs: pd.DataFrame
    calls: pd.DataFrame
    tools: pd.DataFrame
    branches: pd.DataFrame


def read_own_traces(paths: Sequence[Path]) -> OwnTraces:
    """Read trace files; the last 30 % of the runs of each, by their first event, are held out.

    Raises
    ------
    InvalidInput, TraceFormatError
        If a file or a row cannot be read; the message names it.
    """
    records: list[Sequence[TraceRecord]] = []
    foreign: list[SetAside] = []
    for path in paths:
        imported = load_any(path)
        impossible: Counter[str] = Counter()
        records.append(
            load_trace(path, partial(_possible, impossible))
            if imported is None
            else imported.records
        )
        foreign += [
            SetAside(table=path.name, reason=reason, rows=rows)
            for reason, rows in (imported.left_out if imported else impossible).items()
        ]
    runs = Sieve(_table(RunRecord, records), "run records")
    runs.reject(runs.frame["status"] != "ok", "run not ok")
    runs.require("arrival_s", 0, MAX_TIME_S)
    runs.require("finish_s", 0, MAX_TIME_S)
    runs.reject(runs.frame["finish_s"] < runs.frame["arrival_s"], "finish before arrival")

    calls = Sieve(_table(CallRecord, records), "call records")
    calls.reject(~calls.frame["status"].isin(["ok", "planned"]), "call not ok")
    named = calls.frame[["workflow_hash", "node", "site", "endpoint"]]
    calls.reject(named.isna().any(axis=1), "workflow, node, site or endpoint is missing")
    calls.require("visit", 0, 1e6)
    calls.require("in_flight", 0, 1e6)
    calls.require("prompt_tokens", 1, MAX_TOKENS)
    calls.require("output_tokens", 1, MAX_TOKENS)
    for name in ("ready_s", "sent_s"):
        calls.require(name, 0, MAX_TIME_S)
    # What was asked for has lengths even where nothing tells how long the answer took.
    for name in ("first_token_s", "finish_s"):
        values = calls.frame[name]
        calls.reject((values < 0) | (values > MAX_TIME_S), f"{name} outside [0, {MAX_TIME_S:g}]")
    times = calls.frame
    untimed = int((times["first_token_s"].isna() | times["finish_s"].isna()).sum())
    if untimed:
        reason = "first_token_s or finish_s is missing (length used, latency not)"
        foreign.append(SetAside(table="call records", reason=reason, rows=untimed))
    unordered = (
        (times["sent_s"] < times["ready_s"])
        | (times["first_token_s"] < times["sent_s"])
        | (times["finish_s"] < times["first_token_s"])
    )
    calls.reject(unordered, "times out of order")
    cached = calls.frame["cached_tokens"]
    calls.reject(
        (cached < 0) | (cached > calls.frame["prompt_tokens"]), "cached_tokens outside the prompt"
    )

    tools = Sieve(_table(ToolRecord, records), "tool records")
    tools.reject(tools.frame["status"] != "ok", "tool not ok")
    tools.reject(tools.frame["node"].isna(), "node is missing")
    tools.require("start_s", 0, MAX_TIME_S)
    tools.require("finish_s", 0, MAX_TIME_S)
    tools.reject(tools.frame["finish_s"] < tools.frame["start_s"], "finish before start")

    branches = Sieve(_table(BranchRecord, records), "branch records")
    named = branches.frame[["branch", "outcome"]]
    branches.reject(named.isna().any(axis=1), "branch or outcome is missing")
    branches.require("visit", 0, 1e6)

    begin = pd.concat(
        [
            runs.frame[["file", "run", "arrival_s"]].set_axis(["file", "run", "time_s"], axis=1),
            calls.frame[["file", "run", "ready_s"]].set_axis(["file", "run", "time_s"], axis=1),
        ]
    )
    first = begin.groupby(["file", "run"], as_index=False)["time_s"].min()
    late = first.groupby("file")["time_s"].transform(split_tail).astype(bool)
    late_runs = set(first.loc[late, "run"])
    for sieve in (runs, calls, tools, branches):
        sieve.frame = sieve.frame.assign(held_out=sieve.frame["run"].isin(late_runs))

    parts = (runs, calls, tools, branches)
    refused = sum(one.rows for one in foreign if one.table != "call records")
    set_aside: tuple[SetAside, ...] = tuple(one for part in parts for one in part.set_aside)
    set_aside += tuple(foreign)
    delays, choices = _delay_steps(tools.frame), _choice_steps(branches.frame)
    return OwnTraces(
        dataset=Dataset(
            name="traces",
            split="last 30 % of the runs in time held out",
            rows_read=sum(part.rows_read for part in parts) + refused,
            set_aside=set_aside,
            data_hash=file_hash(*paths),
            window=f"{len(first)} runs in {len(paths)} traces",
            calls=_call_steps(calls.frame) if len(calls.frame) else None,
            delays=delays if len(delays) else None,
            choices=choices if len(choices) else None,
        ),
        runs=runs.frame,
        calls=calls.frame,
        tools=tools.frame,
        branches=branches.frame,
    )


def _possible(refused: Counter[str], row: Mapping[str, Any]) -> bool:
    """Whether no count or time of a row is negative or not finite; counts those where one is."""
    for name, value in row.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and name.endswith(_NUMERIC) and not 0 <= value < math.inf:
            refused[f"{name} is negative or not finite"] += 1
            return False
    return True


def _table(
    kind: type[RunRecord] | type[CallRecord] | type[ToolRecord] | type[BranchRecord],
    files: Sequence[Sequence[TraceRecord]],
) -> pd.DataFrame:
    rows = [
        {**asdict(record), "file": position, "run": f"{position:04d}/{record.run_id}"}
        for position, records in enumerate(files)
        for record in records
        if isinstance(record, kind)
    ]
    names = [*(field.name for field in fields(kind)), "file", "run"]
    table = pd.DataFrame(rows, columns=names)
    numeric = [name for name in names if name.endswith(_NUMERIC)]
    for name in numeric:
        # None means absent in a record and NaN means absent in a table.
        table[name] = pd.to_numeric(table[name], errors="coerce").astype(float)
    return table


def _visit(table: pd.DataFrame) -> pd.Series:
    visit = table["visit"].clip(upper=HISTORY_VISITS).astype(int).astype(str)
    return "visit " + visit


def _call_steps(calls: pd.DataFrame) -> pd.DataFrame:
    # A call's history is what its own site answered before in the run. Parallel visits (Send)
    # start a history of their own: at dispatch the answers beside them are not known yet.
    ordered = calls.sort_values(["run", "site", "ready_s", "call_id"], kind="stable")
    site = ordered["run"] + "/" + ordered["site"]
    ended = ordered.groupby(site)["finish_s"].cummax().groupby(site).shift(1)
    parallel = (ordered["ready_s"] < ended).groupby(site).cumsum()
    return steps(
        session_id=site + "/" + parallel.astype(int).astype(str).str.zfill(6),
        family=ordered["run"],
        step=ordered.groupby(site).cumcount(),
        kind=ordered["workflow_hash"],
        site=ordered["site"],
        input_kind=_visit(ordered),
        prompt_tokens=ordered["prompt_tokens"],
        max_tokens=ordered["max_tokens"],
        output_tokens=ordered["output_tokens"],
        held_out=ordered["held_out"],
    )


def _delay_steps(tools: pd.DataFrame) -> pd.DataFrame:
    ordered = tools.sort_values(["run", "start_s", "node"], kind="stable")
    return steps(
        session_id=ordered["run"],
        family=ordered["run"],
        step=ordered.groupby("run").cumcount(),
        kind=ordered["workflow_hash"],
        site=ordered["node"],
        action=ordered["node"],
        delay_s=ordered["finish_s"] - ordered["start_s"],
        held_out=ordered["held_out"],
    )


def _choice_steps(branches: pd.DataFrame) -> pd.DataFrame:
    # Each branch of a run is a sequence of its own: its outcome depends on its own last one.
    return steps(
        session_id=branches["run"] + "/" + branches["branch"],
        family=branches["run"],
        step=branches["visit"],
        kind=branches["workflow_hash"],
        site=branches["branch"],
        input_kind=_visit(branches),
        action=branches["outcome"],
        held_out=branches["held_out"],
    )
