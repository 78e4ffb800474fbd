"""The state of a gateway process: what calls are placed by, and what operators may change.

No HTTP here: `runtime.gateway` translates requests into these methods. Everything is synchronous
except `place`, so each call sees and leaves a consistent state.

======================  ======================================================================
part                    idea
======================  ======================================================================
`runtime.routing`       the router in use, its policy and its table
`runtime.guard`         the endpoints' health, and how long attempts are waited for
`runtime.workflows`     the graphs that are known, and what their runs will take
`runtime.lifecycle`     runs from their arrival to their end
`runtime.reports`       the events that agents report of their runs
`runtime.ledger`        where records go
`runtime.accuracy`      how good the forecasts of calls were
`runtime.admission`     who is let in when
======================  ======================================================================

What can be seen of all that is in `runtime.diagnostics`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.dispatch.events import Call
from planner.dispatch.router import Router
from planner.dispatch.table import DispatchTable
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Fleet
from planner.domain.ids import EndpointId
from planner.domain.trace import CallRecord
from planner.domain.workflow import Workflow
from runtime.accuracy import Accuracy
from runtime.admission import Admission
from runtime.clock import Clock
from runtime.config import GatewayConfig
from runtime.dispatcher import Moved, Ticket
from runtime.fingerprint import Prompt, TokenScale
from runtime.fleets import FleetChange, merge, present
from runtime.guard import Guard, Patience
from runtime.health import Breaker
from runtime.hints import Hints, read_hints, stepping_back
from runtime.identity import Identity, identify
from runtime.keys import KeyedTenancy
from runtime.ledger import Ledger
from runtime.lifecycle import Lifecycle
from runtime.limits import ANYONE, Limits, Tenant
from runtime.metrics import GatewayMetrics
from runtime.reports import Reports
from runtime.routing import Routing
from runtime.scraping import Scraper
from runtime.traces import TraceWriter
from runtime.tracing import NoTracing, Tracing
from runtime.workflows import Workflows

__all__ = ["Control"]


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
        self.tenancy = tenancy or KeyedTenancy()
        self.tracing: Tracing = tracing or NoTracing()
        self.scraper = Scraper(self.config.scrape_stale_s * self.clock.dilation)
        self.admission = Admission(
            _limits_of(self.config), now_s=time.monotonic, refused=self.metrics.rejections.inc
        )
        self.guard = Guard(fleet.endpoints, self.config, self.clock, self.metrics)
        self.workflows = Workflows(estimates or EstimateTable(), seed=self.config.seed)
        for workflow in workflows:
            self.add_workflow(workflow)
        self.ledger = Ledger()
        self.accuracy = Accuracy()
        """Of the forecasts made under the policy in use."""
        self.routing = Routing(
            fleet,
            self.workflows.forecaster,
            policy=policy,
            table=table,
            health=self.guard.health,
            config=self.config,
            clock=self.clock,
            ended=self._ended,
        )
        self.guard.switch = self.routing
        self.lifecycle = Lifecycle(
            self.workflows,
            self.ledger,
            config=self.config,
            clock=self.clock,
            tracing=self.tracing,
            tell=self.routing.tell,
            load=self.routing.load,
        )
        self.runs = self.lifecycle.runs
        self.begin_call = self.lifecycle.begin_call
        self.end_run = self.lifecycle.end
        self.reports = Reports(self.lifecycle, self.clock, self.metrics.events)
        self.replanning: Callable[[], dict[str, Any]] | None = None
        """What became of re-planning, for the diagnostics."""
        self.processes: Callable[[], list[dict[str, Any]]] | None = None
        """The worker processes, for the diagnostics, where there are any."""

    @property
    def router(self) -> Router:
        """The router in use."""
        return self.routing.dispatcher.router

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
        return self.routing.table

    @property
    def table_version(self) -> str:
        """Its version, or an empty string."""
        return self.routing.table_version

    @property
    def waiting(self) -> int:
        """Calls that wait for admission, or for an endpoint."""
        return self.router.held + self.admission.waiting

    # Policy, table, fleet, settings, trace, workflows

    def set_policy(self, text: str) -> None:
        """Switch to a policy with a fresh router; held calls move over.

        Calls in flight end with the router that sent them; the new one does not count them, so
        switch in quiet moments where loads matter.

        Raises
        ------
        InvalidInput
            If the text names no policy or parameter; the old policy stays.
        """
        self.routing.set_policy(text)
        self.accuracy = Accuracy()
        self.workflows.kept.clear()

    def set_table(self, table: DispatchTable) -> None:
        """Swap the dispatch table; decisions already made stay.

        Raises
        ------
        InvalidInput
            If it was made for another fleet; the old table stays.
        """
        self.routing.set_table(table)

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
        self.routing.refit(change)
        return change

    def reconfigure(self, config: GatewayConfig) -> None:
        """Go on with other settings; those read at the start only stay as they were."""
        self.config = self.routing.config = self.guard.config = self.lifecycle.config = config
        self.scraper.stale_s = config.scrape_stale_s * self.clock.dilation
        self.admission.set_limits(_limits_of(config), self.tenancy.tenants)

    def set_tenancy(self, tenancy: KeyedTenancy) -> None:
        """Tell tenants apart by other keys; calls under way go on."""
        self.tenancy = tenancy
        self.admission.set_limits(_limits_of(self.config), tenancy.tenants)

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
                "policy": self.routing.policy_text,
                "dilation": self.clock.dilation,
                **header,
            }
            fresh = TraceWriter(path, now_s=self.clock.now_s(), header=facts)
        # Each trace is an account of its own: the runs of a repetition may bear the same ids.
        self.runs.forget_ended()
        self.ledger.set_trace(fresh)

    def add_workflow(self, workflow: Workflow) -> None:
        """Learn a workflow graph; one that is known already costs nothing."""
        self.workflows.add(workflow, self.fleet, seed=self.config.seed)

    def close(self) -> None:
        """Write the records of runs still open, and close the trace."""
        self.lifecycle.close()
        self.set_trace(None)
        self.tracing.close()

    # Calls

    async def place(self, call: Call, exclude: frozenset[int], attempt: int) -> Ticket:
        """Return a ticket for an attempt; see `Dispatcher.place`."""
        while True:
            aside, trial = self._aside(call, exclude)
            try:
                ticket = await self.routing.dispatcher.place(call, aside, attempt)
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
            self.ledger.journal.sent(ticket, self.router.policy.name)
            if call.prompt_tokens > 0:
                self.metrics.prefix_match.observe(send.cached_tokens / call.prompt_tokens)
            recent = self.ledger.recent
            if recent is not None and call.workflow_hash in self.workflows:
                recent.decided(covered=send.reason != "fallback")
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
                run_id=tenant.own(found.run_id),
                parent_id=found.parent_id and tenant.own(found.parent_id),
            )
        if found.source == "session" and found.session_id == payload.get("previous_response_id"):
            # Each answer has an id of its own: the chain of them is the session.
            known = self.runs.of_answer(found.session_id or "")
            if known is not None and known.startswith(tenant.own("")):
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

    def _ended(self, record: CallRecord) -> None:
        self.metrics.outcomes.inc(record.endpoint, record.status)
        index = self.fleet.index_of(EndpointId(record.endpoint))
        if record.status == "ok":
            self.accuracy.add(record)
            self.guard.succeeded(index, record, self.router)
        else:
            self.breakers[index].end_trial()
        self.ledger.write(record)


def _check_addresses(fleet: Fleet) -> None:
    for position, endpoint in enumerate(fleet.endpoints):
        if endpoint.url is None:
            raise InvalidInput(
                f"endpoint {endpoint.id!r} has no address",
                where=f"workers[{position}].url",
                remedy="add url: http://host:port",
            )


def _limits_of(config: GatewayConfig) -> Limits:
    """Return the gateway's own limits."""
    return Limits(
        max_in_flight=config.max_in_flight,
        queue_limit=config.queue_limit,
        queue_timeout_s=config.queue_timeout_s,
        ageing_s=config.ageing_s,
    )
