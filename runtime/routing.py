"""The router in use: its policy, its table and its fleet may each be exchanged while calls wait.

A policy comes with a fresh router; a table and a fleet are given to the one there is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from planner.dispatch.events import Event
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import Policy, make_policy, parse_policy
from planner.dispatch.policies.planned import Planned
from planner.dispatch.router import Router
from planner.dispatch.table import DispatchTable
from planner.domain.fleet import Fleet
from planner.domain.trace import CallRecord
from runtime.clock import Clock
from runtime.config import GatewayConfig
from runtime.dispatcher import Dispatcher
from runtime.fleets import FleetChange, present
from runtime.health import FleetHealth

__all__ = ["Routing"]

_log = logging.getLogger(__name__)


class Routing:
    """Makes routers and exchanges what they decide by; see also `runtime.guard.Switch`.

    Parameters
    ----------
    fleet
        Endpoints at the start.
    forecaster
        Of calls; all routers share it.
    policy
        ``name`` or ``name:key=value,...``.
    table
        Dispatch table for the ``almanac`` policy, or None.
    health
        Says which endpoints a fresh router may send to.
    config
        Settings; assign it when they change.
    clock
        For all times given to the router.
    ended
        Takes the record of each settled attempt.

    Attributes
    ----------
    dispatcher
        The router in use, with the calls it holds.
    policy_text
        As given.
    table, table_version
        The dispatch table in use, or None; its version, or an empty string.

    Raises
    ------
    InvalidInput
        If policy or table do not fit.
    """

    def __init__(
        self,
        fleet: Fleet,
        forecaster: Forecaster,
        *,
        policy: str,
        table: DispatchTable | None,
        health: FleetHealth,
        config: GatewayConfig,
        clock: Clock,
        ended: Callable[[CallRecord], None],
    ) -> None:
        self.config = config
        self._fleet = fleet
        self._absent: frozenset[int] = frozenset()
        self._forecaster = forecaster
        self._health = health
        self._clock = clock
        self._ended = ended
        if table is not None:
            table.check_fleet(fleet)
        self.table = table
        self.table_version = "" if table is None else table.version
        self._table_since_s = 0.0
        self.policy_text = policy
        self.dispatcher = self._new_dispatcher(policy)

    @property
    def router(self) -> Router:
        """The router in use."""
        return self.dispatcher.router

    @property
    def table_age_s(self) -> float | None:
        """Clock seconds since the table went live; None without one."""
        return None if self.table is None else self._clock.now_s() - self._table_since_s

    def load(self) -> float:
        """Return calls in flight per endpoint."""
        return self.router.in_flight / len(self._fleet.endpoints)

    def tell(self, event: Event) -> None:
        """Give the router an event."""
        self.dispatcher.handle(event)

    # Exchanges

    def set_policy(self, text: str) -> None:
        """See `runtime.control.Control.set_policy`."""
        fresh = self._new_dispatcher(text)
        old, self.dispatcher = self.dispatcher, fresh
        self.policy_text = text
        old.move_held()

    def set_table(self, table: DispatchTable) -> None:
        """See `runtime.control.Control.set_table`."""
        table.check_fleet(present(self._fleet, self._absent))
        self._table_since_s = self._clock.now_s()
        self._activate(table)

    def refit(self, change: FleetChange) -> None:
        """Go on with a changed fleet; a table stays while no endpoint is new to it."""
        self._fleet, self._absent = change.fleet, change.absent
        self.router.refit(change.fleet)
        for index in change.left:
            self.dispatcher.endpoint_down(index)
        table = self.table
        if table is not None:
            here = present(change.fleet, change.absent).endpoints
            if {endpoint.id for endpoint in here} <= set(table.endpoints):
                self._activate(table)
            else:
                self._activate(None)
                _log.warning("table dropped: endpoints are new", extra={"table": table.version})

    def _new_dispatcher(self, text: str) -> Dispatcher:
        config = self.config
        name, parameters = parse_policy(text)
        policy: Policy
        if name == Planned.name:
            given: dict[str, Any] = {**parameters, "table": self._spread(self.table)}
            policy = make_policy(name, seed=config.seed, **given)
        else:
            policy = make_policy(name, seed=config.seed, **parameters)
        dispatcher = Dispatcher(
            Router(self._fleet, policy, self._forecaster, online=config.online),
            self._clock,
            self._ended,
            table_version=self.table_version if name == Planned.name else "",
            hold_limit=config.hold_limit,
            hold_timeout_s=config.hold_timeout_s,
        )
        for index, breaker in enumerate(self._health.breakers):
            if not breaker.takes_calls or index in self._absent:
                dispatcher.endpoint_down(index)
        return dispatcher

    def _spread(self, table: DispatchTable | None) -> DispatchTable | None:
        """Return a table as the router reads it, in the order of all places of the fleet."""
        ids = tuple(str(endpoint.id) for endpoint in self._fleet.endpoints)
        return table if table is None or ids == table.endpoints else table.spread(ids)

    def _activate(self, table: DispatchTable | None) -> None:
        """Give the router a table that was checked, or none."""
        self.table = table
        self.table_version = "" if table is None else table.version
        if isinstance(self.router.policy, Planned):
            self.router.policy.table = self._spread(table)
            self.dispatcher.table_version = self.table_version

    # Endpoints that take calls, or not

    def endpoint_down(self, index: int) -> None:
        """See `runtime.guard.Switch`."""
        self.dispatcher.endpoint_down(index)

    def endpoint_up(self, index: int, *, cold: bool) -> None:
        """See `runtime.guard.Switch`; one that is absent stays down."""
        if index not in self._absent:
            self.dispatcher.endpoint_up(index, cold=cold)

    def move_held(self) -> None:
        """See `runtime.guard.Switch`."""
        self.dispatcher.move_held()
