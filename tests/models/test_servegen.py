"""ServeGen's client profiles."""

import os
from pathlib import Path

import numpy as np
import pytest

from models.importers import read_servegen
from planner.domain.errors import InvalidInput
from planner.sim.workload import windowed_arrivals

HEAD = "client,window_start_s,rate_rps,iat_cv,iat_dist,param1,param2\n"


def table(folder: Path, *lines: str) -> Path:
    (folder / "servegen").mkdir()
    (folder / "servegen" / "arrivals_m-small.csv").write_text(HEAD + "\n".join(lines) + "\n")
    return folder


def test_windows_are_read_in_order(tmp_path: Path) -> None:
    """Rate, law and shape come from the table, the length of a window from its documentation."""
    folder = table(tmp_path, "7,1200,0.5,2.2,Gamma,0.2,0.1", "3,600,1.5,6.0,Weibull,0.35,0.02")
    first, second = read_servegen(folder)
    assert (first.client, first.start_s, first.end_s) == ("3", 600.0, 1200.0)
    assert (first.rate_rps, first.law, first.shape) == (1.5, "weibull", 0.35)
    assert (second.client, second.law) == ("7", "gamma")
    assert read_servegen(folder / "servegen") == [first, second]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,0,0,1,Gamma,1,1", r"m-small.csv:2: rate_rps: np.*0.0|m-small.csv:2: rate_rps: 0.0"),
        ("1,0,1,1,Pareto,1,1", r"m-small.csv:2: iat_dist: 'Pareto' is unknown"),
        ("1,0,1,1,Gamma,x,1", r"m-small.csv:2: param1: 'x' is not a number"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    """The error names file, line, column and value."""
    with pytest.raises(InvalidInput, match=message):
        read_servegen(table(tmp_path, line))


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    """A folder without the table is an input error."""
    with pytest.raises(InvalidInput, match="no such table"):
        read_servegen(tmp_path)


@pytest.mark.parametrize("part", ["m-small", "m-mid"])
def test_the_public_slice_is_bursty(part: str) -> None:
    """The real profiles give arrivals at the wanted rate, burstier than Poisson."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("ALMANAC_PUBLIC_DATA", default))
    if not (folder / "servegen").is_dir():
        pytest.skip("the public data is not here")
    windows = read_servegen(folder, part)
    times, clients = windowed_arrivals(windows, 2.0, 3000, np.random.default_rng(0))
    gaps = np.diff(times)
    assert times[-1] == pytest.approx(1500.0)
    assert gaps.std() / gaps.mean() > 1.05
    assert len(set(clients)) > 5
