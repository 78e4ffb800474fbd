"""`almanac evaluate` and `almanac models show`, from files to files."""

import json

import numpy as np
import pandas as pd
import pytest

from models.artifacts import ArtifactInfo, save_artifact
from models.evaluate import bar, evaluate
from models.evaluation import median_relative_error
from models.importers.folder import Sources
from models.latency_pool import LatencyPool
from models.tables import Dataset
from planner.cli import main as cli


@pytest.mark.parametrize(
    ("limits", "value", "holds", "wanted"),
    [
        ({"least": 10}, 9.99, False, ">= 10"),
        ({"most": 5}, 5.0, True, "<= 5"),
        ({"least": 0.88, "most": 0.92}, 0.93, False, "0.88 to 0.92"),
        ({}, 3.0, None, ""),
        ({"least": 1}, None, None, ">= 1"),
    ],
)
def test_bars_say_whether_they_hold(limits, value, holds, wanted):
    """A bar holds inside its limits; without limits or value it says nothing."""
    one = bar("x", value, "1", **limits)
    assert (one.holds, one.bar) == (holds, wanted)


def test_own_traces_are_judged(trace_folder):
    """Length, delay and branches of our traces have bars, coverage and curves."""
    found = evaluate(trace_folder)
    names = {one.name: one for one in found.bars}
    gain = names["output_length, traces: pinball gain over the constant"]
    assert gain.value is not None
    assert gain.value > 10
    assert gain.holds
    assert names["output_length, traces: coverage of 0.9, online"].value is not None
    assert names["branching, traces: log loss"].holds
    assert {one.kind for one in found.curves} == {"calibration", "reliability"}
    assert "holds" in found.text()
    assert all(set(row) == {"name", "value", "unit", "bar", "holds", "note"}
               for row in found.to_json())  # fmt: skip


def test_the_commands(trace_folder, tmp_path, capsys, monkeypatch):
    """Train, show, evaluate the artifacts, and write the page: each says what it did."""
    out = tmp_path / "models"
    assert cli.main(["train", "--traces", str(trace_folder), "--out", str(out)]) == 0
    capsys.readouterr()
    assert cli.main(["models", "show", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["kind"] for row in rows} >= {"output_length", "tool_delay", "branching"}
    assert all(row["problem"] is None and row["data_hash"] for row in rows)
    assert cli.main(["models", "show", str(out)]) == 0
    assert "output_length-traces.joblib" in capsys.readouterr().out
    page = tmp_path / "page"
    words = ["evaluate", "--traces", str(trace_folder), "--artifacts", str(out)]
    assert cli.main([*words, "--out", str(page), "--json"]) == 0
    bars = json.loads(capsys.readouterr().out)
    # The artifacts were trained on these very rows, and the note must not hide it.
    assert any("not held out" in one["note"] for one in bars)
    assert {one.name for one in page.iterdir()} == {
        "report.html", "bars.json", "calibration.png", "reliability.png",
    }  # fmt: skip
    assert json.loads((page / "bars.json").read_text(encoding="utf-8")) == bars
    html = (page / "report.html").read_text(encoding="utf-8")
    assert "http" not in html.replace("http-equiv", "")
    monkeypatch.delenv("ALMANAC_PUBLIC_DATA", raising=False)


def test_bad_input_is_told(tmp_path, capsys):
    """Missing and empty folders are one clear error each; a damaged artifact is listed as such."""
    for words in (
        ["models", "show", str(tmp_path / "absent")],
        ["models", "show", str(tmp_path)],
        ["evaluate", "--traces", str(tmp_path / "absent")],
        ["evaluate", "--traces", str(tmp_path), "--artifacts", str(tmp_path / "absent")],
    ):
        assert cli.main(words) == 2
        assert capsys.readouterr().err.count("error:") == 1
    (tmp_path / "x.joblib").write_bytes(b"junk")
    assert cli.main(["models", "show", str(tmp_path)]) == 1
    assert "CANNOT BE USED" in capsys.readouterr().out


def _requests(configs, rng, rows=100):
    """Return requests of configurations whose true times no formula of ours describes."""
    out = []
    for name, speed in configs.items():
        calls = rng.integers(1, 33, rows).astype(float)
        prompt, output = rng.integers(50, 900, rows), rng.integers(1, 200, rows)
        ttft = speed * (0.02 + 2e-5 * prompt) * (1 + 0.2 * np.sqrt(calls))
        decode = speed * (output - 1) * 0.01 * (1 + 0.1 * np.sqrt(calls))
        out.append(
            pd.DataFrame(
                {
                    "config": name, "run": name, "sent_s": np.arange(rows) * 1.0,
                    "prompt_tokens": prompt.astype(float), "calls": calls,
                    "kv_tokens": prompt + 300.0 * (calls - 1),
                    "output_tokens": output.astype(float), "ttft_s": ttft,
                    "decode_s": np.maximum(decode, 0.0), "held_out": "",
                }
            )
        )  # fmt: skip
    return pd.concat(out, ignore_index=True)


def test_what_physics_leaves_out_carries_over_to_a_new_configuration():
    """A pool forecasts a configuration it knows from 50 requests better than physics alone."""
    rng = np.random.default_rng(0)
    rows = _requests({f"c{number}": 1.0 + 0.3 * number for number in range(6)}, rng)
    new = _requests({"new": 2.2}, rng)
    pool = LatencyPool(known=False).fit(rows)
    first, later = new[:50], new[50:]
    observed = (later["ttft_s"] + later["decode_s"]).to_numpy(float)
    error = median_relative_error(observed, pool.adapted_s(first, later))
    assert error < 0.05
    assert (pool.adapted_s(first, later) > 0).all()


def test_saved_latency_is_judged_as_it_was_saved(tmp_path, monkeypatch):
    """A saved pool is judged on what it knows, and on new configurations after 50 requests."""
    rng = np.random.default_rng(0)
    known = _requests({f"c{number}": 1.0 + 0.3 * number for number in range(6)}, rng)
    both = pd.concat([known, _requests({"new": 2.2}, rng)], ignore_index=True)
    info = ArtifactInfo(kind="endpoint_latency", dataset="d", window="w", data_hash="h", metrics={})
    save_artifact(LatencyPool().fit(known), info, tmp_path / "endpoint_latency-d.joblib")
    data = Dataset(
        name="d", split="none", rows_read=len(both), set_aside=(), data_hash="h2", window="w",
        requests=both,
    )  # fmt: skip
    monkeypatch.setattr(
        "models.evaluate.read_folder",
        lambda *_: Sources(own=None, public=(data,), ignored=()),
    )
    names = {one.name: one for one in evaluate(tmp_path, artifacts=tmp_path).bars}
    assert names["latency, d: known configurations"].holds
    assert names["latency, d: configurations new to it, after 50 requests"].holds
    assert all("not held out" not in one.note for one in names.values())


def test_a_pool_looks_back_only_on_what_has_ended():
    """What happens later in a run does not change the forecast of an earlier request."""
    rng = np.random.default_rng(0)
    rows = _requests({f"c{number}": 1.0 + number for number in range(3)}, rng, rows=80)
    pool = LatencyPool().fit(rows)
    early = rows[rows["sent_s"] < 40]
    changed = rows.copy()
    changed.loc[changed["sent_s"] >= 40, ["ttft_s", "decode_s"]] *= 5
    assert pool.total_s(early, rows) == pytest.approx(pool.total_s(early, changed))
