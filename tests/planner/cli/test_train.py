"""`almanac train`, small: what was too little to learn from is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.cli.main import main

DATA = Path(__file__).resolve().parents[3] / "data"


def test_what_could_not_be_fitted_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trace of a few calls gives priors, and says so."""
    lines = (DATA / "demo/traces/week-0.jsonl").read_text().splitlines()
    trace = tmp_path / "few.jsonl"
    trace.write_text("\n".join(lines[:12]))
    out = tmp_path / "fitted"
    assert main(["train", "--traces", str(trace), "--out", str(out), "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["results"] == []
    assert "output_length of traces: " in told.err
    assert "rows not used: fewer than 20 rows on a side of the split, priors are kept" in told.err
    assert (out / "estimates.json").exists()


def test_a_bad_place_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--out that is a file is refused before any trace is read."""
    file = tmp_path / "file"
    file.write_text("")
    assert main(["train", "--traces", str(tmp_path), "--out", str(file)]) == 2
    assert capsys.readouterr().err.endswith("is not a folder; choose another path\n")
