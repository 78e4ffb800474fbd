"""Results files: round trip, and one clear error for each way to be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.domain.errors import InvalidInput
from planner.report.results import load_results, save_results
from tests.planner.report.samples import results


def test_round_trip_through_a_folder_and_a_file(tmp_path: Path) -> None:
    """What is saved is loaded again, from the folder or from the file itself."""
    made = results()
    file = save_results(made, tmp_path)
    assert file == tmp_path / "results.json"
    assert load_results(tmp_path) == load_results(file)
    assert load_results(file).to_json() == made.to_json()
    assert save_results(made, tmp_path / "simulated.json").name == "simulated.json"


def test_policy_by_label() -> None:
    """A policy is found by its label; an unknown one lists the known."""
    made = results()
    assert made.policy("almanac").values("mean_s").keys() == {0, 1, 2}
    with pytest.raises(InvalidInput, match="round_robin, marginal_cost, almanac"):
        made.policy("best")


def break_seed(raw: dict[str, Any]) -> None:
    """Repeat a seed."""
    raw["policies"][0]["seeds"].append(raw["policies"][0]["seeds"][0])


def break_metric(raw: dict[str, Any]) -> None:
    """Put a word where a number belongs."""
    raw["policies"][1]["seeds"][2]["metrics"]["mean_s"] = "slow"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw.update(schema="other/1"), "schema: 'other/1' is not a schema"),
        (lambda raw: raw.update(mode="dreamt"), "mode: 'dreamt' is unknown"),
        (lambda raw: raw.update(policies=[]), "no policy"),
        (lambda raw: raw.update(colour=1), "unknown field 'colour'"),
        (lambda raw: raw["policies"][1].update(label="almanac"), "label 'almanac' is used twice"),
        (break_seed, r"policies\[0\]\.seeds: seeds \[0, 1, 2, 0\]"),
        (break_metric, r"policies\[1\]\.seeds\[2\]\.metrics\.mean_s: 'slow'"),
    ],
)
def test_errors_name_file_field_and_value(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    """A broken results file is refused with its path, the field and the value."""
    raw = results().to_json()
    damage(raw)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(InvalidInput, match=message) as caught:
        load_results(tmp_path)
    assert str(file) in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    """A folder without results is one clear error."""
    with pytest.raises(InvalidInput, match="no such results file"):
        load_results(tmp_path)
