"""Output length of a call: quantiles from site, history and prompt; and per call site, frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from models.features import LENGTH, length_features
from models.predictor import StepQuantilePredictor
from models.quantiles import shrink
from planner.domain.estimates import LEVELS, PRIOR_OUTPUT, Quantiles

__all__ = ["output_length_predictor", "shrunk_quantiles", "site_output_tokens"]


def output_length_predictor(*, constant: bool = False, seed: int = 0) -> StepQuantilePredictor:
    """Return the (unfitted) predictor of output tokens at dispatch.

    Cold starts fall back from (system, site, last action, last command words, site before) one by
    one to all calls of the source.
    """
    return StepQuantilePredictor(
        target="output_tokens",
        features=length_features,
        schema=LENGTH,
        groups=("kind", "site", "last_action", "last_words", "last_site"),
        constant=constant,
        seed=seed,
    )


def shrunk_quantiles(sample: Sequence[float], prior: Quantiles, strength: float) -> Quantiles:
    """Return quantiles of a sample pulled towards a prior, in logarithms.

    Parameters
    ----------
    sample
        Values >= 0; an empty sample gives the prior itself.
    prior
        The distribution to pull towards.
    strength
        Its weight in observations.
    """
    values = np.asarray(sample, dtype=float)
    if values.size == 0:
        return prior
    logs = shrink(np.log1p(values), np.log1p(prior.values), strength, LEVELS)
    quantiles = np.maximum.accumulate(np.maximum(np.expm1(logs), 0.0))
    mean = (values.sum() + strength * prior.mean) / (values.size + strength)
    return Quantiles(
        values=tuple(map(float, quantiles)),
        mean=float(mean),
        count=int(values.size),
        provenance="learned",
    )


def site_output_tokens(
    samples: Mapping[str, Sequence[float]], strength: float = 5.0
) -> tuple[dict[str, Quantiles], Quantiles]:
    """Return output-token quantiles per call site, and those of all sites together.

    Sites are pulled towards all calls, and all calls towards the public prior
    (`planner.domain.estimates.PRIOR_OUTPUT`), so that a site seen twice is not taken at its word.
    """
    pooled = shrunk_quantiles(
        [value for name in sorted(samples) for value in samples[name]], PRIOR_OUTPUT, strength
    )
    return {
        site: shrunk_quantiles(values, pooled, strength) for site, values in samples.items()
    }, pooled
