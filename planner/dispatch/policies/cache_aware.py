"""Cache-aware routing as SGLang's gateway and its successor do it, and the expected wait.

Deviations common to all three: the prefix index holds what fits the endpoint's KV cache, token
blocks under LRU, where the gateways keep a radix tree of characters that is trimmed every minute;
loads are the router's own counters and never stale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from planner.dispatch.policies.base import Choice, Ready, least
from planner.dispatch.view import EndpointState

__all__ = ["CacheAware", "CacheAwareSmg", "ExpectedWait", "expected_wait_s"]

_KV_WEIGHT_S = 0.15
_MOST_KV = 0.999


def expected_wait_s(state: EndpointState) -> float:
    """Return Shepherd's load score of an endpoint, s.

    ``queued_tokens / throughput + 0.15 k / (1 - k)`` with k the share of KV in use, at most 0.999.
    Queued tokens are the prompt tokens sent and not yet computed; the throughput is that of the
    endpoint's latency row, where Shepherd takes the worker's report or 2000 tokens/s.
    """
    used = min(state.context_tokens / state.endpoint.kv_tokens, _MOST_KV)
    queued_s = state.latency.prefill_marginal_s(state.prefill_tokens)
    return queued_s + _KV_WEIGHT_S * used / (1.0 - used)


class ExpectedWait:
    """The endpoint with the least expected wait, whatever the call.

    References
    ----------
    Shepherd Model Gateway 1.13 (smg-project/smg), policy ``least_load``.
    """

    name = "expected_wait"

    def choose(self, ready: Ready) -> Choice:
        """Return the candidate of the least score; the first one wins ties."""
        position = least([expected_wait_s(state) for state in ready.candidates])
        return Choice(ready.candidates[position].index, "wait")


def _best_match(ready: Ready) -> tuple[EndpointState, float]:
    """Return the candidate that holds most of the prompt, and which share of it that is."""
    prefix = ready.call.prefix
    matches = [state.prefix.match(prefix) for state in ready.candidates]
    best = max(matches)
    return ready.candidates[matches.index(best)], best / len(prefix) if prefix else 0.0


def _shortest(candidates: Sequence[EndpointState]) -> EndpointState:
    return candidates[least([float(state.in_flight) for state in candidates])]


class CacheAware:
    """SGLang's rule: shortest queue if loads are unbalanced, else the best match, else least load.

    Parameters
    ----------
    cache_threshold
        Share of the prompt above which a match counts, [0, 1].
    balance_abs_threshold, balance_rel_threshold
        Loads are unbalanced if the largest exceeds the smallest by more than the first, calls in
        flight, and by more than the second as a factor.

    References
    ----------
    sgl-project/sglang, sglang-router 0.3.2, policy ``cache_aware`` with its defaults.
    """

    name = "cache_aware"

    def __init__(
        self,
        *,
        cache_threshold: float = 0.3,
        balance_abs_threshold: float = 64,
        balance_rel_threshold: float = 1.5,
    ) -> None:
        self.cache_threshold = cache_threshold
        self.balance_abs_threshold = balance_abs_threshold
        self.balance_rel_threshold = balance_rel_threshold

    def choose(self, ready: Ready) -> Choice:
        """Return the choice by SGLang's rule."""
        loads = [state.in_flight for state in ready.candidates]
        most, fewest = max(loads), min(loads)
        if (
            most - fewest > self.balance_abs_threshold
            and most > self.balance_rel_threshold * fewest
        ):
            return Choice(_shortest(ready.candidates).index, "unbalanced")
        state, share = _best_match(ready)
        if share > self.cache_threshold:
            return Choice(state.index, "prefix")
        return Choice(_shortest(ready.candidates).index, "load")


class CacheAwareSmg:
    """Shepherd's rule: the best match unless it is far above the mean load, else expected wait.

    Parameters
    ----------
    cache_threshold
        Share of the prompt above which a match counts, [0, 1].
    least_gap, most_gap
        A matched endpoint is overloaded if its load exceeds the mean by two standard deviations
        (at least ``least_gap``, at most ``most_gap`` calls in flight) and is over 1.5 times it.

    References
    ----------
    Shepherd Model Gateway 1.13 (smg-project/smg), policy ``cache_aware`` with its defaults.
    """

    name = "cache_aware_smg"

    def __init__(
        self, *, cache_threshold: float = 0.3, least_gap: float = 4, most_gap: float = 64
    ) -> None:
        self.cache_threshold = cache_threshold
        self.least_gap = least_gap
        self.most_gap = most_gap

    def choose(self, ready: Ready) -> Choice:
        """Return the choice by Shepherd's rule."""
        candidates = ready.candidates
        state, share = _best_match(ready)
        if share > self.cache_threshold:
            loads = [one.in_flight for one in candidates]
            mean = sum(loads) / len(loads)
            spread = math.sqrt(sum((load - mean) ** 2 for load in loads) / len(loads))
            gap = min(self.most_gap, max(self.least_gap, 2.0 * spread))
            if not (state.in_flight > mean + gap and state.in_flight > 1.5 * mean):
                return Choice(state.index, "prefix")
        position = least([expected_wait_s(one) for one in candidates])
        return Choice(candidates[position].index, "wait")
