"""When the runs in progress will be over, by what they have done and the load as it is now.

A forecast takes milliseconds, so it is made only while somebody looks, a few runs at a look, the
oldest forecasts first; in between it stays, and time passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.dispatch.remaining import EndpointLoad, Progress, Service, fleet_service, remaining_s
from planner.dispatch.view import FleetView
from planner.domain.ids import NodeId
from planner.domain.run import RunSpec, Task
from runtime.dashboard.journal import RunLog
from runtime.runs import Run

__all__ = ["Outlooks", "progress_of"]

_AT_A_LOOK = 8
_LAST_S = 10.0
"""Age, clock seconds, from which a forecast is made anew although nothing has happened."""


@dataclass(frozen=True, slots=True)
class _Outlook:
    finish_s: float
    made_s: float
    changes: int


class Outlooks:
    """Predicted finishes of runs in progress."""

    def __init__(self) -> None:
        self._known: dict[str, _Outlook] = {}

    def finish_s(self, run: Run) -> float | None:
        """Return when a run is predicted to end, clock seconds; None without any forecast.

        Before its first look it is the forecast made at its arrival.
        """
        known = self._known.get(run.run_id)
        if known is not None:
            return known.finish_s
        return None if run.predicted_s is None else run.arrival_s + run.predicted_s

    async def look(
        self,
        runs: Sequence[tuple[Run, RunLog]],
        sampled: Mapping[str, Sequence[RunSpec]],
        view: FleetView,
        now_s: float,
    ) -> None:
        """Refresh the oldest forecasts; other tasks get their turn after each.

        Parameters
        ----------
        runs
            All in progress that are of interest; others are forgotten.
        sampled
            Runs drawn from the graph of each workflow, by its hash.
        """
        here = {run.run_id for run, _ in runs}
        self._known = {name: one for name, one in self._known.items() if name in here}
        due = [
            (run, log)
            for run, log in runs
            if sampled.get(run.workflow_hash) and self._due(run, log, now_s)
        ]
        due.sort(key=lambda one: self._made_s(one[0]))
        service = _remembered(_service(view))
        for run, log in due[:_AT_A_LOOK]:
            left = remaining_s(sampled[run.workflow_hash], service, progress_of(run, log, now_s))
            self._known[run.run_id] = _Outlook(now_s + left.at(0.5), now_s, log.changes)
            await asyncio.sleep(0)

    def _due(self, run: Run, log: RunLog, now_s: float) -> bool:
        known = self._known.get(run.run_id)
        return known is None or known.changes != log.changes or now_s - known.made_s >= _LAST_S

    def _made_s(self, run: Run) -> float:
        known = self._known.get(run.run_id)
        return float("-inf") if known is None else known.made_s


def progress_of(run: Run, log: RunLog, now_s: float) -> Progress:
    """Return what a run has done, as far as its gateway has seen."""
    running = {node: now_s - start_s for (node, _), start_s in run.tools.items()}
    for ticket in log.open.values():
        waited_s = now_s - ticket.call.ready_s
        running[ticket.call.node] = max(running.get(ticket.call.node, 0.0), waited_s)
    return Progress(
        done={NodeId(node): count for node, count in log.done.items()},
        running={NodeId(node): seconds for node, seconds in running.items()},
        outcomes={branch: tuple(taken) for branch, taken in log.outcomes.items()},
    )


def _service(view: FleetView) -> Service:
    states = [state for state in view.states if state.healthy] or list(view.states)
    return fleet_service(
        [
            EndpointLoad(
                row=state.latency,
                calls=state.in_flight,
                kv_tokens=state.context_tokens,
                slots=state.endpoint.max_num_seqs,
            )
            for state in states
        ]
    )


def _remembered(service: Service) -> Service:
    """Return the service with its answers kept: the same sampled calls come for every run."""
    seconds: dict[int, float] = {}

    def remembered(task: Task) -> float:
        found = seconds.get(id(task))
        if found is None:
            found = seconds[id(task)] = service(task)
        return found

    return remembered
