"""A plan: which endpoint each call site of each run class uses, with its proof.

The planned traffic of a workflow is divided into ``run_classes`` equal shares. Each class is a
representative run with a placement of its own, so shares are multiples of 1 / run_classes and a
run's calls are placed together (which is what prefix reuse inside a run needs).

``levels`` says at which load level each endpoint is planned to work: the number of calls that run
there side by side, which fixes its speed.

Planned service time
--------------------
The solver and the checker compute it separately from this definition. Over all calls of the
scenarios let ``p`` be the mean of ``prefill_marginal_s(uncached, cached)`` on the endpoint, ``o``
the mean output length, and ``c`` the mean of ``prompt + output / 2`` weighted by output length
(the context of a call that is found decoding). At level ``l`` a call takes

    prefill_s(uncached, cached) + output * (decode_step_s(l, l * c) + (l - 1) * p / o)

seconds: its own prefill, its decode steps beside ``l`` calls of typical context, and the prefills
of the others, of which ``(l - 1) / o`` arrive per step. ``cached`` is the longest known start of
the prompt, at most all but one token: the static prefix of the site, or the prompt and answer of
an earlier call of the same site in the same run (same site, same class, hence same endpoint).

Capacity: with runs arriving at rate ``r``, the expected seconds of service per second of time on
an endpoint are at most ``UTILISATION_CAP * l``. What the cap leaves free is the allowance for
waiting, which the service time does not contain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from planner.domain.errors import InvalidInput
from planner.domain.files import atomic_write, read_json

__all__ = [
    "PLAN_SCHEMA",
    "PLAN_TICK_S",
    "UTILISATION_CAP",
    "Assignment",
    "Plan",
    "load_plan",
    "save_plan",
]

PLAN_SCHEMA = "almanac.plan/1"
PLAN_TICK_S = 0.01
"""Time resolution of plans, seconds; every duration is rounded up to it."""
UTILISATION_CAP = 0.8
"""Largest share of the slots of a load level that a plan may fill on average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Call site ``site`` of run class ``run_class`` (from 0) goes to ``endpoint``."""

    run_class: int
    site: str
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All assignments with provenance.

    Parameters
    ----------
    workflow_hash, fleet_hash
        What it was made for.
    arrival_rate_rps
        Runs per second it was made for, > 0.
    run_classes
        Number of representative runs, >= 1.
    assignments
        One per run class and call site.
    levels
        Endpoint id -> calls side by side (>= 1) its speed is planned for.
    objective_s, bound_s
        Expected run latency of the plan over the scenarios, and the proven least, seconds.
    status
        ``optimal`` or ``feasible``.
    scenarios, seed
        Sample size per run class and seed of the scenarios.
    wall_s, deterministic_time
        What solving took.
    """

    workflow_hash: str
    fleet_hash: str
    arrival_rate_rps: float
    run_classes: int
    assignments: tuple[Assignment, ...]
    levels: Mapping[str, int]
    objective_s: float
    bound_s: float
    status: str
    scenarios: int
    seed: int
    wall_s: float = 0.0
    deterministic_time: float = 0.0
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """Relative distance of the objective to the bound, >= 0."""
        if self.objective_s <= 0:
            return 0.0
        return max(0.0, (self.objective_s - self.bound_s) / self.objective_s)

    def shares(self) -> dict[str, dict[str, float]]:
        """Return call site -> endpoint -> share of its traffic (each site sums to one)."""
        out: dict[str, dict[str, float]] = {}
        for one in self.assignments:
            row = out.setdefault(one.site, {})
            row[one.endpoint] = row.get(one.endpoint, 0.0) + 1.0 / self.run_classes
        return out

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form, schema and gap included."""
        return {"schema": PLAN_SCHEMA, **asdict(self), "gap": self.gap}

    @classmethod
    def from_json(cls, raw: Any, where: str = "plan") -> Plan:
        """Rebuild a plan, or raise `InvalidInput`."""
        if not isinstance(raw, dict) or raw.get("schema") != PLAN_SCHEMA:
            raise InvalidInput(
                "not a plan file", where=where, remedy="give a file made by `almanac plan`"
            )
        try:
            values = {k: v for k, v in raw.items() if k not in ("schema", "gap")}
            values["assignments"] = tuple(Assignment(**row) for row in raw["assignments"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise InvalidInput(
                f"a field is missing or unknown ({error})",
                where=where,
                remedy="make it again with `almanac plan`",
            ) from error


def load_plan(path: Path) -> Plan:
    """Read a plan file."""
    return Plan.from_json(read_json(path, what="plan file"), where=str(path))


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(plan.to_json(), indent=1) + "\n", encoding="utf-8")
