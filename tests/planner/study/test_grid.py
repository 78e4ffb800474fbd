"""Cells, resuming, figures, the clairvoyant search, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.cli.main import main
from planner.dispatch.table import Tuning, save_table
from planner.domain.blocks import Segment
from planner.domain.ids import NodeId, RunId, SiteId, WorkflowHash
from planner.domain.run import RunSpec, Task
from planner.domain.trace import CallRecord
from planner.report.study_page import write_study_page
from planner.sim.experiment import Cell, PolicySetup, run_cell
from planner.study import grid
from planner.study.clairvoyant import Clairvoyant, critical_path_s, estimate
from planner.study.entries import parse_entry
from planner.study.grid import chosen_settings, run_clairvoyant, run_more, run_study
from planner.study.measure import jain_index, measure, refilled_tokens, standalone_s, texts_of
from planner.study.outcome import document, save_document, study_table
from planner.study.settings import Setting, workload
from planner.study.studies import STUDIES, Study

TINY = Study(
    name="tiny",
    question="Does it run?",
    settings=(Setting(mix="extraction", load=0.5, forecasts="oracle"),),
    policies=("least_expected_finish", "prefix_affinity:imbalanced_threshold=2"),
    runs=40,
    seeds=2,
    baseline="least_expected_finish",
)


def test_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished cells are not simulated again, a lost one is, and the outcome stays the same."""
    first = run_study(TINY, tmp_path, jobs=1)
    files = sorted((tmp_path / "cells").glob("*.json"))
    assert len(files) == 4
    files[0].unlink()
    made: list[str] = []
    simulate = grid._simulate

    def counted(job: grid._Job) -> str:
        made.append(job.key)
        return simulate(job)

    monkeypatch.setattr(grid, "_simulate", counted)
    second = run_study(TINY, tmp_path, jobs=1)
    assert made == [files[0].stem]
    for one, other in zip(first, second, strict=True):
        for seed in one.results:
            assert one.results[seed].value("mean_s") == other.results[seed].value("mean_s")


def test_batches_share_their_runs(tmp_path: Path) -> None:
    """Every cell is in one batch, a batch has the same runs, and none is a large part of all."""
    cells = [
        grid._Job(
            setting=Setting(load=load), setup=PolicySetup(policy=policy), seed=seed, runs=1,
            folder=tmp_path, data=None,
        )
        for policy in ("random", "round_robin", "least_load")
        for load in (0.5, 0.7)
        for seed in range(40)
    ]  # fmt: skip
    for workers, most in ((1, 3), (2, 3), (4, 1)):
        batches = grid._batches(cells, workers)
        assert sorted(one.key for batch in batches for one in batch) == sorted(
            one.key for one in cells
        )
        assert all(len({(one.setting, one.seed) for one in batch}) == 1 for batch in batches)
        assert max(map(len, batches)) == most


def test_key_covers_what_matters(tmp_path: Path) -> None:
    """Cells differ by setting, policy, parameters, seed and runs."""
    job = grid._Job(setting=TINY.settings[0], setup=PolicySetup(policy="marginal_cost"), seed=0,
                    runs=10, folder=tmp_path, data=None)  # fmt: skip
    others = [
        replace(job, setting=replace(job.setting, kv="scarce")),
        replace(job, setup=PolicySetup(policy="round_robin")),
        replace(job, setup=PolicySetup(policy="marginal_cost", parameters={"theta": 2.0})),
        replace(job, seed=1),
        replace(job, runs=11),
    ]
    assert len({one.key for one in (job, *others)}) == 6
    assert replace(job, folder=tmp_path / "elsewhere").key == job.key


def test_tuning_uses_other_seeds(tmp_path: Path) -> None:
    """A tuned policy is tuned on seeds that do not evaluate it, each value once."""
    study = replace(TINY, policies=("marginal_cost",), seeds=1, tuning_seeds=1, tuning_runs=20)
    (outcome,) = run_study(study, tmp_path, jobs=1)
    cells = [json.loads(file.read_text()) for file in (tmp_path / "cells").glob("*.json")]
    tuning = [cell for cell in cells if cell["seed"] >= grid.TUNING_SEED]
    assert len(tuning) == 12
    assert list(outcome.results) == [0]
    assert {cell["seed"] for cell in cells} == {0, grid.TUNING_SEED}


def test_bursts_are_tuned_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning has fewer runs than the study, but not in a burst, whose length is their number."""
    burst = replace(TINY.settings[0], arrivals="burst")
    study = replace(TINY, settings=(*TINY.settings, burst), policies=("marginal_cost",), seeds=1,
                    tuning_seeds=1, tuning_runs=20)  # fmt: skip
    sizes: dict[tuple[str, bool], int] = {}
    simulate = grid._simulate

    def noted(job: grid._Job) -> str:
        sizes[job.setting.arrivals, job.seed >= grid.TUNING_SEED] = job.runs
        return simulate(job)

    monkeypatch.setattr(grid, "_simulate", noted)
    run_study(study, tmp_path, jobs=1)
    assert sizes == {
        ("poisson", True): 20, ("poisson", False): 40, ("burst", True): 40, ("burst", False): 40,
    }  # fmt: skip


def test_kept_tables_have_the_weights_of_the_code(tmp_path: Path) -> None:
    """A table that an earlier version wrote is used with today's defaults."""
    entry = parse_entry("almanac")
    table = grid._table(TINY.settings[0], entry, tmp_path)
    (file,) = (tmp_path / "tables").glob("*.json")
    save_table(replace(table, tuning=Tuning(remaining_weight=0.0, tail_weight=9.0)), file)
    assert grid._table(TINY.settings[0], entry, tmp_path).tuning == table.tuning == Tuning()


def test_more_seeds(tmp_path: Path) -> None:
    """Chosen outcomes get the further seeds, the others stay as they are, in their order."""
    study = replace(TINY, more_seeds=2)
    first, second = run_study(study, tmp_path, jobs=1)
    kept, grown = run_more(study, [first, second], [second], tmp_path, jobs=1)
    assert kept is first
    assert list(grown.results) == [0, 1, 2, 3]
    assert grown.results[0] is second.results[0]
    assert grown.results[3].value("mean_s") != grown.results[2].value("mean_s")


def test_settings_by_pattern() -> None:
    """A pattern picks settings; one that fits none is an error that shows what names look like."""
    value = STUDIES["value"]
    assert len(value.settings) == 24
    assert len({setting.name for setting in value.settings}) == 24
    assert len(chosen_settings(value, "h02-scarce-*")) == 4
    assert len(chosen_settings(value, "h02-scarce-*,h00-*0.5*, h00-ample*")) == 9
    with pytest.raises(Exception, match="names look like h00-ample"):
        chosen_settings(value, "h07*")


def test_document_and_page(tmp_path: Path) -> None:
    """The document holds figures, intervals and origin; table and page are made of it alone."""
    found = document(TINY, run_study(TINY, tmp_path, jobs=1), {})
    save_document(found, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
    (setting,) = found["settings"]
    first, second = setting["policies"]
    assert first["against_baseline"] == []
    assert {one["baseline"] for one in second["against_baseline"]} == {"least_expected_finish"}
    assert first["metrics"]["stretch_p95"]["mean"] >= 1.0
    assert "least_expected_finish" in study_table(found)
    page = write_study_page(found, tmp_path / "report.html").read_text()
    assert "Threats" in page
    assert setting["name"] in page


def test_stretch_of_an_idle_fleet() -> None:
    """Runs that are alone have stretch one and share it fairly."""
    setting = replace(TINY.settings[0], load=1e-5)
    world = replace(setting.world(), noise_cv=0.0)
    runs = workload(setting, 0, 30)
    alone = standalone_s(runs, world)
    setup = PolicySetup(policy="least_expected_finish")
    records = run_cell(Cell(setup=setup, seed=0, runs=runs, world=world))
    result = measure(records, runs, alone, world.fleet)
    assert result.stretch_p99 == pytest.approx(1.0, abs=0.01)
    assert result.jain == pytest.approx(1.0, abs=1e-4)


def test_jain_index() -> None:
    """One alike, 1/n if one has all."""
    assert jain_index([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def _call(index: int, *parts: Segment) -> Task:
    return Task(index=index, node=NodeId("n"), kind="llm", site=SiteId("n#0"), prompt=parts,
                output_tokens=16, output_key=900 + index)  # fmt: skip


def test_refilled_tokens_by_hand() -> None:
    """Text computed again on the endpoint that had it counts; elsewhere, or cached, it does not."""
    old, new = Segment(1, 64), Segment(2, 33)
    run = RunSpec(run_id=RunId("r"), workflow="w", workflow_hash=WorkflowHash("h"), arrival_s=0.0,
                  tasks=tuple(_call(n, old, new) for n in range(4)))  # fmt: skip

    def record(index: int, endpoint: str, cached: int) -> CallRecord:
        return CallRecord(
            run_id="r", call_id=f"r/{index}", workflow_hash="h", node="n", site="n#0", ready_s=0.0,
            sent_s=0.0, endpoint=endpoint, prompt_tokens=97, output_tokens=16,
            finish_s=float(index), cached_tokens=cached,
        )  # fmt: skip

    records = [record(0, "a", 0), record(1, "b", 0), record(2, "a", 96), record(3, "a", 16)]
    texts = texts_of([run])
    assert refilled_tokens(records, texts) == 96 - 16
    assert refilled_tokens(records, texts, {"r"}) == 0


def test_parts_of_texts_stand_for_all_of_their_blocks() -> None:
    """What of a text was in any others is what of its parts was in theirs."""
    runs = workload(Setting(mix="tree", load=0.5), 3, 6) + workload(Setting(load=0.5), 4, 12)
    chains = {f"{run.run_id}/{task.index}": task.chain for run in runs for task in run.tasks}
    texts = texts_of(runs)
    rng = np.random.default_rng(0)
    names = rng.permutation(sorted(texts)).tolist()
    assert len(names) > 100
    seen: set[int] = set()
    seen_parts: set[int] = set()
    for name in names:
        blocks, ends = texts[name]
        held = [end for block, end in zip(blocks, ends, strict=True) if block in seen_parts]
        assert max(held, default=0) == sum(block in seen for block in chains[name])
        assert held == list(ends[: len(held)])
        assert ends[-1:] == (len(chains[name]),)
        seen.update(chains[name])
        seen_parts.update(blocks)


def test_clairvoyant_search(tmp_path: Path) -> None:
    """What is found lies between the critical path and marginal cost, of the runs that count."""
    setting = TINY.settings[0]
    runs, graphs = workload(setting, 0, 20), setting.make_mix().workflows
    how: dict[str, Any] = {"theta": 1.5, "steps": 10, "seed": 0, "counted": slice(5, 15)}
    found = estimate(runs, setting.world(), graphs, **how)
    assert found.bound_s <= found.found_s <= found.exact_s
    assert found.bound_s == pytest.approx(critical_path_s(runs[5:15], setting.make_fleet()))
    assert estimate(runs, setting.world(), graphs, **how) == found
    assert run_clairvoyant(TINY, [], tmp_path) == {}


def test_clairvoyant_of_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates start from marginal cost as tuned, and are kept; another weight is another one."""
    monkeypatch.setattr(grid, "CLAIRVOYANT_RUNS", 12)
    monkeypatch.setattr(grid, "CLAIRVOYANT_COUNTED", slice(3, 9))
    monkeypatch.setattr(grid, "CLAIRVOYANT_SEEDS", 1)
    asked: list[float] = []
    study = replace(TINY, clairvoyant_steps=1, policies=("marginal_cost:theta=2",), runs=10)

    def noted(*args: Any, theta: float, **how: Any) -> Clairvoyant:
        asked.append(theta)
        return estimate(*args, theta=theta, **how)

    monkeypatch.setattr(grid, "estimate", noted)
    outcomes = run_study(study, tmp_path, jobs=1)
    found = run_clairvoyant(study, outcomes, tmp_path, jobs=1)
    again = run_clairvoyant(study, outcomes, tmp_path, jobs=1)
    assert asked == [2.0]
    assert found == again
    assert [len(estimates) for estimates in found.values()] == [1]
    run_clairvoyant(study, [], tmp_path, jobs=1)
    assert asked == [2.0, 1.0]
    assert list(found) == list(TINY.settings)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command lists settings, and bad names cost no traceback and no waiting."""
    assert main(["study", "--out", str(tmp_path), "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    for words in (["--study", "nothing"], ["--settings", "x*"], ["--policies", "nobody"],
                  ["--seeds", "0"]):  # fmt: skip
        assert main(["study", "--out", str(tmp_path / "s"), *words]) == 2
        assert "error" in capsys.readouterr().err
