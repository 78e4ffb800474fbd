"""Prefix affinity as Ray Serve LLM does it: go where the prompt's beginning was seen."""

from __future__ import annotations

import math

from planner.dispatch.policies.base import Choice, Ready
from planner.dispatch.policies.classic import PowerOfTwo

__all__ = ["PrefixAffinity"]


class PrefixAffinity:
    """Ray's PrefixCacheAffinityRouter.

    If the gap between the longest and shortest queue exceeds the threshold, two choices; else, if
    the best match covers at least ``match_rate_threshold`` of the prompt, the least loaded of the
    best matching endpoints; else the endpoint that holds least cached text.

    Parameters
    ----------
    imbalanced_threshold
        Calls in flight, >= 0. Ray's default since 2.5x is infinity (never fall back); tuned
        values are far better.
    match_rate_threshold
        Share of the prompt, [0, 1].
    seed
        Of the fallback's random stream.
    """

    name = "prefix_affinity"

    def __init__(
        self,
        *,
        imbalanced_threshold: float = math.inf,
        match_rate_threshold: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.imbalanced_threshold = imbalanced_threshold
        self.match_rate_threshold = match_rate_threshold
        self._fallback = PowerOfTwo(seed=seed)

    def choose(self, ready: Ready) -> Choice:
        """Return the choice by Ray's rule."""
        candidates = ready.candidates
        prefix = ready.call.prefix
        loads = [state.in_flight for state in candidates]
        if max(loads) - min(loads) > self.imbalanced_threshold:
            return self._fallback.choose(ready)
        matches = [state.prefix.match(prefix) for state in candidates]
        best = max(matches)
        rate = best / len(prefix) if prefix else 0.0
        if best and rate >= self.match_rate_threshold:
            tied = [
                state for state, match in zip(candidates, matches, strict=True) if match == best
            ]
            return Choice(
                min(tied, key=lambda state: (state.in_flight, state.index)).index, "prefix"
            )
        smallest = min(candidates, key=lambda state: (state.prefix.held_tokens, state.index))
        return Choice(smallest.index, "least_cached")
