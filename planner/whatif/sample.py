"""One seed of one question: its runs simulated, and what no policy could beat on them.

The first `WARM_UP` of the runs fill queues and caches and are not counted. Percentiles are order
statistics (the least latency that this share of the runs does not exceed), as the bounds are.

Bounds of the counted runs alone hold with the others there, who only take room, if text that the
others may have left in a cache costs nothing: it is taken out of the prompts (`counted_only`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.dispatch.table import DispatchTable
from planner.domain.errors import Infeasible, InvalidInput
from planner.domain.run import RunSpec, Task
from planner.domain.trace import RunRecord, TraceRecord
from planner.sim.experiment import Cell, run_cell
from planner.whatif.question import Metric, Question, workload

__all__ = ["WARM_UP", "BoundTask", "Sample", "SampleTask", "TableTask", "counted_only"]

WARM_UP = 0.15
PERCENT: Mapping[str, int] = {"p50_s": 50, "p95_s": 95, "p99_s": 99}
_PLAN_EFFORT = 1.0
"""Deterministic time of each plan behind a table of ``almanac``."""
_PLAN_GAP = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The counted runs of one seed, by arrival.

    Parameters
    ----------
    latency_s
        Run latency, s; infinite for a run that did not end well.
    tenant
        Of each run.
    deadline_s
        Of each run, s, or None.
    """

    latency_s: tuple[float, ...]
    tenant: tuple[str, ...]
    deadline_s: tuple[float | None, ...]

    def value(self, metric: Metric, tenant: str | None = None) -> float | None:
        """Return a figure, of one tenant if named; None if no run says anything about it."""
        rows = [
            (latency, deadline)
            for latency, deadline, whose in zip(
                self.latency_s, self.deadline_s, self.tenant, strict=True
            )
            if tenant in (None, whose)
        ]
        if metric == "attainment":
            met = [latency <= deadline for latency, deadline in rows if deadline is not None]
            return sum(met) / len(met) if met else None
        latencies = sorted(latency for latency, _ in rows)
        if not latencies:
            return None
        if metric == "mean_s":
            return math.fsum(latencies) / len(latencies)
        return latencies[math.ceil(PERCENT[metric] / 100 * len(latencies)) - 1]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; a lost run's latency is null."""
        return {
            "latency_s": [round(x, 6) if math.isfinite(x) else None for x in self.latency_s],
            "tenant": list(self.tenant),
            "deadline_s": list(self.deadline_s),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Sample:
        """Rebuild a sample."""
        return cls(
            latency_s=tuple(math.inf if x is None else float(x) for x in raw["latency_s"]),
            tenant=tuple(raw["tenant"]),
            deadline_s=tuple(raw["deadline_s"]),
        )

    @classmethod
    def of(cls, runs: Sequence[RunSpec], records: Sequence[TraceRecord]) -> Sample:
        """Return the sample of some runs, all of them counted, from the records of a simulation."""
        latency = {
            one.run_id: one.finish_s - one.arrival_s
            for one in records
            if isinstance(one, RunRecord) and one.status == "ok"
        }
        return cls(
            latency_s=tuple(latency.get(run.run_id, math.inf) for run in runs),
            tenant=tuple(run.tenant for run in runs),
            deadline_s=tuple(run.deadline_s for run in runs),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTask:
    """Simulates one seed of a question; the result is a `Sample`."""

    question: Question
    seed: int
    runs: int
    table: DispatchTable | None = None

    kind = "samples"

    @property
    def key(self) -> str:
        """Question, table, seed and number of runs."""
        plan = "" if self.table is None else f"-{self.table.version}"
        return f"{self.question.key}{plan}-{self.seed}-{self.runs}"

    def compute(self) -> dict[str, Any]:
        """Simulate."""
        runs = workload(self.question, self.seed, self.runs)
        setup = self.question.setup(self.table)
        cell = Cell(setup=setup, seed=self.seed, runs=runs, world=self.question.world())
        return Sample.of(runs[int(WARM_UP * len(runs)) :], run_cell(cell)).to_json()

    def __str__(self) -> str:
        """Say what is simulated."""
        return f"{self.question.policy} on {self.question.fleet.name}, seed {self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundTask:
    """Bounds one seed of a question, whatever the policy; the result has a bound per metric."""

    question: Question
    seed: int
    runs: int
    metrics: tuple[Metric, ...] = ("mean_s", "p50_s", "p95_s", "p99_s")

    kind = "bounds"

    @property
    def key(self) -> str:
        """Workload, fleet, seed, number of runs and metrics."""
        names = "".join(sorted(PERCENT.get(one, 0).__format__("02d") for one in self.metrics))
        return f"{self.question.workload_key}-{self.seed}-{self.runs}-{names}"

    def compute(self) -> dict[str, Any]:
        """Bound; an impossible workload has no bounds but the reason."""
        from planner.solve.workload_bounds import workload_bound  # OR-Tools takes a second to load

        runs = workload(self.question, self.seed, self.runs)
        counted = counted_only(runs, int(WARM_UP * len(runs)))
        wanted = {PERCENT[one]: one for one in self.metrics if one in PERCENT}
        try:
            bound = workload_bound(counted, self.question.fleet, percentiles=tuple(wanted))
        except InvalidInput as error:
            return {"values": {}, "reason": error.what}
        values = {"mean_s": bound.mean_s}
        values |= {name: bound.percentile_s[percent] for percent, name in wanted.items()}
        return {"values": values, "reason": bound.name}

    def __str__(self) -> str:
        """Say what is bounded."""
        return f"bounds on {self.question.fleet.name}, seed {self.seed}"


def counted_only(runs: Sequence[RunSpec], skipped: int) -> tuple[RunSpec, ...]:
    """Return the runs after the first ``skipped``, without text that those may have left cached."""
    known = {
        key
        for run in runs[:skipped]
        for task in run.tasks
        for key in (*(segment.key for segment in task.prompt), task.output_key)
    }
    return tuple(
        replace(run, tasks=tuple(_without(task, known) for task in run.tasks))
        for run in runs[skipped:]
    )


def _without(task: Task, known: set[int]) -> Task:
    if task.site is None:
        return task
    kept = tuple(segment for segment in task.prompt if segment.key not in known)
    # A prompt has at least one token that is always computed.
    return replace(task, prompt=kept or (replace(task.prompt[-1], tokens=1),))


@dataclass(frozen=True, slots=True, kw_only=True)
class TableTask:
    """Plans a question for policy ``almanac``; the result is its dispatch table, or the reason."""

    question: Question

    kind = "tables"

    @property
    def key(self) -> str:
        """Fleet, loads and beliefs."""
        return replace(self.question, policy="almanac", truth=None).key

    def compute(self) -> dict[str, Any]:
        """Plan within a deterministic budget."""
        from planner.solve.budget import Budget
        from planner.solve.instance import Demand
        from planner.solve.solver import solve_mix
        from planner.solve.tables import mix_table

        loads = self.question.loads_rps
        demands = [
            Demand(workflow=one, rate_rps=loads[one.content_hash])
            for one in self.question.workflows
            if one.content_hash in loads
        ]
        fleet, estimates = self.question.fleet, self.question.estimates
        budget = Budget.reproducible(_PLAN_EFFORT, _PLAN_GAP)
        try:
            base = solve_mix(demands, fleet, estimates, budget=budget)
            table = mix_table(
                demands, fleet, estimates, base=base, budget=budget, run_classes=4, scenarios=8
            )
        except Infeasible as error:
            return {"table": None, "reason": str(error)}
        return {"table": table.to_json(), "reason": None}

    def __str__(self) -> str:
        """Say what is planned."""
        return f"plan for {self.question.fleet.name} at {self.question.rate_rps:.3g} runs/s"
