"""Arrivals of a service: rate, burstiness, and lengths by prompt size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from planner.domain.estimates import Quantiles

__all__ = ["ArrivalModel"]

PROMPT_BUCKETS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalModel:
    """A renewal process with a rate and a spread, and the lengths that come with it.

    Parameters
    ----------
    rate_per_s
        Mean arrivals a second.
    gap_cv
        Coefficient of variation of the gaps (1 for a Poisson process, more for bursts).
    minute_index
        Variance over mean of the arrivals in a minute (1 for a Poisson process).
    prompt_tokens
        Quantiles of the prompt length.
    output_by_prompt
        (upper edge of prompt tokens, output quantiles) per fifth of the prompts, in order.
    """

    rate_per_s: float
    gap_cv: float
    minute_index: float
    prompt_tokens: Quantiles
    output_by_prompt: tuple[tuple[float, Quantiles], ...]

    @classmethod
    def fit(cls, rows: pd.DataFrame) -> ArrivalModel:
        """Fit on ``time_s`` (sorted, not all equal), ``prompt_tokens`` and ``output_tokens``."""
        times = rows["time_s"].to_numpy(float)
        gaps = np.diff(times)
        minutes = np.bincount(((times - times[0]) // 60).astype(int))[:-1]
        edges = np.unique(rows["prompt_tokens"].quantile(np.arange(1, PROMPT_BUCKETS + 1) / 5))
        bucket = np.searchsorted(edges, rows["prompt_tokens"])
        output = rows["output_tokens"].to_numpy(float)
        return cls(
            rate_per_s=float(len(gaps) / (times[-1] - times[0])),
            gap_cv=float(gaps.std() / gaps.mean()),
            minute_index=float(minutes.var() / minutes.mean()) if len(minutes) > 1 else 1.0,
            prompt_tokens=Quantiles.from_samples(rows["prompt_tokens"]),
            output_by_prompt=tuple(
                (float(edge), Quantiles.from_samples(output[bucket == position]))
                for position, edge in enumerate(edges)
                if (bucket == position).any()
            ),
        )
