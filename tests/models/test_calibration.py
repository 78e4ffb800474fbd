"""Split conformal offsets, and the predictor that carries them."""

import numpy as np
import pytest

from models.calibration import LEAST_SCORES, conformal_offsets, shifted
from models.features import steps
from models.output_length import output_length_predictor
from planner.domain.estimates import LEVELS


def test_offsets_mend_what_was_promised():
    """Quantiles of a third of the true size cover as promised once shifted."""
    rng = np.random.default_rng(0)
    values = rng.lognormal(5.0, 0.7, 4000)
    low = np.tile(np.quantile(values, LEVELS) / 3, (4000, 1))
    offsets = conformal_offsets(low[:2000], values[:2000], LEVELS)
    mended = shifted(low[2000:], offsets)
    for column, level in enumerate(LEVELS):
        assert np.mean(values[2000:] <= mended[:, column]) == pytest.approx(level, abs=0.03)


def test_few_scores_change_nothing():
    """With fewer rows than needed the offsets are zero."""
    few = LEAST_SCORES - 1
    offsets = conformal_offsets(np.ones((few, len(LEVELS))), np.full(few, 9.0), LEVELS)
    assert not offsets.any()


def _table(rng, output):
    count = len(output)
    return steps(
        session_id=[f"s{number // 5:04d}" for number in range(count)],
        family=[f"s{number // 5:04d}" for number in range(count)],
        step=[number % 5 for number in range(count)],
        kind="k",
        site=np.where(rng.random(count) < 0.5, "a", "b"),
        prompt_tokens=rng.integers(100, 1000, count),
        output_tokens=output,
    )


def test_the_constant_is_kept_where_features_say_nothing():
    """On lengths that depend on nothing the predictor is the constant; on others it is not."""
    rng = np.random.default_rng(0)
    noise = _table(rng, rng.lognormal(4, 0.8, 1000).round() + 1)
    rows = noise["step"] >= 0
    fitted = output_length_predictor().fit(noise, rows)
    assert fitted.constant_
    assert np.ptp(fitted.predict_quantiles(noise), axis=0).max() == 0
    told = noise.assign(
        output_tokens=np.where(noise["site"] == "a", 20.0, 900.0) * rng.lognormal(0, 0.2, 1000)
    )
    fitted = output_length_predictor().fit(told, rows)
    assert not fitted.constant_
    assert fitted.offsets_.shape == (len(LEVELS),)
