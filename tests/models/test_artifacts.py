"""Artifacts load again, and anything that is not a fresh artifact of ours is refused clearly."""

import json

import joblib
import numpy as np
import pytest

from models.artifacts import ArtifactInfo, load_artifact, read_info, save_artifact
from models.quantiles import ShrunkQuantileRegressor
from planner.domain.errors import InvalidInput


@pytest.fixture
def path(tmp_path):
    """Save an artifact."""
    model = ShrunkQuantileRegressor().fit(np.zeros((4, 1)), np.arange(4.0))
    info = ArtifactInfo(
        kind="output_length", dataset="d", window="4 rows", data_hash="ab", metrics={"pinball": 1.0}
    )
    save_artifact(model, info, tmp_path / "a.joblib")
    return tmp_path / "a.joblib"


def _edit(path, **changes):
    magic, header, payload = path.read_bytes().split(b"\n", 2)
    values = {**json.loads(header), **changes}
    path.write_bytes(b"\n".join([magic, json.dumps(values).encode(), payload]))


def test_round_trip(path):
    """The predictor predicts as before, and the header tells where it comes from."""
    model, info = load_artifact(path, "output_length")
    assert model.predict(np.zeros((1, 1))) == pytest.approx([1.5], abs=0.2)
    assert (info.dataset, info.window, info.metrics) == ("d", "4 rows", {"pinball": 1.0})
    assert info.features == "length/3"
    assert "scikit-learn" in info.libraries
    assert read_info(path) == info


def test_missing_file(tmp_path):
    """A missing artifact is named."""
    with pytest.raises(InvalidInput, match=r"none\.joblib"):
        load_artifact(tmp_path / "none.joblib", "output_length")


def test_foreign_file_is_not_unpickled(tmp_path):
    """A plain joblib file of someone else is refused before it is loaded."""
    joblib.dump({"a": 1}, tmp_path / "foreign.joblib")
    with pytest.raises(InvalidInput, match="not an Almanac artifact"):
        load_artifact(tmp_path / "foreign.joblib", "output_length")


def test_damaged_content(path):
    """A truncated file is refused."""
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InvalidInput, match="damaged"):
        load_artifact(path, "output_length")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "almanac.artifact/9"}, "almanac.artifact/9"),
        ({"features": "length/0"}, "feature schema 'length/0'"),
        ({"libraries": {"scikit-learn": "0.1", "joblib": "1", "numpy": "1"}}, "was made with"),
    ],
)
def test_stale_artifacts_are_refused(path, changes, message):
    """Another schema, feature set or library version is refused, with the way out."""
    _edit(path, **changes)
    with pytest.raises(InvalidInput, match=message) as caught:
        load_artifact(path, "output_length")
    assert "almanac train" in caught.value.remedy


def test_wrong_kind(path):
    """An artifact of another predictor is refused."""
    with pytest.raises(InvalidInput, match="output_length"):
        load_artifact(path, "tool_delay")


def test_damaged_header(path):
    """A header that is not JSON is refused."""
    path.write_bytes(b"ALMANAC ARTIFACT\n{oops\nxx")
    with pytest.raises(InvalidInput, match="header is damaged"):
        read_info(path)
