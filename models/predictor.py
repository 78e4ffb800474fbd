"""Quantiles of one column of a step table: features, category codes and estimator in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.preprocessing import OrdinalEncoder

from models.features import FeatureSchema
from models.quantiles import BoostedQuantileRegressor, ShrunkQuantileRegressor
from planner.domain.estimates import LEVELS

__all__ = ["StepQuantilePredictor"]

Floats = npt.NDArray[np.float64]


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
        Seed of the trees.
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
            if self.constant
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
        return self.regressor_.predict_quantiles(self.encoder_.transform(self.features(table)))

    def predict_log_mean(self, table: pd.DataFrame) -> Floats:
        """Return the mean of ``log(1 + target)``, shape (rows,)."""
        return self.regressor_.predict_log_mean(self.encoder_.transform(self.features(table)))

    @property
    def levels(self) -> tuple[float, ...]:
        """Quantile levels of the prediction."""
        return LEVELS
