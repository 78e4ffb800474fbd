"""Opportunity prices of endpoints."""

from __future__ import annotations

import pytest

from planner.domain.errors import Infeasible
from planner.solve.prices import capacity_prices

from .small import Case, case, chain, endpoint, fleet


def prices(question: Case) -> dict[str, float]:
    """Return the prices of a question."""
    return capacity_prices(
        question.workflow,
        question.fleet,
        question.estimates,
        question.runs,
        arrival_rate_rps=question.rate,
    )


def test_idle_capacity_is_free() -> None:
    """At light load no endpoint has a price."""
    question = case(chain("a"), fleet(endpoint("fast"), endpoint("slow", 2.0)), 0.1)
    assert prices(question) == {"fast": 0.0, "slow": 0.0}


def test_scarce_fast_slot_costs_what_it_saves() -> None:
    """A slot second on the full fast endpoint is worth the detour it spares.

    A call takes 1.2 s there and 1.8 s on the other one: each of its slot seconds saves
    0.6 / 1.2 = 0.5 s.
    """
    machines = fleet(endpoint("fast", slots=1), endpoint("slow", 1.5, slots=1))
    found = prices(case(chain("a"), machines, 0.9))
    assert found["fast"] == pytest.approx(0.5)
    assert found["slow"] == pytest.approx(0.0)


def test_prices_do_not_fall_with_load() -> None:
    """More load never makes a slot second on the fast endpoint cheaper."""
    machines = fleet(endpoint("fast"), endpoint("slow", 2.0), endpoint("slower", 3.0))
    rates = (0.3, 0.8, 1.5, 2.2)
    found = [prices(case(chain("a", "b"), machines, r / 2, (50, 200)))["fast"] for r in rates]
    assert found == sorted(found)
    assert found[-1] > found[0]


def test_no_prices_beyond_what_the_fleet_carries() -> None:
    """Above the carried rate there is no price, and the error names that rate."""
    with pytest.raises(Infeasible, match=r"carries at most 0\.6667"):
        prices(case(chain("a"), fleet(endpoint("e", slots=1)), 0.9))
