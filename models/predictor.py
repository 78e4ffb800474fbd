"""Quantiles of one column of a step table: features, category codes and estimator in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.preprocessing import OrdinalEncoder

from models.calibration import LEAST_SCORES, conformal_offsets, shifted
from models.evaluation import pinball_loss
from models.features import FeatureSchema
from models.quantiles import BoostedQuantileRegressor, ShrunkQuantileRegressor
from models.tables import split_groups
from planner.domain.estimates import LEVELS

__all__ = ["StepQuantilePredictor"]

Floats = npt.NDArray[np.float64]

CALIBRATION_SHARE = 0.25


class StepQuantilePredictor:
    """Predicts quantiles at `planner.domain.estimates.LEVELS` of a column of a step table.

    Parameters
    ----------
    target
        The column to predict, >= 0.
    features
        From a step table to the schema's columns.
    schema
        The columns, categories first.
    groups
        Categories that nest the shrunk groups, general first.
    constant
        True gives the constant quantiles of the training rows: the baseline, and what is kept
        when features do not beat it.
    seed
        Seed of the trees and of the calibration split.

    Attributes
    ----------
    offsets_ : array, shape (levels,)
        Split conformal offsets on ``log(1 + target)``, see `models.calibration`.
    constant_ : bool
        Whether the constant was kept.

    Notes
    -----
    A quarter of the families is kept from a first fit. It gives the offsets, and where features do
    not beat the constant on it, the constant is kept. The final fit uses all rows. Constants are
    not calibrated: they are the quantiles of the very rows.
    """

    def __init__(
        self,
        *,
        target: str,
        features: Callable[[pd.DataFrame], pd.DataFrame],
        schema: FeatureSchema,
        groups: tuple[str, ...],
        constant: bool = False,
        seed: int = 0,
    ) -> None:
        self.target = target
        self.features = features
        self.schema = schema
        self.groups = groups
        self.constant = constant
        self.seed = seed

    def fit(self, table: pd.DataFrame, rows: pd.Series) -> Self:
        """Fit on the marked rows of a step table; histories read all of it."""
        self.offsets_ = np.zeros(len(LEVELS))
        self.constant_ = self.constant
        if self.constant_:
            return self._fit(table, rows)
        aside = rows & self._calibration_rows(table, rows)
        inner = rows & ~aside
        if aside.sum() >= LEAST_SCORES and inner.any():
            observed = table.loc[aside, self.target].to_numpy(float)
            self._fit(table, inner)
            raw = self.predict_quantiles(table)[aside.to_numpy()]
            flat = np.quantile(table.loc[inner, self.target].to_numpy(float), LEVELS)
            offsets = conformal_offsets(raw, observed, LEVELS)
            if _pinball(observed, raw) < _pinball(observed, flat[None, :]):
                self.offsets_ = offsets
            else:
                self.constant_ = True
        return self._fit(table, rows)

    def _calibration_rows(self, table: pd.DataFrame, rows: pd.Series) -> pd.Series:
        if table["family"].nunique() < len(table):
            # Another seed than that of the held-out split, or its families would be drawn again.
            return split_groups(table["family"], self.seed + 1, CALIBRATION_SHARE)
        # Unrelated rows are in order of time: what drifts shows in the latest.
        latest = np.flatnonzero(rows)[int((1 - CALIBRATION_SHARE) * rows.sum()) :]
        return pd.Series(np.isin(np.arange(len(table)), latest), index=table.index)

    def _fit(self, table: pd.DataFrame, rows: pd.Series) -> Self:
        # At most 200 codes: the trees take 255, and a word seen five times teaches little.
        codes = OrdinalEncoder(
            handle_unknown="use_encoded_value",
            unknown_value=-1,
            min_frequency=5,
            max_categories=200,
        )
        self.encoder_ = make_column_transformer(
            (codes, list(self.schema.categorical)), ("passthrough", list(self.schema.numeric))
        )
        inputs = self.encoder_.fit_transform(self.features(table)[rows])
        categories = len(self.schema.categorical)
        regressor = (
            ShrunkQuantileRegressor(columns=())
            if self.constant_
            else BoostedQuantileRegressor(
                categorical=tuple(range(categories)),
                group_columns=tuple(self.schema.categorical.index(name) for name in self.groups),
                random_state=self.seed,
            )
        )
        self.regressor_ = regressor.fit(inputs, table.loc[rows, self.target].to_numpy(float))
        return self

    def predict_quantiles(self, table: pd.DataFrame) -> Floats:
        """Return quantiles, shape (rows, levels), sorted, for every row of a step table."""
        raw = self.regressor_.predict_quantiles(self.encoder_.transform(self.features(table)))
        return shifted(raw, self.offsets_) if self.offsets_.any() else raw

    def predict_log_mean(self, table: pd.DataFrame) -> Floats:
        """Return the mean of ``log(1 + target)``, shape (rows,)."""
        return self.regressor_.predict_log_mean(self.encoder_.transform(self.features(table)))

    @property
    def levels(self) -> tuple[float, ...]:
        """Quantile levels of the prediction."""
        return LEVELS


def _pinball(observed: Floats, quantiles: Floats) -> float:
    columns = range(len(LEVELS))
    return float(
        np.mean([pinball_loss(observed, quantiles[:, i], LEVELS[i]) for i in columns if i > 2])
    )
