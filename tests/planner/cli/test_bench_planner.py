"""`almanac bench-planner`: figures beside bars, and clear words about missing data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.cli import bench_shops, bench_speed
from planner.cli.main import main
from planner.domain.errors import InvalidInput
from planner.domain.schedule import ScheduleQuestion


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with one tiny instance of each kind."""
    (tmp_path / "shop_scheduling").mkdir()
    (tmp_path / "dag_sets").mkdir()
    reference = {"ortools": {"status": "Optimal"}}
    rows = {
        "shop_scheduling/fjsp.jsonl": {
            "instance": "1", "best_known": "5", "reference": reference, "n_machines": 2,
            "jobs": [[[3, 0], [0, 2]], [[2, 2]]],
        },
        "shop_scheduling/hfsp.jsonl": {
            "instance": "1", "best_known": "7", "reference": reference,
            "times": [[2, 3], [2, 3]], "machines_per_stage": [1, 2],
        },
        "dag_sets/dagbench.jsonl": {
            "id": "two", "tasks": [["a", 1.0], ["b", 1.0]], "edges": [["a", "b", 1.0]],
            "nodes": [["x", 1.0], ["y", 1.0]], "links": [["x", "y", 1.0]],
        },
        "dag_sets/asynchow_plans.jsonl": {
            "id": 1, "edges": [["1", "3"], ["2", "3"]], "critical_path_s_min_max": [4.0, 6.0],
            "dur_s_min_max": {"3": [1.0, 1.0], "1": [3.0, 3.0], "2": [2.0, 5.0]},
        },
    }  # fmt: skip
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    return tmp_path


def test_published_instances_are_judged(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each figure has name, value, unit, bar and verdict; quick limits leave the verdict open."""
    only = "hfsp,critical-paths,task-graphs,fjsp"
    assert main(["bench-planner", "--data", str(data), "--quick", "--json", "--only", only]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert all(set(row) == {"name", "value", "unit", "bar", "holds"} for row in rows.values())
    assert rows["asynchow_critical_paths_wrong"]["value"] == 0
    assert rows["dagbench_worse_than_heft_cpop_peft"]["holds"] is True
    assert rows["fjsp_gap_5s_1_instances"]["value"] == 0
    assert rows["hfsp_gap_5s_1_instances"] | {"value": 0} == {
        "name": "hfsp_gap_5s_1_instances", "value": 0, "unit": "%", "bar": 1.5, "holds": None,
    }  # fmt: skip


def test_published_values_out_of_reach_are_marked(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Best known 5 where 7 is proven: the old gap stays, beside it none to what is proven."""
    path = data / "shop_scheduling/hfsp.jsonl"
    row = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(row | {"best_known": "5"}) + "\n", encoding="utf-8")
    argv = ["bench-planner", "--data", str(data), "--quick", "--json", "--only", "hfsp,fjsp"]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "hfsp 1: 7, best known 5 (proven out of reach: at least 7)" in said.err
    assert "fjsp 1: 5, best known 5\n" in said.err
    values = {row["name"]: row["value"] for row in json.loads(said.out)}
    assert values["hfsp_gap_5s_1_instances"] == pytest.approx(40.0)
    assert values["hfsp_gap_to_known_or_proven_5s"] == 0
    assert (values["hfsp_best_known_out_of_reach"], values["fjsp_best_known_out_of_reach"]) == (
        1,
        0,
    )


def test_speed_figures_are_there() -> None:
    """A small share of the speed figures: windows, a fleet plan, the table."""
    names = {row.name for row in bench_speed.table_bars(1)}
    assert names == {"table_lookup_p50", "table_memory_four_buckets"}
    took, gap, built = bench_speed.fleet_plan(4, 3, 0, 0.5, 2.0)
    assert took > 0
    assert built > 0
    assert 0 <= gap < 1


def test_one_part_runs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """--only runs what it names and nothing else; an unknown or dataless part is bad input."""
    assert main(["bench-planner", "--quick", "--only", "table", "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert names == {"table_lookup_p50", "table_memory_four_buckets"}
    assert main(["bench-planner", "--only", "tables"]) == 2
    assert "task-graphs" in capsys.readouterr().err
    assert main(["bench-planner", "--only", "fjsp"]) == 2
    assert "--data" in capsys.readouterr().err


def test_offline_growth_is_measured() -> None:
    """A small offline question has its seconds and its gap."""
    seconds, gap = bench_speed.offline(8, 3, 0.5)
    assert seconds.value > 0
    assert 0 <= gap.value < 100


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without the instances is bad input: which file, and what to do."""
    assert main(["bench-planner", "--data", str(tmp_path)]) == 2
    assert "asynchow_plans.jsonl" in capsys.readouterr().err


def test_a_peer_that_does_not_run_is_named(tmp_path: Path) -> None:
    """An interpreter without PyJobShop is bad input."""
    question = ScheduleQuestion(slots=(1,), activities=())
    with pytest.raises(InvalidInput, match="--peer-python"):
        bench_shops.peer_objective(tmp_path / "python", question, 1.0)


def test_what_a_peer_leaves_unsolved_is_not_compared(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A distance to the peer where it has a schedule, no such figure where it has none."""
    argv = ["bench-planner", "--data", str(data), "--quick", "--json", "--only", "hfsp,fjsp"]
    peers = iter([5.0, float("inf")])
    monkeypatch.setattr(bench_shops, "peer_objective", lambda *_: next(peers))
    assert main([*argv, "--peer-python", "python"]) == 0
    values = {row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)}
    assert values["fjsp_behind_pyjobshop_5s"] == 0
    assert "hfsp_behind_pyjobshop_5s" not in values
