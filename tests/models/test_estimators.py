"""The estimators keep scikit-learn's contract and their own promises."""

# ruff: noqa: N806  (X is the name of scikit-learn's contract)

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from models.branching import BranchClassifier, visit_probabilities
from models.endpoint_latency import RelativeNonNegativeRegressor
from models.quantiles import BoostedQuantileRegressor, ShrunkQuantileRegressor
from planner.domain.estimates import LEVELS


@parametrize_with_checks(
    [
        ShrunkQuantileRegressor(),
        BoostedQuantileRegressor(levels=(0.5,), trees=2, min_samples_leaf=2),
        BranchClassifier(),
        RelativeNonNegativeRegressor(),
    ]
)
def test_official_estimator_checks(estimator, check):
    """Every official check of scikit-learn passes."""
    check(estimator)


def _data(rows=1500, seed=0):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 3, rows)
    size = rng.uniform(0, 1, rows)
    y = np.exp(2 + group + size + rng.normal(0, 0.5, rows))
    return np.column_stack([group, size]).astype(float), y


@pytest.mark.parametrize(
    "estimator",
    [
        ShrunkQuantileRegressor(columns=(0,)),
        BoostedQuantileRegressor(categorical=(0,), group_columns=(0,), trees=30),
    ],
)
def test_quantiles_are_sorted_and_cover(estimator):
    """Quantiles come sorted and >= 0, and cover held-out data about as often as promised."""
    X, y = _data()
    test_X, test_y = _data(seed=1)
    quantiles = estimator.fit(X, y).predict_quantiles(test_X)
    assert quantiles.shape == (len(test_X), len(LEVELS))
    assert (np.diff(quantiles, axis=1) >= 0).all()
    assert (quantiles >= 0).all()
    for position, level in enumerate(LEVELS):
        assert np.mean(test_y <= quantiles[:, position]) == pytest.approx(level, abs=0.06)


def test_trees_beat_groups_where_numbers_matter():
    """A numeric feature that matters lowers the spread that groups alone must leave."""
    X, y = _data()
    test_X, test_y = _data(seed=1)

    def error(model):
        return np.mean(np.abs(np.log1p(test_y) - model.fit(X, y).predict_log_mean(test_X)))

    trees = BoostedQuantileRegressor(categorical=(0,), group_columns=(0,), trees=40)
    assert error(trees) < 0.95 * error(ShrunkQuantileRegressor(columns=(0,)))


def test_shrinkage_pulls_small_groups_to_their_parent():
    """A group of one keeps close to its parent; a group of many goes its own way."""
    X = np.array([[0.0]] * 200 + [[1.0]] * 200 + [[2.0]])
    y = np.array([10.0] * 200 + [1000.0] * 200 + [1000.0])
    model = ShrunkQuantileRegressor(columns=(0,), strength=20).fit(X, y)
    middle = model.predict(np.array([[0.0], [1.0], [2.0], [9.0]]))
    assert middle[0] < 20
    assert middle[1] > 600
    # Unseen groups take the parent's median, a group of one moves by a twenty-first.
    assert middle[3] <= middle[2] < middle[3] * 2 or middle[2] == pytest.approx(middle[3], rel=0.3)


def test_missing_columns_do_not_stop_the_trees():
    """A feature that a source does not have (all missing) is passed over."""
    X, y = _data()
    X = np.column_stack([X, np.full(len(X), np.nan)])
    model = BoostedQuantileRegressor(categorical=(0,), group_columns=(0,), trees=5).fit(X, y)
    assert list(model.used_) == [0, 1]
    assert np.isfinite(model.predict(X)).all()


def test_negative_targets_are_refused():
    """Lengths and delays are never negative; a negative target is an error that says so."""
    with pytest.raises(ValueError, match="must be >= 0"):
        ShrunkQuantileRegressor().fit(np.zeros((3, 1)), [1.0, -2.0, 3.0])


def test_branch_backs_off_to_the_general_context():
    """An unseen specific context gets the general context's probabilities; rows sum to one."""
    X = np.array([[0, 0]] * 50 + [[0, 1]] * 50 + [[1, 0]] * 50, dtype=float)
    y = np.array(["a"] * 50 + ["b"] * 50 + ["c"] * 50)
    model = BranchClassifier(strength=5).fit(X, y)
    chances = model.predict_proba(np.array([[0.0, 0.0], [0.0, 7.0], [9.0, 9.0]]))
    assert chances.sum(axis=1) == pytest.approx(1.0)
    assert (chances > 0).all()
    assert chances[0, 0] > 0.9
    assert chances[1, 0] == pytest.approx(chances[1, 1], abs=1e-9)
    assert chances[1, 2] < 0.1
    assert chances[2] == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_visit_probabilities_follow_counts_and_keep_the_prior():
    """Each visit sums to one, follows its counts, and leans on the visit before when rare."""
    rows = visit_probabilities([[80, 20], [10, 30], [0, 1]], [0.5, 0.5])
    assert [sum(row) for row in rows] == pytest.approx([1.0] * 3)
    assert rows[0][0] == pytest.approx(0.8, abs=0.01)
    assert rows[1][0] == pytest.approx(0.3, abs=0.03)
    assert 0.1 < rows[2][0] < rows[1][0]
    assert visit_probabilities([[0, 0]], [0.7, 0.3]) == [pytest.approx((0.7, 0.3))]


def test_relative_regressor_recovers_coefficients_despite_outliers():
    """Non-negative coefficients come back although a tenth of the rows are stragglers."""
    rng = np.random.default_rng(0)
    X = np.column_stack([np.ones(400), rng.uniform(10, 1000, 400), rng.uniform(1, 30, 400)])
    y = X @ np.array([0.02, 1e-4, 0.0]) * np.exp(rng.normal(0, 0.02, 400))
    y[::10] *= 4
    model = RelativeNonNegativeRegressor(rounds=10).fit(X, y)
    assert model.coef_[:2] == pytest.approx([0.02, 1e-4], rel=0.1)
    assert (model.coef_ >= 0).all()


def test_prior_carries_directions_without_data():
    """A coefficient that no row informs is the prior's, scaled by the factor the others show."""
    X = np.array([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    model = RelativeNonNegativeRegressor(prior=(1.0, 5.0)).fit(X, 1.5 * X[:, 0])
    assert model.coef_ == pytest.approx([1.5, 7.5], rel=1e-6)


def test_a_prior_of_the_wrong_length_is_refused():
    """The prior has one value per column."""
    with pytest.raises(ValueError, match="1 values for 2 features"):
        RelativeNonNegativeRegressor(prior=(1.0,)).fit(np.ones((3, 2)), np.ones(3))
