"""Regret of recorded runs, and diffs, on cases by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import almanac
from planner.cli.main import main
from planner.dispatch.policies import make_policy
from planner.domain.errors import InvalidInput
from planner.domain.files import data_dir
from planner.domain.fleet import Fleet, load_fleet
from planner.domain.plan import Assignment, Plan, save_plan
from planner.domain.trace import CallRecord, TraceRecord, save_trace
from planner.domain.workflow import save_workflow
from planner.sim.kernel import simulate
from planner.whatif.diff import compare
from planner.whatif.effort import Effort
from planner.whatif.question import Question, workload
from planner.whatif.regret import PARTS, Regret, hindsight

from .small import endpoint, question


def recorded(asked: Question, policy: str, runs: int = 12) -> list[TraceRecord]:
    return simulate(
        workload(asked, 0, runs), asked.fleet, make_policy(policy), asked.world().forecaster
    )


def regret_of(asked: Question, records: list[TraceRecord], steps: int = 5) -> Regret:
    return hindsight(records, asked.fleet, asked.workflows, asked.estimates, steps=steps)


def test_nothing_to_regret() -> None:
    """On one endpoint with runs that hardly meet there is nothing to gain, and replay is exact."""
    asked = question()
    found = regret_of(asked, recorded(asked, "least_load"))
    (row,) = found.rows()
    assert row["excess_s"] == pytest.approx(0.0, abs=1e-6)
    assert found.model_s == pytest.approx(0.0, abs=1e-3)
    assert found.bound_s == pytest.approx(row["found_s"], rel=1e-3)


def test_slow_endpoints_are_a_matter_of_placement() -> None:
    """Round robin sends every other run to an endpoint five times slower: placement, all of it."""
    asked = question(endpoint("a"), endpoint("b", scale=5.0))
    found = regret_of(asked, recorded(asked, "round_robin"))
    (row,) = found.rows()
    assert row["replayed_s"] == pytest.approx(3 * 1.199, rel=1e-3)
    assert row["placement_s"] == pytest.approx(2 * 1.199, rel=1e-3)
    assert row["excess_s"] == pytest.approx(row["placement_s"], abs=1e-3)


def test_waiting_in_the_router_is_a_matter_of_admission() -> None:
    """Calls that the router held for two seconds each would have been served at once."""
    asked = question()
    held = [
        replace(
            one,
            sent_s=one.sent_s + 2.0,
            first_token_s=(one.first_token_s or 0.0) + 2.0,
            finish_s=(one.finish_s or 0.0) + 2.0,
        )
        if isinstance(one, CallRecord)
        else one
        for one in recorded(asked, "least_load")
    ]
    (row,) = regret_of(asked, held).rows()
    assert row["admission_s"] == pytest.approx(2.0, abs=1e-3)
    assert row["excess_s"] == pytest.approx(2.0, abs=1e-3)


def test_parts_add_up_run_by_run() -> None:
    """Under load, whatever the shortcomings: the parts of each run sum to its excess."""
    asked = question(endpoint("a", slots=1), endpoint("b", scale=2.0, slots=1), rate=1.0)
    found = regret_of(asked, recorded(asked, "random"), steps=8)
    for one in found.runs:
        assert set(one.parts) == set(PARTS)
        assert sum(one.parts.values()) == pytest.approx(one.excess_s)
    (row,) = found.rows()
    assert all(row[f"{part}_s"] >= -1e-9 for part in PARTS)
    assert found.bound_s <= row["found_s"] + 1e-9
    assert "best found s" in found.text()


def test_traces_that_cannot_be_judged() -> None:
    """Several models, pools, strangers and empty traces are one clear error each."""
    asked = question()
    records = recorded(asked, "least_load")
    two = Fleet(name="two", endpoints=(endpoint("a"), replace(endpoint("b"), model="other")))
    with pytest.raises(InvalidInput, match="m, other"):
        hindsight(records, two)
    with pytest.raises(InvalidInput, match="no endpoint 'a'"):
        hindsight(records, Fleet(name="x", endpoints=(endpoint("z"),)))
    with pytest.raises(InvalidInput, match="no run"):
        hindsight([], asked.fleet)


def plan(endpoint_id: str, objective_s: float = 2.0, wall_s: float = 0.0) -> Plan:
    return Plan(
        workflow_hash="w", fleet_hash="f", arrival_rate_rps=1.0, run_classes=1,
        assignments=(Assignment(run_class=0, site="n0#0", endpoint=endpoint_id),),
        levels={endpoint_id: 4}, objective_s=objective_s, bound_s=1.0, status="feasible",
        scenarios=2, seed=0, wall_s=wall_s,
    )  # fmt: skip


def test_plans_row_by_row() -> None:
    """A site that moves is a changed row; levels come and go; wall times do not count."""
    assert compare(plan("a"), plan("a", wall_s=3.0)).changes == ()
    found = compare(plan("a"), plan("b", objective_s=2.5))
    shown = [(one.kind, one.row, one.field) for one in found.changes]
    assert shown == [
        ("changed", "", "objective_s"),
        ("removed", "level of a", ""),
        ("added", "level of b", ""),
        ("changed", "site n0#0", "share on a"),
        ("changed", "site n0#0", "share on b"),
    ]


def test_diff_is_a_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits with 1 on a change where it is told to, with the same bytes each time."""
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    save_plan(plan("a"), first)
    save_plan(plan("b"), second)
    assert main(["diff", str(first), str(first), "--fail-on-change"]) == 0
    assert main(["diff", str(first), str(second)]) == 0
    capsys.readouterr()
    said = []
    for _ in range(2):
        assert main(["diff", str(first), str(second), "--fail-on-change", "--json"]) == 1
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    fleet = data_dir() / "fleets" / "demo.yaml"
    assert main(["diff", str(first), str(fleet)]) == 2
    assert "two of the same kind" in capsys.readouterr().err


def test_fleets_by_endpoint() -> None:
    """An endpoint that leaves is a row, a changed price a field."""
    before = load_fleet(data_dir() / "fleets" / "demo.yaml")
    after = Fleet(
        name="demo",
        endpoints=(replace(before.endpoints[0], usd_per_hour=3.0), *before.endpoints[1:-1]),
    )
    found = compare(before, after)
    assert [(one.row, one.field) for one in found.changes] == [
        ("endpoint h100", "usd_per_hour"),
        ("endpoint l4", ""),
    ]
    assert "2 of 5 rows change" in found.text()


def test_commands_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`whatif` answers and keeps, `regret` splits; the facade gives the same records."""
    fleet = data_dir() / "fleets" / "demo.yaml"
    graph, truth = data_dir() / "demo" / "research.json", data_dir() / "demo" / "truth.json"
    asked = [
        "whatif", str(fleet), "--workflow", str(graph), "--estimates", str(truth), "--rate", "0.2",
        "--seeds", "2", "--runs", "20", "--jobs", "1", "--out", str(tmp_path),
    ]  # fmt: skip
    assert main([*asked, "--change=-l4", "--target", "p95=1"]) == 0
    assert "no policy can reach p95=1 s" in capsys.readouterr().out
    assert (tmp_path / "whatif.json").exists()
    small = question()
    trace, own = tmp_path / "trace.jsonl", tmp_path / "own.json"
    save_trace(recorded(small, "least_load"), trace)
    save_workflow(small.workflows[0], own)
    again = almanac.regret(trace, small.fleet, own, small.estimates, steps=1)
    assert len(again.runs) == 12
    shown = almanac.whatif(
        small.fleet, own, small.estimates, rate=1e-6, changes=["slots a=+1"],
        effort=Effort(seeds=2, runs=20),
    )  # fmt: skip
    assert [one.label for one in shown.answers] == ["as it is", "slots a=+1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no fleet file"),
        (["fleet.yaml"], "--workflow FILE"),
        (["--demo", "--change", "faster"], "is no change"),
        (["--demo", "--target", "p95"], "p95=8"),
        (["--demo", "--why-not"], "no --target"),
        (["--demo", "--prices", "--grid", "x"], "one after the other"),
        (["--demo", "--prices", "--change", "load 2"], "into the grid"),
        (["--demo", "--seeds", "1", "--target", "p95=1"], "--seeds"),
    ],
)
def test_mistakes_on_the_command_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is one line on stderr and exit code 2."""
    assert main(["whatif", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
