"""A rolling horizon inside a simulation: plans are made while calls run, and take their time.

A plan is made from the state at t and is in use from t + planner seconds on, as it would be live;
in between the old table decides. Triggers and measures are those of the gateway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from planner.dispatch.policies.planned import Planned
from planner.dispatch.replan import PlanBasis, RateMeter, ReplanTrigger
from planner.dispatch.table import DispatchTable
from planner.domain.errors import InvalidInput
from planner.domain.trace import TraceRecord

__all__ = ["Horizon", "Replan", "ReplanLog", "Replanned", "Seen", "StepPlanner"]

POLL_S = 1.0
"""How often the triggers are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is known when a plan is asked for; nothing of what is to come.

    Parameters
    ----------
    now_s
        The instant.
    up
        Ids of the endpoints that take calls.
    rates_rps, active_runs
        Arrivals per second and runs in progress, by workflow hash.
    table
        In use, or None.
    records
        All records so far, in order of completion.
    """

    now_s: float
    up: tuple[str, ...]
    rates_rps: Mapping[str, float]
    active_runs: Mapping[str, int]
    table: DispatchTable | None
    records: Sequence[TraceRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replanned:
    """A planner's answer: a table to use, or None to keep the old one; and what it took, s."""

    table: DispatchTable | None
    seconds: float


class StepPlanner(Protocol):
    """Makes plans, one after the other; may keep the last one as a hint."""

    def plan(self, seen: Seen) -> Replanned:
        """Return the answer to a state."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """Re-planning as part of a simulated world.

    Parameters
    ----------
    period_s
        Longest time between two plans, > 0.
    planner
        Makes a fresh planner for a seed.
    planner_s
        Seconds charged for each plan, >= 0; None charges what the planner says it took.
    window_s
        Time constant of arrival rates, > 0.
    """

    period_s: float
    planner: Callable[[int], StepPlanner]
    planner_s: float | None = None
    window_s: float = 60.0

    def __post_init__(self) -> None:
        if self.planner_s is not None and not 0 <= self.planner_s < float("inf"):
            raise InvalidInput(
                f"{self.planner_s!r} s", where="planner time", remedy="use a number >= 0"
            )
        ReplanTrigger(self.period_s, window_s=self.window_s)


@dataclass(slots=True)
class ReplanLog:
    """What became of the plans of a simulation.

    Attributes
    ----------
    made, adopted
        Plans asked for, and those whose table went into use.
    planner_s
        Seconds charged, in total.
    reasons
        Causes of the plans.
    """

    made: int = 0
    adopted: int = 0
    planner_s: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    _ages_s: float = 0.0
    _decisions: int = 0

    def decided(self, age_s: float) -> None:
        """Note the age of the plan behind a decision."""
        self._ages_s += age_s
        self._decisions += 1

    @property
    def mean_age_s(self) -> float:
        """Mean age of the plan in use, over decisions: since the state it was made from."""
        return self._ages_s / self._decisions if self._decisions else 0.0


class Horizon:
    """The re-planning of one simulation.

    Parameters
    ----------
    policy
        Whose table is replaced.
    setup
        How.
    seed
        Of the planner.
    log
        Told what happens.
    """

    def __init__(self, policy: Planned, setup: Replan, seed: int, log: ReplanLog) -> None:
        self._policy = policy
        self._planner = setup.planner(seed)
        self._charged_s = setup.planner_s
        self._trigger = ReplanTrigger(setup.period_s, window_s=setup.window_s)
        self._rates = RateMeter(setup.window_s)
        self._active: Counter[str] = Counter()
        self._busy = False
        self._made_s = 0.0
        self._log = log

    def arrived(self, workflow_hash: str, now_s: float) -> None:
        """Note the start of a run."""
        self._rates.observe(workflow_hash, now_s)
        self._active[workflow_hash] += 1

    def ended(self, workflow_hash: str) -> None:
        """Note the end of a run."""
        self._active[workflow_hash] -= 1

    def decided(self, now_s: float) -> None:
        """Note that a call was placed by the table in use, if any."""
        if self._policy.table is not None:
            self._log.decided(now_s - self._made_s)

    def look(
        self, now_s: float, up: Sequence[str], records: Sequence[TraceRecord]
    ) -> tuple[float, Callable[[float], None]] | None:
        """Make a plan if one is due; return when its answer comes, and what to do then."""
        if self._busy:
            return None
        rates = self._rates.rates_rps(now_s)
        basis = PlanBasis(up=frozenset(up), rates_rps=rates)
        reason = self._trigger.due(now_s, basis)
        if reason is None:
            return None
        self._trigger.attempted(now_s, basis)
        answer = self._planner.plan(
            Seen(
                now_s=now_s,
                up=tuple(up),
                rates_rps=rates,
                active_runs=+self._active,
                table=self._policy.table,
                records=records,
            )
        )
        seconds = answer.seconds if self._charged_s is None else self._charged_s
        self._busy = True
        self._log.made += 1
        self._log.reasons[reason] += 1
        self._log.planner_s += seconds

        def take(_now_s: float) -> None:
            self._busy = False
            if answer.table is not None:
                self._policy.table = answer.table
                self._made_s = now_s
                self._log.adopted += 1

        return now_s + seconds, take
