"""Steps of the rolling horizon with their verdict, the worker's lines, and the options."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.cli import plan_worker, replan_options
from planner.cli.explain import run as explain
from planner.cli.main import main
from planner.cli.rolling import RollingPlanners, RollingStep
from planner.dispatch.forecast import Forecaster
from planner.dispatch.table import DispatchTable, save_table
from planner.domain.errors import InvalidInput
from planner.domain.estimates import save_estimates
from planner.domain.snapshot import Snapshot
from planner.domain.trace import TraceRecord, record_to_json, save_trace
from planner.domain.workflow import save_workflow
from planner.sim.experiment import Cell, PolicySetup, World, run_cell
from planner.sim.horizon import Seen
from planner.sim.workload import sampled_workload
from planner.solve import tables
from planner.solve.budget import Budget
from tests.planner.solve.small import case, chain, endpoint, fleet

DATA = Path(__file__).resolve().parents[3] / "data"
QUESTION = case(chain("a", "b"), fleet(endpoint("fast"), endpoint("slow", 4.0)), 0.1)
HASH = str(QUESTION.workflow.content_hash)
STEP = RollingStep(budget=Budget.reproducible(2.0, 0.02), runs=10, replications=1, tuned=False)


def snapshot(**changes: Any) -> Snapshot:
    values: dict[str, Any] = {
        "now_s": 0.0,
        "fleet": QUESTION.fleet,
        "up": ("fast", "slow"),
        "workflows": (QUESTION.workflow,),
        "estimates": QUESTION.estimates,
        "rates_rps": {HASH: 0.1},
        "latency": {},
        "active_runs": {},
        "horizon_s": 60.0,
    }
    return Snapshot(**(values | changes))


def trace(count: int = 12) -> list[TraceRecord]:
    truth = QUESTION.estimates.workflows[QUESTION.workflow.content_hash]
    runs = sampled_workload(QUESTION.workflow, truth, [3.0 * n for n in range(count)], seed=5)
    world = World(
        fleet=QUESTION.fleet, forecaster=Forecaster(QUESTION.estimates, [QUESTION.workflow])
    )
    setup = PolicySetup(policy="round_robin")
    return run_cell(Cell(setup=setup, seed=0, runs=runs, world=world))


def bad(table: DispatchTable) -> DispatchTable:
    """Return the table with all traffic on the slow endpoint, whatever it costs."""
    rows = tuple(
        replace(
            row,
            ranked=tuple(
                replace(one, share=float(one.endpoint == "slow"), price=0.0) for one in row.ranked
            ),
        )
        for row in table.rows
    )
    return replace(table, rows=rows, tuning=replace(table.tuning, theta=0.0, plan_pull=100.0))


def test_recent_runs_judge_where_there_are_enough() -> None:
    """A dozen recent runs are replayed; with fewer, runs drawn from the forecasts are."""
    rolled = STEP.take(snapshot(), recent=trace())
    assert (rolled.evidence, rolled.activation.incumbent) == ("recent", "marginal_cost")
    assert rolled.activation.runs == 10
    assert STEP.take(snapshot(), recent=trace(4)).evidence == "sampled"


def test_a_step_replaces_a_bad_table_and_keeps_its_weights_if_told_so() -> None:
    """A table that sends everything to the slow endpoint loses; weights are tuned or kept."""
    first = STEP.take(snapshot(), recent=trace()).table
    incumbent = replace(bad(first), tuning=replace(first.tuning, theta=0.0))
    kept = STEP.take(snapshot(), incumbent=incumbent, recent=trace())
    assert kept.table.tuning == incumbent.tuning
    tuned = replace(STEP, tuned=True).take(snapshot(), incumbent=bad(first), recent=trace())
    assert tuned.activation.activate
    assert sum(tuned.activation.incumbent_s) > 1.5 * sum(tuned.activation.candidate_s)
    assert tuned.table.tuning.plan_pull < 100.0


def test_the_replay_knows_what_is_down_and_how_fast_the_rest_is() -> None:
    """With the fast endpoint down both tables run on the slow one, four times as slow."""
    whole = STEP.take(snapshot(), recent=trace()).activation
    down = STEP.take(snapshot(up=("slow",)), recent=trace()).activation
    assert sum(down.candidate_s) > 2 * sum(whole.candidate_s)
    slowed = {one.id: one.latency.scaled(3.0) for one in QUESTION.fleet.endpoints}
    learned = STEP.take(snapshot(latency=slowed), recent=trace()).activation
    assert sum(learned.candidate_s) > 2 * sum(whole.candidate_s)


def test_the_worker_answers_line_by_line() -> None:
    """A question gets table, plans and verdict; the plans may be the next question's hint."""
    question = {
        "id": 7,
        "snapshot": snapshot().to_json(),
        "incumbent": None,
        "recent": [record_to_json(record) for record in trace()],
    }
    answer = plan_worker.answer(json.dumps(question), STEP)
    assert answer["id"] == 7
    table = DispatchTable.from_json(answer["table"])
    table.check_fleet(QUESTION.fleet)
    assert answer["activation"]["candidate"] == table.version
    assert answer["activation"]["evidence"] == "recent"
    again = {**question, "id": 8, "hint": answer["plans"], "incumbent": answer["table"]}
    second = plan_worker.answer(json.dumps(again), STEP)
    assert second["activation"]["incumbent"] == table.version
    assert second["activation"]["activate"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "not an object"),
        ('{"id": 1}', "not a snapshot"),
        (json.dumps({"id": 1, "snapshot": snapshot(rates_rps={}).to_json()}), "no workflow has"),
        (json.dumps({"id": 1, "snapshot": snapshot(up=()).to_json()}), "no endpoint is up"),
        (json.dumps({"id": 1, "snapshot": snapshot().to_json(), "recent": [3]}), "recent"),
        (
            json.dumps({"id": 1, "snapshot": snapshot(rates_rps={HASH: 1e6}).to_json()}),
            "Infeasible",
        ),
    ],
)
def test_a_question_without_an_answer_gets_its_error(line: str, told: str) -> None:
    """The error is the answer, under the question's id where it has one; nothing is raised."""
    answer = plan_worker.answer(line, STEP)
    assert told in answer["error"]
    assert answer["id"] == (1 if '"id"' in line else None)


def test_the_process_beats_and_ends_with_its_input() -> None:
    """`almanac plan-worker` shows life, answers on stdout alone, and ends with 0."""
    done = subprocess.run(
        [sys.executable, "-m", "planner.cli.main", "plan-worker", "--plan-limit", "1"],
        input='{"id": 3}\n',
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"beat": 0} in lines
    assert [line["id"] for line in lines if "beat" not in line] == [3]
    assert done.stderr == ""


def test_a_simulated_planner_sees_the_plan_of_before() -> None:
    """Plans of one step are the hint of the next; what cannot be planned keeps the table."""
    planners = RollingPlanners(
        fleet=QUESTION.fleet,
        workflows=(QUESTION.workflow,),
        estimates=QUESTION.estimates,
        horizon_s=60.0,
        step=STEP,
    )
    planner = planners(3)
    seen = Seen(
        now_s=60.0,
        up=("fast", "slow"),
        rates_rps={HASH: 0.1, "unknown": 1.0},
        active_runs={HASH: 1},
        table=None,
        records=trace(),
    )
    first = planner.plan(seen)
    assert first.table is not None
    assert first.seconds > 0
    assert planner.plan(replace(seen, table=bad(first.table))).table is not None
    assert planner.plan(replace(seen, up=())).table is None


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    replan_options.add_replan_arguments(parser)
    return parser.parse_args(words)


def test_the_gateway_starts_a_worker_with_its_own_options(tmp_path: Path) -> None:
    """Without --replan there is none; with it the options go over, and both sides agree."""
    assert replan_options.replan_options(options(), "almanac") is None
    words = ("--replan", "--plan-limit", "3", "--deterministic", "--keep-weights")
    found = replan_options.replan_options(
        options(*words, "--replan-log", str(tmp_path / "log.jsonl")), "almanac"
    )
    assert found is not None
    command, config = found
    assert config.period_s == replan_options.DEFAULT_PERIOD_S
    assert config.log == tmp_path / "log.jsonl"
    parser = argparse.ArgumentParser()
    plan_worker.register(parser.add_subparsers())
    step = replan_options.step_from(parser.parse_args(command[command.index("plan-worker") :]))
    assert step == RollingStep(budget=Budget.reproducible(3.0, 0.02), tuned=False)


@pytest.mark.parametrize(
    ("words", "policy", "told"),
    [
        (("--replan", "0"), "almanac", "--replan: 0.0 is out of range"),
        (("--replan", "--plan-limit", "-1"), "almanac", "--plan-limit"),
        (("--replan", "--tolerance", "nan"), "almanac", "--tolerance"),
        (("--replan", "--replan-deadline", "0"), "almanac", "--replan-deadline"),
        (("--replan",), "least_load", "uses no dispatch table"),
        (("--replan", "--replan-log", "/nonexistent/x/y"), "almanac", "--replan-log"),
    ],
)
def test_wrong_options_are_told_before_anything_starts(
    words: tuple[str, ...], policy: str, told: str
) -> None:
    """A worker that could only fail again and again is never started."""
    if "/nonexistent/x/y" in words:
        words = (*words[:-1], str(DATA))  # a folder
    with pytest.raises(InvalidInput, match=told):
        replan_options.replan_options(options(*words), policy)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with workflow, estimates and a trace of the demo fleet."""
    save_workflow(QUESTION.workflow, tmp_path / "workflow.json")
    save_estimates(QUESTION.estimates, tmp_path / "estimates.json")
    lines = ["schema: almanac.fleet/1", "name: small", "workers:"]
    for one in QUESTION.fleet.endpoints:
        lines += [
            f"  - {{id: {one.id}, model: m, gpu: G, kv_blocks: {one.kv_blocks}, slots: 4,",
            "     latency: {a: 0, b: 1000, c: 0, d: 9, e: 1000, f: 0},",
            f"     scale: {one.latency.scale}}}",
        ]
    (tmp_path / "fleet.yaml").write_text("\n".join(lines))
    save_trace(trace(), tmp_path / "trace.jsonl")
    return tmp_path


def plan(folder: Path, *words: str) -> int:
    return main(
        [
            "plan",
            *("--workflow", str(folder / "workflow.json"), "--fleet", str(folder / "fleet.yaml")),
            *("--estimates", str(folder / "estimates.json"), "--rate", "0.1", "--deterministic"),
            *("--table", str(folder / "table.json"), *words),
        ]
    )


def test_a_planned_table_is_written_if_it_is_not_worse(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a bad incumbent it is; the verdict is kept beside it and can be explained."""
    against = ("--activate-against", str(folder / "trace.jsonl"))
    assert plan(folder, *against, "--tolerance", "0.5") == 0
    good = DispatchTable.from_json(json.loads((folder / "table.json").read_text()))
    save_table(bad(good), folder / "bad.json")
    assert plan(folder, *against, "--incumbent", str(folder / "bad.json")) == 0
    assert "activated on 12 runs" in capsys.readouterr().err
    record = folder / "table.activation.json"
    words = argparse.Namespace(file=record, site=None, run=None, gateway=None, json=False)
    assert explain(words) == 0
    assert "slow 100%" in capsys.readouterr().out


def test_simulate_replans_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`simulate --replan` makes plans on the way and reports number, adoption, age and time."""
    assert plan(folder) == 0
    capsys.readouterr()
    words = (
        "simulate", "--fleet", "fleet.yaml", "--workflow", "workflow.json", "--truth",
        "estimates.json", "--table", "table.json", "--rate", "0.2", "--runs", "20", "--seeds", "1",
        "--jobs", "1", "--no-tune", "--json", "--policies", "almanac", "--replan", "40",
        "--planner-s", "5", "--replay-runs", "8", "--plan-limit", "1", "--deterministic",
        "--keep-weights",
    )  # fmt: skip
    files = ("fleet.yaml", "workflow.json", "estimates.json", "table.json")
    assert main([str(folder / word) if word in files else word for word in words]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["replan_s"] == 40.0
    facts = settings["replanning"]
    assert facts["plans_made"] >= 1
    assert 0 <= facts["plans_adopted"] <= facts["plans_made"]
    assert facts["mean_age_s"] > 0
    assert facts["planner_s"] == 5.0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--incumbent", "t.json"), "--incumbent: nothing to compare on"),
        (("--activate-against", "missing.jsonl"), "no such trace"),
        (("--activate-against", "missing.jsonl", "--tolerance", "-1"), "--tolerance: -1.0"),
    ],
)
def test_trials_that_cannot_be_held_are_told_first(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    """A missing trace, or an incumbent without one, is told before any planning."""
    assert plan(folder, *words) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""


def test_a_worse_table_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the replay says worse, the exit code is 1, the record is kept and the file untouched."""
    made = tables.mix_table
    monkeypatch.setattr(tables, "mix_table", lambda *args, **named: bad(made(*args, **named)))
    assert plan(folder, "--activate-against", str(folder / "trace.jsonl")) == 1
    assert not (folder / "table.json").exists()
    assert json.loads((folder / "table.activation.json").read_text())["activate"] is False
