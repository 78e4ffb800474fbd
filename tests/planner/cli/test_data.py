"""`almanac data`: the list, a download, and its errors. Transfers are tested in test_download."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.cli import data
from planner.cli.main import main
from planner.domain.errors import DownloadFailed
from runtime.download import Fetched, Recipe, load_recipes


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Every dataset with form, licence and title; --json gives the recipes."""
    assert main(["data", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in load_recipes())
    assert "ready: `almanac train`" in shown
    assert main(["data", "list", "--json"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert raw[0]["licence"] == "CC-BY-4.0"
    assert raw[0]["sources"][0]["output"]


def test_get_prints_files_to_stdout_and_progress_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe is fetched into --out; credit and progress go to stderr."""

    def fetch(
        recipe: Recipe, folder: Path, *, progress: Callable[[str, int, int], None], **_: Any
    ) -> list[Fetched]:
        progress("a.csv", 10, 2_000_000)
        progress("a.csv", 2_000_000, 2_000_000)
        return [Fetched(path=folder / recipe.name / "a.csv", size=2_000_000, fresh=True)]

    monkeypatch.setattr(data, "fetch", fetch)
    assert main(["data", "get", "lmcache_agents", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == str(tmp_path / "lmcache_agents" / "a.csv")
    assert "1 files, 2.0 MB, 1 downloaded" in out
    assert "does not read this form" in out
    assert err.splitlines()[1:] == ["data: Apache-2.0; LMCache team", "data: a.csv 2.0 MB"]
    assert main(["data", "get", "azure_llm_2023", "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["form"] == "ready"


def test_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown name or address is bad input (2), a failed download a failure (1)."""
    assert main(["data", "get", "azure_llm_2032"]) == 2
    assert "did you mean azure_llm_2023" in capsys.readouterr().err
    assert main(["data", "get", "azure_llm_2023", "--base-url", "x"]) == 2
    assert "--base-url" in capsys.readouterr().err

    def fetch(*_: Any, **__: Any) -> list[Fetched]:
        raise DownloadFailed("cannot reach example.org")

    monkeypatch.setattr(data, "fetch", fetch)
    assert main(["data", "get", "azure_llm_2023"]) == 1
    assert capsys.readouterr().err.endswith("error: cannot reach example.org\n")
