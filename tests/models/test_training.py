"""`almanac train`, from files to files."""

import argparse
import json
import math

import numpy as np
import pytest

from models.artifacts import load_artifact
from models.evaluation import coverage, log_loss, median_relative_error, pinball_loss, r2_log
from models.importers.agents import read_lmcache
from models.training import train
from planner.cli import train as command
from planner.domain.errors import InvalidInput
from planner.domain.estimates import load_estimates
from planner.domain.trace import RunRecord, save_trace

FLEET = """
schema: almanac.fleet/1
name: one
workers:
  - {id: e1, model: m, gpu: L4, latency: 8b-a100-1-bf16, kv_blocks: 3000, slots: 64}
"""


@pytest.fixture
def fleet(tmp_path):
    """Write a fleet file with the traces' only endpoint."""
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET, encoding="utf-8")
    return path


def test_own_traces_give_artifacts_card_and_table(trace_folder, fleet, tmp_path):
    """Every file is there, loads again, and the predictors of the trace beat a constant."""
    out = tmp_path / "out"
    report = train(trace_folder, out, fleet=fleet)
    names = {path.name for path in report.files}
    assert names == {
        "output_length-traces.joblib",
        "tool_delay-traces.joblib",
        "branching-traces.joblib",
        "endpoint_latency-traces.joblib",
        "estimates.json",
        "model_card.md",
        "model_card.json",
    }
    assert {path.name for path in out.iterdir()} == names
    table = load_estimates(out / "estimates.json")
    assert table == report.table
    assert set(table.endpoints) == {"e1"}
    gains = {one.predictor: one.gain for one in report.results}
    assert gains["output_length"] > 0.2
    assert gains["endpoint_latency"] > 0.5
    predictor, info = load_artifact(out / "output_length-traces.joblib", "output_length")
    assert info.metrics
    assert predictor.levels
    card = json.loads((out / "model_card.json").read_text(encoding="utf-8"))
    assert card["datasets"][0]["rows_read"] > 0
    assert "output_length" in (out / "model_card.md").read_text(encoding="utf-8")


def test_a_folder_matches_its_card(trace_folder, tmp_path):
    """Artifacts of an earlier training go when another one is written; other files stay."""
    out = tmp_path / "out"
    train(trace_folder, out)
    (out / "output_length-traces.joblib").rename(out / "output_length-older.joblib")
    (out / "mine.joblib").write_bytes(b"not ours")
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    said = []
    report = train(trace_folder, out, progress=said.append)
    names = {path.name for path in report.files}
    assert {path.name for path in out.iterdir()} == names | {"mine.joblib", "notes.txt"}
    assert any("removing" in line and "output_length-older" in line for line in said)


def test_same_seed_same_table(trace_folder, fleet, tmp_path):
    """Two trainings on the same data give the same results and the same table."""
    one = train(trace_folder, tmp_path / "a", fleet=fleet, seed=3)
    two = train(trace_folder, tmp_path / "b", fleet=fleet, seed=3)
    assert one.results == two.results
    assert one.table == two.table


def test_a_single_trace_file_is_enough(trace_folder, tmp_path):
    """`--traces` may name one file, and the fleet may be left out."""
    report = train(trace_folder / "one.jsonl", tmp_path / "out")
    assert report.table is not None
    assert "e1" in report.table.endpoints


def test_few_runs_keep_priors_and_say_so(tmp_path, make_records):
    """A handful of runs gives an estimate table; the card says what was not fitted."""
    save_trace(make_records(runs=4), tmp_path / "traces" / "t.jsonl")
    report = train(tmp_path / "traces", tmp_path / "out")
    assert report.table.workflows
    assert not report.results
    assert any("fewer than" in one["reason"] for one in report.card["not_fitted"])


def test_no_usable_row_is_an_error_and_writes_nothing(tmp_path):
    """Traces without a single usable record stop the job before anything is written."""
    save_trace(
        [RunRecord(run_id="r", workflow="w", workflow_hash="h", arrival_s=3, finish_s=1)],
        tmp_path / "traces" / "t.jsonl",
    )
    with pytest.raises(InvalidInput, match="too few usable rows") as caught:
        train(tmp_path / "traces", tmp_path / "out")
    assert "finish before arrival" in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_bad_side_inputs_are_named(trace_folder, tmp_path):
    """A missing fleet, a missing or empty workflow folder: one error naming it."""
    (tmp_path / "none").mkdir()
    for options, name in (
        ({"fleet": tmp_path / "no.yaml"}, "no.yaml"),
        ({"workflows": tmp_path / "nowhere"}, "nowhere"),
        ({"workflows": tmp_path / "none"}, "none"),
    ):
        with pytest.raises(InvalidInput, match=name):
            train(trace_folder, tmp_path / "out", **options)


def test_command_prints_a_table_or_json(trace_folder, tmp_path, capsys):
    """Results go to stdout as a table or as the card's JSON; progress goes to stderr."""
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    base = ["train", "--traces", str(trace_folder), "--out", str(tmp_path / "out")]
    args = parser.parse_args(base)
    assert args.run(args) == 0
    shown = capsys.readouterr()
    assert "output_length" in shown.out
    assert "fitting" in shown.err
    args = parser.parse_args([*base, "--json"])
    assert args.run(args) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "almanac.model_card/1"


def test_measures_by_hand():
    """Each measure on numbers small enough to check by head."""
    y = np.array([1.0, 3.0])
    # Above the prediction by 1 costs 0.9, below by 1 costs 0.1.
    assert pinball_loss(y, np.array([2.0, 2.0]), 0.9) == pytest.approx(0.5)
    assert coverage(y, np.array([1.0, 2.0])) == 0.5
    assert r2_log(y, np.log1p(y), 0.0) == 1.0
    assert log_loss(np.array([0.5, 0.25])) == pytest.approx(1.5 * math.log(2))
    assert median_relative_error(y, np.array([1.1, 6.0])) == pytest.approx(0.55)


@pytest.fixture(scope="module")
def lmcache(tmp_path_factory, public_data):
    """Train on the LMCache agents once; give the folder, the output and the report."""
    out = tmp_path_factory.mktemp("lmcache")
    folder = public_data / "lmcache_agents"
    return folder, out, train(folder, out)


def test_public_agents_beat_constants(lmcache):
    """On held-out LMCache sessions every predictor beats its constant, lengths by 10 %."""
    _, _, report = lmcache
    results = {one.predictor: one for one in report.results}
    assert set(results) == {"output_length", "tool_delay", "branching"}
    assert all(one.gain > 0.1 for one in report.results)
    assert results["output_length"].more["R2log"] > 0.5
    assert report.table is None


def test_artifact_serves_a_running_session(lmcache):
    """A loaded predictor answers for a session that is still going on."""
    folder, out, _ = lmcache
    predictor, _ = load_artifact(out / "output_length-lmcache_agents.joblib", "output_length")
    table = read_lmcache(folder, seed=0).calls
    session = table[table["session_id"] == table["session_id"].iloc[0]].head(3).copy()
    session.loc[session.index[-1], "output_tokens"] = np.nan
    quantiles = predictor.predict_quantiles(session)[-1]
    assert np.isfinite(quantiles).all()
    assert (np.diff(quantiles) >= 0).all()
