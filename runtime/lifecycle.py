"""Runs from their arrival to their end: the router, the trace and the spans hear of each step."""

from __future__ import annotations

from collections.abc import Callable

from planner.dispatch.events import (
    BranchTaken,
    Event,
    RunEnded,
    RunStarted,
    ToolFinished,
    ToolStarted,
)
from runtime.clock import Clock
from runtime.config import GatewayConfig
from runtime.identity import Identity
from runtime.ledger import Ledger
from runtime.limits import ANYONE, Tenant
from runtime.runs import Run, RunBook
from runtime.tracing import Tracing
from runtime.workflows import Workflows

__all__ = ["Lifecycle"]


class Lifecycle:
    """Begins, continues and ends runs.

    Parameters
    ----------
    workflows
        Forecasts of runs; learns from those that end.
    ledger
        Takes the records.
    config
        Settings; assign it when they change.
    clock
        Of arrivals and ends.
    tracing
        Makes a span per run.
    tell
        Takes the events for the router.
    load
        Says how many calls are in flight per endpoint.

    Attributes
    ----------
    runs
        Those in progress.
    """

    def __init__(
        self,
        workflows: Workflows,
        ledger: Ledger,
        *,
        config: GatewayConfig,
        clock: Clock,
        tracing: Tracing,
        tell: Callable[[Event], None],
        load: Callable[[], float],
    ) -> None:
        self.runs = RunBook()
        self.config = config
        self._workflows = workflows
        self._ledger = ledger
        self._clock = clock
        self._tracing = tracing
        self._tell = tell
        self._load = load

    # Arrivals

    def begin_call(self, identity: Identity, tenant: Tenant) -> Run:
        """Return the run of a call that arrives now, with the call counted."""
        known = self.runs.find(identity.run_id)
        if known is not None and known.calls and not known.open_calls:
            self._workflows.endings.paused(known, self._clock.now_s() - known.last_s)
        run = self.run_of(identity, tenant)
        run.node, run.visit = identity.node or run.node, identity.visit
        run.calls += 1
        run.open_calls += 1
        return run

    def run_of(self, identity: Identity, tenant: Tenant = ANYONE) -> Run:
        """Return the run a call or event belongs to, starting it if it is new."""
        now_s = self._clock.now_s()
        run = self.runs.find(identity.run_id)
        if run is None:
            given = identity.workflow
            # Known names are accepted too; of anything else the client's word is kept as hash.
            workflow = self._workflows.find(given)
            key = workflow.content_hash if workflow else given
            forecast_s = self._workflows.run_s(key, self._load, online=self.config.online)
            parent = self.runs.find(identity.parent_id) if identity.parent_id else None
            run = Run(
                run_id=identity.run_id,
                tenant=tenant.name,
                parent_id=identity.parent_id,
                source=identity.source,
                since_s=now_s if parent is None else parent.since_s,
                workflow=workflow.name if workflow else "",
                workflow_hash=key,
                session_id=identity.session_id,
                arrival_s=now_s,
                forecast_s=forecast_s,
                predicted_s=self._workflows.corrected_s(key, forecast_s),
                last_s=now_s,
            )
            self._begin(run)
        run.last_s = now_s
        return run

    def resume(self, run: Run) -> None:
        """Go on with a run that was in progress before a restart."""
        if self.runs.find(run.run_id) is None:
            self._begin(run)

    def _begin(self, run: Run) -> None:
        self.runs.add(run)
        facts = {"run_id": run.run_id, "workflow_hash": run.workflow_hash, "source": run.source}
        run.span = self._tracing.start("run", facts)
        now_s = self._clock.now_s()
        if self._ledger.recent is not None:
            self._ledger.recent.arrived(run.run_id, run.workflow_hash, now_s)
        self._tell(
            RunStarted(
                run_id=run.run_id,
                workflow_hash=run.workflow_hash,
                now_s=now_s,
                tenant=run.tenant,
            )
        )

    # On the way

    def tool_started(self, run: Run, node: str, visit: int, now_s: float) -> None:
        """Note the start of a tool."""
        self._tell(ToolStarted(run_id=run.run_id, node=node, now_s=now_s))
        self.runs.tool_started(run, node, visit, now_s)

    def tool_ended(self, run: Run, node: str, visit: int, now_s: float, status: str) -> bool:
        """Note the end of a tool; return whether its start was seen."""
        record = self.runs.tool_ended(run, node, visit, now_s, status)
        if record is None:
            return False
        self._tell(ToolFinished(run_id=run.run_id, node=node, now_s=now_s))
        self._ledger.write(record)
        return True

    def branch_taken(self, run: Run, branch: str, outcome: str, visit: int, now_s: float) -> None:
        """Note the outcome of a branch."""
        self._tell(BranchTaken(run_id=run.run_id, branch=branch, outcome=outcome, now_s=now_s))
        self._ledger.write(self.runs.branch_taken(run, branch, outcome, visit, now_s))

    # Ends

    def end(self, run_id: str, status: str = "ok") -> bool:
        """End a run, and those it started that have nothing under way.

        Returns
        -------
        bool
            Whether it was in progress.
        """
        now_s = self._clock.now_s()
        run = self.runs.find(run_id)
        for child in reversed(self.runs.below(run_id)):
            if not child.open_calls:
                self.end(child.run_id, status)
        _end_span(run, status)
        record = self.runs.end(run_id, now_s, status)
        if record is None:
            return False
        if run is not None and run.forecast_s is not None and self.config.online and status == "ok":
            self._workflows.learn_run(run.workflow_hash, run.forecast_s, now_s - run.arrival_s)
        self._ledger.write(record)
        self._tell(RunEnded(run_id=run_id, now_s=now_s))
        return True

    def end_session(self, name: str, tenant: Tenant) -> int:
        """End the runs in progress that are, or belong to, what a client calls by a name.

        Returns
        -------
        int
            How many ended; 0 for a name nobody has, which is no error.
        """
        own = tenant.own(name)
        ended = [
            run.run_id
            for run in self.runs.active()
            if run.run_id == own or (run.session_id == name and run.tenant == tenant.name)
        ]
        return sum(self.end(run_id) for run_id in ended)

    def expire(self) -> None:
        """End the runs nothing was heard of for long."""
        now_s = self._clock.now_s()
        endings, config = self._workflows.endings, self.config
        idle_s, done_s = config.run_idle_s, config.run_done_idle_s
        silent = {run.run_id: run for run in self.runs.active()}
        for record in self.runs.expire(
            now_s, lambda run: endings.patience_s(run, idle_s=idle_s, done_s=done_s)
        ):
            _end_span(silent[record.run_id], "silent")
            self._ledger.write(record)
            self._tell(RunEnded(run_id=record.run_id, now_s=now_s))

    def close(self) -> None:
        """Write the records of the runs in progress, as of when they were heard."""
        for run in self.runs.active():
            _end_span(run, "ok")
            record = self.runs.end(run.run_id, run.last_s, "ok")
            if record is not None:
                self._ledger.write(record)


def _end_span(run: Run | None, status: str) -> None:
    if run is not None and run.span is not None:
        run.span.set_attribute("almanac.status", status)
        run.span.set_attribute("almanac.calls", run.calls)
        run.span.end()
        run.span = None
