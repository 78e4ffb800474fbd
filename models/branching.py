"""Next action and branch: probabilities of the outcomes, from counts with back-off.

Counting is hard to beat here and easy to explain: few contexts, few outcomes, and the planner
needs honest probabilities of rare outcomes more than a sharper guess of the likeliest.
"""

# ruff: noqa: N803, N806  (X is the name of scikit-learn's contract)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.preprocessing import OrdinalEncoder
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from models.features import CHOICE, FeatureSchema, choice_features

__all__ = ["BranchClassifier", "ChoicePredictor", "visit_probabilities"]

Floats = npt.NDArray[np.float64]


class BranchClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Dirichlet-shrunk outcome counts per context, backing off from specific to general.

    Parameters
    ----------
    strength
        Weight of the more general context in observations, > 0.

    Attributes
    ----------
    classes_ : array of outcomes, sorted
    counts_ : list of dict
        Per depth, outcome counts by context; depth 0 is the base rate.

    Notes
    -----
    Columns of X nest the contexts, general first. With n observations of a context, of which n_o
    had outcome o, ``p(o | context) = (n_o + strength p(o | parent)) / (n + strength)``: the
    posterior mean under a Dirichlet prior centred on the parent (MacKay and Peto, 1995). The root
    is shrunk to the uniform distribution with a weight of one observation in all.
    """

    def __init__(self, strength: float = 12.0) -> None:
        self.strength = strength

    def fit(self, X: Any, y: Any) -> Self:
        """Fit on X (rows, contexts), category codes or any numbers, and y (rows,) outcomes."""
        X, y = validate_data(self, X, y, ensure_all_finite="allow-nan")
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        self.counts_: list[dict[tuple[float, ...], Floats]] = []
        for depth in range(X.shape[1] + 1):
            level: dict[tuple[float, ...], Floats] = {}
            for key, code in zip(self._keys(X, depth), codes, strict=True):
                if key not in level:
                    level[key] = np.zeros(len(self.classes_))
                level[key][code] += 1
            self.counts_.append(level)
        return self

    @staticmethod
    def _keys(X: npt.NDArray[Any], depth: int) -> list[tuple[float, ...]]:
        part = np.nan_to_num(np.asarray(X[:, :depth], dtype=float), nan=-np.inf)
        return list(map(tuple, part.tolist()))

    def predict_proba(self, X: Any) -> Floats:
        """Return probabilities, shape (rows, outcomes), each row summing to one, all > 0."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, ensure_all_finite="allow-nan")
        size = len(self.classes_)
        out = np.empty((len(X), size))
        known: dict[tuple[float, ...], Floats] = {}
        for row, key in enumerate(self._keys(X, X.shape[1])):
            if key not in known:
                probability = np.full(size, 1.0 / size)
                for depth, level in enumerate(self.counts_):
                    counts = level.get(key[:depth])
                    if counts is None:
                        break
                    weight = self.strength if depth else 1.0
                    probability = (counts + weight * probability) / (counts.sum() + weight)
                known[key] = probability
            out[row] = known[key]
        return out

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Return the likeliest outcome of each row."""
        chances = self.predict_proba(X)
        return np.asarray(self.classes_[np.argmax(chances, axis=1)])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


class ChoicePredictor:
    """Outcome probabilities of the next ``action`` of a step table.

    Parameters
    ----------
    contexts
        False gives the base rates alone: the constant baseline, and what is kept when contexts
        do not beat it.
    """

    schema: FeatureSchema = CHOICE

    def __init__(self, *, contexts: bool = True) -> None:
        self.contexts = contexts

    def fit(self, table: pd.DataFrame, rows: pd.Series) -> Self:
        """Fit on the marked rows of a step table; histories read all of it."""
        columns = choice_features(table)[rows]
        self.encoder_ = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
        codes = self.encoder_.fit_transform(columns)
        self.classifier_ = BranchClassifier().fit(self._shape(codes), table.loc[rows, "action"])
        return self

    def _shape(self, codes: Floats) -> Floats:
        return codes if self.contexts else np.zeros((len(codes), 1))

    def probabilities(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return probabilities per step, one column per outcome seen in training."""
        codes = self.encoder_.transform(choice_features(table))
        return pd.DataFrame(
            self.classifier_.predict_proba(self._shape(codes)),
            index=table.index,
            columns=self.classifier_.classes_,
        )


def visit_probabilities(
    counts: Sequence[Sequence[float]], prior: Sequence[float], strength: float = 4.0
) -> list[tuple[float, ...]]:
    """Return outcome probabilities by visit, for the estimate table.

    Parameters
    ----------
    counts
        Per visit (0, 1, 2, ...; the last one also stands for all later visits), the count of each
        outcome, >= 0.
    prior
        Probabilities of the outcomes before anything was seen, summing to one.
    strength
        Weight in observations of a visit's probabilities in those of the next.

    Returns
    -------
    Per visit the probabilities, each > 0 where the prior is, summing to one.

    Notes
    -----
    A visit is pulled towards the visit before it, not towards the mean of all: the chance to go
    round a loop once more mostly falls, and the mean would promise loops that never end.
    """
    # Two pseudo-observations of the prior: enough to keep an unseen outcome possible.
    weight, centre = 2.0, np.asarray(prior, dtype=float)
    out = []
    for row in counts:
        seen = np.asarray(row, dtype=float)
        centre = (seen + weight * centre) / (seen.sum() + weight)
        out.append(tuple(map(float, centre / centre.sum())))
        weight = strength
    return out
