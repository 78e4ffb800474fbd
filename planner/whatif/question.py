"""A question about a fleet: what arrives, what is believed of it, who decides, and the target.

`workload` draws the runs. Run n of a stream is drawn from (seed, stream, n) alone, and the times
between arrivals scale with the stream's rate, so that two questions that differ in their fleet,
policy or load see the same runs: differences between answers are differences between fleets.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import numpy as np

from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import parse_policy
from planner.dispatch.table import DispatchTable
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.fleet import Fleet
from planner.domain.run import RunSpec
from planner.domain.workflow import Workflow
from planner.graph.sampling import sample_run
from planner.sim.experiment import PolicySetup, World
from planner.sim.retention import Fate, FixedRetention
from planner.sim.workload import Times, gamma_arrivals

__all__ = [
    "METRICS",
    "Metric",
    "Question",
    "Stream",
    "Target",
    "check_deadlines",
    "parse_retention",
    "workload",
]

Metric = Literal["mean_s", "p50_s", "p95_s", "p99_s", "attainment"]
METRICS: tuple[Metric, ...] = ("mean_s", "p50_s", "p95_s", "p99_s", "attainment")
_FATES = ("drop", "leave", "pin", "offload")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Runs of one workflow from one tenant.

    Parameters
    ----------
    workflow
        The graph.
    rate_rps
        Runs per second, >= 0; 0 keeps a place for a tenant that sends nothing.
    tenant
        Whose runs they are.
    deadline_s
        Seconds a run may take, > 0, or None.
    """

    workflow: Workflow
    rate_rps: float
    tenant: str = "default"
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        where = f"stream of {self.workflow.name!r} from tenant {self.tenant!r}"
        if not 0 <= self.rate_rps < math.inf:
            raise InvalidInput(
                f"{self.rate_rps!r} runs per second", where=where, remedy="use a number >= 0"
            )
        if self.deadline_s is not None and not 0 < self.deadline_s < math.inf:
            raise InvalidInput(
                f"deadline {self.deadline_s!r} s", where=where, remedy="use a number > 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Everything that an answer depends on, besides seeds.

    Parameters
    ----------
    fleet
        Where calls run.
    streams
        What arrives; at least one with a rate above 0.
    estimates
        What policies and plans believe.
    truth
        What the runs are drawn from; the estimates themselves if None.
    policy
        Name, or ``name:key=value,...``.
    retention
        KV of a run while its tools run: ``leave``, ``drop``, ``pin:SECONDS`` or ``offload``.
    burst_cv
        Variation of the gaps between arrivals, > 0; 1 is Poisson.
    noise_cv
        Variation of engine step times, >= 0. Bounds hold for 0.
    dispatch_s
        Decision time charged to each call, s, >= 0.
    """

    fleet: Fleet
    streams: tuple[Stream, ...]
    estimates: EstimateTable = field(default_factory=EstimateTable)
    truth: EstimateTable | None = None
    policy: str = "marginal_cost"
    retention: str = "leave"
    burst_cv: float = 1.0
    noise_cv: float = 0.0
    dispatch_s: float = 0.0005

    def __post_init__(self) -> None:
        if not any(stream.rate_rps > 0 for stream in self.streams):
            raise InvalidInput("nothing arrives", where="streams", remedy="give one a rate above 0")
        parse_policy(self.policy)
        parse_retention(self.retention)

    @property
    def rate_rps(self) -> float:
        """Runs per second of all streams."""
        return math.fsum(stream.rate_rps for stream in self.streams)

    @property
    def workflows(self) -> tuple[Workflow, ...]:
        """The graphs, each once."""
        return tuple({one.workflow.content_hash: one.workflow for one in self.streams}.values())

    @property
    def loads_rps(self) -> Mapping[str, float]:
        """Runs per second by workflow hash, those that arrive."""
        loads: dict[str, float] = {}
        for one in self.streams:
            if one.rate_rps > 0:
                key = one.workflow.content_hash
                loads[key] = loads.get(key, 0.0) + one.rate_rps
        return loads

    @property
    def usd_per_hour(self) -> float | None:
        """What the fleet costs an hour, None if an endpoint has no price."""
        prices = [endpoint.usd_per_hour for endpoint in self.fleet.endpoints]
        return None if None in prices else math.fsum(price or 0.0 for price in prices)

    @property
    def usd_per_run(self) -> float | None:
        """The fleet's cost divided among the runs, None if an endpoint has no price."""
        total = self.usd_per_hour
        return None if total is None else total / (3600.0 * self.rate_rps)

    @property
    def workload_key(self) -> str:
        """16 hex digits that change with the runs or the fleet, whoever decides."""
        parts = (self.fleet, self.streams, self.truth or self.estimates, self.burst_cv)
        return _digest(repr(parts))

    @property
    def key(self) -> str:
        """16 hex digits that change with anything that the answer depends on."""
        beliefs = "" if self.truth is None else repr(self.estimates)
        rest = (self.policy, self.retention, self.noise_cv, self.dispatch_s, beliefs)
        return _digest(f"{self.workload_key} {rest!r}")

    def world(self) -> World:
        """Return what the simulator needs besides runs and policy."""
        return World(
            fleet=self.fleet,
            forecaster=Forecaster(self.estimates, self.workflows),
            noise_cv=self.noise_cv,
            dispatch_s=self.dispatch_s,
            retention=parse_retention(self.retention),
        )

    def setup(self, table: DispatchTable | None = None) -> PolicySetup:
        """Return the policy; ``table`` is the plan of ``almanac``."""
        name, parameters = parse_policy(self.policy)
        return PolicySetup(policy=name, parameters=parameters, table=table)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_retention(text: str) -> FixedRetention | None:
    """Return the retention of ``leave`` (None), ``drop``, ``offload``, ``pin`` or ``pin:SECONDS``.

    Raises
    ------
    InvalidInput
        If it is none of them.
    """
    action, _, rest = text.partition(":")
    ttl_s = _seconds(rest or "300") if action == "pin" or not rest else math.nan
    if action not in _FATES or math.isnan(ttl_s):
        raise InvalidInput(
            f"{text!r} is unknown",
            where="retention",
            remedy="use leave, drop, offload, pin or pin:SECONDS",
        )
    if action == "leave":
        return None
    fate = Fate(action=cast("Literal['drop', 'offload', 'pin']", action), ttl_s=ttl_s)
    return FixedRetention(fate=fate)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def workload(question: Question, seed: int, runs: int) -> tuple[RunSpec, ...]:
    """Return the first ``runs`` arrivals of all streams together, in order of arrival."""
    truth = question.truth or question.estimates
    arrivals: list[tuple[float, int, int]] = []
    for position, stream in enumerate(question.streams):
        if stream.rate_rps > 0:
            rng = np.random.default_rng([seed, position, 0])
            times: Times = gamma_arrivals(1.0, question.burst_cv, runs, rng) / stream.rate_rps
            arrivals += [(float(t), position, number) for number, t in enumerate(times)]
    return tuple(
        _run(question.streams[position], truth, seed, position, number, arrival_s)
        for arrival_s, position, number in sorted(arrivals)[:runs]
    )


def _run(
    stream: Stream, truth: EstimateTable, seed: int, position: int, number: int, arrival_s: float
) -> RunSpec:
    graph = stream.workflow
    run = sample_run(
        graph,
        truth.workflows.get(graph.content_hash, WorkflowEstimate()),
        np.random.default_rng([seed, position, 1, number]),
        run_id=f"s{seed}-w{position}-r{number}",
        arrival_s=arrival_s,
        defaults=truth,
    )
    return replace(run, tenant=stream.tenant, deadline_s=stream.deadline_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is asked of a fleet: a latency at most, or a share of deadlines at least.

    Parameters
    ----------
    metric
        One of `METRICS`.
    value
        Seconds (> 0), or for ``attainment`` a share in (0, 1].
    """

    metric: Metric
    value: float

    def __post_init__(self) -> None:
        most = 1.0 if self.metric == "attainment" else math.inf
        if self.metric not in METRICS or not 0 < self.value <= most or math.isinf(self.value):
            raise InvalidInput(
                f"{self.metric} = {self.value!r}",
                where="target",
                remedy="write p95=8 (mean, p50, p95 or p99, seconds) or attainment=0.95",
            )

    @classmethod
    def parse(cls, text: str) -> Target:
        """Return the target of ``p95=8``, ``mean=5`` or ``attainment=0.95``.

        Raises
        ------
        InvalidInput
            If the text is none.
        """
        name, _, value = text.partition("=")
        metric = name.strip() if name.strip() == "attainment" else f"{name.strip()}_s"
        number = _seconds(value.strip().removesuffix("s"))
        return cls(metric=cast("Metric", metric), value=number)

    @property
    def least(self) -> bool:
        """Whether more is better."""
        return self.metric == "attainment"

    def met(self, value: float) -> bool:
        """Whether a figure meets it."""
        return value >= self.value if self.least else value <= self.value

    def __str__(self) -> str:
        """Return it as it is written on the command line."""
        return f"{self.metric.removesuffix('_s')}={self.value:g}"


def check_deadlines(target: Target | None, streams: Sequence[Stream]) -> None:
    """Check that a target of attainment has deadlines to attain.

    Raises
    ------
    InvalidInput
        If no stream has one.
    """
    if target is not None and target.least and all(one.deadline_s is None for one in streams):
        raise InvalidInput(
            f"{target} without a deadline", where="target", remedy="give --deadline SECONDS"
        )
