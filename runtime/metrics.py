"""The gateway's own metrics, under one prefix, in base units, with bounded labels."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from planner.dispatch.online import OnlineLatency
from planner.dispatch.view import FleetView
from runtime.prometheus import Counter, Gauge, Histogram, Registry

__all__ = ["GatewayMetrics"]

_LATENCY_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640,
)  # fmt: skip
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_OVERHEAD_S = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)


class GatewayMetrics:
    """All metrics of one gateway process; latencies are wall seconds.

    Parameters
    ----------
    label_limit
        Label combinations of one metric; further ones count as ``other``.
    """

    def __init__(self, *, label_limit: int = 1000) -> None:
        self.requests = Counter("almanac_requests_total", "Requests answered", ("model", "status"))
        self.duration = Histogram(
            "almanac_request_duration_seconds", "Request to last byte", _LATENCY_S, ("model",)
        )
        self.ttft = Histogram(
            "almanac_ttft_seconds", "Request to first byte of a stream", _LATENCY_S, ("model",)
        )
        self.overhead = Histogram(
            "almanac_router_overhead_seconds",
            "Reading, fingerprint and decision, before the request is sent on",
            _OVERHEAD_S,
        )
        self.decisions = Counter("almanac_decisions_total", "Choices made", ("policy", "reason"))
        self.selected = Counter("almanac_worker_selection_total", "Attempts sent", ("endpoint",))
        self.outcomes = Counter("almanac_attempts_total", "Attempts ended", ("endpoint", "status"))
        self.retries = Counter(
            "almanac_retries_total",
            "Further attempts, by what failed before",
            ("endpoint", "reason"),
        )
        self.cut = Counter(
            "almanac_streams_cut_total",
            "Answers that ended with an error event",
            ("endpoint", "reason"),
        )
        self.hedges = Counter("almanac_hedges_total", "Late calls sent twice", ("outcome",))
        self.breaker = Gauge("almanac_cb_state", "0 closed, 1 half-open, 2 open", ("endpoint",))
        self.transitions = Counter(
            "almanac_cb_transitions_total", "Changes of state", ("endpoint", "to")
        )
        self.draining = Gauge(
            "almanac_worker_draining", "1 if it takes no new calls", ("endpoint",)
        )
        self.restarts = Counter("almanac_worker_restarts_total", "Restarts noticed", ("endpoint",))
        self.rejections = Counter(
            "almanac_rejections_total", "Calls refused by the gateway", ("reason", "tenant")
        )
        self.queue_wait = Histogram(
            "almanac_queue_wait_seconds", "Wait for admission and for an endpoint", _LATENCY_S
        )
        self.tenant_service = Gauge(
            "almanac_tenant_service_seconds", "Predicted service admitted", ("tenant",)
        )
        self.tenant_queue = Gauge(
            "almanac_tenant_queue_depth", "Calls waiting for admission", ("tenant",)
        )
        self.fairness = Gauge(
            "almanac_jains_fairness_index", "Of the tenants' service per weight, 1 is even"
        )
        self.events = Counter("almanac_events_total", "Lifecycle events", ("type", "taken"))
        self.active = Gauge("almanac_worker_requests_active", "Calls in flight", ("endpoint",))
        self.health = Gauge("almanac_worker_health", "1 up, 0 down", ("endpoint",))
        self.drift = Gauge(
            "almanac_worker_drift_ratio",
            "Observed over expected seconds of late, 1 as learned at first",
            ("endpoint",),
        )
        self.drifting = Gauge(
            "almanac_worker_drifting", "1 if slower than it was for long", ("endpoint",)
        )
        self.queue = Gauge(
            "almanac_queue_depth", "Calls waiting for admission, or held in the router"
        )
        self.runs = Gauge("almanac_program_active", "Runs in progress")
        self.replans = Counter(
            "almanac_replans_total", "Plans asked for, by cause and outcome", ("reason", "outcome")
        )
        self.table_age = Gauge("almanac_table_age_seconds", "Since the table in use went live")
        self.prefix_match = Histogram(
            "almanac_prefix_match_ratio",
            "Share of a prompt expected in the cache of its endpoint",
            _SHARES,
        )
        self.hints_ignored = Counter(
            "almanac_hints_ignored_total", "Hints that could not be read", ("hint",)
        )
        self.engine_running = Gauge(
            "almanac_worker_engine_running", "Running by the engine's own word", ("endpoint",)
        )
        self.engine_waiting = Gauge(
            "almanac_worker_engine_waiting", "Waiting by the engine's own word", ("endpoint",)
        )
        self.engine_kv = Gauge(
            "almanac_worker_kv_usage_ratio", "KV pool in use by the engine's word", ("endpoint",)
        )
        self._registry = Registry(
            (
                self.requests, self.duration, self.ttft, self.overhead, self.decisions,
                self.selected, self.outcomes, self.retries, self.events, self.active, self.health,
                self.drift, self.drifting, self.queue, self.runs, self.replans, self.table_age,
                self.cut, self.hedges, self.breaker, self.transitions, self.draining, self.restarts,
                self.rejections, self.queue_wait, self.tenant_service, self.tenant_queue,
                self.fairness, self.prefix_match, self.hints_ignored, self.engine_running,
                self.engine_waiting, self.engine_kv,
            ),
            label_limit=label_limit,
        )  # fmt: skip

    def drain(self) -> list[Any]:
        """Return what was counted since the last drain, for `merge` in another process."""
        return self._registry.drain()

    def merge(self, counted: Sequence[Any]) -> None:
        """Count what another process of this gateway has counted."""
        self._registry.merge(counted)

    def render(
        self,
        view: FleetView,
        *,
        held: int,
        runs: int,
        learned: Sequence[OnlineLatency] = (),
        absent: Container[int] = (),
    ) -> str:
        """Return the exposition text, with the gauges as they are now.

        ``learned`` are the endpoints' learners in the view's order, or nothing; ``absent`` the
        places whose endpoint has left the fleet.
        """
        for gauge in (self.active, self.health, self.drift, self.drifting):
            gauge.clear()
        here = [state for state in view.states if state.index not in absent]
        if learned:
            for state in here:
                row = learned[state.index]
                self.drift.set(row.ratio, state.endpoint.id)
                self.drifting.set(float(row.drifting), state.endpoint.id)
        for state in here:
            self.active.set(state.in_flight, state.endpoint.id)
            self.health.set(float(state.healthy), state.endpoint.id)
        self.queue.set(held)
        self.runs.set(runs)
        return self._registry.render()
