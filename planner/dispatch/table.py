"""The dispatch table: a plan in the form that answers at run time.

A row is keyed by (workflow hash, call site, load bucket) and says, for people and for the router:
ranked endpoints with their cost in seconds, the share of the site's traffic each is meant to take,
the opportunity price of a slot second there, the priority class, whether a session's KV is worth
keeping, the range of load in which the row holds, and why.

Load is the fleet's occupancy: calls in flight per slot. Buckets are given by their upper bounds.
The table is immutable, content-hashed, and saved as JSON that people can read and diff. In memory
its rows are kept by column, see `planner.dispatch.rows`.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.dispatch.rows import Numbers, Ranked, Row, Rows
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.files import atomic_write, read_json
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.plan import Plan
from planner.domain.show import html_table
from planner.domain.workflow import Workflow

__all__ = [
    "TABLE_SCHEMA",
    "TAIL_WEIGHT",
    "DispatchTable",
    "Found",
    "LoadLevel",
    "Ranked",
    "Row",
    "Tuning",
    "compile_table",
    "load_table",
    "merge_tables",
    "save_table",
]

TABLE_SCHEMA = "almanac.table/1"


_FOUND = 1024
"""Rows kept in the form that the router reads."""
TAIL_WEIGHT = 3.0
"""Weight of the tail in tables of a CVaR objective: best for it in simulation, of 0, 1, 3 and 8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Weights of the live score, set by simulation with common random numbers.

    Parameters
    ----------
    theta
        Weight of the delay imposed on others, >= 0.
    price_scale
        Multiplier of the opportunity prices, >= 0; 0 leaves the live marginal cost alone.
    remaining_weight
        Seconds of age that a second of a run's expected remainder takes away in engine queues,
        >= 0; 0 serves the oldest run first, a large weight the one that is soonest over. Of runs
        that arrive together any weight but 0 makes the same order (variant ``remainder`` of study
        ``ablation``); where calls queue all the time more weight helps the mean and hurts P95.
        Not tuned.
    tail_weight
        By how much a call of a run that is sure to be among the slowest counts more than one that
        is sure not to be, >= 0; 0 never looks (variant ``slow`` of study ``ablation``), and is
        not tried in tuning.
    join_weight
        Weight of a second by which a call is expected to make its run later where branches join,
        >= 0, see `planner.dispatch.joins`; 0 weighs the call's own time by its criticality. The
        branches of a join are weighed as if none knew of the others, hence less than one (variant
        ``joins`` of study ``ablation``).
    plan_pull
        Cost, in units of the call's least service time, of an endpoint the plan gives no share;
        for fleets whose plan is to be followed whatever the load. In simulation no weight gained
        anything, and from 0.3 on it costs the mean, so it is 0 and not tuned.
    """

    theta: float = 1.0
    price_scale: float = 0.5
    remaining_weight: float = 0.25
    tail_weight: float = 0.5
    join_weight: float = 0.5
    plan_pull: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadLevel:
    """A plan and its prices, good up to ``occupancy`` calls in flight per slot."""

    occupancy: float
    plan: Plan
    prices: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class DispatchTable:
    """All rows, with the index the router reads.

    Parameters
    ----------
    fleet_hash, endpoints
        The fleet it was compiled for, and its endpoint ids in order.
    bounds
        Upper occupancy bounds of the buckets, increasing.
    """

    fleet_hash: str
    endpoints: tuple[str, ...]
    bounds: tuple[float, ...]
    rows: Sequence[Row]
    tuning: Tuning = field(default_factory=Tuning)
    _rows: Rows = field(init=False, repr=False, compare=False)
    _index: dict[tuple[str, str], tuple[int, ...]] = field(init=False, repr=False, compare=False)
    _found: dict[tuple[str, str, int], Found] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _places: npt.NDArray[np.intp] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.bounds or any(
            a >= b for a, b in zip(self.bounds, self.bounds[1:], strict=False)
        ):
            raise InvalidInput(
                f"bucket bounds {self.bounds}", where="table", remedy="give increasing bounds"
            )
        rows = self.rows
        if not isinstance(rows, Rows) or rows.endpoints != self.endpoints:
            rows = Rows(rows, self.endpoints)
        grouped: dict[tuple[str, str], list[int]] = {}
        for number, key in enumerate(rows.keys):
            grouped.setdefault(key, []).append(number)
        index: dict[tuple[str, str], tuple[int, ...]] = {}
        for key, numbers in grouped.items():
            numbers.sort(key=rows.buckets.__getitem__)
            buckets = [rows.buckets[number] for number in numbers]
            if buckets != list(range(len(self.bounds))):
                raise InvalidInput(
                    f"buckets {buckets}",
                    where=f"table rows of {key[1]}",
                    remedy=f"give each bucket from 0 to {len(self.bounds) - 1} once",
                )
            index[key] = tuple(numbers)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_index", index)

    def find(self, workflow_hash: str, site: str, occupancy: float) -> Found | None:
        """Return the row of a call at an occupancy, or None if the table does not cover it."""
        key = workflow_hash, site, bisect.bisect_left(self.bounds, occupancy)
        return self._found.get(key) or self._look_up(*key)

    def _look_up(self, workflow_hash: str, site: str, bucket: int) -> Found | None:
        """Return a row that is not at hand, and keep it at hand."""
        numbers = self._index.get((workflow_hash, site), ())
        if bucket >= len(numbers):
            return None
        if len(self._found) >= _FOUND:
            self._found.clear()
        found = Found(self._rows, numbers[bucket], self.tuning, self._places)
        self._found[workflow_hash, site, bucket] = found
        return found

    def spread(self, endpoints: Sequence[str]) -> DispatchTable:
        """Return the same table for a router whose endpoints are these, in this order.

        It may have more than the table: those cost nothing beyond their own, and nothing is
        planned for them.
        """
        place = {endpoint: index for index, endpoint in enumerate(self.endpoints)}
        table = replace(self)
        # -1 finds the zero that is put after the values.
        places = np.array([place.get(endpoint, -1) for endpoint in endpoints], dtype=np.intp)
        object.__setattr__(table, "_places", places)
        return table

    @cached_property
    def version(self) -> str:
        """12 hex digits of the content."""
        return _digest(self._body())

    def _body(self) -> dict[str, Any]:
        return {
            "fleet_hash": self.fleet_hash,
            "endpoints": list(self.endpoints),
            "bounds": [_to_json(bound) for bound in self.bounds],
            "tuning": asdict(self.tuning),
            "rows": [
                {**asdict(row), "valid_to": _to_json(row.valid_to)}
                for row in sorted(self.rows, key=lambda r: (r.workflow_hash, r.site, r.bucket))
            ],
        }

    def _repr_html_(self) -> str:
        """Return the rows, each with its ranked endpoints, for a notebook."""
        return html_table(
            [
                {
                    "call site": row.site,
                    "calls per slot from": row.valid_from,
                    "priority": row.priority,
                    "ranked": ", ".join(
                        f"{one.endpoint} {one.share:.0%} {one.cost_s:.2f} s" for one in row.ranked
                    ),
                    "reason": row.reason,
                }
                for row in self.rows
            ],
            f"dispatch table {self.version}: share of the call site's traffic and cost by endpoint",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, schema and version included."""
        return {"schema": TABLE_SCHEMA, "version": self.version, **self._body()}

    @classmethod
    def from_json(cls, raw: Any, where: str = "table") -> DispatchTable:
        """Rebuild a table, or raise `InvalidInput`."""
        if not isinstance(raw, dict) or raw.get("schema") != TABLE_SCHEMA:
            raise InvalidInput(
                "not a dispatch table", where=where, remedy="give a file made by `almanac plan`"
            )
        try:
            table = cls(
                fleet_hash=str(raw["fleet_hash"]),
                endpoints=tuple(raw["endpoints"]),
                bounds=tuple(_from_json(bound) for bound in raw["bounds"]),
                tuning=Tuning(**raw["tuning"]),
                rows=Rows(
                    (
                        Row(
                            **{
                                **row,
                                "valid_to": _from_json(row["valid_to"]),
                                "ranked": tuple(Ranked(**one) for one in row["ranked"]),
                            }
                        )
                        for row in raw["rows"]
                    ),
                    raw["endpoints"],
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InvalidInput):
                raise InvalidInput(
                    error.what, where=f"{where}: {error.where}", remedy=error.remedy
                ) from error
            raise InvalidInput(
                f"a field is missing or unknown ({error})",
                where=where,
                remedy="make it again with `almanac plan`",
            ) from error
        content = _digest({name: raw[name] for name in _BODY})
        if raw.get("version") != content:
            raise InvalidInput(
                f"version {raw.get('version')!r} is not that of the content ({content})",
                where=f"{where}: version",
                remedy="the file was edited by hand: make it again with `almanac plan`",
            )
        return table

    def check_fleet(self, fleet: Fleet, where: str = "table") -> None:
        """Raise `InvalidInput` unless the table was compiled for this fleet.

        ``where`` names the table in the error, best by its file.
        """
        if self.fleet_hash != fleet.content_hash():
            raise InvalidInput(
                f"the table was compiled for another fleet ({self.fleet_hash}, with endpoints "
                f"{', '.join(self.endpoints)}) than {fleet.name!r} ({fleet.content_hash()})",
                where=where,
                remedy="run `almanac plan` for this fleet",
            )


class Found:
    """A row as the router reads it: arrays in the router's order of endpoints.

    Attributes
    ----------
    theta
        Weight of a second of delay imposed on each endpoint's residents: that of the tuning, and
        the scaled opportunity price of a slot second.
    priority
        As in `Row`.
    """

    __slots__ = ("_number", "_places", "_rows", "_tuning", "priority", "theta")

    def __init__(
        self, rows: Rows, number: int, tuning: Tuning, places: npt.NDArray[np.intp] | None
    ) -> None:
        self._rows, self._number, self._tuning, self._places = rows, number, tuning, places
        price = self._placed(rows.price[number] * tuning.price_scale)
        self.theta: npt.NDArray[np.float64] = tuning.theta + price.astype(np.float64)
        self.priority = rows.priorities[number]

    @property
    def pull_s(self) -> Numbers:
        """Seconds that count for the distance from the plan."""
        share = self._rows.share[self._number]
        least_s = float(self._rows.cost_s[self._number].min())
        pull_s = self._tuning.plan_pull * least_s
        return self._placed(pull_s - share * (pull_s / (float(share.max()) or 1.0)))

    @property
    def row(self) -> Row:
        """The row for people."""
        return self._rows[self._number]

    def _placed(self, values: Numbers) -> Numbers:
        return values if self._places is None else np.append(values, 0.0)[self._places]


_BODY = ("fleet_hash", "endpoints", "bounds", "tuning", "rows")


def _digest(body: Mapping[str, Any]) -> str:
    payload = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(payload.encode()).hexdigest()[:12]


def _to_json(bound: float) -> float | None:
    """JSON has no infinity: an open bound is null."""
    return None if math.isinf(bound) else bound


def _from_json(bound: float | None) -> float:
    return math.inf if bound is None else float(bound)


def _service_s(endpoint: Endpoint, level: int, prompt: float, output: float) -> float:
    step = endpoint.latency.decode_step_s(level, level * (prompt + output / 2))
    return endpoint.latency.prefill_s(prompt) + output * step


def compile_table(
    levels: Sequence[LoadLevel],
    workflow: Workflow,
    fleet: Fleet,
    estimates: EstimateTable,
    *,
    tuning: Tuning | None = None,
) -> DispatchTable:
    """Return the table of one workflow from plans at increasing load.

    Parameters
    ----------
    levels
        By increasing occupancy; beyond the last the router falls back to least expected finish,
        so the last bound is usually ``math.inf``.

    Raises
    ------
    InvalidInput
        If there is no level, the bounds do not increase, or a plan is for another workflow or
        fleet.
    """
    if not levels:
        raise InvalidInput("no plan", where="levels", remedy="give at least one")
    ids = tuple(endpoint.id for endpoint in fleet.endpoints)
    rows: list[Row] = []
    lower = 0.0
    for bucket, level in enumerate(levels):
        plan = level.plan
        if (plan.workflow_hash, plan.fleet_hash) != (workflow.content_hash, fleet.content_hash()):
            raise InvalidInput(
                f"the plan of bucket {bucket} was made for workflow {plan.workflow_hash} on fleet "
                f"{plan.fleet_hash}",
                where="levels",
                remedy="plan for this workflow and fleet",
            )
        for site, shares in sorted(plan.shares().items()):
            estimate = estimates.site(workflow.content_hash, site)
            prompt = max(0.0, estimate.prompt_tokens.mean - estimate.shared_prefix_tokens)
            ranked = [
                Ranked(
                    endpoint=endpoint.id,
                    cost_s=round(
                        _service_s(
                            endpoint,
                            plan.levels.get(endpoint.id, 1),
                            prompt,
                            estimate.output_tokens.mean,
                        ),
                        4,
                    ),
                    share=round(shares.get(endpoint.id, 0.0), 4),
                    price=round(level.prices.get(endpoint.id, 0.0), 5),
                )
                for endpoint in fleet.endpoints
            ]
            ranked.sort(key=lambda one: (-one.share, one.cost_s * (1 + one.price), one.endpoint))
            rows.append(
                Row(
                    workflow_hash=workflow.content_hash,
                    site=site,
                    bucket=bucket,
                    valid_from=lower,
                    valid_to=level.occupancy,
                    ranked=tuple(ranked),
                    retain_kv=plan.keeps(site),
                    reason=(
                        f"planned for {plan.arrival_rate_rps:.3g} runs/s, gap {plan.gap:.1%}; "
                        f"{ranked[0].endpoint} takes {ranked[0].share:.0%}"
                    ),
                )
            )
        lower = level.occupancy
    return DispatchTable(
        fleet_hash=fleet.content_hash(),
        endpoints=ids,
        bounds=tuple(level.occupancy for level in levels),
        rows=tuple(rows),
        tuning=tuning or Tuning(),
    )


def merge_tables(tables: Sequence[DispatchTable]) -> DispatchTable:
    """Return one table with the rows of several, for one fleet, one set of buckets and weights.

    Raises
    ------
    InvalidInput
        If they differ in fleet, buckets or tuning, or share a workflow.
    """
    first, *rest = tables
    for other in rest:
        if (other.fleet_hash, other.bounds, other.tuning) != (
            first.fleet_hash,
            first.bounds,
            first.tuning,
        ):
            raise InvalidInput(
                "tables of different fleets, buckets or weights",
                where="merge",
                remedy="compile them together",
            )
    return DispatchTable(
        fleet_hash=first.fleet_hash,
        endpoints=first.endpoints,
        bounds=first.bounds,
        rows=tuple(row for table in tables for row in table.rows),
        tuning=first.tuning,
    )


def load_table(path: Path) -> DispatchTable:
    """Read a table file."""
    return DispatchTable.from_json(read_json(path, what="dispatch table"), where=str(path))


def save_table(table: DispatchTable, path: Path) -> None:
    """Write a table as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(table.to_json(), indent=1) + "\n", encoding="utf-8")
