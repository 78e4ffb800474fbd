"""Marginal values: what one more of each thing is worth, simulated and by the plan's duals.

Simulated values are paired differences with common random numbers: the same runs before and after.
Beside them stand the solver's prices where it has one: the dual of an endpoint's capacity (seconds
of run latency per busy slot, over all runs) and of its KV room. Duals are of the fleet plan, which
knows the mean flow but no queues, so they vanish where capacity is ample on average and the
simulated value may not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from planner.domain.errors import Infeasible, InvalidInput, NoSolutionFound
from planner.domain.estimates import WorkflowEstimate
from planner.domain.memory import GB
from planner.graph.sampling import scenarios
from planner.report.terminal import align
from planner.whatif.answer import Answer
from planner.whatif.asking import ask
from planner.whatif.changes import AddEndpoints, AddKv, AddSlots, Change, SetDeadline
from planner.whatif.effort import Effort
from planner.whatif.figures import Figure, mean_figure
from planner.whatif.question import Metric, Question
from planner.whatif.store import Store

__all__ = ["Price", "Prices", "marginal_values"]

_EFFORT = 1.0
_SAMPLE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one more of something changes.

    Parameters
    ----------
    change
        The one more, in the notation of changes.
    effects
        By tenant, and ``""`` for all: metric -> change in its own unit, seconds or share.
    dual_s
        Seconds of mean run latency that the plan's dual says it saves, None where there is none.
    usd_per_hour
        What it costs, None if unknown.
    """

    change: str
    effects: Mapping[str, Mapping[Metric, Figure]]
    dual_s: float | None = None
    usd_per_hour: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "change": self.change,
            "effects": {
                tenant: {name: one.to_json() for name, one in row.items()}
                for tenant, row in self.effects.items()
            },
            "dual_s": self.dual_s,
            "usd_per_hour": self.usd_per_hour,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """The marginal values of a question."""

    base: Answer
    rows: tuple[Price, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": "almanac.prices/1",
            "base": self.base.to_json(),
            "rows": [one.to_json() for one in self.rows],
        }

    def text(self) -> str:
        """Return a table for a terminal; of single tenants the mean alone."""
        tenants = [name for name in (self.rows[0].effects if self.rows else ()) if name]
        head = ["one more", "mean s", "P95 s", "in time", *(f"{one}: mean s" for one in tenants)]
        rows = [[*head, "dual s", "$/h"]]
        for one in self.rows:
            everyone = one.effects[""]
            cells = [
                everyone[name].text(3) if name in everyone else "-"
                for name in ("mean_s", "p95_s", "attainment")
            ]
            for tenant in tenants:
                figure = one.effects[tenant].get("mean_s")
                cells.append("-" if figure is None else f"{figure.value:.3f}")
            rows.append([one.change, *cells, _number(one.dual_s, 3), _number(one.usd_per_hour, 2)])
        return align(rows)

    def to_frame(self) -> Any:
        """Return a pandas data frame, a row per change and tenant."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "change": one.change,
                    "tenant": tenant or "all",
                    **{name: figure.value for name, figure in effects.items()},
                    "dual_s": one.dual_s,
                    "usd_per_hour": one.usd_per_hour,
                }
                for one in self.rows
                for tenant, effects in one.effects.items()
            ]
        )

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return str(self.to_frame().to_html(index=False, float_format=lambda x: f"{x:.3g}"))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def marginal_values(
    question: Question, *, effort: Effort | None = None, store: Store | None = None
) -> Prices:
    """Return what one more endpoint of each kind, slot, GB of KV and second of deadline is worth.

    Raises
    ------
    InvalidInput
        If the question cannot be simulated.
    """
    effort = replace(effort or Effort(), bounds=())
    duals = _duals(question)
    changes: list[tuple[Change, float | None]] = []
    seen: set[str] = set()
    for one in question.fleet.endpoints:
        if one.gpu not in seen:
            seen.add(one.gpu)
            own = duals.slot_s.get(one.id)
            changes.append(
                (
                    AddEndpoints(count=1, kind=one.id),
                    None if own is None else 0.0 - own * one.max_num_seqs,
                )
            )
    for one in question.fleet.endpoints:
        own = duals.slot_s.get(one.id)
        changes.append((AddSlots(endpoint=one.id, count=1), None if own is None else 0.0 - own))
    for one in question.fleet.endpoints:
        if one.kv_bytes_per_token is not None:
            token_s = duals.token_s.get(one.id)
            gained = GB / one.kv_bytes_per_token
            changes.append(
                (
                    AddKv(endpoint=one.id, gb=1.0),
                    None if token_s is None else 0.0 - token_s * gained,
                )
            )
    timed = [one for one in question.streams if one.deadline_s is not None and one.rate_rps > 0]
    changes += [
        (SetDeadline(seconds=1.0, more=True, tenant=tenant), None)
        for tenant in dict.fromkeys(one.tenant for one in timed)
    ]
    asked = [("as it is", question)]
    asked += [(str(change), change.apply(question)) for change, _ in changes]
    base, *after = ask(asked, effort, store=store or Store())
    if not base.figures:
        raise InvalidInput(
            "; ".join(base.notes), where="prices", remedy="ask `almanac whatif --why-not` first"
        )
    return Prices(
        base=base,
        rows=tuple(
            Price(
                change=str(change),
                effects=_effects(base, answer, effort.level),
                dual_s=dual,
                usd_per_hour=_extra(base, answer),
            )
            for (change, dual), answer in zip(changes, after, strict=True)
        ),
    )


def _extra(base: Answer, answer: Answer) -> float | None:
    before, after = base.question.usd_per_hour, answer.question.usd_per_hour
    return None if before is None or after is None else after - before


def _effects(base: Answer, after: Answer, level: float) -> dict[str, dict[Metric, Figure]]:
    tenants = list(base.tenants)
    found: dict[str, dict[Metric, Figure]] = {}
    metrics: Sequence[Metric] = ("mean_s", "p95_s", "attainment")
    for tenant in (None, *(tenants if len(tenants) > 1 else ())):
        row: dict[Metric, Figure] = {}
        for metric in metrics:
            shifts = [
                new - old
                for a, b in zip(base.samples, after.samples, strict=True)
                if (old := a.value(metric, tenant)) is not None
                and (new := b.value(metric, tenant)) is not None
            ]
            if shifts:
                row[metric] = _shift(shifts, level)
        found[tenant or ""] = row
    return found


def _shift(shifts: Sequence[float], level: float) -> Figure:
    """Return the mean of shifts of either sign, by a mean far enough from zero."""
    far = 1e6
    moved = mean_figure([far + one for one in shifts], level)
    return Figure(value=moved.value - far, low=moved.low - far, high=moved.high - far)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Duals:
    """Seconds of mean run latency by endpoint: one slot more, one KV token more."""

    slot_s: Mapping[str, float]
    token_s: Mapping[str, float]


def _duals(question: Question) -> _Duals:
    from planner.domain.plan import UTILISATION_CAP
    from planner.solve.budget import Budget
    from planner.solve.instance import Demand, build_mix
    from planner.solve.prices import instance_prices, site_criticality
    from planner.solve.solver import solve_mix

    loads, estimates = question.loads_rps, question.estimates
    graphs = [one for one in question.workflows if one.content_hash in loads]
    demands = [Demand(workflow=one, rate_rps=loads[one.content_hash]) for one in graphs]
    samples = [
        scenarios(
            one,
            estimates.workflows.get(one.content_hash, WorkflowEstimate()),
            _SAMPLE,
            0,
            defaults=estimates,
        )
        for one in graphs
    ]
    slot_s: dict[str, float] = {}
    token_s: dict[str, float] = {}
    # The relaxed plan may exist where no plan of whole run classes does.
    with suppress(Infeasible):
        instance = build_mix(demands, question.fleet, estimates, samples, run_classes=1)
        # Prices are run-seconds per slot second; a slot is there for a second each second, and
        # runs come at the rate.
        prices = instance_prices(instance, site_criticality(instance, *samples))
        slot_s = {key: UTILISATION_CAP * one / question.rate_rps for key, one in prices.items()}
    with suppress(Infeasible, NoSolutionFound):
        budget = Budget.reproducible(_EFFORT, 0.03)
        plan = solve_mix(demands, question.fleet, estimates, budget=budget)
        token_s = dict(zip(plan.instance.endpoints, plan.token_price.tolist(), strict=True))
    return _Duals(slot_s=slot_s, token_s=token_s)
