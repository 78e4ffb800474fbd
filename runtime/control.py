"""What a gateway process knows and can be told: router, runs, workflows, table, trace, health.

No HTTP here: `runtime.gateway` translates requests into these methods. Everything is synchronous
except `place`, so each call sees and leaves a consistent state.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from planner.dispatch.arrival import ArrivalForecast
from planner.dispatch.events import (
    BranchTaken,
    Call,
    Event,
    RunEnded,
    RunStarted,
    ToolFinished,
    ToolStarted,
)
from planner.dispatch.forecast import Forecaster
from planner.dispatch.learning import Kept
from planner.dispatch.policies import Policy, make_policy, parse_policy
from planner.dispatch.policies.planned import Planned
from planner.dispatch.router import Router
from planner.dispatch.table import DispatchTable
from planner.domain.calibration import QuantileTracker
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Fleet
from planner.domain.ids import EndpointId
from planner.domain.run import RunSpec
from planner.domain.trace import CallRecord, TraceRecord
from planner.domain.workflow import START, Workflow
from planner.graph.sampling import scenarios
from runtime.admission import Admission
from runtime.clock import Clock
from runtime.config import GatewayConfig
from runtime.dashboard.journal import Journal
from runtime.dispatcher import Dispatcher, Moved, Ticket
from runtime.endings import EndForecast
from runtime.fingerprint import Prompt, TokenScale
from runtime.fleets import FleetChange, merge, present
from runtime.guard import Guard, Patience
from runtime.health import Breaker
from runtime.hints import Hints, read_hints, stepping_back
from runtime.identity import Identity, identify
from runtime.keys import KeyedTenancy
from runtime.limits import ANYONE, Limits, Tenant
from runtime.metrics import GatewayMetrics
from runtime.recent import RecentWork
from runtime.runs import Run, RunBook
from runtime.scraping import Scraper
from runtime.traces import TraceWriter
from runtime.tracing import NoTracing, Tracing

__all__ = ["Control", "limits_of"]

_log = logging.getLogger(__name__)

_ARRIVAL_RUNS = 32
"""Sampled runs behind the forecast of a run at its arrival."""


class Control:
    """The state of one gateway.

    Parameters
    ----------
    fleet
        Endpoints, each with an address.
    estimates, workflows
        Forecasts, and graphs known from the start.
    policy
        ``name`` or ``name:key=value,...``.
    table
        Dispatch table for the ``almanac`` policy, or None.
    config
        Settings.
    clock
        Made from the dilation if None.
    tenancy
        Tells tenants apart; None takes everybody as one.
    tracing
        Makes spans; None makes none.

    Raises
    ------
    InvalidInput
        If an endpoint has no address, or policy or table do not fit.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        estimates: EstimateTable | None = None,
        workflows: Iterable[Workflow] = (),
        policy: str = "almanac",
        table: DispatchTable | None = None,
        config: GatewayConfig | None = None,
        clock: Clock | None = None,
        tenancy: KeyedTenancy | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        _check_addresses(fleet)
        self.fleet = fleet
        self.absent: frozenset[int] = frozenset()
        self.config = config or GatewayConfig()
        self.clock = clock or Clock(self.config.dilation)
        self.models = tuple(dict.fromkeys(endpoint.model for endpoint in fleet.endpoints))
        self.metrics = GatewayMetrics(label_limit=self.config.label_limit)
        self.scale = TokenScale()
        self.runs = RunBook()
        self.tenancy = tenancy or KeyedTenancy()
        self.tracing: Tracing = tracing or NoTracing()
        self.scraper = Scraper(self.config.scrape_stale_s * self.clock.dilation)
        self.admission = Admission(
            limits_of(self.config), now_s=time.monotonic, refused=self.metrics.rejections.inc
        )
        self.guard = Guard(fleet.endpoints, self.config, self.clock, self.metrics)
        self.guard.switch = self
        self._forecaster = Forecaster(estimates or EstimateTable(), seed=self.config.seed)
        self.endings = EndForecast(self._forecaster.estimates)
        self._workflows: dict[str, Workflow] = {}
        self._by_name: dict[str, Workflow] = {}
        self._arrivals: dict[str, ArrivalForecast] = {}
        self.sampled: dict[str, Sequence[RunSpec]] = {}
        """Runs drawn from the graph of each workflow with forecasts, by its hash."""
        self._runs_kept: dict[str, Kept] = {}
        for workflow in workflows:
            self.add_workflow(workflow)
        self._table: DispatchTable | None = None
        self._table_version = ""
        self.table_since_s = 0.0
        """When it went live, clock seconds."""
        self.journal = Journal()
        self.recent: RecentWork | None = None
        """Told of arrivals, decisions and records, if somebody plans by them."""
        self.replanning: Callable[[], dict[str, Any]] | None = None
        """What became of re-planning, for the diagnostics."""
        self.processes: Callable[[], list[dict[str, Any]]] | None = None
        """The worker processes, for the diagnostics, where there are any."""
        self._trace: TraceWriter | None = None
        self._errors = _ErrorStats()
        if table is not None:
            self._set_table(table)
        self.policy_text = policy
        self._dispatcher = self._new_dispatcher(policy)

    @property
    def router(self) -> Router:
        """The router in use."""
        return self._dispatcher.router

    @property
    def breakers(self) -> Sequence[Breaker]:
        """The state of each endpoint, in fleet order."""
        return self.guard.health.breakers

    @property
    def ready(self) -> bool:
        """Whether at least one endpoint is up."""
        return any(
            breaker.takes_calls and index not in self.absent
            for index, breaker in enumerate(self.breakers)
        )

    @property
    def table(self) -> DispatchTable | None:
        """The dispatch table in use."""
        return self._table

    @property
    def table_version(self) -> str:
        """Its version, or an empty string."""
        return self._table_version

    @property
    def waiting(self) -> int:
        """Calls that wait for admission, or for an endpoint."""
        return self.router.held + self.admission.waiting

    @property
    def estimates(self) -> EstimateTable:
        """The forecasts, as given."""
        return self._forecaster.estimates

    @property
    def workflows(self) -> tuple[Workflow, ...]:
        """The graphs known so far."""
        return tuple(self._workflows.values())

    # Policy, table, trace, workflows

    def set_policy(self, text: str) -> None:
        """Switch to a policy with a fresh router; held calls move over.

        Calls in flight end with the router that sent them; the new one does not count them, so
        switch in quiet moments where loads matter.

        Raises
        ------
        InvalidInput
            If the text names no policy or parameter; the old policy stays.
        """
        fresh = self._new_dispatcher(text)
        old, self._dispatcher = self._dispatcher, fresh
        self.policy_text = text
        self._errors = _ErrorStats()
        self._runs_kept.clear()
        old.move_held()

    def set_table(self, table: DispatchTable) -> None:
        """Swap the dispatch table; decisions already made stay.

        Raises
        ------
        InvalidInput
            If it was made for another fleet; the old table stays.
        """
        self._set_table(table)
        self.table_since_s = self.clock.now_s()
        self._activate(table)

    def set_fleet(self, wanted: Fleet) -> FleetChange:
        """Serve with these endpoints from now on; calls in flight end where they are.

        The table stays while no endpoint is new to it; else it is out of its range until another
        one is loaded.

        Raises
        ------
        InvalidInput
            If an endpoint has no address; nothing is changed.
        """
        _check_addresses(wanted)
        change = merge(self.fleet, self.absent, wanted)
        self.fleet, self.absent = change.fleet, change.absent
        here = present(change.fleet, change.absent).endpoints
        self.models = tuple(dict.fromkeys(endpoint.model for endpoint in here))
        self.guard.refit(change.fleet.endpoints)
        for index in (*change.left, *change.moved):
            self.scraper.forget(index)
        self.router.refit(change.fleet)
        for index in change.left:
            self._dispatcher.endpoint_down(index)
        table = self._table
        if table is not None:
            if {endpoint.id for endpoint in here} <= set(table.endpoints):
                self._activate(table)
            else:
                self._activate(None)
                _log.warning("table dropped: endpoints are new", extra={"table": table.version})
        return change

    def reconfigure(self, config: GatewayConfig) -> None:
        """Go on with other settings; those read at the start only stay as they were."""
        self.config = self.guard.config = config
        self.scraper.stale_s = config.scrape_stale_s * self.clock.dilation
        self.admission.set_limits(limits_of(config), self.tenancy.tenants)

    def set_tenancy(self, tenancy: KeyedTenancy) -> None:
        """Tell tenants apart by other keys; calls under way go on."""
        self.tenancy = tenancy
        self.admission.set_limits(limits_of(self.config), tenancy.tenants)

    def set_trace(self, path: Path | None, **header: Any) -> None:
        """Close the trace in use, if any, and open another one, if any.

        Raises
        ------
        InvalidInput
            If the new file cannot be written; the old trace stays open.
        """
        fresh = None
        if path is not None:
            facts = {
                "source": "gateway",
                "fleet": self.fleet.name,
                "fleet_hash": self.fleet.content_hash(),
                "policy": self.policy_text,
                "dilation": self.clock.dilation,
                **header,
            }
            fresh = TraceWriter(path, now_s=self.clock.now_s(), header=facts)
        old, self._trace = self._trace, fresh
        # Each trace is an account of its own: the runs of a repetition may bear the same ids.
        self.runs.forget_ended()
        if old is not None:
            old.close()

    def add_workflow(self, workflow: Workflow) -> None:
        """Learn a workflow graph; one that is known already costs nothing."""
        key = workflow.content_hash
        self._by_name[workflow.name] = workflow
        if key in self._workflows:
            return
        self._forecaster.add_workflow(workflow, seed=self.config.seed)
        self._workflows[key] = workflow
        estimate = self._forecaster.estimates.workflows.get(key)
        runs: Sequence[RunSpec] = ()
        if estimate is not None:
            runs = scenarios(
                workflow,
                estimate,
                _ARRIVAL_RUNS,
                self.config.seed,
                defaults=self._forecaster.estimates,
            )
            self._arrivals[key] = ArrivalForecast(runs, self.fleet)
            self.sampled[key] = runs
        self.endings.add_workflow(workflow, runs)

    def close(self) -> None:
        """Write the records of runs still open, and close the trace."""
        for run in self.runs.active():
            self._end_span(run, "ok")
            record = self.runs.end(run.run_id, run.last_s, "ok")
            if record is not None:
                self._write(record)
        self.set_trace(None)
        self.tracing.close()

    # Calls

    async def place(self, call: Call, exclude: frozenset[int], attempt: int) -> Ticket:
        """Return a ticket for an attempt; see `Dispatcher.place`."""
        while True:
            aside, trial = self._aside(call, exclude)
            try:
                ticket = await self._dispatcher.place(call, aside, attempt)
            except Moved:
                continue
            finally:
                # Its end will say how it went; where it is not sent after all, nothing will.
                if trial is not None and not self.router.on(call.call_id, trial):
                    self.breakers[trial].end_trial()
            send = ticket.send
            endpoint_id = self.fleet.endpoints[send.endpoint].id
            self.metrics.decisions.inc(self.router.policy.name, send.reason)
            self.metrics.selected.inc(endpoint_id)
            self.journal.sent(ticket, self.router.policy.name)
            if call.prompt_tokens > 0:
                self.metrics.prefix_match.observe(send.cached_tokens / call.prompt_tokens)
            if self.recent is not None and call.workflow_hash in self._workflows:
                self.recent.decided(covered=send.reason != "fallback")
            return ticket

    def _aside(self, call: Call, exclude: frozenset[int]) -> tuple[frozenset[int], int | None]:
        """Return the endpoints a call may not go to, and the one it has to try, if any."""
        spared = self.guard.health.spared(call.model) - self.absent
        if not spared:
            return exclude, None
        if not exclude and (trial := self.guard.health.trial(spared)) is not None:
            others = frozenset(range(len(self.fleet.endpoints))) - {trial}
            if self.router.servable(call, others):
                self.breakers[trial].begin_trial()
                return others, trial
        # Where nobody else can take it, one on trial is better than none.
        aside = exclude | spared
        return (aside if self.router.servable(call, aside) else exclude), None

    def patience(
        self, ticket: Ticket, *, streams: bool, attempt: int, exclude: frozenset[int]
    ) -> Patience:
        """Return how long an attempt just decided is waited for."""
        beyond = exclude | {ticket.send.endpoint}
        return self.guard.patience(
            ticket,
            self.router,
            streams=streams,
            attempt=attempt,
            last=attempt >= self.config.retries,
            elsewhere=lambda: self.others(ticket.call, beyond),
        )

    def others(self, call: Call, exclude: frozenset[int]) -> bool:
        """Return whether an endpoint that is up and not excluded could take a call."""
        return self.router.servable(call, exclude)

    def service_s(self, call: Call, output_tokens: float) -> float:
        """Return the engine seconds of service a call needs alone on the best endpoint for it."""
        return self.router.view.alone_s(call.model, call.prompt_tokens, output_tokens)

    def room_tokens(self, model: str | None) -> int:
        """Return the longest sequence an endpoint of the model can hold, be it up or down."""
        return self.router.view.room_tokens(model)

    def identify(
        self, headers: Mapping[str, str], payload: Mapping[str, Any], prompt: Prompt, tenant: Tenant
    ) -> Identity:
        """Return who sent a request; names of one tenant are never those of another."""
        found = identify(
            headers,
            payload,
            prompt,
            session_headers=self.config.session_headers,
            session_fields=self.config.session_fields,
        )
        if tenant is not ANYONE:
            found = replace(
                found,
                run_id=_owned(tenant, found.run_id),
                parent_id=found.parent_id and _owned(tenant, found.parent_id),
            )
        if found.source == "session" and found.session_id == payload.get("previous_response_id"):
            # Each answer has an id of its own: the chain of them is the session.
            known = self.runs.of_answer(found.session_id or "")
            if known is not None and (tenant is ANYONE or known.startswith(f"{tenant.name}/")):
                return replace(found, run_id=known)
        return found

    def hints(
        self, headers: Mapping[str, str], payload: Mapping[str, Any], tenant: Tenant
    ) -> Hints:
        """Return what a request says of itself; what makes no sense is counted.

        Among tenants the operator says who goes first: their clients may only step back.
        """
        hints = read_hints(headers, payload, self.config.hint_sources)
        for name in hints.ignored:
            self.metrics.hints_ignored.inc(name)
        return hints if tenant is ANYONE else stepping_back(hints)

    def begin_call(self, identity: Identity, tenant: Tenant) -> Run:
        """Return the run of a call that arrives now, with the call counted."""
        known = self.runs.find(identity.run_id)
        if known is not None and known.calls and not known.open_calls:
            self.endings.paused(known, self.clock.now_s() - known.last_s)
        run = self.run_of(identity, tenant.name)
        run.node, run.visit = identity.node or run.node, identity.visit
        run.calls += 1
        run.open_calls += 1
        return run

    def resume_run(self, run: Run) -> None:
        """Go on with a run that was in progress before a restart."""
        if self.runs.find(run.run_id) is None:
            self.runs.add(run)
            self._begun(run)

    def _begun(self, run: Run) -> None:
        facts = {"run_id": run.run_id, "workflow_hash": run.workflow_hash, "source": run.source}
        run.span = self.tracing.start("run", facts)
        now_s = self.clock.now_s()
        if self.recent is not None:
            self.recent.arrived(run.run_id, run.workflow_hash, now_s)
        self._tell(
            RunStarted(
                run_id=run.run_id,
                workflow_hash=run.workflow_hash,
                now_s=now_s,
                tenant=run.tenant,
            )
        )

    def _end_span(self, run: Run | None, status: str) -> None:
        if run is not None and run.span is not None:
            run.span.set_attribute("almanac.status", status)
            run.span.set_attribute("almanac.calls", run.calls)
            run.span.end()
            run.span = None

    def run_of(self, identity: Identity, tenant: str = ANYONE.name) -> Run:
        """Return the run a call or event belongs to, starting it if it is new."""
        now_s = self.clock.now_s()
        run = self.runs.find(identity.run_id)
        if run is None:
            given = identity.workflow
            # Known names are accepted too; of anything else the client's word is kept as hash.
            workflow = self._workflows.get(given) or self._by_name.get(given)
            key = workflow.content_hash if workflow else given
            forecast_s = self._run_forecast(key)
            kept = self._runs_kept.get(key)
            parent = self.runs.find(identity.parent_id) if identity.parent_id else None
            run = Run(
                run_id=identity.run_id,
                tenant=tenant,
                parent_id=identity.parent_id,
                source=identity.source,
                since_s=now_s if parent is None else parent.since_s,
                workflow=workflow.name if workflow else "",
                workflow_hash=key,
                session_id=identity.session_id,
                arrival_s=now_s,
                forecast_s=forecast_s,
                predicted_s=(
                    forecast_s
                    if forecast_s is None or kept is None
                    else kept.tracker.correct(forecast_s)
                ),
                last_s=now_s,
            )
            self.runs.add(run)
            self._begun(run)
        run.last_s = now_s
        return run

    def end_session(self, name: str, tenant: Tenant) -> int:
        """End the runs in progress that are, or belong to, what a client calls by a name.

        Returns
        -------
        int
            How many ended; 0 for a name nobody has, which is no error.
        """
        own = name if tenant is ANYONE else _owned(tenant, name)
        ended = [
            run.run_id
            for run in self.runs.active()
            if run.run_id == own or (run.session_id == name and run.tenant == tenant.name)
        ]
        return sum(self.end_run(run_id) for run_id in ended)

    def end_run(self, run_id: str, status: str = "ok") -> bool:
        """End a run, and those it started that have nothing under way.

        Returns
        -------
        bool
            Whether it was in progress.
        """
        now_s = self.clock.now_s()
        run = self.runs.find(run_id)
        for child in reversed(self.runs.below(run_id)):
            if not child.open_calls:
                self.end_run(child.run_id, status)
        self._end_span(run, status)
        record = self.runs.end(run_id, now_s, status)
        if record is None:
            return False
        if run is not None and run.forecast_s is not None and self.config.online and status == "ok":
            kept = self._runs_kept.setdefault(run.workflow_hash, _median())
            kept.update(run.forecast_s, now_s - run.arrival_s)
        self._write(record)
        self._tell(RunEnded(run_id=run_id, now_s=now_s))
        return True

    def expire_runs(self) -> None:
        """End the runs nothing was heard of for long."""
        now_s = self.clock.now_s()
        idle_s, done_s = self.config.run_idle_s, self.config.run_done_idle_s
        silent = {run.run_id: run for run in self.runs.active()}
        for record in self.runs.expire(
            now_s, lambda run: self.endings.patience_s(run, idle_s=idle_s, done_s=done_s)
        ):
            self._end_span(silent[record.run_id], "silent")
            self._write(record)
            self._tell(RunEnded(run_id=record.run_id, now_s=now_s))

    def take_events(self, events: Sequence[Any], tenant: Tenant = ANYONE) -> int:
        """Apply lifecycle events; return how many were understood. The others are counted."""
        taken = 0
        for event in events:
            kind = _text(event, "type") if isinstance(event, dict) else ""
            understood = kind in _EVENTS and self._take(kind, event, tenant)
            taken += understood
            self.metrics.events.inc(kind if kind in _EVENTS else "unknown", str(understood).lower())
        return taken

    def _take(self, kind: str, event: dict[str, Any], tenant: Tenant) -> bool:
        run_id = _text(event, "run_id")
        if not run_id:
            return False
        if tenant is not ANYONE:
            run_id = _owned(tenant, run_id)
        if kind == "run_end":
            return self.end_run(run_id, _status(event))
        if kind == "run_start" and event.get("resumed") is True:
            self.runs.reopen(run_id)
        run = self.run_of(
            Identity(
                run_id=run_id,
                workflow=_text(event, "workflow_hash") or _text(event, "workflow"),
                session_id=_text(event, "session_id") or None,
                source="run",
            ),
            tenant.name,
        )
        run.workflow = run.workflow or _text(event, "workflow")
        run.workflow_hash = run.workflow_hash or _text(event, "workflow_hash")
        run.session_id = run.session_id or _text(event, "session_id") or None
        now_s = self.clock.now_s()
        visit = event.get("visit")
        visit = visit if isinstance(visit, int) and visit >= 0 else 0
        node = _text(event, "node")
        if kind == "tool_start":
            self._tell(ToolStarted(run_id=run_id, node=node, now_s=now_s))
            self.runs.tool_started(run, node, visit, now_s)
        elif kind == "tool_end":
            record = self.runs.tool_ended(run, node, visit, now_s, _status(event))
            if record is None:
                return False
            self._tell(ToolFinished(run_id=run_id, node=node, now_s=now_s))
            self._write(record)
        elif kind == "branch":
            branch, outcome = _text(event, "branch"), _text(event, "outcome")
            if not branch or not outcome:
                return False
            self._tell(BranchTaken(run_id=run_id, branch=branch, outcome=outcome, now_s=now_s))
            self._write(self.runs.branch_taken(run, branch, outcome, visit, now_s))
        return True

    # Endpoints

    def endpoint_failed(self, index: int, reason: str, *, unreachable: bool = False) -> None:
        """Note a failure of an endpoint; it may go down by it."""
        self.guard.failed(index, reason, unreachable=unreachable)

    def endpoint_refused(self, index: int) -> None:
        """Note that an endpoint was too busy to take a call."""
        self.guard.refused(index)

    def endpoint_recovered(self, index: int) -> None:
        """Take somebody's word that an endpoint is well again; calls will tell."""
        if index not in self.absent:
            self.guard.recovered(index)

    def endpoint_probed(self, index: int, *, well: bool, boot_s: float | None = None) -> None:
        """Note what a health check said; see `Guard.probed`."""
        if index not in self.absent:
            self.guard.probed(index, well=well, boot_s=boot_s)

    def drain(self, index: int) -> None:
        """Send no new call to an endpoint; those it has go on."""
        self.guard.drain(index)

    def undrain(self, index: int) -> None:
        """Take a drain back."""
        if index not in self.absent:
            self.guard.undrain(index)

    def to_probe(self) -> list[int]:
        """Return the endpoints whose health is to be looked at now."""
        return [index for index in self.guard.to_probe() if index not in self.absent]

    def retry_after_s(self, model: str | None = None) -> float:
        """Return when a refused client may try again.

        That is when an endpoint may be back, and has served those who wait already.
        """
        here = [i for i in range(len(self.fleet.endpoints)) if i not in self.absent]
        waiting = self.waiting
        return (
            self.guard.up_in_s(model, here)
            + self.config.probe_interval_s
            + (self.admission.throughput.wait_s(waiting, time.monotonic()) if waiting else 0.0)
        )

    def endpoint_down(self, index: int) -> None:
        """Tell the router; see `runtime.guard.Switch`."""
        self._dispatcher.endpoint_down(index)

    def endpoint_up(self, index: int, *, cold: bool) -> None:
        """Tell the router; see `runtime.guard.Switch`."""
        if index not in self.absent:
            self._dispatcher.endpoint_up(index, cold=cold)

    def move_held(self) -> None:
        """Place every held call anew; see `runtime.guard.Switch`."""
        self._dispatcher.move_held()

    # Views

    def metrics_text(self) -> str:
        """Return the Prometheus exposition."""
        learner = self.router.learner
        self.guard.gauge()
        self._gauge_engines()
        self.admission.gauge(self.metrics)
        if self._table is not None:
            self.metrics.table_age.set(self.clock.now_s() - self.table_since_s)
        return self.metrics.render(
            self.router.view,
            held=self.waiting,
            runs=len(self.runs),
            learned=learner.rows if learner else (),
            absent=self.absent,
        )

    def _gauge_engines(self) -> None:
        """Set what the engines say; what is stale is left out, not shown as it was."""
        metrics = self.metrics
        for gauge in (metrics.engine_running, metrics.engine_waiting, metrics.engine_kv):
            gauge.clear()
        for index, endpoint in enumerate(self.fleet.endpoints):
            report = self.scraper.report(index, self.clock.now_s())
            if report is not None and index not in self.absent:
                for gauge, value in (
                    (metrics.engine_running, report.running),
                    (metrics.engine_waiting, report.waiting),
                    (metrics.engine_kv, report.kv_usage),
                ):
                    if value is not None:
                        gauge.set(value, endpoint.id)

    def diagnostics(self) -> dict[str, Any]:
        """Return what the router knows and how good its forecasts are, JSON-ready."""
        lengths = self.router.lengths
        return {
            "online": self.config.online,
            "policy": self.policy_text,
            "table_version": self._table_version,
            "table_age_s": None
            if self._table is None
            else round(self.clock.now_s() - self.table_since_s, 3),
            "replanning": self.replanning() if self.replanning else None,
            "processes": self.processes() if self.processes else None,
            "estimates_version": self._forecaster.estimates.version,
            "fleet": {"name": self.fleet.name, "hash": self.fleet.content_hash()},
            "clock_s": round(self.clock.now_s(), 3),
            "dilation": self.clock.dilation,
            "trace": str(self._trace.path) if self._trace else None,
            "in_flight": self.router.in_flight,
            "held": self.router.held,
            "admission": self.admission.to_json(),
            "time_limits": self.guard.limits_json(),
            "runs_active": len(self.runs),
            "workflows": {key: one.name for key, one in self._workflows.items()},
            "forecast": self._errors.to_json(),
            "runs": {key: kept.to_json() for key, kept in self._runs_kept.items()},
            "lengths": [kept.to_json() for kept in lengths.kept] if lengths else [],
            "endpoints": [
                {
                    "id": state.endpoint.id,
                    "url": state.endpoint.url,
                    "model": state.endpoint.model,
                    "up": state.healthy,
                    "health": self.guard.to_json(state.index),
                    "in_flight": state.in_flight,
                    "decoding": state.decoding,
                    "prefill_tokens": round(state.prefill_tokens, 1),
                    "context_tokens": round(state.context_tokens, 1),
                    "prefix_tokens": round(state.prefix.held_tokens, 1),
                    "latency": self._latency(state.index),
                    "engine": self.scraper.to_json(state.index, self.clock.now_s()),
                }
                for state in self.router.view.states
                if state.index not in self.absent
            ],
        }

    # Inside

    def _latency(self, index: int) -> dict[str, Any]:
        """Return the row in use, and how it came about where it is learned online."""
        state, learner = self.router.view.states[index], self.router.learner
        facts: dict[str, Any] = {"row": asdict(state.latency)}
        if learner is not None:
            row = learner.rows[index]
            facts |= {
                "observations": row.observations,
                "drift_ratio": round(row.ratio, 4),
                "drifting": row.drifting,
            }
        return facts

    def _new_dispatcher(self, text: str) -> Dispatcher:
        name, parameters = parse_policy(text)
        policy: Policy
        if name == Planned.name:
            given: dict[str, Any] = {**parameters, "table": self._spread(self._table)}
            policy = make_policy(name, seed=self.config.seed, **given)
        else:
            policy = make_policy(name, seed=self.config.seed, **parameters)
        dispatcher = Dispatcher(
            Router(self.fleet, policy, self._forecaster, online=self.config.online),
            self.clock,
            self._ended,
            table_version=self._table_version if name == Planned.name else "",
            hold_limit=self.config.hold_limit,
            hold_timeout_s=self.config.hold_timeout_s,
        )
        for index, breaker in enumerate(self.breakers):
            if not breaker.takes_calls or index in self.absent:
                dispatcher.endpoint_down(index)
        return dispatcher

    def _set_table(self, table: DispatchTable) -> None:
        table.check_fleet(present(self.fleet, self.absent))
        self._table, self._table_version = table, table.version

    def _spread(self, table: DispatchTable | None) -> DispatchTable | None:
        """Return a table as the router reads it, in the order of all places of the fleet."""
        ids = tuple(str(endpoint.id) for endpoint in self.fleet.endpoints)
        return table if table is None or ids == table.endpoints else table.spread(ids)

    def _activate(self, table: DispatchTable | None) -> None:
        """Give the router a table that was checked, or none."""
        self._table = table
        self._table_version = "" if table is None else table.version
        if isinstance(self.router.policy, Planned):
            self.router.policy.table = self._spread(table)
            self._dispatcher.table_version = self._table_version

    def _ended(self, record: CallRecord) -> None:
        self.metrics.outcomes.inc(record.endpoint, record.status)
        index = self.fleet.index_of(EndpointId(record.endpoint))
        if record.status == "ok":
            self._errors.add(record)
            self.guard.succeeded(index, record, self.router)
        else:
            self.breakers[index].end_trial()
        self._write(record)

    def _tell(self, event: Event) -> None:
        self._dispatcher.handle(event)

    def _write(self, record: TraceRecord) -> None:
        self.journal.add(record)
        if self.recent is not None:
            self.recent.add(record)
        if self._trace is None:
            return
        try:
            self._trace.write(record)
        except OSError as error:
            # A full disk must not fail calls.
            _log.error("trace given up", extra={"path": str(self._trace.path), "error": str(error)})
            trace, self._trace = self._trace, None
            with contextlib.suppress(OSError):
                trace.close()

    def _run_forecast(self, key: str) -> float | None:
        """Return seconds of a run that arrives now, None without forecasts for its workflow.

        While nothing corrects it, the mean learned from traces is the better one: the ladder of
        `ArrivalForecast` takes all endpoints as equally loaded.
        """
        if not self.config.online:
            workflow = self._workflows.get(key)
            estimate = self._forecaster.estimates.workflows.get(key)
            if workflow is not None and estimate is not None:
                starts = [n for n in workflow.successors[START] if n in estimate.remaining_s]
                if starts:
                    return max(estimate.remaining_s[node] for node in starts)
        forecast = self._arrivals.get(key)
        if forecast is None:
            return None
        return forecast.at(self.router.in_flight / len(self.fleet.endpoints))


def _check_addresses(fleet: Fleet) -> None:
    for position, endpoint in enumerate(fleet.endpoints):
        if endpoint.url is None:
            raise InvalidInput(
                f"endpoint {endpoint.id!r} has no address",
                where=f"workers[{position}].url",
                remedy="add url: http://host:port",
            )


def _owned(tenant: Tenant, name: str) -> str:
    """Return a run's id as it is known here: clients of two tenants may choose the same."""
    return f"{tenant.name}/{name}"


def limits_of(config: GatewayConfig) -> Limits:
    """Return the gateway's own limits."""
    return Limits(
        max_in_flight=config.max_in_flight,
        queue_limit=config.queue_limit,
        queue_timeout_s=config.queue_timeout_s,
        ageing_s=config.ageing_s,
    )


def _median() -> Kept:
    return Kept(QuantileTracker(level=0.5))


_EVENTS = frozenset({"run_start", "run_end", "tool_start", "tool_end", "branch"})
_STATUSES = frozenset({"ok", "failed", "cancelled"})


def _text(event: dict[str, Any], name: str) -> str:
    value = event.get(name)
    return value[:200] if isinstance(value, str) else ""


def _status(event: dict[str, Any]) -> str:
    value = event.get("status", "ok")
    if value == "interrupted":  # it waits for a human and may go on under the same id
        return "cancelled"
    return value if value in _STATUSES else "failed"


class _ErrorStats:
    """Forecast against actual service of the calls that ended well, in engine seconds."""

    __slots__ = ("_absolute_s", "_actual_s", "_calls", "_kept", "_signed_s")

    def __init__(self) -> None:
        self._kept = [Kept(QuantileTracker(level=level)) for level in (0.5, 0.9)]
        self._calls = 0
        self._signed_s = self._absolute_s = self._actual_s = 0.0

    def add(self, record: CallRecord) -> None:
        if record.predicted_finish_s is None or record.finish_s is None:
            return
        error_s = record.predicted_finish_s - record.finish_s
        self._calls += 1
        self._signed_s += error_s
        self._absolute_s += abs(error_s)
        self._actual_s += record.finish_s - record.sent_s
        for kept in self._kept:
            kept.update(
                max(0.0, record.predicted_finish_s - record.sent_s),
                record.finish_s - record.sent_s,
            )

    def to_json(self) -> dict[str, Any]:
        calls = self._calls
        return {
            "calls": calls,
            "mean_actual_s": self._actual_s / calls if calls else None,
            "mean_error_s": self._signed_s / calls if calls else None,
            "mean_absolute_error_s": self._absolute_s / calls if calls else None,
            # How often a call was done by its forecast, and by it as corrected to that level.
            "quantiles": [kept.to_json() for kept in self._kept],
        }
