"""Latency of an endpoint: physics-shaped, non-negative, anchored on a prior row.

Everything is linear in the six coefficients of `planner.domain.latency.LatencyRow` once the state
of the endpoint is known, so that one small non-negative least squares does it. Errors are
relative: a tenth of a short wait matters as much as a tenth of a long one. Trees are not used:
they do not carry over to a load, a model or a GPU they have not seen.
"""

# ruff: noqa: N803, N806  (X is the name of scikit-learn's contract)
from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import nnls
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from planner.domain.latency import LatencyRow

__all__ = [
    "REQUEST_COLUMNS",
    "LatencyPredictor",
    "RelativeNonNegativeRegressor",
    "call_design",
    "fit_row",
    "row_seconds",
]

Floats = npt.NDArray[np.float64]

REQUEST_COLUMNS = (
    "config",  # (model, GPU, number) the row was measured on
    "run",  # one measurement of a configuration: requests of a run meet each other
    "sent_s",  # on the run's clock: sending, or admission, as the reader says
    "prompt_tokens",  # uncached
    "calls",  # in flight when the request was sent, itself included
    "kv_tokens",  # their context, its own prompt included
    "output_tokens",
    "ttft_s",  # from admission or sending, as the reader says
    "decode_s",  # from first to last token
    "held_out",  # "" for training rows, else the name of the held-out part
)


class RelativeNonNegativeRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Linear model with coefficients >= 0, fitted to relative errors, robust, with a prior.

    Parameters
    ----------
    prior
        Expected coefficients, one per column, >= 0; None for none. The fit first finds the one
        factor that makes the prior fit best, then pulls each coefficient towards its scaled prior.
    strength
        Weight of the prior, in observations, per coefficient, >= 0.
    huber
        Relative error beyond which a row counts less (its weight falls as huber / error), > 0.
    rounds
        Rounds of re-weighting, >= 1.

    Attributes
    ----------
    coef_ : array, shape (features,)
    scale_ : float
        The factor on the prior (1.0 without one).

    Notes
    -----
    Minimises ``sum w_i ((x_i b - y_i) / y_i)^2 + strength sum_k (b_k / p_k - scale)^2`` over
    b >= 0 by active sets (Lawson and Hanson, 1974), with the Huber weights w_i of the round
    before. Columns are divided by the prior, or by their size without one.
    """

    def __init__(
        self,
        prior: tuple[float, ...] | None = None,
        strength: float = 5.0,
        huber: float = 0.3,
        rounds: int = 4,
    ) -> None:
        self.prior = prior
        self.strength = strength
        self.huber = huber
        self.rounds = rounds

    def fit(self, X: Any, y: Any) -> Self:
        """Fit on X (rows, features) and y (rows,), y > 0."""
        X, y = validate_data(self, X, y, y_numeric=True, dtype=np.float64)
        y = np.asarray(y, dtype=float)
        if np.min(y) <= 0:
            raise ValueError(f"y must be > 0, got {np.min(y):g}")
        relative = X / y[:, None]
        size = np.abs(relative).max(axis=0)
        unit = np.where(size > 0, 1.0 / np.where(size > 0, size, 1.0), 1.0)
        self.scale_ = 1.0
        weight = 0.0
        if self.prior is not None:
            prior = np.asarray(self.prior, dtype=float)
            if prior.shape != (X.shape[1],):
                raise ValueError(f"prior has {prior.size} values for {X.shape[1]} features")
            guess = relative @ prior
            if np.any(guess > 0):
                self.scale_ = float(np.median(1.0 / guess[guess > 0]))
            # A zero in the prior is a small number unsure of itself, not a prohibition.
            unit = np.where(prior > 0, prior, 0.05 * unit)
            weight = float(np.sqrt(self.strength))
        scaled = relative * unit
        rows = np.ones(len(y))
        anchor = weight * np.eye(X.shape[1])
        target = np.full(X.shape[1], weight * self.scale_)
        for _ in range(self.rounds):
            root = np.sqrt(rows)
            solution, _ = nnls(
                np.vstack([scaled * root[:, None], anchor]), np.concatenate([root, target])
            )
            error = np.abs(scaled @ solution - 1.0)
            rows = np.minimum(1.0, self.huber / np.maximum(error, 1e-12))
        self.coef_ = solution * unit
        return self

    def predict(self, X: Any) -> Floats:
        """Return predictions, shape (rows,), in the unit of y."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return np.asarray(X @ self.coef_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        tags.regressor_tags.poor_score = True  # no intercept, no negative slope
        return tags


@dataclass(frozen=True, slots=True)
class LatencyPredictor:
    """Prefill and decode of one configuration, for a request and the load it meets.

    ``ttft = a + b n + c n^2 + g (B - 1) + h (KV - n)`` and ``step = d + e B + f KV``, with n
    uncached prompt tokens, B calls in flight and KV tokens of context, all when it is sent;
    g and h are the wait that the load brings. All coefficients are >= 0, in seconds.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    @classmethod
    def fit(cls, rows: pd.DataFrame, prior: LatencyPredictor | None = None) -> LatencyPredictor:
        """Fit on rows with `REQUEST_COLUMNS`.

        ``prior`` is the shape to lean on where the rows say little (a new configuration): with the
        weight of one request per coefficient.
        """

        # A narrow Huber zone is close to least absolute relative error: these logs have long tails.
        def model(shape: tuple[float, ...] | None) -> RelativeNonNegativeRegressor:
            return RelativeNonNegativeRegressor(prior=shape, strength=1.0, huber=0.05, rounds=15)

        prefill = model(prior.prefill if prior else None).fit(
            _prefill_design(rows), rows["ttft_s"].to_numpy(float)
        )
        several = rows[(rows["output_tokens"] > 1) & (rows["decode_s"] > 0)]
        if several.empty:
            decode = prior.decode if prior else (0.0, 0.0, 0.0)
        else:
            step_s = several["decode_s"] / (several["output_tokens"] - 1)
            fitted = model(prior.decode if prior else None).fit(
                _decode_design(several), step_s.to_numpy(float)
            )
            decode = tuple(fitted.coef_)
        return cls(prefill=tuple(map(float, prefill.coef_)), decode=tuple(map(float, decode)))

    @classmethod
    def fit_whole(cls, rows: pd.DataFrame) -> LatencyPredictor:
        """Fit on the time to the last token alone, both parts at once.

        For a handful of requests and a question about their whole time: what the parts' own fits
        get wrong in opposite directions is not added up.
        """
        steps = np.maximum(rows["output_tokens"].to_numpy(float) - 1, 0)[:, None]
        prefill = _prefill_design(rows)
        fitted = RelativeNonNegativeRegressor(huber=0.05, rounds=15).fit(
            np.hstack([prefill, steps * _decode_design(rows)]),
            (rows["ttft_s"] + rows["decode_s"]).to_numpy(float),
        )
        parts = tuple(map(float, fitted.coef_))
        return cls(prefill=parts[: prefill.shape[1]], decode=parts[prefill.shape[1] :])

    def ttft_s(self, rows: pd.DataFrame) -> Floats:
        """Return seconds to the first token, shape (rows,)."""
        return np.asarray(_prefill_design(rows) @ np.array(self.prefill))

    def step_s(self, rows: pd.DataFrame) -> Floats:
        """Return seconds per output token after the first, shape (rows,)."""
        return np.asarray(_decode_design(rows) @ np.array(self.decode))

    def total_s(self, rows: pd.DataFrame) -> Floats:
        """Return seconds to the last token, given ``output_tokens``, shape (rows,)."""
        steps = np.maximum(rows["output_tokens"].to_numpy(float) - 1, 0)
        return np.asarray(self.ttft_s(rows) + steps * self.step_s(rows))


def _prefill_design(rows: pd.DataFrame) -> Floats:
    tokens = rows["prompt_tokens"].to_numpy(float)
    others = np.maximum(rows["calls"].to_numpy(float) - 1, 0)
    context = np.maximum(rows["kv_tokens"].to_numpy(float) - tokens, 0)
    return np.column_stack([np.ones(len(rows)), tokens, tokens**2, others, context])


def _decode_design(rows: pd.DataFrame) -> Floats:
    # A call reads, over its decode, its prompt and half its own answer on average.
    context = rows["kv_tokens"].to_numpy(float) + rows["output_tokens"].to_numpy(float) / 2
    return np.column_stack([np.ones(len(rows)), rows["calls"].to_numpy(float), context])


def call_design(calls: pd.DataFrame, step_tokens: float = 2048.0) -> tuple[Floats, Floats]:
    """Return what each call of one endpoint says about its six coefficients.

    Parameters
    ----------
    calls
        All calls of one endpoint over the trace, with ``sent_s``, ``first_token_s``,
        ``finish_s``, ``prompt_tokens``, ``cached_tokens`` and ``output_tokens``, none missing.
    step_tokens
        Token budget of one engine step.

    Returns
    -------
    design, shape (2 rows, 6), and seconds, shape (2 rows,): first the time to first token of each
    call, then its decode time; ``design @ (a, b, c, d, e, f)`` in seconds per coefficient unit
    (s, s/token, s/token^2, s, s/call, s/token). Decode rows of calls with a single output token
    are all zero with zero seconds: leave them out.

    Notes
    -----
    Only sending, first token and finish are observed, so the state in between is rebuilt from all
    calls. A decode of k steps among B calls with KV tokens takes ``k (d + e B + f KV)`` plus the
    prefills of the calls whose first token fell into it. A first token costs the call's own
    prefill, those that came between its sending and it, and, on a busy endpoint, its own steps
    and on average half a step under way; on an idle one the base cost a.
    """
    sent, first, finish = (
        calls[name].to_numpy(float) for name in ("sent_s", "first_token_s", "finish_s")
    )
    output = calls["output_tokens"].to_numpy(float)
    cached = calls["cached_tokens"].to_numpy(float)
    fresh = np.maximum(calls["prompt_tokens"].to_numpy(float) - cached, 1.0)
    square = fresh * (fresh + 2.0 * cached)
    context = calls["prompt_tokens"].to_numpy(float) + output / 2
    order = np.argsort(first, kind="stable")
    clock = first[order]

    def prefilled(values: Floats, start: Floats, end: Floats) -> Floats:
        """Sum of ``values`` over calls whose first token fell in (start, end]."""
        total = np.concatenate([[0.0], np.cumsum(values[order])])
        upto = np.searchsorted(clock, end, side="right")
        return np.asarray(total[upto] - total[np.searchsorted(clock, start, side="right")])

    decoding = _StepIntegral(first, finish)
    duration = finish - first
    span = np.where(duration > 0, duration, 1.0)
    others = decoding.between(np.ones(len(calls)), first, finish) / span
    kv = decoding.between(context, first, finish) / span
    steps = np.where(duration > 0, np.maximum(output - 1, 0), 0.0)
    zeros = np.zeros(len(calls))
    decode = np.column_stack(
        [
            zeros,
            np.where(steps > 0, prefilled(fresh, first, finish), 0.0),
            np.where(steps > 0, prefilled(square, first, finish), 0.0),
            steps,
            steps * others,
            steps * kv,
        ]
    )
    busy_calls = decoding.at(np.ones(len(calls)), sent)
    busy_kv = decoding.at(context, sent)
    busy = busy_calls > 0
    # Prefills that end in (sent, first], the call's own among them.
    queue_tokens = np.maximum(prefilled(fresh, sent, first), fresh)
    queue_square = np.maximum(prefilled(square, sent, first), square)
    passes = np.where(busy, 0.5 + np.ceil(queue_tokens / step_tokens), 0.0)
    prefill = np.column_stack(
        [
            np.where(busy, 0.0, 1.0),
            queue_tokens,
            queue_square,
            passes,
            passes * busy_calls,
            passes * busy_kv,
        ]
    )
    seconds = np.concatenate([first - sent, np.where(steps > 0, duration, 0.0)])
    return np.vstack([prefill, decode]), seconds


class _StepIntegral:
    """Sums over the intervals [start, end) of calls: at an instant, or integrated over a span."""

    def __init__(self, start: Floats, end: Floats) -> None:
        times = np.concatenate([start, end])
        self._order = np.argsort(times, kind="stable")
        self._times = times[self._order]
        self._sign = np.concatenate([np.ones(len(start)), -np.ones(len(end))])

    def _levels(self, values: Floats) -> Floats:
        change = (np.concatenate([values, values]) * self._sign)[self._order]
        return np.cumsum(change)

    def at(self, values: Floats, when: Floats) -> Floats:
        """Sum of ``values`` over the calls whose interval holds the instant (end excluded)."""
        position = np.searchsorted(self._times, when, side="right") - 1
        level = self._levels(values)[np.maximum(position, 0)]
        return np.asarray(np.where(position >= 0, level, 0.0))

    def between(self, values: Floats, start: Floats, end: Floats) -> Floats:
        """Integral of that sum from ``start`` to ``end``."""
        level = self._levels(values)
        area = np.concatenate([[0.0], np.cumsum(level[:-1] * np.diff(self._times))])

        def upto(when: Floats) -> Floats:
            position = np.clip(
                np.searchsorted(self._times, when, side="right") - 1, 0, len(area) - 1
            )
            return np.asarray(area[position] + level[position] * (when - self._times[position]))

        return np.asarray(upto(end) - upto(start))


_UNITS = (1e-3, 1e-6, 1e-9, 1e-3, 1e-6, 1e-9)
"""Seconds per unit of a to f as a latency row writes them (ms, us, ns, ms, us, ns)."""


def row_seconds(row: LatencyRow) -> Floats:
    """Return a to f of a row in seconds, scale included, shape (6,): the unit of `call_design`."""
    return np.asarray(np.array(astuple(row)[:6]) * np.array(_UNITS) * row.scale)


def fit_row(
    design: Floats, seconds: Floats, prior: LatencyRow, strength: float = 5.0
) -> LatencyRow:
    """Return the latency row learned from `call_design` rows, anchored on a prior row.

    Parameters
    ----------
    design, seconds
        Rows of `call_design`; those with zero seconds are ignored.
    prior
        The endpoint's row before learning (its fleet file's).
    strength
        Weight of the prior per coefficient, in observations.

    Returns
    -------
    A row with scale 1; the prior itself if there is no usable observation.
    """
    usable = seconds > 0
    if not usable.any():
        return prior
    anchor = row_seconds(prior)
    model = RelativeNonNegativeRegressor(prior=tuple(map(float, anchor)), strength=strength)
    coefficients = model.fit(design[usable], seconds[usable]).coef_ / np.array(_UNITS)
    names = (
        "prefill_base_ms", "prefill_us_per_token", "prefill_ns_per_token_sq", "decode_base_ms",
        "decode_us_per_call", "decode_ns_per_kv_token",
    )  # fmt: skip
    found = dict(zip(names, map(float, coefficients), strict=True))
    # A step that reads the weights for nothing is not physics, however the fit came out.
    found["decode_base_ms"] = max(found["decode_base_ms"], 0.02 * anchor[3] / _UNITS[3])
    return LatencyRow(**found)
