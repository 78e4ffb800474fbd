"""Features are the same in training and serving, and never see what they are to predict."""

import numpy as np
import pandas as pd
import pytest

from models.features import choice_features, delay_features, length_features, steps
from models.output_length import output_length_predictor
from planner.domain.estimates import LEVELS


def _table():
    rng = np.random.default_rng(0)
    rows = 24
    return steps(
        session_id=np.repeat(["a", "b", "c"], rows // 3),
        family="f",
        step=np.tile(np.arange(rows // 3), 3),
        kind="agent",
        site=rng.choice(["x", "y"], rows),
        prompt_tokens=rng.integers(100, 900, rows),
        shared_prefix_tokens=rng.integers(0, 100, rows),
        output_tokens=rng.integers(1, 300, rows),
        action=rng.choice(["edit", "test"], rows),
        words=rng.choice(["cat", "ls"], rows),
        argument_chars=rng.integers(1, 90, rows),
        status=rng.choice(["ok", "bad"], rows),
        delay_s=rng.uniform(0, 9, rows),
    )


@pytest.mark.parametrize("features", [length_features, delay_features, choice_features])
def test_serving_sees_the_training_features(features):
    """The last row of a session's beginning has the features it had in the full table."""
    table = _table()
    whole = features(table)
    for end in range(1, 9):
        so_far = table[table["session_id"] == "b"].head(end)
        pd.testing.assert_series_equal(features(so_far).iloc[-1], whole.loc[so_far.index[-1]])


@pytest.mark.parametrize(
    ("features", "unknown"),
    [
        (length_features, ["output_tokens", "action", "words", "argument_chars", "status"]),
        (delay_features, ["delay_s", "status"]),
        (choice_features, ["action", "words", "output_tokens", "status", "delay_s"]),
    ],
)
def test_the_answer_does_not_leak_into_its_own_features(features, unknown):
    """Whatever is unknown at prediction time can change without changing the row's features."""
    table = _table()
    changed = table.copy()
    last = table.groupby("session_id").tail(1).index
    for column in [*unknown, "delay_s"]:
        value = "other" if isinstance(table[column].iloc[0], str) else 1e6
        changed.loc[last, column] = value
    pd.testing.assert_frame_equal(features(table).loc[last], features(changed).loc[last])


def test_steps_are_sorted_and_complete():
    """A step table is sorted by session and step and has every column, unknown ones empty."""
    table = steps(session_id=["b", "a", "a"], step=[0, 1, 0], output_tokens=[1, 2, 3])
    assert list(table["session_id"]) == ["a", "a", "b"]
    assert list(table["output_tokens"]) == [3, 2, 1]
    assert (table["action"] == "").all()
    assert table["delay_s"].isna().all()
    assert not table["held_out"].any()


def test_a_declared_limit_is_learned():
    """Calls with a small ``max_tokens`` are forecast far shorter than those with a large one."""
    rng = np.random.default_rng(0)
    rows = 600
    limit = rng.choice([20.0, 2000.0], rows)
    table = steps(
        session_id=[f"s{number:04d}" for number in range(rows)],
        family=[f"s{number:04d}" for number in range(rows)],
        step=0,
        kind="agent",
        site="x",
        prompt_tokens=rng.integers(100, 900, rows),
        max_tokens=limit,
        output_tokens=np.minimum(np.ceil(rng.lognormal(5.0, 0.5, rows)), limit),
        held_out=False,
    )
    fitted = output_length_predictor().fit(table, pd.Series(data=True, index=table.index))
    high = fitted.predict_quantiles(table)[:, LEVELS.index(0.9)]
    small = table["max_tokens"] == 20
    assert high[small].max() < 60
    assert high[~small].min() > 150
