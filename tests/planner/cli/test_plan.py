"""`almanac plan`: what it prints, writes and refuses."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from planner.cli import plan as command
from planner.dispatch.table import load_table
from planner.domain.errors import Infeasible, InvalidInput
from planner.domain.estimates import EstimateTable, load_estimates, save_estimates
from planner.domain.fleet import load_fleet
from planner.domain.plan import load_plan
from planner.domain.workflow import load_workflow, save_workflow
from planner.graph.sampling import scenarios
from planner.verify import VerifyReport, Violation, verify_plan
from tests.planner.graph.research import research_estimate, research_workflow

FLEET = Path(__file__).parents[3] / "data" / "fleets" / "demo.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the research workflow and its estimates."""
    workflow = research_workflow()
    table = EstimateTable(workflows={workflow.content_hash: research_estimate()})
    save_workflow(workflow, tmp_path / "workflow.json")
    save_estimates(table, tmp_path / "estimates.json")
    return tmp_path


def plan(folder: Path, *extra: str, rate: str = "0.3") -> int:
    """Run the command on the folder's files."""
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    arguments = [
        "plan",
        *("--workflow", str(folder / "workflow.json")),
        *("--fleet", str(FLEET)),
        *("--estimates", str(folder / "estimates.json")),
        *("--rate", rate),
        *("--classes", "2", "--scenarios", "4", "--deterministic"),
    ]
    args = parser.parse_args([*arguments, *extra])
    code: int = args.run(args)
    return code


def test_result_on_stdout_and_progress_on_stderr(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status, objective, bound, gap, verdict and placement are data; the log is not."""
    assert plan(folder, "--explain") == 0
    out, err = capsys.readouterr()
    for word in ("objective", "bound", "gap", "checker     accepted", "draft#0", "runner-up"):
        assert word in out
    assert "gap" in err
    assert all(line.startswith("plan: ") for line in err.splitlines())


def test_written_plan_and_table_can_be_read_and_checked(folder: Path) -> None:
    """The plan file passes the checker again, and the table covers each site of the fleet."""
    out, table_path = folder / "plan.json", folder / "table.json"
    assert plan(folder, "--out", str(out), "--table", str(table_path)) == 0
    saved, fleet = load_plan(out), load_fleet(FLEET)
    workflow = load_workflow(folder / "workflow.json")
    estimates = load_estimates(folder / "estimates.json")
    runs = scenarios(workflow, estimates.workflows[workflow.content_hash], 4, 0)
    assert verify_plan(saved, workflow, fleet, estimates, runs).ok
    table = load_table(table_path)
    table.check_fleet(fleet)
    assert {row.site for row in table.rows} == set(workflow.call_sites)


def test_json_is_one_document_with_plan_and_verdict(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--json prints what a program needs, and with --deterministic the plan is the same again."""
    documents = []
    for _ in range(2):
        assert plan(folder, "--json") == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0]["accepted"] is True
    assert documents[0]["plan"] == documents[1]["plan"]
    assert {"log", "endpoints", "runners_up"} <= documents[0].keys()


def test_several_workflows_get_a_plan_each_and_one_table(folder: Path) -> None:
    """With two workflows there are two plan files and one table that covers both."""
    from tests.planner.solve.small import chain

    other = chain("p", "q")
    other = replace(
        other,
        nodes=tuple(
            replace(node, call_sites=tuple(replace(s, model=None) for s in node.call_sites))
            for node in other.nodes
        ),
    )
    save_workflow(other, folder / "other.json")
    options = ("--workflow", str(folder / "other.json"), "--rate", "0.1")
    out, table = folder / "plan.json", folder / "table.json"
    written = ("--out", str(out), "--table", str(table), "--objective", "mean+cvar:0.9")
    assert plan(folder, *options, *written, "--weight", "2", "--weight", "1") == 0
    plans = [load_plan(folder / f"plan-{n}.json") for n in (1, 2)]
    assert plans[1].workflow_hash == other.content_hash
    assert plans[0].objective.name == "mean+cvar:0.9"
    assert {row.workflow_hash for row in load_table(table).rows} == {
        one.workflow_hash for one in plans
    }
    with pytest.raises(InvalidInput, match="--weight: 1 values for 2 workflows"):
        plan(folder, *options, "--weight", "2")


def test_deadlines_and_objectives_are_options(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values of each term are printed; a deadline no fleet keeps is infeasible and says why."""
    assert plan(folder, "--objective", "miss>mean", "--deadline", "30", "--explain") == 0
    out = capsys.readouterr().out
    assert "miss>mean" in out
    assert "bound of" in out
    with pytest.raises(Infeasible, match="deadline 0.5 s of workflow 'research'"):
        plan(folder, "--deadline", "0.5", "--hard-deadline")
    for bad in (("--objective", "speed"), ("--objective", "miss"), ("--hard-deadline",)):
        with pytest.raises(InvalidInput):
            plan(folder, *bad)


def test_scenarios_may_follow_from_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--scenarios auto` reports the standard error it reached."""
    assert plan(folder, "--scenarios", "auto", "--target-error", "0.2") == 0
    assert "standard error of the mean" in capsys.readouterr().out


def test_missing_forecasts_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A workflow the estimates do not know is planned from priors, and a line says so."""
    save_estimates(EstimateTable(), folder / "estimates.json")
    assert plan(folder, rate="0.01") == 0
    assert "no forecasts for workflow 'research'" in capsys.readouterr().err


def test_rejected_plan_is_not_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the checker objects, the command fails, says why and writes nothing."""
    report = VerifyReport(violations=(Violation("capacity", "too much"),))
    monkeypatch.setattr(command, "verify_plans", lambda *args: report)
    assert plan(folder, "--out", str(folder / "plan.json")) == 1
    assert "capacity: too much" in capsys.readouterr().out
    assert not (folder / "plan.json").exists()


def test_impossible_rate_and_bad_input_raise_one_clear_error(folder: Path) -> None:
    """Too much load is infeasible with figures; a missing file and a bad number are bad input."""
    with pytest.raises(Infeasible, match="carries at most"):
        plan(folder, rate="50")
    for rate, extra in (("-1", ()), ("0.1", ("--classes", "0")), ("0.1", ("--time-limit", "0"))):
        with pytest.raises(InvalidInput):
            plan(folder, *extra, rate=rate)
    (folder / "estimates.json").unlink()
    with pytest.raises(InvalidInput, match=r"estimates\.json: no such estimate table"):
        plan(folder)
