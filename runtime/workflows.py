"""The workflow graphs a gateway knows, and how long their runs will take.

The forecast of a run is made at its arrival, and corrected by the runs of its workflow that ended
before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from planner.dispatch.arrival import ArrivalForecast
from planner.dispatch.forecast import Forecaster
from planner.dispatch.learning import Kept
from planner.domain.calibration import QuantileTracker
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Fleet
from planner.domain.run import RunSpec
from planner.domain.workflow import START, Workflow
from planner.graph.sampling import scenarios
from runtime.endings import EndForecast

__all__ = ["Workflows"]

_ARRIVAL_RUNS = 32
"""Sampled runs behind the forecast of a run at its arrival."""


class Workflows:
    """Graphs by their hash, in order of their arrival.

    Parameters
    ----------
    estimates
        Forecasts per call site, tool and branch.
    seed
        Of sampled runs.

    Attributes
    ----------
    forecaster
        Of calls.
    endings
        How long runs may stay silent.
    sampled
        Runs drawn from the graph of each workflow with forecasts, by its hash.
    kept
        How the forecasts of whole runs turned out, by workflow hash.
    """

    def __init__(self, estimates: EstimateTable, *, seed: int) -> None:
        self.forecaster = Forecaster(estimates, seed=seed)
        self.endings = EndForecast(estimates)
        self.sampled: dict[str, Sequence[RunSpec]] = {}
        self.kept: dict[str, Kept] = {}
        self._by_name: dict[str, Workflow] = {}
        self._arrivals: dict[str, ArrivalForecast] = {}

    def __iter__(self) -> Iterator[Workflow]:
        return iter(self.forecaster.workflows.values())

    def __contains__(self, key: str) -> bool:
        return key in self.forecaster.workflows

    @property
    def estimates(self) -> EstimateTable:
        """The forecasts, as given."""
        return self.forecaster.estimates

    def find(self, given: str) -> Workflow | None:
        """Return the graph of a hash or a name, or None."""
        return self.forecaster.workflows.get(given) or self._by_name.get(given)

    def add(self, workflow: Workflow, fleet: Fleet, *, seed: int) -> None:
        """Learn a graph as this fleet would run it; one that is known already costs nothing."""
        key = workflow.content_hash
        self._by_name[workflow.name] = workflow
        if key in self:
            return
        self.forecaster.add_workflow(workflow, seed=seed)
        estimate = self.estimates.workflows.get(key)
        runs: Sequence[RunSpec] = ()
        if estimate is not None:
            runs = scenarios(workflow, estimate, _ARRIVAL_RUNS, seed, defaults=self.estimates)
            self._arrivals[key] = ArrivalForecast(runs, fleet)
            self.sampled[key] = runs
        self.endings.add_workflow(workflow, runs)

    def run_s(self, key: str, load: Callable[[], float], *, online: bool) -> float | None:
        """Return seconds of a run that arrives now, None without forecasts for its workflow.

        While nothing corrects it (not ``online``), the mean learned from traces is the better one:
        the ladder of `ArrivalForecast` takes all endpoints as equally loaded.

        Parameters
        ----------
        load
            Says how many calls are in flight per endpoint.
        """
        if not online:
            workflow = self.forecaster.workflows.get(key)
            estimate = self.estimates.workflows.get(key)
            if workflow is not None and estimate is not None:
                starts = [n for n in workflow.successors[START] if n in estimate.remaining_s]
                if starts:
                    return max(estimate.remaining_s[node] for node in starts)
        forecast = self._arrivals.get(key)
        return None if forecast is None else forecast.at(load())

    def corrected_s(self, key: str, forecast_s: float | None) -> float | None:
        """Return a forecast of `run_s` as the runs that ended correct it."""
        kept = self.kept.get(key)
        return (
            forecast_s if forecast_s is None or kept is None else kept.tracker.correct(forecast_s)
        )

    def learn_run(self, key: str, forecast_s: float, actual_s: float) -> None:
        """Note how a forecast of `run_s` turned out."""
        kept = self.kept.get(key)
        if kept is None:
            kept = self.kept[key] = Kept(QuantileTracker(level=0.5))
        kept.update(forecast_s, actual_s)
