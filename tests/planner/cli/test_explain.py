"""`almanac explain`: plans, tables and runs, with the figures they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.cli.main import main
from planner.domain.estimates import EstimateTable
from planner.domain.objective import Objective
from planner.domain.plan import save_plan
from planner.solve.solver import Budget, Demand, solve_mix
from tests.planner.report.samples import write_folder
from tests.planner.solve.small import endpoint, fleet, session


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a full results folder."""
    return write_folder(tmp_path / "in")


def explain(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return what the command prints."""
    assert main(["explain", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Objective, bound, gap and shares; --site picks one call site."""
    shown = explain(capsys, folder / "plan.json")
    for words in ("status: feasible", "objective_s: 10.000", "bound_s: 9.500", "gap: 5.0%"):
        assert words in shown
    raw = json.loads(explain(capsys, folder / "plan.json", "--site", "draft#0", "--json"))
    assert [(row["endpoint"], row["share"]) for row in raw["rows"]] == [
        ("a100", 0.5),
        ("h100", 0.5),
    ]


def test_plan_with_scarce_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Objective, values and bounds by term; KV use and price; what is kept of sessions and why."""
    workflow, estimate = session()
    table = EstimateTable(workflows={workflow.content_hash: estimate})
    machines = fleet(endpoint("e", kv_blocks=45), endpoint("f", 9.0))
    demand = Demand(workflow=workflow, rate_rps=0.13, deadline_s=30.0)
    result = solve_mix(
        [demand], machines, table, run_classes=2, scenarios=2,
        budget=Budget.reproducible(1.0), objective=Objective.parse("miss>mean"),
    )  # fmt: skip
    save_plan(result.plan, tmp_path / "plan.json")
    shown = explain(capsys, tmp_path / "plan.json")
    for words in (
        "objective: miss>mean", "value of mean: ", "bound of miss: ", "deadline_s: 30.000",
        "kv_use e: ", "kv_price_per_mtoken_s e: ", "prefix_share", "KV of sessions until",
    ):  # fmt: skip
        assert words in shown
    raw = json.loads(explain(capsys, tmp_path / "plan.json", "--json"))
    (decision,) = raw["sessions"]
    assert decision["site"] == "a#0"
    assert decision["kept_share"] == result.plan.retention[0].share


def test_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranked endpoints with cost, share and price; the load it holds for, and why."""
    shown = explain(capsys, folder / "table.json", "--site", "draft#0")
    assert "draft#0, load from 0 to 0.5 calls per slot" in shown
    assert "draft#0, load from 0.5 calls per slot" in shown
    assert "h100 takes 75%" in shown
    assert "triage#0" not in shown
    raw = json.loads(explain(capsys, folder / "table.json", "--json"))
    assert raw["rows"][0]["cost_s"] == 1.25
    assert raw["rows"][2]["load_to"] is None


def test_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Per call: endpoint, reason, predicted and actual finish, waiting, first token, decode."""
    trace = folder / "traces" / "round_robin-0.jsonl"
    raw = json.loads(explain(capsys, trace, "--run", "s0-r2", "--json"))
    assert raw["facts"]["latency_s"] == 12.0
    assert raw["facts"]["predicted_s"] == 11.0
    first, second = raw["rows"]
    assert (first["endpoint"], second["endpoint"]) == ("h100", "a100")
    assert first["predicted_finish_s"] == pytest.approx(4.8)
    assert first["finish_s"] == pytest.approx(4.0)
    assert first["waiting_s"] == pytest.approx(0.1)
    assert first["ttft_s"] == pytest.approx(1.5)
    assert first["decode_s"] == pytest.approx(2.4)
    assert second["ready_s"] == pytest.approx(8.0)


def test_the_slowest_run_is_the_default(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --run the run with the greatest latency is explained."""
    shown = explain(capsys, folder / "traces" / "almanac-0.jsonl")
    assert shown.startswith("run: s0-r4\n")
    assert "plan" in shown


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("results.json", (), "neither a plan nor a dispatch table"),
        ("nothing.json", (), "no such plan or table"),
        ("plan.json", ("--site", "other#0"), "no call site 'other#0'; known: draft#0, triage#0"),
        ("table.json", ("--run", "r"), "only a trace has runs"),
        ("traces/almanac-0.jsonl", ("--run", "r"), "no run 'r'; known: s0-r0, s0-r1"),
        ("traces/almanac-0.jsonl", ("--site", "other#0"), "no call site 'other#0'"),
    ],
)
def test_bad_input(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    """What is not there is named, with what is."""
    assert main(["explain", str(folder / file), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
