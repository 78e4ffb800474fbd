"""What a browser or `almanac explain` is told of a running gateway, JSON-ready.

Facts only, all in clock seconds: no prompt or answer text, no keys. The page turns successive
answers into curves, so the gateway keeps no history for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.dispatch.replan import speed_s
from planner.dispatch.view import EndpointState
from planner.domain.trace import CallRecord, RunRecord, record_to_json
from runtime.control import Control
from runtime.dashboard.journal import RunLog
from runtime.dashboard.outlook import Outlooks
from runtime.runs import Run

__all__ = ["LIVE_SCHEMA", "RUN_SCHEMA", "LiveView"]

LIVE_SCHEMA = "almanac.live/1"
RUN_SCHEMA = "almanac.run/1"

_RUNS = 50
"""Runs in progress that are listed, the oldest first."""
_LAST = ("at_s", "reason", "outcome", "detail", "wall_s")
"""What is told of the last plan that was asked for."""


class LiveView:
    """Looks at one gateway.

    Parameters
    ----------
    control
        Read, never changed.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._outlooks = Outlooks()

    async def facts(self) -> dict[str, Any]:
        """Return endpoints, runs in progress, plan, decisions and recent regret."""
        control = self._control
        await self._outlooks.look(
            self._listed(), control.workflows.sampled, control.router.view, control.clock.now_s()
        )
        # The forecasts gave way to other tasks: what follows is of one instant.
        now_s = control.clock.now_s()
        return {
            "schema": LIVE_SCHEMA,
            "now_s": round(now_s, 3),
            "dilation": control.clock.dilation,
            "fleet": control.fleet.name,
            "policy": control.routing.policy_text,
            "in_flight": control.router.in_flight,
            "waiting": control.waiting,
            "runs_active": len(control.runs),
            "plan": self._plan(),
            "endpoints": [
                self._endpoint(state, now_s)
                for state in control.router.view.states
                if state.index not in control.absent
            ],
            "runs": [self._run(run, log, now_s) for run, log in self._listed()],
            "decisions": [
                {"policy": policy, "reason": reason, "count": count}
                for (policy, reason), count in control.ledger.journal.decisions.most_common()
            ],
            "regret": self._regret(),
        }

    def run(self, run_id: str) -> dict[str, Any] | None:
        """Return what is known of a run, its records as in a trace, or None if it is unknown.

        A run in progress and its calls under way have ``status`` ``running``; the run's
        ``finish_s`` is now. ``why`` gives the reason of the present table's row for each call site
        at the present load.
        """
        control = self._control
        now_s = control.clock.now_s()
        run, log = control.runs.find(run_id), control.ledger.journal.find(run_id) or RunLog()
        own = log.ended
        going = run if own is None else None
        if own is None:
            if run is None:
                return None
            own = _so_far(run, now_s)
        finish_s = None if going is None else self._outlooks.finish_s(going)
        records = [own, *log.records, *(ticket.record() for ticket in log.open.values())]
        table, view = control.table, control.router.view
        why: dict[str, str] = {}
        for one in records:
            if isinstance(one, CallRecord) and one.site not in why and table is not None:
                found = table.find(one.workflow_hash, one.site, view.occupancy(view.states))
                if found is not None:
                    why[one.site] = found.row.reason
        return {
            "schema": RUN_SCHEMA,
            "now_s": round(now_s, 3),
            "records": [record_to_json(one) for one in records],
            "predicted_finish_s": None if finish_s is None else max(finish_s, now_s),
            "table_version": control.table_version,
            "why": why,
        }

    def _listed(self) -> list[tuple[Run, RunLog]]:
        control = self._control
        return [
            (run, control.ledger.journal.find(run.run_id) or RunLog())
            for run in control.runs.active()[:_RUNS]
        ]

    def _plan(self) -> dict[str, Any]:
        control = self._control
        age_s = control.routing.table_age_s
        replanning = control.replanning() if control.replanning else None
        last = replanning["last"] if replanning else None
        return {
            "version": control.table_version,
            "age_s": None if age_s is None else round(age_s, 3),
            # What was proven of it; a table that was loaded from a file does not say.
            "proof": replanning["proof"] if replanning else None,
            "replans": replanning["outcomes"] if replanning else None,
            "last": {name: last[name] for name in _LAST} if last else None,
        }

    def _endpoint(self, state: EndpointState, now_s: float) -> dict[str, Any]:
        control, endpoint = self._control, state.endpoint
        learner = control.router.learner
        row = None if learner is None else learner.rows[state.index]
        health = control.guard.to_json(state.index)
        engine = control.scraper.to_json(state.index, now_s)
        fresh = engine["state"] == "fresh"
        regrets = [
            one.regret_s for one in control.ledger.journal.regrets if one.endpoint == endpoint.id
        ]
        return {
            "id": endpoint.id,
            "model": endpoint.model,
            "gpu": endpoint.gpu,
            "up": state.healthy,
            "state": "draining" if health["draining"] else health["state"],
            "why": health["why"],
            "in_flight": state.in_flight,
            "slots": endpoint.max_num_seqs,
            "decoding": state.decoding,
            "prefill_tokens": round(state.prefill_tokens),
            "kv_state": engine["state"],
            "kv_usage": engine["kv_usage"] if fresh else None,
            "engine_waiting": engine["waiting"] if fresh else None,
            # Measured over forecast seconds of a usual call: 2 is half as fast as was forecast.
            "speed": None if row is None else round(speed_s(row.row) / speed_s(row.prior), 4),
            "observations": 0 if row is None else row.observations,
            "drifting": row is not None and row.drifting,
            # Of late over what was learned at first; above 1 is slower than usual.
            "drift_ratio": None if row is None else round(row.ratio, 4),
            "regret_s": _mean(regrets),
            "regret_calls": len(regrets),
        }

    def _run(self, run: Run, log: RunLog, now_s: float) -> dict[str, Any]:
        elapsed_s = now_s - run.arrival_s
        finish_s = self._outlooks.finish_s(run)
        left_s = None if finish_s is None else max(0.0, finish_s - now_s)
        whole_s = None if left_s is None else elapsed_s + left_s
        nodes = sorted(
            {ticket.call.node for ticket in log.open.values()} | {node for node, _ in run.tools}
        )
        return {
            "id": run.run_id,
            "workflow": run.workflow or run.workflow_hash,
            "tenant": run.tenant,
            "elapsed_s": round(elapsed_s, 3),
            "left_s": None if left_s is None else round(left_s, 3),
            "progress": None if not whole_s else round(elapsed_s / whole_s, 4),
            "calls": run.calls,
            "open_calls": run.open_calls,
            "nodes": nodes,
        }

    def _regret(self) -> dict[str, Any]:
        recent = list(self._control.ledger.journal.regrets)
        values = [one.regret_s for one in recent]
        return {
            "calls": len(values),
            "mean_s": _mean(values),
            "worse_share": _mean([float(value > 0) for value in values]),
            "values_s": [round(value, 3) for value in values],
        }


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _so_far(run: Run, now_s: float) -> RunRecord:
    return RunRecord(
        run_id=run.run_id,
        workflow=run.workflow,
        workflow_hash=run.workflow_hash,
        arrival_s=run.arrival_s,
        finish_s=now_s,
        status="running",
        session_id=run.session_id,
        tenant=run.tenant,
        predicted_s=run.predicted_s,
        calls=run.calls,
    )
