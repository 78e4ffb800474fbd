"""What the graph promises of a run: seconds and work still to come, on an idle fleet.

Runs are sampled once per workflow from its graph and its forecasts, so joins, branches and loops
are known; what a run has decided so far is known by the call site and visit it has reached only.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from planner.dispatch.events import Call
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies.placement import service_s
from planner.dispatch.view import FleetView
from planner.domain.estimates import WorkflowEstimate
from planner.domain.run import RunSpec
from planner.graph.analysis import completion_s, upward_ranks
from planner.graph.sampling import scenarios

__all__ = ["Ahead", "Outlook"]

_SCENARIOS = 64
_SEED = 0


@dataclass(frozen=True, slots=True)
class Ahead:
    """What lies ahead at the start of a call, itself included, averaged over sampled runs.

    Parameters
    ----------
    remaining_s
        Longest chain to the end of the run, tools included, s.
    work_s
        Service of all calls not yet begun, s.
    """

    remaining_s: float
    work_s: float


@dataclass(frozen=True, slots=True)
class _Workflow:
    whole_s: float
    ahead: dict[tuple[str, int], Ahead]  # (call site, visit)


class Outlook:
    """Expectations by workflow, made on first use and kept.

    Parameters
    ----------
    fleet
        Taken as idle.
    forecaster
        Has the graphs; of others nothing is known.
    """

    def __init__(self, fleet: FleetView, forecaster: Forecaster) -> None:
        self._fleet = fleet
        self._forecaster = forecaster
        self._known: dict[str, _Workflow] = {}

    def whole_s(self, workflow_hash: str) -> float | None:
        """Return the mean seconds of a run on the idle fleet, or None if its graph is unknown."""
        found = self._workflow(workflow_hash)
        return None if found is None else found.whole_s

    def ahead(self, call: Call) -> Ahead:
        """Return what lies ahead of a call; of an unknown graph or site, the call alone."""
        found = self._workflow(call.workflow_hash)
        if found is not None:
            # Visits beyond those sampled look like the last one.
            for visit in range(call.visit, -1, -1):
                ahead = found.ahead.get((call.site, visit))
                if ahead is not None:
                    return ahead
        output = self._forecaster.of(call).output_tokens
        alone = service_s(call.prompt_tokens, output, self._fleet.states, call.model)
        return Ahead(alone, alone)

    def sampled(self, workflow_hash: str) -> tuple[RunSpec, ...]:
        """Return runs drawn from a graph and its forecasts; none if the graph is unknown."""
        workflow = self._forecaster.workflows.get(workflow_hash)
        if workflow is None:
            return ()
        estimate = self._forecaster.estimates.workflows.get(workflow_hash, WorkflowEstimate())
        return tuple(scenarios(workflow, estimate, _SCENARIOS, seed=_SEED))

    def _workflow(self, workflow_hash: str) -> _Workflow | None:
        found = self._known.get(workflow_hash)
        if found is None:
            runs = self.sampled(workflow_hash)
            if not runs:
                return None
            found = self._known[workflow_hash] = self._averaged(runs)
        return found

    def _averaged(self, runs: tuple[RunSpec, ...]) -> _Workflow:
        sums: defaultdict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        whole_s = 0.0
        for run in runs:
            work = [
                service_s(task.prompt_tokens, task.output_tokens, self._fleet.states)
                if task.kind == "llm"
                else 0.0
                for task in run.tasks
            ]
            times = [task.delay_s + seconds for task, seconds in zip(run.tasks, work, strict=True)]
            whole_s += completion_s(run, times)
            left_s = 0.0
            for task, rank, seconds in reversed(
                list(zip(run.tasks, upward_ranks(run, times), work, strict=True))
            ):
                left_s += seconds
                if task.site is not None:
                    total = sums[task.site, task.visit]
                    total[0] += 1
                    total[1] += rank
                    total[2] += left_s
        return _Workflow(
            whole_s / len(runs),
            {key: Ahead(rank / n, left / n) for key, (n, rank, left) in sums.items()},
        )
