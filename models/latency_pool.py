"""Latency of many configurations at once: physics for each, and one correction that all share.

The physics of a configuration (`models.endpoint_latency.LatencyPredictor`) is right on average and
blind to what its formula leaves out (how prefills and decodes alternate, how full batches queue).
What it leaves out is much alike on all configurations of one server software, so trees learn the
ratio of observed to physical time from all of them. A new configuration gets its physics from a
few requests and the ratio from the others: trees never see seconds, only ratios, so nothing has
to carry over but the shape.

What is known when a request is sent
------------------------------------
Its prompt; calls in flight and their prompt tokens; and of the requests of the same run that have
ended by then: how far physics was off (separately for answers of one token) and how many calls
were in flight. The output length is given, as the bar says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.ensemble import HistGradientBoostingRegressor
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from models.endpoint_latency import LatencyPredictor

__all__ = ["ADAPTATION_REQUESTS", "LatencyPool"]

Floats = npt.NDArray[np.float64]

ADAPTATION_REQUESTS = 50
"""Requests after which a new configuration is forecast with its own physics."""
_MEMORY = 20.0
"""Requests (by half-life) that the running means of a run remember."""
_PRIOR_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class _Forest:
    """Trees that give log(observed / physics), averaged over a few seeds."""

    trees: tuple[HistGradientBoostingRegressor, ...]

    @classmethod
    def fit(cls, inputs: Floats, target: Floats, seed: int, **size: Any) -> _Forest:
        # Absolute error: the median of a relative error is what the forecast is judged by.
        with threadpool_limits(limits=1, user_api="openmp"):
            return cls(
                tuple(
                    HistGradientBoostingRegressor(
                        loss="absolute_error",
                        early_stopping=False,
                        max_features=0.5,
                        random_state=seed + number,
                        **size,
                    ).fit(inputs, target)
                    for number in range(3)
                )
            )

    def predict(self, inputs: Floats) -> Floats:
        with threadpool_limits(limits=1, user_api="openmp"):
            return np.asarray(np.mean([one.predict(inputs) for one in self.trees], axis=0))


class LatencyPool:
    """Seconds to the last token on any of several configurations, output length given.

    Parameters
    ----------
    seed
        Seed of the trees.
    known
        False leaves out the trees for known configurations (most of the work), where only new
        ones will be asked for.

    Attributes
    ----------
    physics_ : dict of str to LatencyPredictor
        By configuration.
    prior_ : LatencyPredictor
        The median configuration: what a new one is anchored on.
    """

    def __init__(self, seed: int = 0, *, known: bool = True) -> None:
        self.seed = seed
        self.known = known

    def fit(self, rows: pd.DataFrame, history: pd.DataFrame | None = None) -> Self:
        """Fit on rows with `models.endpoint_latency.REQUEST_COLUMNS`, ``run`` and ``sent_s``.

        ``history`` adds rows that are only looked back on (all of a run, where ``rows`` is a
        part of it).
        """
        known = rows if history is None else history
        self.physics_ = {
            str(name): LatencyPredictor.fit(part) for name, part in rows.groupby("config")
        }
        coefficients = np.array([[*one.prefill, *one.decode] for one in self.physics_.values()])
        middle = np.median(coefficients, axis=0)
        self.prior_ = LatencyPredictor(tuple(middle[:5]), tuple(middle[5:]))
        self.codes_ = {name: float(code) for code, name in enumerate(sorted(self.physics_))}
        self.known_ = self._fit_known(rows, known) if self.known else None
        self.general_ = self._fit_general(rows)
        return self

    def _fit_known(self, rows: pd.DataFrame, history: pd.DataFrame) -> _Forest:
        inputs, physical = self._known_inputs(history)
        chosen = history.index.get_indexer(rows.index)
        observed = (rows["ttft_s"] + rows["decode_s"]).to_numpy(float)
        return _Forest.fit(
            inputs[chosen],
            np.log(observed / physical[chosen]),
            self.seed,
            max_iter=400,
            learning_rate=0.08,
            max_leaf_nodes=127,
            min_samples_leaf=8,
            categorical_features=[0],
        )

    def _fit_general(self, rows: pd.DataFrame) -> _Forest | None:
        """Train on every configuration as if it were new: the trees see what they will see."""
        inputs, target = [], []
        for _, part in rows.groupby("config"):
            ordered = part.sort_values("sent_s", kind="stable")
            first, later = ordered[:ADAPTATION_REQUESTS], ordered[ADAPTATION_REQUESTS:]
            if later.empty:
                continue
            physics = LatencyPredictor.fit(first, prior=self.prior_)
            inputs.append(_new_inputs(physics, first, later))
            observed = (later["ttft_s"] + later["decode_s"]).to_numpy(float)
            target.append(np.log(observed / physics.total_s(later)))
        if not inputs:
            return None
        return _Forest.fit(
            np.concatenate(inputs),
            np.concatenate(target),
            self.seed,
            max_iter=200,
            learning_rate=0.08,
            max_leaf_nodes=31,
            min_samples_leaf=30,
        )

    def total_s(self, rows: pd.DataFrame, history: pd.DataFrame | None = None) -> Floats:
        """Return seconds to the last token of rows of known configurations, shape (rows,).

        ``history`` holds the runs the rows belong to; only requests that ended before a row was
        sent are looked at.
        """
        known = rows if history is None else history
        inputs, physical = self._known_inputs(known)
        chosen = known.index.get_indexer(rows.index)
        if self.known_ is None:
            return np.asarray(physical[chosen])
        return np.asarray(physical[chosen] * np.exp(self.known_.predict(inputs[chosen])))

    def adapted_s(self, first: pd.DataFrame, rows: pd.DataFrame) -> Floats:
        """Return seconds to the last token on a configuration known from ``first`` alone.

        Parameters
        ----------
        first
            Its requests so far, with their times; `ADAPTATION_REQUESTS` are enough.
        rows
            Requests to forecast, of the same configuration.
        """
        physics = LatencyPredictor.fit(first, prior=self.prior_)
        total = physics.total_s(rows)
        if self.general_ is None:
            return total
        return np.asarray(total * np.exp(self.general_.predict(_new_inputs(physics, first, rows))))

    def _known_inputs(self, rows: pd.DataFrame) -> tuple[Floats, Floats]:
        physical = np.empty(len(rows))
        position = pd.Series(np.arange(len(rows)), index=rows.index)
        for name, part in rows.groupby("config"):
            physical[position[part.index]] = self.physics_[str(name)].total_s(part)
        observed = (rows["ttft_s"] + rows["decode_s"]).to_numpy(float)
        backward = _look_back(rows, np.log(observed / physical))
        state = [
            rows["config"].map(self.codes_).to_numpy(float),
            rows["prompt_tokens"].to_numpy(float),
            rows["calls"].to_numpy(float),
            rows["kv_tokens"].to_numpy(float),
            rows["output_tokens"].to_numpy(float),
            np.log(physical),
        ]
        return np.column_stack([*state, backward]), physical


def _look_back(rows: pd.DataFrame, error: Floats) -> Floats:
    """Return what ended requests of the same run say, shape (rows, 5).

    Mean log error of physics over all, over answers of one token, over longer ones (each pulled
    to zero), the number of them, and the mean calls in flight of those sent before.
    """
    out = np.zeros((len(rows), 5))
    sent = rows["sent_s"].to_numpy(float)
    end = sent + (rows["ttft_s"] + rows["decode_s"]).to_numpy(float)
    single = rows["output_tokens"].to_numpy(float) <= 1
    calls = rows["calls"].to_numpy(float)
    decay = 0.5 ** (1.0 / _MEMORY)
    for index in rows.groupby("run").indices.values():
        places = np.asarray(index)
        by_end = places[np.argsort(end[places], kind="stable")]
        by_sent = places[np.argsort(sent[places], kind="stable")]
        sums, weights = np.zeros(3), np.zeros(3)
        done, level = 0, calls[by_sent[0]]
        for place in by_sent:
            while done < len(by_end) and end[by_end[done]] < sent[place]:
                ended = by_end[done]
                kind = 1 if single[ended] else 2
                for slot in (0, kind):
                    sums[slot] = decay * sums[slot] + error[ended]
                    weights[slot] = decay * weights[slot] + 1.0
                done += 1
            out[place, :3] = sums / (weights + 1.0)
            out[place, 3] = done
            out[place, 4] = level
            level = decay * level + (1 - decay) * calls[place]
    return out


def _new_inputs(physics: LatencyPredictor, first: pd.DataFrame, rows: pd.DataFrame) -> Floats:
    observed = (first["ttft_s"] + first["decode_s"]).to_numpy(float)
    error = np.log(observed / physics.total_s(first))
    single = first["output_tokens"].to_numpy(float) <= 1
    means = [float(error[mask].sum() / (mask.sum() + _PRIOR_ERRORS)) for mask in (single, ~single)]
    total = physics.total_s(rows)
    calls = rows["calls"].to_numpy(float)
    prompt = rows["prompt_tokens"].to_numpy(float)
    return np.column_stack(
        [
            rows["output_tokens"].to_numpy(float),
            prompt,
            calls,
            (rows["kv_tokens"].to_numpy(float) - prompt) / np.maximum(calls - 1.0, 1.0),
            physics.ttft_s(rows) / total,
            np.log(total),
            np.tile(means, (len(rows), 1)),
        ]
    )
