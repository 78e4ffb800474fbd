"""Why not: the smallest sets of changes after which a target is met.

Sets are looked at in order of size, within a size cheapest first, and none that contains a set
already found. Before any simulation the bounds speak: the load has to be below the fleet's
capacity, and where no policy can meet the target as things are, none must be proven to fail on the
changed fleet either. What is left is simulated with the same runs for all, and each set that is
returned has met the target in that simulation.

The planner is asked, too: whether every sampled run of a plan could keep the time. If it proves
that none can, its reason comes with the answer: the critical path, the load, the KV, or the
smallest set of limits that CP-SAT found to conflict (an unsatisfiable core).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.domain.errors import Infeasible, InvalidInput, NoSolutionFound
from planner.domain.memory import gpu_memory_gb
from planner.report.terminal import align
from planner.whatif.answer import Answer
from planner.whatif.asking import ask
from planner.whatif.capacity import capacity_rps
from planner.whatif.changes import (
    AddEndpoints,
    Change,
    ScaleLoad,
    ScaleTenant,
    Scenario,
    SetDeadline,
)
from planner.whatif.effort import Effort
from planner.whatif.question import Question, Target, check_deadlines
from planner.whatif.sample import BoundTask
from planner.whatif.store import Store

__all__ = ["Remedy", "WhyNot", "candidates", "why_not"]

_BATCH = 8
"""Sets simulated together: enough for the processes, few enough to stop early."""
_SCREEN = 2
"""Seeds that a set is screened with; one that misses by more than `_HOPELESS` is given up."""
_HOPELESS = 0.25
_SATURATED = 1.0
_PLAN_EFFORT = 1.0
"""Deterministic time of the planner's attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A smallest set of changes that meets the target.

    ``extra_usd_per_hour`` is None where prices are missing.
    """

    scenario: Scenario
    answer: Answer
    extra_usd_per_hour: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WhyNot:
    """Why a target is missed, and what would meet it.

    Parameters
    ----------
    target
        What was asked.
    answer
        The question as it is.
    reason
        What stands in the way, in words: the solver's reason, the bound, or the queues.
    core
        Why no plan keeps the time in every sampled run, by the planner; None if it has no proof,
        or the target is met.
    slack
        How far the target itself would have to give way to be met as things are: seconds, or a
        share; 0 if it is met. No policy could do with less than ``proven_slack``.
    remedies
        Smallest sets, cheapest first.
    looked_at, proven_out
        Sets that were considered, and those of them that a bound ruled out.
    """

    target: Target
    answer: Answer
    reason: str
    core: str | None
    slack: float | None
    proven_slack: float
    remedies: tuple[Remedy, ...]
    looked_at: int = 0
    proven_out: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": "almanac.whynot/1",
            "target": str(self.target),
            "reason": self.reason,
            "core": self.core,
            "slack": self.slack,
            "proven_slack": self.proven_slack,
            "answer": self.answer.to_json(),
            "remedies": [
                {
                    "changes": [str(change) for change in one.scenario.changes],
                    "extra_usd_per_hour": one.extra_usd_per_hour,
                    "answer": one.answer.to_json(),
                }
                for one in self.remedies
            ],
            "looked_at": self.looked_at,
            "proven_out": self.proven_out,
        }

    def text(self) -> str:
        """Return it for a terminal."""
        lines = [self.reason]
        if self.core is not None:
            lines.append(f"no plan keeps it in every sampled run: {self.core}")
        unit = "" if self.target.least else " s"
        if self.slack is not None and self.slack > 0:
            lines.append(
                f"as it is, the target would have to give way by {self.slack:.3g}{unit}; by "
                f"{self.proven_slack:.3g}{unit} under any policy"
            )
        if self.remedies:
            rows = [["smallest changes that meet it", str(self.target.metric), "$/h more"]]
            for one in self.remedies:
                extra = one.extra_usd_per_hour
                figure = one.answer.figures[self.target.metric]
                rows.append(
                    [str(one.scenario), figure.text(), "-" if extra is None else f"{extra:+.2f}"]
                )
            lines += ["", align(rows)]
        elif self.slack:
            lines.append("no set of the changes tried meets it")
        lines.append(
            f"{self.looked_at} sets considered, {self.proven_out} ruled out by a bound alone"
        )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the text for a notebook."""
        from html import escape

        return f"<pre>{escape(self.text())}</pre>"


def candidates(
    question: Question, target: Target, *, impossible: bool = False
) -> tuple[Change, ...]:
    """Return the single changes that may help: more endpoints, less load, a tenant fewer, time.

    Endpoints of the GPUs that the fleet has, and of others of the bundled tables where no policy
    can meet the target on these (``impossible``); loads in steps of a tenth; deadlines only where
    attaining them is the target (a latency target is relaxed by `WhyNot.slack`).
    """
    gpus = dict.fromkeys(one.gpu for one in question.fleet.endpoints)
    found: list[Change] = [AddEndpoints(count=1, kind=gpu.lower()) for gpu in gpus]
    if impossible:
        others = [gpu for gpu in gpu_memory_gb() if gpu not in gpus]
        found += [AddEndpoints(count=1, kind=gpu.lower()) for gpu in others]
    found += [ScaleLoad(factor=step / 10) for step in (9, 8, 7, 6, 5)]
    tenants = dict.fromkeys(one.tenant for one in question.streams if one.rate_rps > 0)
    if len(tenants) > 1:
        found += [ScaleTenant(tenant=one, factor=0.0) for one in tenants]
    if target.least:
        found += [SetDeadline(seconds=seconds, more=True) for seconds in (2.0, 5.0, 10.0)]
    return tuple(found)


def why_not(
    question: Question,
    target: Target,
    *,
    changes: Sequence[Change] | None = None,
    most: int = 2,
    wanted: int = 6,
    effort: Effort | None = None,
    store: Store | None = None,
) -> WhyNot:
    """Return why a target is missed and the smallest sets of changes that meet it.

    Parameters
    ----------
    changes
        Single changes to combine; `candidates` if None. One may be used several times.
    most
        Changes in a set, >= 1.
    wanted
        Stop after this many sets, >= 1.
    """
    check_deadlines(target, question.streams)
    if most < 1 or wanted < 1:
        raise InvalidInput(
            f"{most} changes, {wanted} sets", where="why not", remedy="use at least 1 of each"
        )
    store = store or Store()
    effort = effort or Effort(seeds=4, runs=120)
    effort = replace(effort, bounds=("mean_s",) if target.least else (target.metric,))
    base = ask([(str(Scenario()), question)], effort, store=store)[0]
    figure = base.figures.get(target.metric)
    search = _Search(question, target, effort, store, impossible=base.impossible(target))
    met = figure is not None and target.met(figure.value)
    remedies: tuple[Remedy, ...] = ()
    if not met:
        impossible = base.impossible(target)
        steps = tuple(changes or candidates(question, target, impossible=impossible))
        remedies = search.run(steps, most, wanted)
    bound = base.bounds.get(target.metric, 0.0)
    return WhyNot(
        target=target,
        answer=base,
        reason=_reason(base, target),
        core=None if met else _core(question, target),
        slack=None if figure is None else max(0.0, _excess(target, figure.value)),
        proven_slack=0.0 if target.least else max(0.0, bound - target.value),
        remedies=remedies,
        looked_at=search.looked_at,
        proven_out=search.proven_out,
    )


def _excess(target: Target, value: float) -> float:
    return target.value - value if target.least else value - target.value


def _reason(base: Answer, target: Target) -> str:
    if not base.figures:
        return "; ".join(base.notes)
    if base.load >= _SATURATED and not target.met(base.figures[target.metric].value):
        return (
            f"the load asks for {base.question.rate_rps:.3g} runs/s, the fleet carries at most "
            f"{base.capacity_rps:.3g}; {base.verdict(target)}"
        )
    return base.verdict(target)


def _core(question: Question, target: Target) -> str | None:
    """Return the planner's proof that no plan keeps the time, None if it has none."""
    from planner.solve.budget import Budget
    from planner.solve.instance import Demand
    from planner.solve.solver import solve_mix

    within: dict[str, float] = {}
    for one in question.streams:
        key = one.workflow.content_hash
        limit = one.deadline_s if target.least else target.value
        if limit is not None and target.metric != "mean_s":
            within[key] = min(limit, within.get(key, limit))
    loads = question.loads_rps
    demands = [
        Demand(
            workflow=one,
            rate_rps=loads[one.content_hash],
            deadline_s=within.get(one.content_hash),
            hard=one.content_hash in within,
        )
        for one in question.workflows
        if one.content_hash in loads
    ]
    try:
        solve_mix(
            demands, question.fleet, question.estimates, budget=Budget.reproducible(_PLAN_EFFORT)
        )
    except Infeasible as error:
        return str(error)
    except NoSolutionFound:
        return None
    return None


class _Search:
    """Breadth first over sets of changes."""

    def __init__(
        self,
        question: Question,
        target: Target,
        effort: Effort,
        store: Store,
        *,
        impossible: bool,
    ) -> None:
        self._question = question
        self._target = target
        self._effort = effort
        self._store = store
        self._impossible = impossible
        self.looked_at = 0
        self.proven_out = 0

    def run(self, steps: Sequence[Change], most: int, wanted: int) -> tuple[Remedy, ...]:
        """Return the smallest sets found, smaller ones first, then cheaper ones."""
        found: list[Remedy] = []
        for size in range(1, most + 1):
            sets = self._sets(steps, size, found)
            for start in range(0, len(sets), _BATCH):
                if len(found) >= wanted:
                    break
                found += self._try(sets[start : start + _BATCH])
            if len(found) >= wanted:
                break
        found = [one for one in found if not any(_smaller(other, one) for other in found)]
        found.sort(key=lambda one: (len(one.scenario.changes), _price(one.extra_usd_per_hour)))
        return tuple(found[:wanted])

    def _sets(
        self, steps: Sequence[Change], size: int, found: Sequence[Remedy]
    ) -> list[tuple[Scenario, Question]]:
        """Return the sets of a size that hold no smaller answer, cheapest first."""
        sets = []
        for chosen in itertools.combinations_with_replacement(steps, size):
            if not _sensible(chosen) or any(_holds(chosen, one.scenario.changes) for one in found):
                continue
            scenario = Scenario(changes=chosen)
            try:
                changed = scenario.apply(self._question)
            except InvalidInput:
                continue  # the last tenant cannot leave, a GPU may have no row for the model
            sets.append((scenario, changed))
        return sorted(sets, key=lambda one: (_price(self._extra(one[1])), _harm(one[0])))

    def _try(self, sets: Sequence[tuple[Scenario, Question]]) -> list[Remedy]:
        """Return those of some sets that meet the target: by bound, by a screen, by all seeds."""
        self.looked_at += len(sets)
        left = [one for one in sets if self._may(one[1])]
        self.proven_out += len(sets) - len(left)
        screen = replace(self._effort, seeds=min(_SCREEN, self._effort.seeds), bounds=())
        screened = ask([(str(s), q) for s, q in left], screen, store=self._store)
        left = [one for one, answer in zip(left, screened, strict=True) if self._near(answer)]
        full = replace(self._effort, bounds=())
        answers = ask([(str(s), q) for s, q in left], full, store=self._store)
        return [
            Remedy(scenario=s, answer=answer, extra_usd_per_hour=self._extra(q))
            for (s, q), answer in zip(left, answers, strict=True)
            if (figure := answer.figures.get(self._target.metric)) is not None
            and self._target.met(figure.value)
            and answer.load < _SATURATED
        ]

    def _may(self, changed: Question) -> bool:
        """Whether neither capacity nor a bound rules a set out."""
        try:
            if changed.rate_rps >= capacity_rps(changed):
                return False
        except Infeasible:
            return False
        if not self._impossible:
            return True  # the changes only relax: a bound that allowed it before still does
        tasks = [
            BoundTask(
                question=changed, seed=seed, runs=self._effort.runs, metrics=self._effort.bounds
            )
            for seed in self._effort.all_seeds
        ]
        documents = self._store.results(tasks)
        values = [one["values"].get(self._target.metric) for one in documents]
        return None not in values and sum(values) / len(values) <= self._target.value

    def _near(self, answer: Answer) -> bool:
        figure = answer.figures.get(self._target.metric)
        if figure is None:
            return False
        return _excess(self._target, figure.value) <= _HOPELESS * self._target.value

    def _extra(self, changed: Question) -> float | None:
        before, after = self._question.usd_per_hour, changed.usd_per_hour
        return None if before is None or after is None else after - before


def _price(extra: float | None) -> float:
    """Return what sets are ordered by: those of unknown price come last."""
    return math.inf if extra is None else extra


def _sensible(chosen: Sequence[Change]) -> bool:
    """Whether a set does not do the same thing twice: one load, one deadline, a tenant once."""
    once = [one for one in chosen if not isinstance(one, AddEndpoints)]
    kinds = [one if isinstance(one, ScaleTenant) else type(one) for one in once]
    return len(kinds) == len(set(kinds))


def _harm(scenario: Scenario) -> float:
    """Return how much work a set turns away, 0 to 1 and more, or how late it allows runs."""
    harm = 0.0
    for one in scenario.changes:
        if isinstance(one, ScaleLoad):
            harm += 1.0 - one.factor
        elif isinstance(one, ScaleTenant):
            harm += 1.0
        elif isinstance(one, SetDeadline):
            harm += one.seconds / 100.0
    return harm


def _smaller(one: Remedy, other: Remedy) -> bool:
    """Whether another remedy does all that ``one`` does, and more."""
    return one is not other and _holds(other.scenario.changes, one.scenario.changes)


def _holds(chosen: Sequence[Change], smaller: Sequence[Change]) -> bool:
    """Whether a set does at least what a smaller one does."""
    left = list(chosen)
    for one in smaller:
        match = next((other for other in left if _at_least(other, one)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _at_least(one: Change, other: Change) -> bool:
    if isinstance(one, ScaleLoad) and isinstance(other, ScaleLoad):
        return one.factor <= other.factor
    if isinstance(one, SetDeadline) and isinstance(other, SetDeadline):
        return (one.tenant, one.more) == (other.tenant, other.more) and one.seconds >= other.seconds
    return one == other
