"""The demo fleet and workflow as a question, with example prices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from planner.domain.estimates import load_estimates
from planner.domain.files import data_dir
from planner.domain.fleet import Fleet, load_fleet
from planner.domain.workflow import load_workflow
from planner.whatif.question import Question, Stream

__all__ = ["EXAMPLE_USD_PER_HOUR", "demo_question", "priced"]

EXAMPLE_USD_PER_HOUR: Mapping[str, float] = {
    "H200": 3.6, "H100": 2.8, "A100-80": 1.8, "L40S": 1.0, "A10G": 0.9, "L4": 0.6,
}  # fmt: skip
"""Examples for the demo, by GPU: of the size that clouds ask, no offer of any of them."""


def priced(fleet: Fleet, usd_per_hour: Mapping[str, float]) -> Fleet:
    """Return the fleet with prices by GPU where an endpoint has none."""
    return replace(
        fleet,
        endpoints=tuple(
            replace(one, usd_per_hour=usd_per_hour.get(one.gpu))
            if one.usd_per_hour is None
            else one
            for one in fleet.endpoints
        ),
    )


def demo_question(rate_rps: float = 1.0, *, deadline_s: float | None = 20.0) -> Question:
    """Return the demo: one workflow on five unlike endpoints; a fifth of the runs are a tenant's.

    Forecasts are the truth's own distributions.
    """
    folder = data_dir()
    workflow = load_workflow(folder / "demo" / "research.json")
    shares = {"small": 0.8, "heavy": 0.2}
    return Question(
        fleet=priced(load_fleet(folder / "fleets" / "demo.yaml"), EXAMPLE_USD_PER_HOUR),
        streams=tuple(
            Stream(
                workflow=workflow, rate_rps=share * rate_rps, tenant=tenant, deadline_s=deadline_s
            )
            for tenant, share in shares.items()
        ),
        estimates=load_estimates(folder / "demo" / "truth.json"),
    )
