"""What a plan is made from: fleet, forecasts and load at one instant.

The gateway takes it, the planner's process reads it; it goes between them as JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.latency import LatencyRow
from planner.domain.workflow import Workflow

__all__ = ["SNAPSHOT_SCHEMA", "Snapshot"]

SNAPSHOT_SCHEMA = "almanac.snapshot/1"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state a plan is made from.

    Parameters
    ----------
    now_s
        When it was taken, clock seconds.
    fleet
        All endpoints, as configured.
    up
        Ids of the endpoints that take calls.
    latency
        Latency rows as learned, by endpoint id; an absent endpoint keeps its configured row.
    workflows
        Graphs that may be planned.
    estimates
        Forecasts.
    rates_rps
        Arrivals per second by workflow hash, >= 0; of workflows that are listed.
    active_runs
        Runs in progress by workflow hash; of workflows that are listed.
    horizon_s
        How far the plan looks, > 0: within it the active runs are to be finished.

    Raises
    ------
    InvalidInput
        If an id or hash is unknown, or a number is out of range.
    """

    now_s: float
    fleet: Fleet
    up: tuple[str, ...]
    workflows: tuple[Workflow, ...]
    estimates: EstimateTable
    rates_rps: Mapping[str, float]
    latency: Mapping[str, LatencyRow]
    active_runs: Mapping[str, int]
    horizon_s: float

    def __post_init__(self) -> None:
        ids = {str(endpoint.id) for endpoint in self.fleet.endpoints}
        hashes = {workflow.content_hash for workflow in self.workflows}
        for where, names, known in (
            ("up", self.up, ids),
            ("latency", self.latency, ids),
            ("rates_rps", self.rates_rps, hashes),
            ("active_runs", self.active_runs, hashes),
        ):
            unknown = sorted(set(names) - known)
            if unknown:
                raise InvalidInput(
                    f"unknown {unknown[0]!r}",
                    where=f"snapshot: {where}",
                    remedy=f"use one of {', '.join(sorted(known))}",
                )
        for name, value in (*self.rates_rps.items(), *self.active_runs.items()):
            if not 0 <= value < math.inf:
                raise InvalidInput(
                    f"{value!r} of {name!r}", where="snapshot: load", remedy="use a number >= 0"
                )
        if not 0 < self.horizon_s < math.inf:
            raise InvalidInput(
                f"{self.horizon_s!r} s", where="snapshot: horizon_s", remedy="use a number above 0"
            )

    def loads_rps(self) -> dict[str, float]:
        """Return the runs per second to plan for by workflow hash, only those above 0.

        At least what it takes to finish the active runs within the horizon: after a burst the
        fleet is still busy though nothing arrives any more.
        """
        found = {}
        for workflow in self.workflows:
            key = workflow.content_hash
            backlog = self.active_runs.get(key, 0) / self.horizon_s
            load = max(self.rates_rps.get(key, 0.0), backlog)
            if load > 0:
                found[str(key)] = load
        return found

    @cached_property
    def learned_fleet(self) -> Fleet:
        """All endpoints, with their rows as learned."""
        return Fleet(
            name=self.fleet.name,
            endpoints=tuple(
                replace(endpoint, latency=self.latency.get(endpoint.id, endpoint.latency))
                for endpoint in self.fleet.endpoints
            ),
        )

    @cached_property
    def learned_estimates(self) -> EstimateTable:
        """The forecasts, with the endpoints' rows as learned."""
        return replace(self.estimates, endpoints={**self.estimates.endpoints, **self.latency})

    @cached_property
    def version(self) -> str:
        """12 hex digits of the content, the instant left out."""
        body = {name: value for name, value in self.to_json().items() if name != "now_s"}
        payload = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(payload.encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, schema included."""
        return {
            "schema": SNAPSHOT_SCHEMA,
            "now_s": self.now_s,
            "fleet": {
                "name": self.fleet.name,
                "endpoints": [asdict(endpoint) for endpoint in self.fleet.endpoints],
            },
            "up": list(self.up),
            "latency": {name: asdict(row) for name, row in self.latency.items()},
            "workflows": [workflow.to_json() for workflow in self.workflows],
            "estimates": self.estimates.to_json(),
            "rates_rps": dict(self.rates_rps),
            "active_runs": dict(self.active_runs),
            "horizon_s": self.horizon_s,
        }

    @classmethod
    def from_json(cls, raw: Any, where: str = "snapshot") -> Snapshot:
        """Rebuild a snapshot.

        Raises
        ------
        InvalidInput
            If the schema or a field does not fit.
        """
        if not isinstance(raw, dict) or raw.get("schema") != SNAPSHOT_SCHEMA:
            raise InvalidInput(
                "not a snapshot", where=where, remedy=f"give one of schema {SNAPSHOT_SCHEMA}"
            )
        try:
            return cls(
                now_s=float(raw["now_s"]),
                fleet=Fleet(
                    name=str(raw["fleet"]["name"]),
                    endpoints=tuple(_endpoint(one) for one in raw["fleet"]["endpoints"]),
                ),
                up=tuple(map(str, raw["up"])),
                latency={name: LatencyRow(**row) for name, row in raw["latency"].items()},
                workflows=tuple(
                    Workflow.from_json(one, f"{where}: workflows[{position}]")
                    for position, one in enumerate(raw["workflows"])
                ),
                estimates=EstimateTable.from_json(raw["estimates"], f"{where}: estimates"),
                rates_rps={name: float(rate) for name, rate in raw["rates_rps"].items()},
                active_runs={name: int(count) for name, count in raw["active_runs"].items()},
                horizon_s=float(raw["horizon_s"]),
            )
        except InvalidInput:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(
                f"a field is missing or of the wrong type ({error})",
                where=where,
                remedy="write it with Snapshot.to_json of this version",
            ) from error


_ENDPOINT_FIELDS = frozenset(field.name for field in fields(Endpoint))


def _endpoint(raw: Mapping[str, Any]) -> Endpoint:
    values = {name: value for name, value in raw.items() if name in _ENDPOINT_FIELDS}
    values["latency"] = LatencyRow(**raw["latency"])
    values["labels"] = tuple((str(key), str(label)) for key, label in raw["labels"])
    return Endpoint(**values)
