"""A wheel holds what the packages read: all of their files, and the bundled data."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path, PurePosixPath

import pytest

from planner.domain import files
from planner.domain.errors import InvalidInput
from planner.domain.files import data_dir

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGES = [
    folder
    for name in ("planner", "models", "runtime")
    for folder in (ROOT / name, *(ROOT / name).rglob("*"))
    if folder.is_dir() and folder.name != "__pycache__" and any(folder.glob("*.py"))
]


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_every_file_of_a_package_is_packed(folder: Path) -> None:
    """Each folder of modules is a package, and its other files are named in pyproject.toml."""
    assert (folder / "__init__.py").is_file()
    package = ".".join(folder.relative_to(ROOT).parts)
    patterns = SETUPTOOLS["package-data"].get(package, [])
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".py":
            assert any(file.match(pattern) for pattern in patterns), file


def test_the_bundled_data_are_packed() -> None:
    """Tables, demo and example fleets are named in pyproject.toml, each in its own folder."""
    packed = set()
    for target, patterns in SETUPTOOLS["data-files"].items():
        folder = PurePosixPath(target).relative_to("share/almanac")
        for pattern in patterns:
            assert PurePosixPath(pattern).parent == folder
            found = {one.relative_to(ROOT).as_posix() for one in ROOT.glob(pattern)}
            assert found, pattern
            packed |= found
    kept = {
        one.relative_to(ROOT).as_posix()
        for one in (ROOT / "data").rglob("*")
        if one.suffix in {".csv", ".yaml", ".json", ".jsonl"} and "results" not in one.parts
    }
    assert packed == kept


def test_an_installed_wheel_finds_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a clone around the packages, the folder comes from the installer's record."""
    monkeypatch.delenv("ALMANAC_DATA", raising=False)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "site" / "planner" / "domain" / "files"))
    record = tmp_path / "almanac_scheduler-1.dist-info"
    share = tmp_path / "share" / "almanac" / "data"
    share.mkdir(parents=True)
    record.mkdir()
    (share / "gpus.csv").touch()
    (record / "METADATA").write_text("Name: almanac-scheduler\nVersion: 1\n")
    (record / "RECORD").write_text("share/almanac/data/gpus.csv,,\n")
    found = importlib.metadata.Distribution.at(record).files
    monkeypatch.setattr(importlib.metadata, "files", lambda _: found)
    assert data_dir() == share

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(InvalidInput, match="ALMANAC_DATA"):
        data_dir()
