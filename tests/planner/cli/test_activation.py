"""A table goes live only if a replay of recent runs says it is not worse."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from planner.cli import activation
from planner.cli.activation import save_activation, weigh_tables
from planner.dispatch.forecast import Forecaster
from planner.dispatch.table import DispatchTable, Ranked, Row, Tuning
from planner.domain.errors import InvalidInput
from planner.domain.run import RunSpec
from planner.sim.experiment import PolicySetup
from planner.sim.workload import sampled_workload
from tests.planner.solve.small import case, chain, endpoint, fleet

QUESTION = case(chain("a", "b"), fleet(endpoint("fast"), endpoint("slow", 4.0)), 0.1)


def table(home: str) -> DispatchTable:
    """Return a table that sends everything to one endpoint, whatever the live costs say."""
    return DispatchTable(
        fleet_hash=QUESTION.fleet.content_hash(),
        endpoints=("fast", "slow"),
        bounds=(math.inf,),
        tuning=Tuning(theta=0.0, plan_pull=100.0),
        rows=tuple(
            Row(
                workflow_hash=QUESTION.workflow.content_hash,
                site=str(site),
                bucket=0,
                valid_from=0.0,
                valid_to=math.inf,
                ranked=tuple(
                    Ranked(endpoint=e, cost_s=1.0, share=float(e == home), price=0.0)
                    for e in ("fast", "slow")
                ),
            )
            for site in QUESTION.workflow.call_sites
        ),
    )


def recent() -> dict[int, tuple[RunSpec, ...]]:
    truth = QUESTION.estimates.workflows[QUESTION.workflow.content_hash]
    return {
        seed: sampled_workload(QUESTION.workflow, truth, [10.0 * n for n in range(4)], seed=seed)
        for seed in (1, 2)
    }


def test_the_better_table_goes_live_and_the_worse_does_not(tmp_path: Path) -> None:
    """Fast replaces slow, slow does not replace fast; a table never loses against itself."""
    forecaster = Forecaster(QUESTION.estimates, [QUESTION.workflow])
    fast, slow = table("fast"), table("slow")

    def weighed(candidate: DispatchTable, incumbent: DispatchTable) -> bool:
        return weigh_tables(candidate, incumbent, recent(), QUESTION.fleet, forecaster).activate

    assert [weighed(fast, slow), weighed(slow, fast), weighed(fast, fast)] == [True, False, True]
    record = weigh_tables(slow, fast, recent(), QUESTION.fleet, forecaster)
    assert sum(record.candidate_s) > 2 * sum(record.incumbent_s)
    assert [(one.site, one.before, one.after) for one in record.changes] == [
        (site, {"fast": 1.0}, {"slow": 1.0}) for site in ("a#0", "b#0")
    ]
    save_activation(record, tmp_path / "record.json")
    saved = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert (saved["activate"], saved["candidate"]) == (False, slow.version)


def test_nothing_to_replay_is_bad_input() -> None:
    """No recent runs, or a table for another fleet, is refused."""
    forecaster = Forecaster(QUESTION.estimates, [QUESTION.workflow])
    fast = table("fast")
    with pytest.raises(InvalidInput, match="recent"):
        weigh_tables(fast, fast, {}, QUESTION.fleet, forecaster)
    other = replace(fast, fleet_hash="other")
    with pytest.raises(InvalidInput, match="another fleet"):
        weigh_tables(other, fast, recent(), QUESTION.fleet, forecaster)


@pytest.mark.parametrize(
    ("candidate", "activate"),
    [((1.0, 2.0), True), ((0.9, 2.05), False), ((1.05, 1.9), False), ((1.009, 2.019), True)],
)
def test_mean_and_p95_both_count_beyond_the_tolerance(
    monkeypatch: pytest.MonkeyPatch, candidate: tuple[float, float], activate: bool
) -> None:
    """A gain in one does not pay for a loss in the other; within the tolerance nothing is lost."""
    new, old = table("fast"), table("slow")

    def latencies(setup: PolicySetup, *_others: object) -> tuple[float, float]:
        return candidate if setup.table is new else (1.0, 2.0)

    monkeypatch.setattr(activation, "_latencies", latencies)
    forecaster = Forecaster(QUESTION.estimates, [QUESTION.workflow])
    verdict = weigh_tables(new, old, recent(), QUESTION.fleet, forecaster, tolerance=0.01)
    assert verdict.activate is activate


def test_a_first_table_is_weighed_against_marginal_cost() -> None:
    """Without an incumbent every row is new, and sending all to the slow endpoint loses."""
    forecaster = Forecaster(QUESTION.estimates, [QUESTION.workflow])
    verdict = weigh_tables(table("slow"), None, recent(), QUESTION.fleet, forecaster)
    assert (verdict.incumbent, verdict.activate) == ("marginal_cost", False)
    assert [one.before for one in verdict.changes] == [None, None]
    assert "not activated" in verdict.text()


def test_a_table_under_which_nothing_ends_never_goes_live() -> None:
    """Infinite latencies are null in the record, and lose even against themselves."""
    fast = table("fast")
    endless = tuple(replace(run, patience_s=1e-3) for run in recent()[1])
    forecaster = Forecaster(QUESTION.estimates, [QUESTION.workflow])
    verdict = weigh_tables(fast, fast, {1: endless}, QUESTION.fleet, forecaster)
    assert not verdict.activate
    assert verdict.to_json()["candidate_s"] == [None]
