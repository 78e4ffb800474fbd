"""Grids, remedies, cheapest fleets and marginal values on small questions."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from planner.domain.errors import InvalidInput
from planner.report.whatif_page import grid_figure, write_grid_page
from planner.whatif.answer import Answer
from planner.whatif.bars import random_scenarios
from planner.whatif.changes import AddEndpoints, ScaleLoad, Scenario
from planner.whatif.cheapest import cheapest_fleet
from planner.whatif.demo import demo_question
from planner.whatif.effort import Effort
from planner.whatif.figures import Figure
from planner.whatif.grid import Cell, Grid, knees, load_grid, run_grid
from planner.whatif.notation import parse_scenario
from planner.whatif.prices import marginal_values
from planner.whatif.question import Target
from planner.whatif.store import Store
from planner.whatif.whynot import why_not

from .small import endpoint, question

EFFORT = Effort(seeds=2, runs=20)


def cell(rate: float, mean_s: float, name: str = "x") -> Cell:
    asked = question(rate=rate)
    figure = Figure(value=mean_s, low=mean_s, high=mean_s)
    answer = Answer(label=name, question=asked, figures={"mean_s": figure}, capacity_rps=10.0)
    return Cell(scenario=name, policy="p", factor=rate, answer=answer)


def test_the_knee_is_where_power_is_largest() -> None:
    """Of 1/1, 2/1.5 and 3/4 runs per second and second of latency the middle one is largest."""
    (found,) = knees([cell(1.0, 1.0), cell(2.0, 1.5), cell(3.0, 4.0)])
    assert (found.rate_rps, found.load, found.inside) == (2.0, 0.2, True)
    (edge,) = knees([cell(1.0, 1.0), cell(2.0, 1.5)])
    assert not edge.inside


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    """Scenarios x loads x policies, with the cheapest that meets the target, table and page."""
    base = question(endpoint("a"), endpoint("b", usd=3.0), rate=0.5)
    grid = Grid(
        scenarios=(Scenario(), parse_scenario("-b"), parse_scenario("-a")),
        loads=(0.5, 1.0),
        policies=("least_load", "random"),
    )
    found = run_grid(base, grid, target=Target.parse("mean=5"), effort=EFFORT, store=Store())
    assert len(found.cells) == 12
    assert found.cheapest is not None
    assert found.cheapest.scenario == "-b"
    rows = list(csv.DictReader(found.to_csv().splitlines()))
    assert len(rows) == 12
    assert {row["meets_target"] for row in rows} == {"True"}
    assert len(found.knees) == 6
    assert "knee of" in found.text()
    document = found.to_json()
    assert len(grid_figure(document).axes) == 2
    page = write_grid_page(document, tmp_path / "page.html")
    assert page.read_bytes() == write_grid_page(document, tmp_path / "again.html").read_bytes()
    assert "cheapest is -b" in page.read_text(encoding="utf-8")


def test_a_grid_goes_on_where_it_was(tmp_path: Path) -> None:
    """What was done before an interruption is not done again, and the answer is the same."""
    base = question(endpoint("a"), rate=0.5)
    grid = Grid(scenarios=(Scenario(), parse_scenario("load 0.5")))

    class Stopped(Exception):
        pass

    done: list[str] = []

    def stop(text: str) -> None:
        done.append(text)
        if len(done) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        run_grid(base, grid, effort=EFFORT, store=Store(folder=tmp_path, progress=stop))
    again: list[str] = []
    store = Store(folder=tmp_path, progress=again.append)
    found = run_grid(base, grid, effort=EFFORT, store=store)
    assert len(done) + len(again) == 8
    fresh = run_grid(base, grid, effort=EFFORT, store=Store())
    assert found.to_json() == fresh.to_json()


def test_grid_files(tmp_path: Path) -> None:
    """A grid file says what to try; a mistake names file, field and remedy."""
    path = tmp_path / "grid.yaml"
    head = "schema: almanac.whatif-grid/1\n"
    path.write_text(f'{head}changes: ["", "+1xa"]\nloads: [0.5, 1]\n', encoding="utf-8")
    grid = load_grid(path)
    assert [str(one) for one in grid.scenarios] == ["as it is", "+1xa"]
    for body, said in (
        ("changes: [faster]\n", "is no change"),
        ("loads: [0]\n", r"loads\[0\]"),
        ("policies: [best]\n", "'best' is unknown"),
        ("colour: red\n", "unknown field"),
    ):
        path.write_text(head + body, encoding="utf-8")
        with pytest.raises(InvalidInput, match=said) as caught:
            load_grid(path)
        assert str(path) in str(caught.value)
    path.write_text("schema: other\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match="almanac.whatif-grid/1"):
        load_grid(path)


def test_remedies_are_smallest_and_meet_the_target() -> None:
    """Beyond capacity one endpoint more helps, or less load; no set holds another."""
    base = question(endpoint("a"), rate=2.2)
    target = Target.parse("mean=2.2")
    steps = (AddEndpoints(count=1, kind="a"), ScaleLoad(factor=0.9), ScaleLoad(factor=0.4))
    found = why_not(base, target, changes=steps, effort=EFFORT, store=Store())
    sets = [str(one.scenario) for one in found.remedies]
    assert sets == ["load 0.4", "+1xa"]
    assert "carries at most" in found.reason
    assert found.core is not None
    assert "the load asks for 2.2 runs/s" in found.core
    assert found.slack is not None
    assert found.slack > 0
    for one in found.remedies:
        assert target.met(one.answer.figures["mean_s"].value)
    assert found.remedies[1].extra_usd_per_hour == pytest.approx(1.0)
    assert "smallest changes" in found.text()


def test_what_no_policy_can_reach_needs_other_hardware() -> None:
    """Below a run's time alone: bounds rule out more of the same, a faster GPU meets it."""
    base = question(endpoint("a"))
    target = Target.parse("p95=0.5")
    gpu = replace(endpoint("fast", scale=0.2), usd_per_hour=9.0)
    both = replace(base, fleet=replace(base.fleet, endpoints=(endpoint("a"), gpu)))
    slow = why_not(
        base, target, changes=(AddEndpoints(count=1, kind="a"),), effort=EFFORT, store=Store()
    )
    assert slow.remedies == ()
    assert slow.proven_out == slow.looked_at == 2
    assert slow.proven_slack == pytest.approx(1.199 - 0.5, rel=0.02)
    assert "no policy can reach" in slow.reason
    assert slow.core is not None
    assert "critical path" in slow.core
    cheapest = cheapest_fleet(both, target, most=2, effort=EFFORT, store=Store())
    assert cheapest.answer is not None
    assert cheapest.answer.label == "1xfast"
    assert cheapest.proven_out == 2


def test_a_target_that_is_met_needs_no_remedy() -> None:
    """Where the target is met nothing is looked for."""
    found = why_not(question(), Target.parse("p95=2"), effort=EFFORT, store=Store())
    assert (found.remedies, found.slack, found.looked_at) == ((), 0.0, 0)


def test_the_cheapest_fleet_carries_the_load() -> None:
    """Of endpoints at 1 $ a fleet of two is cheapest for a load of 1.5 times what one carries."""
    base = question(endpoint("a"), rate=2.6)
    found = cheapest_fleet(base, Target.parse("mean=3"), most=3, effort=EFFORT, store=Store())
    assert found.answer is not None
    assert found.answer.label == "2xa"
    assert found.beyond_capacity == 1
    assert "2xa for 2.00 $/h" in found.text()
    unpriced = question(endpoint("a", usd=None))
    with pytest.raises(InvalidInput, match=r"workers\[0\].usd_per_hour"):
        cheapest_fleet(unpriced, Target.parse("mean=3"))


def test_marginal_values_by_hand() -> None:
    """On an idle fleet slots and KV are worth nothing; a second makes every run timely."""
    found = marginal_values(question(deadline_s=1.0), effort=EFFORT, store=Store())
    rows = {one.change: one for one in found.rows}
    assert list(rows) == ["+1xa", "slots a=+1", "kv a=+1", "deadline t0=+1"]
    for name in ("slots a=+1", "kv a=+1"):
        assert rows[name].effects[""]["mean_s"].value == pytest.approx(0.0, abs=1e-6)
    assert rows["deadline t0=+1"].effects[""]["attainment"].value == pytest.approx(1.0)
    assert rows["+1xa"].usd_per_hour == pytest.approx(1.0)
    assert "dual s" in found.text()


def test_a_slot_is_worth_something_where_they_are_short() -> None:
    """With one slot and a queue, one more shortens runs, and the plan's dual says so, too."""
    busy = question(endpoint("a", slots=1), endpoint("b", slots=1, scale=3.0), rate=0.75)
    found = marginal_values(busy, effort=Effort(seeds=3, runs=40), store=Store())
    row = next(one for one in found.rows if one.change == "slots a=+1")
    assert row.effects[""]["mean_s"].high < 0
    assert row.dual_s is not None
    assert row.dual_s < 0


def test_random_scenarios_are_the_same_each_time() -> None:
    """The scenarios of the agreement bar are drawn from a seed."""
    one, other = (random_scenarios(demo_question(), 5) for _ in range(2))
    assert [label for label, _ in one] == [label for label, _ in other]
    assert len({label for label, _ in one}) == 5
