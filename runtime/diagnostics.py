"""What operators see of a gateway: its metrics, and what the router knows, JSON-ready."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from runtime.control import Control

__all__ = ["diagnostics", "metrics_text"]


def metrics_text(control: Control) -> str:
    """Return the Prometheus exposition."""
    learner, metrics = control.router.learner, control.metrics
    control.guard.gauge()
    _gauge_engines(control)
    control.admission.gauge(metrics)
    age_s = control.routing.table_age_s
    if age_s is not None:
        metrics.table_age.set(age_s)
    return metrics.render(
        control.router.view,
        held=control.waiting,
        runs=len(control.runs),
        learned=learner.rows if learner else (),
        absent=control.absent,
    )


def diagnostics(control: Control) -> dict[str, Any]:
    """Return what the router knows and how good its forecasts are, JSON-ready."""
    router, workflows, trace = control.router, control.workflows, control.ledger.path
    now_s, age_s = control.clock.now_s(), control.routing.table_age_s
    return {
        "online": control.config.online,
        "policy": control.routing.policy_text,
        "table_version": control.table_version,
        "table_age_s": None if age_s is None else round(age_s, 3),
        "replanning": control.replanning() if control.replanning else None,
        "processes": control.processes() if control.processes else None,
        "estimates_version": workflows.estimates.version,
        "fleet": {"name": control.fleet.name, "hash": control.fleet.content_hash()},
        "clock_s": round(now_s, 3),
        "dilation": control.clock.dilation,
        "trace": None if trace is None else str(trace),
        "in_flight": router.in_flight,
        "held": router.held,
        "admission": control.admission.to_json(),
        "time_limits": control.guard.limits_json(),
        "runs_active": len(control.runs),
        "workflows": {one.content_hash: one.name for one in workflows},
        "forecast": control.accuracy.to_json(),
        "runs": {key: kept.to_json() for key, kept in workflows.kept.items()},
        "lengths": [kept.to_json() for kept in router.lengths.kept] if router.lengths else [],
        "endpoints": [
            {
                "id": state.endpoint.id,
                "url": state.endpoint.url,
                "model": state.endpoint.model,
                "up": state.healthy,
                "health": control.guard.to_json(state.index),
                "in_flight": state.in_flight,
                "decoding": state.decoding,
                "prefill_tokens": round(state.prefill_tokens, 1),
                "context_tokens": round(state.context_tokens, 1),
                "prefix_tokens": round(state.prefix.held_tokens, 1),
                "latency": _latency(control, state.index),
                "engine": control.scraper.to_json(state.index, now_s),
            }
            for state in router.view.states
            if state.index not in control.absent
        ],
    }


def _gauge_engines(control: Control) -> None:
    """Set what the engines say; what is stale is left out, not shown as it was."""
    metrics = control.metrics
    for gauge in (metrics.engine_running, metrics.engine_waiting, metrics.engine_kv):
        gauge.clear()
    for index, endpoint in enumerate(control.fleet.endpoints):
        report = control.scraper.report(index, control.clock.now_s())
        if report is not None and index not in control.absent:
            for gauge, value in (
                (metrics.engine_running, report.running),
                (metrics.engine_waiting, report.waiting),
                (metrics.engine_kv, report.kv_usage),
            ):
                if value is not None:
                    gauge.set(value, endpoint.id)


def _latency(control: Control, index: int) -> dict[str, Any]:
    """Return the row in use, and how it came about where it is learned online."""
    state, learner = control.router.view.states[index], control.router.learner
    facts: dict[str, Any] = {"row": asdict(state.latency)}
    if learner is not None:
        row = learner.rows[index]
        facts |= {
            "observations": row.observations,
            "drift_ratio": round(row.ratio, 4),
            "drifting": row.drifting,
        }
    return facts
