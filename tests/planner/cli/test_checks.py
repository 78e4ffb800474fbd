"""Checks before the work: options in range, places that can be written to."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import pytest

from planner.cli.checks import addresses, at_least, keep_copy, out_file, out_folder
from planner.domain.errors import InvalidInput
from planner.domain.fleet import load_fleet


@pytest.mark.parametrize("value", [-1, 0.5, math.nan, math.inf])
def test_numbers_out_of_range_are_named(value: float) -> None:
    """Below the bound, NaN and infinity are refused by option, value and bound."""
    args = argparse.Namespace(max_calls=value, rate=None)
    with pytest.raises(InvalidInput, match=f"--max-calls: {value} .* at least 1"):
        at_least(args, rate=0, max_calls=1)
    at_least(argparse.Namespace(max_calls=1, rate=None), rate=0, max_calls=1)


def test_places_to_write_are_checked_and_left_alone(tmp_path: Path) -> None:
    """Folders in the place of files and the other way round are refused; nothing is made."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidInput, match="--out: .* is a folder"):
        out_file(tmp_path, "--out")
    for path in (file / "x", file / "x" / "y"):
        with pytest.raises(InvalidInput, match="--out: .*file is not a folder"):
            out_file(path, "--out")
    with pytest.raises(InvalidInput, match="is not a folder"):
        out_folder(file, "--out")
    out_file(None, "--out")
    out_file(tmp_path / "a" / "b.json", "--out")
    out_folder(tmp_path / "a" / "b", "--out")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_permission_is_checked(tmp_path: Path) -> None:
    """A folder that may not be written to is named."""
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInput, match="no permission to write"):
        out_file(tmp_path / "a.json", "--out")


def test_a_file_is_not_copied_onto_itself(tmp_path: Path) -> None:
    """The copy beside the results may be the source."""
    source, target = tmp_path / "s", tmp_path / "t"
    source.write_text("x")
    keep_copy(source, target)
    keep_copy(target, target)
    assert target.read_text() == "x"


def test_missing_addresses_are_named_by_file_and_field() -> None:
    """A fleet for simulation alone cannot be served."""
    fleets = Path(__file__).resolve().parents[3] / "data" / "fleets"
    addresses(load_fleet(fleets / "demo.yaml"), fleets / "demo.yaml")
    with pytest.raises(InvalidInput, match=r"f.yaml: workers\[0\].url: .* has no address; add"):
        addresses(load_fleet(fleets / "measured.yaml"), Path("f.yaml"))
