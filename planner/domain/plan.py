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

Several workflows planned together have a plan each, with the same levels. Means over calls then
weight each workflow by its rate, and loads are summed.

Prefill/decode pairs: an assignment with ``prefill`` computes the prompt there, alone
(``prefill_s(uncached, cached)``, which is also its load; the lane is at most the cap busy), hands
the whole prompt over (``TRANSFER_SETUP_S`` plus its bytes over the slower of the two links) and
decodes at ``endpoint``, whose steps wait for no prefill: ``output * decode_step_s(l, l * c)``.

KV memory
---------
On an endpoint that serves calls whole, prompts are cached only as far as its KV cache holds them.
``warm`` says that the static prefix of the site is kept there; else the first visit of a run
prefills its cached tokens, too. ``keep`` says that a session's KV outlives the gap between two
visits; else a later visit prefills everything that would have been cached. Both add
``prefill_marginal_s(cached, 0)`` to the service time (and so to the load). The tokens held on
average by Little's law are at most ``UTILISATION_CAP`` of the cache: the sum of

* busy calls of a site times their context beyond the static prefix (mean weighted by output),
* each static prefix kept, once for all sites that share it,
* for a kept session, its rate times context after a visit times the gap of the site: the mean
  time from the end of a visit to the start of the next, where there is one, with calls as long as
  at level 1 (the mean over the endpoints that serve their model whole; 0 if there are none).

A cold call's own copy of the prefix is left out. Pairs count the contexts at their decode
endpoint; their prefixes and sessions take no part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from planner.domain.errors import InvalidInput
from planner.domain.files import atomic_write, read_json
from planner.domain.objective import MEAN, Objective
from planner.domain.show import html_table

__all__ = [
    "PLAN_SCHEMA",
    "PLAN_TICK_S",
    "TRANSFER_SETUP_S",
    "UTILISATION_CAP",
    "Assignment",
    "Plan",
    "Retention",
    "load_plan",
    "save_plan",
]

PLAN_SCHEMA = "almanac.plan/1"
PLAN_TICK_S = 0.01
"""Time resolution of plans, seconds; every duration is rounded up to it."""
UTILISATION_CAP = 0.8
"""Largest share of a level's slots, and of a KV cache, that a plan may fill on average."""
TRANSFER_SETUP_S = 0.001
"""Set-up of a KV transfer between prefill and decode endpoint, seconds (RDMA: 0.5 to 2 ms)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Call site ``site`` of run class ``run_class`` (from 0) goes to ``endpoint``.

    Parameters
    ----------
    prefill
        The endpoint that computes the prompt, where ``endpoint`` only decodes.
    warm
        The static prefix is kept there.
    keep
        A session's KV is kept there between visits of the site.
    """

    run_class: int
    site: str
    endpoint: str
    prefill: str | None = None
    warm: bool = True
    keep: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Whether a session's KV is worth keeping after a call of a site, and why.

    Parameters
    ----------
    site
        A call site that runs visit more than once.
    share
        Share of the traffic whose KV the plan keeps, [0, 1].
    return_probability
        Later visits per visit, [0, 1).
    gap_s
        Mean time from a visit to the next, seconds.
    saved_s
        Prefill seconds that a kept session saves at its next visit, mean.
    value
        Seconds saved per KV token second: ``return_probability * saved_s`` over context tokens
        times ``gap_s``.
    price
        What a KV token second costs where the site is placed, in seconds of run latency: the dual
        of the KV capacity in the relaxed plan; 0 where KV is not scarce.
    """

    site: str
    share: float
    return_probability: float
    gap_s: float
    saved_s: float
    value: float
    price: float


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
        Value of the objective (of its first term, if they are taken one after the other) over all
        workflows planned together, and the proven least; seconds.
    status
        ``optimal`` or ``feasible``.
    scenarios, seed
        Sample size per run class and seed of the scenarios.
    wall_s, deterministic_time
        What solving took.
    notes
        Further figures by name.
    objective
        What was minimised.
    values
        Value of each term over all workflows planned together, and of the mean, by name.
    bounds
        Proven least value of each stage, by name, where terms are taken one after the other.
    weight, deadline_s, hard_deadline
        Of this workflow: weight in the objective (> 0), deadline in seconds or None, and whether
        every scenario has to keep it.
    retention
        One decision per site that runs visit again.
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
    objective: Objective = MEAN
    values: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    weight: float = 1.0
    deadline_s: float | None = None
    hard_deadline: bool = False
    retention: tuple[Retention, ...] = ()

    @property
    def gap(self) -> float:
        """Relative distance of the objective to the bound, >= 0."""
        if self.objective_s <= 0:
            return 0.0
        return max(0.0, (self.objective_s - self.bound_s) / self.objective_s)

    def shares(self) -> dict[str, dict[str, float]]:
        """Return call site -> endpoint -> share of its traffic (each site sums to one).

        The endpoint is where calls are sent: of a prefill/decode pair, the first.
        """
        out: dict[str, dict[str, float]] = {}
        for one in self.assignments:
            row = out.setdefault(one.site, {})
            entry = one.prefill or one.endpoint
            row[entry] = row.get(entry, 0.0) + 1.0 / self.run_classes
        return out

    def keeps(self, site: str) -> bool:
        """Return whether most of a site's sessions keep their KV for another visit."""
        return any(one.site == site and one.share >= 0.5 for one in self.retention)

    def _repr_html_(self) -> str:
        """Return what was proven and each call site's shares, for a notebook."""
        return html_table(
            [
                {"call site": site, **{name: f"{share:.0%}" for name, share in row.items()}}
                for site, row in sorted(self.shares().items())
            ],
            f"{self.status}: {self.objective_s:.2f} s expected, proven at least {self.bound_s:.2f} "
            f"s (gap {self.gap:.1%}), at {self.arrival_rate_rps:.3g} runs/s",
        )

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
            values["retention"] = tuple(Retention(**row) for row in raw.get("retention", ()))
            if "objective" in raw:
                values["objective"] = Objective.from_json(raw["objective"])
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
