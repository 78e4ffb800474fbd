"""The runs in progress: when each arrived, what it did, and the records of what it did.

A run starts with its first call or its ``run_start`` event, whichever comes first, and ends with
``run_end`` or, for programs that never say goodbye, when nothing came for as long as
`runtime.endings` allows. Events are sent on the side and may overtake calls, so a run that was
said to end stays remembered for a time and is not started again by a late call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from planner.domain.trace import BranchRecord, RunRecord, ToolRecord
from runtime.tracing import SpanLike

__all__ = ["Run", "RunBook"]

_REMEMBERED = 4096
"""Ended runs kept in mind, and answers of runs."""


@dataclass(slots=True, kw_only=True)
class Run:
    """A run in progress. Times are clock seconds.

    Parameters
    ----------
    forecast_s, predicted_s
        Run latency forecast at arrival, before and after correction by runs that ended; or None.
    calls
        Calls seen, retries of the gateway not counted.
    open_calls
        Calls that have not ended.
    admitted
        Whether one of its calls was let in.
    last_s
        When something was last heard of it.
    tenant
        Whose it is.
    parent_id
        Run that started it, or an empty string.
    source
        How it was recognised, see `runtime.identity.Identity`.
    since_s
        Arrival of the run at the top of its family, which the age of its calls goes by.
    span
        Its span while it is in progress, or None.
    node, visit
        What the last call came from, as far as it is known.
    """

    run_id: str
    workflow: str
    workflow_hash: str
    session_id: str | None
    arrival_s: float
    predicted_s: float | None
    last_s: float
    forecast_s: float | None = None
    calls: int = 0
    open_calls: int = 0
    admitted: bool = False
    tenant: str = "default"
    parent_id: str = ""
    source: str = "run"
    since_s: float = 0.0
    span: SpanLike | None = None
    node: str = ""
    visit: int = 0
    tools: dict[tuple[str, int], float] = field(default_factory=dict)


class RunBook:
    """All runs in progress."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._ended: OrderedDict[str, Run] = OrderedDict()
        self._answers: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._runs)

    def find(self, run_id: str) -> Run | None:
        """Return a run that is in progress, or that was said to end a short while ago.

        One that only fell silent is not found: what comes after is a new run of that name.
        """
        return self._runs.get(run_id) or self._ended.get(run_id)

    def answered(self, response_id: str, run_id: str) -> None:
        """Note which run an answer belongs to, so that one that continues it is known."""
        self._answers[response_id] = run_id
        if len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)

    def of_answer(self, response_id: str) -> str | None:
        """Return the run that an earlier answer belongs to, or None."""
        return self._answers.get(response_id)

    def active(self) -> tuple[Run, ...]:
        """Return the runs in progress, in order of their start."""
        return tuple(self._runs.values())

    def below(self, run_id: str) -> list[Run]:
        """Return the runs in progress that a run started, directly or not."""
        found: list[Run] = []
        above = {run_id}
        for run in self._runs.values():  # a parent starts before its children
            if run.parent_id in above:
                above.add(run.run_id)
                found.append(run)
        return found

    def forget_ended(self) -> None:
        """Stop remembering ended runs, so that their ids may be used again."""
        self._ended.clear()

    def reopen(self, run_id: str) -> None:
        """Let a run that ended start again: it was resumed from a checkpoint."""
        self._ended.pop(run_id, None)

    def add(self, run: Run) -> None:
        """Note the start of a run."""
        self._runs[run.run_id] = run

    def end(self, run_id: str, now_s: float, status: str) -> RunRecord | None:
        """Note the end of a run; None if no such run is in progress."""
        run = self._runs.pop(run_id, None)
        if run is None:
            return None
        self._ended[run_id] = run
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        return RunRecord(
            run_id=run_id,
            workflow=run.workflow,
            workflow_hash=run.workflow_hash,
            arrival_s=run.arrival_s,
            finish_s=now_s,
            status=status,
            session_id=run.session_id,
            predicted_s=run.predicted_s,
            calls=run.calls,
        )

    def expire(self, now_s: float, patience_s: Callable[[Run], float] | float) -> list[RunRecord]:
        """End the runs that were silent for longer than their patience, as of when they were heard.

        A run is not silent while a run it started goes on.
        """
        allowed = patience_s if callable(patience_s) else lambda _run: patience_s
        parents = {run.parent_id for run in self._runs.values()}
        idle = [
            run
            for run in self._runs.values()
            if run.open_calls == 0
            and run.run_id not in parents
            and now_s - run.last_s > allowed(run)
        ]
        records = [self.end(run.run_id, run.last_s, "ok") for run in idle]
        for run in idle:
            self._ended.pop(run.run_id, None)
        return [record for record in records if record is not None]

    def tool_started(self, run: Run, node: str, visit: int, now_s: float) -> None:
        """Note the start of a tool."""
        run.tools[node, visit] = now_s
        run.last_s = now_s

    def tool_ended(
        self, run: Run, node: str, visit: int, now_s: float, status: str
    ) -> ToolRecord | None:
        """Note the end of a tool; None if its start was not seen."""
        run.last_s = now_s
        start_s = run.tools.pop((node, visit), None)
        if start_s is None:
            return None
        return ToolRecord(
            run_id=run.run_id,
            workflow_hash=run.workflow_hash,
            node=node,
            start_s=start_s,
            finish_s=now_s,
            status=status,
        )

    def branch_taken(
        self, run: Run, branch: str, outcome: str, visit: int, now_s: float
    ) -> BranchRecord:
        """Note the outcome of a branch."""
        run.last_s = now_s
        return BranchRecord(
            run_id=run.run_id,
            workflow_hash=run.workflow_hash,
            branch=branch,
            outcome=outcome,
            time_s=now_s,
            visit=visit,
        )
