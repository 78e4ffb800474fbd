"""`almanac report`: the file, the table, and JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.cli.main import main
from tests.planner.report.samples import write_folder


def test_writes_the_file_and_prints_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page goes into the folder, the table to stdout, progress to stderr."""
    folder = write_folder(tmp_path / "in")
    assert main(["report", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert (folder / "report.html").exists()
    assert out.startswith("Three seeds <by hand>\npolicy ")
    assert err.endswith(f"report: wrote {folder / 'report.html'}\n")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json gives the comparison and the path of the page, --out names it."""
    folder = write_folder(tmp_path / "in")
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--json", "--out", str(page)]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert raw["report"] == str(page)
    assert raw["rows"][2]["comparisons"][0]["verdict"] == "win"


def test_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without results is bad input."""
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'results.json'}: no such")
