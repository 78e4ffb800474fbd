"""What knowing everything would gain: a local search over placements, and the critical path.

The search starts where marginal cost with exact lengths places the calls of some runs, and pins
calls to other endpoints while the simulated mean run latency falls. The simulator is the judge, so
queues, batches and caches count; engines serve older runs first throughout. What it finds is a
feasible clairvoyant placement: its mean is an *upper* bound on the best mean that clairvoyance
allows, so the gap it shows is a lower bound on what is there to be gained. Runs that find the fleet
empty, or leave it so, are simulated and not counted: there is less to be gained from them.

The critical path is a bound from below: each run alone, every call on the endpoint that is fastest
for it, all text that an earlier prompt or answer may have left in a cache found there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.dispatch.events import Call
from planner.dispatch.forecast import Forecast, Forecaster
from planner.dispatch.policies.base import Choice, Policy, Ready, age_priority
from planner.dispatch.policies.finish import MarginalCost
from planner.domain.fleet import Fleet
from planner.domain.run import RunSpec, Task
from planner.domain.trace import CallRecord, TraceRecord
from planner.domain.workflow import Workflow
from planner.graph.analysis import completion_s
from planner.sim.experiment import World, mean_latency_s
from planner.sim.kernel import simulate

__all__ = ["Clairvoyant", "Exact", "Pinned", "critical_path_s", "estimate"]

_THETAS = (1.0, 1.5, 2.0)
"""Weights of imposed delay that are tried with exact lengths, besides the one of the setting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clairvoyant:
    """Mean run latencies, seconds, of the same runs.

    Parameters
    ----------
    learned_s
        Marginal cost with the forecasts of the setting.
    exact_s
        Marginal cost with exact lengths.
    found_s
        The best placement found.
    bound_s
        Critical paths on the idle fleet.
    """

    learned_s: float
    exact_s: float
    found_s: float
    bound_s: float

    @property
    def gap(self) -> float:
        """Share of marginal cost's mean that clairvoyance is known to save."""
        return 1.0 - self.found_s / self.learned_s

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, gap included."""
        return {
            "learned_s": self.learned_s,
            "exact_s": self.exact_s,
            "found_s": self.found_s,
            "bound_s": self.bound_s,
            "gap": self.gap,
        }


class Exact(Forecaster):
    """Knows each call's output length, and whether it is likely to be critical as others do."""

    def __init__(self, known: Forecaster, runs: Sequence[RunSpec], graphs: Sequence[Workflow]):
        super().__init__(known.estimates, graphs)
        self._tokens = {
            f"{run.run_id}/{task.index}": float(task.output_tokens)
            for run in runs
            for task in run.tasks
        }

    def of(self, call: Call) -> Forecast:
        """Return the forecast with the length that will be."""
        return replace(super().of(call), output_tokens=self._tokens[call.call_id])


class Pinned(MarginalCost):
    """Marginal cost, except for the calls that are told where to go."""

    name = "pinned"

    def __init__(self, theta: float, places: Mapping[str, int]) -> None:
        super().__init__(theta=theta)
        self._places = places

    def choose(self, ready: Ready) -> Choice:
        """Return the place of a call."""
        call = ready.call
        place = self._places.get(call.call_id)
        if place is None:
            return super().choose(ready)
        return Choice(place, "pinned", priority=age_priority(call))


def estimate(
    runs: Sequence[RunSpec],
    world: World,
    graphs: Sequence[Workflow],
    *,
    theta: float,
    steps: int,
    seed: int,
    counted: slice = slice(None),
) -> Clairvoyant:
    """Return the estimate for some runs.

    Parameters
    ----------
    runs
        About a hundred and fifty, by arrival: a step costs a simulation of them all.
    graphs
        Their workflows.
    theta
        Weight of imposed delay of the marginal cost that goes by forecasts: as tuned.
    steps
        Moves tried.
    seed
        Of the search.
    counted
        The runs whose latencies count.

    Notes
    -----
    A move pins one or two calls to endpoints. Calls are drawn by the time they lose against their
    time alone, endpoints by their speed; calls that are not pinned follow marginal cost, so that
    they make room for those that are. The simulation is without noise, so that a better mean is
    one.
    """
    fleet, judged = world.fleet, runs[counted]
    exact = Exact(world.forecaster, runs, graphs)
    least_s = {
        f"{run.run_id}/{task.index}": _least_s(task, fleet)
        for run in judged
        for task in run.tasks
        if task.site
    }
    names = {run.run_id for run in judged}

    def trial(policy: Policy, forecaster: Forecaster) -> tuple[float, list[TraceRecord]]:
        records = [one for one in simulate(runs, fleet, policy, forecaster) if one.run_id in names]
        return mean_latency_s(records), records

    learned_s, _ = trial(MarginalCost(theta=theta), world.forecaster)
    starts = {value: trial(Pinned(value, {}), exact) for value in (theta, *_THETAS)}
    weight, (found_s, records) = min(starts.items(), key=lambda one: one[1][0])
    speed = np.array([1.0 / endpoint.latency.decode_step_s(8, 8e3) for endpoint in fleet.endpoints])
    places: dict[str, int] = {}
    rng = np.random.default_rng(seed)
    calls, chances = _losses(records, least_s)
    for _ in range(steps):
        tried = dict(places)
        for n in rng.choice(len(calls), size=int(rng.integers(1, 3)), p=chances):
            tried[calls[n]] = int(rng.choice(len(speed), p=speed / speed.sum()))
        value, records = trial(Pinned(weight, tried), exact)
        if value < found_s:
            places, found_s = tried, value
            calls, chances = _losses(records, least_s)
    return Clairvoyant(
        learned_s=learned_s,
        exact_s=starts[theta][0],
        found_s=found_s,
        bound_s=critical_path_s(judged, fleet),
    )


def _losses(
    records: Sequence[TraceRecord], least_s: Mapping[str, float]
) -> tuple[list[str], np.ndarray]:
    """Return the calls, and for each the chance to be moved: its share of all time lost."""
    lost = {
        one.call_id: max(1e-3, one.finish_s - one.ready_s - least_s[one.call_id])
        for one in records
        if isinstance(one, CallRecord) and one.finish_s is not None
    }
    weights = np.array(list(lost.values()))
    return list(lost), weights / weights.sum()


def critical_path_s(runs: Sequence[RunSpec], fleet: Fleet) -> float:
    """Return the mean over runs of the longest chain, each call at its least time, seconds."""
    return float(
        np.mean([completion_s(run, [_least_s(task, fleet) for task in run.tasks]) for run in runs])
    )


def _least_s(task: Task, fleet: Fleet) -> float:
    if task.kind != "llm":
        return task.delay_s
    # Only the text new in this prompt has to be computed: its last segment.
    fresh, depth = task.prompt[-1].tokens, sum(part.tokens for part in task.prompt[:-1])
    context = depth + fresh + task.output_tokens / 2
    return task.delay_s + min(
        endpoint.latency.prefill_marginal_s(fresh, depth)
        # The first token comes with the prefill.
        + (task.output_tokens - 1) * endpoint.latency.decode_step_s(1, context)
        for endpoint in fleet.endpoints
    )
