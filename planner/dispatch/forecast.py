"""The forecasts a policy may use, looked up once per call site and kept.

Built from an `EstimateTable` and the workflows; criticality comes from sampled runs of the
workflow graph, so it knows joins, branches and loops.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.dispatch.events import Call
from planner.dispatch.joins import RunDelay, run_delays
from planner.dispatch.loads import LEAST_LEFT
from planner.domain.estimates import EstimateTable, Quantiles, WorkflowEstimate
from planner.domain.records import record
from planner.domain.run import RunSpec
from planner.domain.workflow import Workflow
from planner.graph.analysis import criticality, remaining_s
from planner.graph.sampling import scenarios

__all__ = ["Forecast", "Forecaster", "with_length"]

_SITES = 4096
"""Call sites whose forecasts are kept; clients name them, so their number is bounded."""
_SCENARIOS = 64
"""Sampled runs behind a criticality: a standard error of at most 0.06."""
_SURE_LEFT, _MOST_LEFT = 0.1, 1.5
"""Limits of `Forecast.least_left`: no forecast is exact, and quantiles say little of the far
tail."""
_OUTPUT_TOKEN_S = 0.02
_PROMPT_TOKEN_S = 0.0001
"""Seconds per token that compare calls with tools when the critical path is looked for: an
endpoint of middling speed. Which chain is the longest depends little on them."""


def _durations(run: RunSpec) -> list[float]:
    return [
        task.delay_s + task.prompt_tokens * _PROMPT_TOKEN_S + task.output_tokens * _OUTPUT_TOKEN_S
        for task in run.tasks
    ]


@record()
class Forecast:
    """What is expected of a call.

    Parameters
    ----------
    output_tokens
        Mean output length.
    criticality
        Probability of being on the run's critical path, [0, 1]; 1 for serial nodes.
    remaining_s
        Expected time from the call's start to the end of its run, on an endpoint of middling
        speed without waiting; 0 if the workflow is unknown.
    delay
        By how much the call makes its run end later, by what it takes, or None if each of its
        seconds counts.
    least_left
        What calls as long as expected have left on average, as a share of that length, > 0.
    """

    output_tokens: float
    criticality: float
    remaining_s: float = 0.0
    delay: RunDelay | None = None
    least_left: float = LEAST_LEFT


class Forecaster:
    """Forecasts per call site.

    Parameters
    ----------
    estimates
        Frozen forecasts.
    workflows
        The graphs that calls may belong to; others get criticality 1.
    seed
        Of the scenarios behind the criticalities.

    Attributes
    ----------
    workflows
        The graphs, by content hash.
    """

    def __init__(
        self, estimates: EstimateTable, workflows: Iterable[Workflow] = (), *, seed: int = 0
    ) -> None:
        self.estimates = estimates
        self.workflows: dict[str, Workflow] = {}
        self._critical: dict[tuple[str, str], float] = {}
        self._remaining: dict[tuple[str, str], float] = {}
        self._delays: dict[tuple[str, str], RunDelay] = {}
        self._cache: dict[tuple[str, str], Forecast] = {}
        self._asked: Call | None = None
        self._answer: Forecast
        for workflow in workflows:
            self.add_workflow(workflow, seed=seed)

    def add_workflow(self, workflow: Workflow, *, seed: int = 0) -> None:
        """Learn a graph's criticalities, what remains after each site, and its joins."""
        key = workflow.content_hash
        self.workflows[key] = workflow
        self._asked = None
        estimate = self.estimates.workflows.get(key, WorkflowEstimate())
        runs = scenarios(workflow, estimate, _SCENARIOS, seed=seed)
        for site, value in criticality(runs, _durations).items():
            self._critical[(key, site)] = value
            self._cache.pop((key, site), None)
        for site, seconds in remaining_s(runs, _durations).items():
            self._remaining[(key, site)] = seconds
        for site, delay in run_delays(runs, _durations, seed=seed).items():
            self._delays[(key, site)] = delay

    def of(self, call: Call) -> Forecast:
        """Return the forecast of a call; a declared ``max_tokens`` caps it.

        A length the client expects is taken instead of ours.
        """
        if call is self._asked:  # a decision asks more than once
            return self._answer
        self._asked, self._answer = call, self._of(call)
        return self._answer

    def _of(self, call: Call) -> Forecast:
        key = (call.workflow_hash, call.site)
        forecast = self._cache.get(key)
        if forecast is None:
            length = self.estimates.site(*key).output_tokens
            forecast = Forecast(
                output_tokens=max(1.0, length.mean),
                criticality=self._critical.get(key, 1.0),
                remaining_s=self._remaining.get(key, 0.0),
                delay=self._delays.get(key),
                least_left=_least_left(length),
            )
            if len(self._cache) >= _SITES:
                self._cache.clear()
            self._cache[key] = forecast
        hinted = call.hinted_tokens
        tokens = forecast.output_tokens if hinted is None else float(hinted)
        return with_length(forecast, tokens, call.max_tokens)


def with_length(forecast: Forecast, tokens: float, max_tokens: int | None) -> Forecast:
    """Return a forecast of another length, tokens >= 0, which a declared ``max_tokens`` caps.

    A call that has come near its cap has no more left than up to there.
    """
    least_left = forecast.least_left
    if max_tokens is not None:
        tokens = min(tokens, float(max_tokens))
        if max_tokens < tokens * (1.0 + least_left):
            least_left = max(max_tokens / max(tokens, 1.0) - 1.0, _SURE_LEFT)
    if tokens == forecast.output_tokens and least_left == forecast.least_left:
        return forecast
    return Forecast(
        output_tokens=tokens,
        criticality=forecast.criticality,
        remaining_s=forecast.remaining_s,
        delay=forecast.delay,
        least_left=least_left,
    )


def _least_left(length: Quantiles) -> float:
    """Return what calls as long as the mean have left, as a share of it."""
    mean = max(1.0, length.mean)
    return min(max(length.given(mean).mean / mean - 1.0, _SURE_LEFT), _MOST_LEFT)
