"""Conditional quantiles of a positive, heavy-tailed quantity: the ground of lengths and delays.

Both estimators take a plain numeric array and work on ``log(1 + y)``: quantiles commute with a
monotone transform, and relative errors are what the planner feels. ``predict`` gives the median,
``predict_quantiles`` all levels, sorted, and ``predict_log_mean`` the mean of ``log(1 + y)``.
"""

# ruff: noqa: N803, N806  (X is the name of scikit-learn's contract)
from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from planner.domain.estimates import LEVELS

__all__ = ["BoostedQuantileRegressor", "ShrunkQuantileRegressor", "shrink"]

Floats = npt.NDArray[np.float64]


def shrink(sample: Floats, prior: Floats, strength: float, levels: tuple[float, ...]) -> Floats:
    """Return quantiles of a sample, pulled towards prior quantiles of the same levels.

    Parameters
    ----------
    sample
        Observations, any number (none gives the prior).
    prior
        Quantiles at ``levels``.
    strength
        The weight of the prior in observations, >= 0.

    Notes
    -----
    Quantile by quantile ``(n q + strength q_prior) / (n + strength)``: a Vincent average, which
    keeps quantiles sorted and the shape of both distributions.
    """
    if sample.size == 0:
        return prior
    own = np.quantile(sample, levels)
    return np.asarray((sample.size * own + strength * prior) / (sample.size + strength))


def _one_thread() -> Any:
    # Trees this small gain nothing from more threads, and on a busy machine the threads that wait
    # for each other in busy loops made a fit ten times slower.
    return threadpool_limits(limits=1, user_api="openmp")


class _LogQuantiles(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """What the two estimators share: validation, the way back from logarithms."""

    levels: tuple[float, ...]

    def _check_fit(self, X: Any, y: Any, **options: Any) -> tuple[Floats, Floats]:
        X, y = validate_data(self, X, y, dtype="numeric", y_numeric=True, **options)
        if np.min(y) < 0:
            raise ValueError(f"y must be >= 0, got {np.min(y):g}")
        return np.asarray(X, dtype=float), np.log1p(np.asarray(y, dtype=float))

    def _log_quantiles(self, X: Any) -> Floats:
        raise NotImplementedError

    def predict_quantiles(self, X: Any) -> Floats:
        """Return the quantiles, shape (rows, levels), non-decreasing along a row, >= 0."""
        return np.asarray(np.maximum(np.expm1(self._log_quantiles(X)), 0.0))

    def predict_log_mean(self, X: Any) -> Floats:
        """Return the mean of ``log(1 + y)``, shape (rows,), by the trapezoid rule on quantiles."""
        edges = np.array([0.0, *self.levels, 1.0])
        weights = (edges[2:] - edges[:-2]) / 2
        weights[0] += edges[1] / 2
        weights[-1] += (1 - edges[-2]) / 2
        return np.asarray(self._log_quantiles(X) @ weights)

    def predict(self, X: Any) -> Floats:
        """Return the median, shape (rows,)."""
        quantiles = self.predict_quantiles(X)
        return np.array([np.interp(0.5, self.levels, row) for row in quantiles])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        tags.regressor_tags.poor_score = True  # a median of groups is no least-squares fit
        return tags


class ShrunkQuantileRegressor(_LogQuantiles):
    """Quantiles per group, pulled towards the parent group, from the root down.

    Parameters
    ----------
    columns
        Columns of X that nest the groups, general first: the groups are the values of the first,
        then of the first two, and so on. Missing values are a value of their own. An unseen group
        gets its parent's quantiles.
    strength
        Weight of the parent in observations, >= 0.
    levels
        Quantile levels, increasing, in (0, 1).

    Attributes
    ----------
    groups_ : list of dict
        Per depth, log quantiles by group key; depth 0 is the root.
    """

    def __init__(
        self,
        columns: tuple[int, ...] = (0,),
        strength: float = 20.0,
        levels: tuple[float, ...] = LEVELS,
    ) -> None:
        self.columns = columns
        self.strength = strength
        self.levels = levels

    def fit(self, X: Any, y: Any) -> Self:
        """Fit on X (rows, features) and y (rows,), y >= 0."""
        X, log_y = self._check_fit(X, y, ensure_all_finite="allow-nan")
        root = np.quantile(log_y, self.levels)
        self.groups_: list[dict[tuple[float, ...], Floats]] = [{(): root}]
        for depth in range(1, len(self.columns) + 1):
            keys = self._keys(X, depth)
            order: dict[tuple[float, ...], list[int]] = {}
            for row, key in enumerate(keys):
                order.setdefault(key, []).append(row)
            parents = self.groups_[-1]
            self.groups_.append(
                {
                    key: shrink(log_y[rows], parents[key[:-1]], self.strength, self.levels)
                    for key, rows in order.items()
                }
            )
        return self

    def _keys(self, X: Floats, depth: int) -> list[tuple[float, ...]]:
        # NaN is not equal to itself, so that it would make a new group in every row.
        part = np.nan_to_num(X[:, list(self.columns[:depth])], nan=-np.inf)
        return list(map(tuple, part.tolist()))

    def _log_quantiles(self, X: Any) -> Floats:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype="numeric", ensure_all_finite="allow-nan")
        out = np.empty((len(X), len(self.levels)))
        for row, key in enumerate(self._keys(np.asarray(X, dtype=float), len(self.columns))):
            depth = len(key)
            while key[:depth] not in self.groups_[depth]:
                depth -= 1
            out[row] = self.groups_[depth][key[:depth]]
        return out

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


class BoostedQuantileRegressor(_LogQuantiles):
    """Gradient-boosted trees, one forest per level, averaged with shrunk group quantiles.

    Parameters
    ----------
    categorical
        Columns of X that hold category codes; a negative code is an unseen category.
    group_columns
        Columns that nest the groups of the shrunk part, see `ShrunkQuantileRegressor`.
    strength
        Its shrinkage.
    group_rows
        Rows at which trees and groups count the same in the average of log quantiles, >= 0: the
        trees' weight is ``n / (n + group_rows)``.
    trees, learning_rate, min_samples_leaf
        Size of the forests (one per level).
    levels
        Quantile levels, increasing, in (0, 1).
    random_state
        Seed.

    Attributes
    ----------
    groups_ : ShrunkQuantileRegressor
    used_ : array of int
        Columns that held at least one value in training.
    forests_ : list of HistGradientBoostingRegressor
        One per level; empty if there were fewer rows than ten leaves, when trees only add noise.
    weight_ : float
        Weight of the trees in the average.
    center_ : HistGradientBoostingRegressor or None
        The mean of ``log(1 + y)``.

    Notes
    -----
    On few rows the average beats either part: groups are steadier in the tails, trees see the
    numbers; on many the trees win.
    Quantiles of neighbouring forests may cross; they are sorted (monotone rearrangement, which
    never raises the pinball loss: Chernozhukov et al., Econometrica 78, 2010).
    """

    def __init__(
        self,
        categorical: tuple[int, ...] = (),
        group_columns: tuple[int, ...] = (),
        strength: float = 20.0,
        group_rows: float = 300.0,
        trees: int = 80,
        learning_rate: float = 0.08,
        min_samples_leaf: int = 25,
        levels: tuple[float, ...] = LEVELS,
        random_state: int = 0,
    ) -> None:
        self.categorical = categorical
        self.group_columns = group_columns
        self.strength = strength
        self.group_rows = group_rows
        self.trees = trees
        self.learning_rate = learning_rate
        self.min_samples_leaf = min_samples_leaf
        self.levels = levels
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Fit on X (rows, features) and y (rows,), y >= 0; X may hold NaN."""
        X, log_y = self._check_fit(X, y, ensure_all_finite="allow-nan")
        self.groups_ = ShrunkQuantileRegressor(
            columns=self.group_columns, strength=self.strength, levels=self.levels
        ).fit(X, np.expm1(log_y))
        # The trees cannot bin a column without a single value (facts this source does not have).
        self.used_ = np.flatnonzero(~np.isnan(X).all(axis=0))
        X = X[:, self.used_]
        self.weight_ = len(X) / (len(X) + self.group_rows)
        self.forests_ = []
        self.center_ = None
        if len(X) >= 10 * self.min_samples_leaf:
            with _one_thread():
                self.forests_ = [
                    self._forest(loss="quantile", quantile=level).fit(X, log_y)
                    for level in self.levels
                ]
                self.center_ = self._forest(loss="squared_error").fit(X, log_y)
        return self

    def _forest(self, **loss: Any) -> HistGradientBoostingRegressor:
        return HistGradientBoostingRegressor(
            **loss,
            max_iter=self.trees,
            learning_rate=self.learning_rate,
            min_samples_leaf=self.min_samples_leaf,
            max_leaf_nodes=15,
            categorical_features=np.isin(self.used_, self.categorical),
            early_stopping=False,
            random_state=self.random_state,
        )

    def _log_quantiles(self, X: Any) -> Floats:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype="numeric", ensure_all_finite="allow-nan")
        out = np.log1p(self.groups_.predict_quantiles(X))
        if self.forests_:
            X = X[:, self.used_]
            with _one_thread():
                boosted = np.column_stack([forest.predict(X) for forest in self.forests_])
            out = (1 - self.weight_) * out + self.weight_ * boosted
        return np.asarray(np.sort(out, axis=1))

    def predict_log_mean(self, X: Any) -> Floats:
        """Return the mean of ``log(1 + y)``, shape (rows,)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype="numeric", ensure_all_finite="allow-nan")
        grouped = self.groups_.predict_log_mean(X)
        if self.center_ is None:
            return grouped
        with _one_thread():
            boosted = self.center_.predict(X[:, self.used_])
        return np.asarray((1 - self.weight_) * grouped + self.weight_ * boosted)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags
