"""What a policy of the literature brings along for the engines: retention and eviction.

A policy of `planner.dispatch` answers where a call goes. Some papers' policies also say what
becomes of a run's KV while its tools run, and which blocks go first. That part lives here, since
only the simulator's engines can be told; it shares what its policy has learned, and no more.

* Astraea: preserve, drop or swap, whichever wastes least memory-time (`AdaptiveKv`).
* SAGA: pins of the tool's 95th percentile (`ToolTtl`), workflow-aware LRU (`WaLru`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from planner.dispatch.policies import Policy
from planner.dispatch.policies.astraea import Astraea
from planner.dispatch.policies.saga import Saga
from planner.sim.blockpool import Eviction
from planner.sim.retention import Fate, Idle, Retention

__all__ = ["AdaptiveKv", "Companions", "ToolTtl", "WaLru", "companions_of"]

_MOST_TTL_S = 300.0
_LEAST_TTL_S = 1e-3
_COLD_TTL_S = 4.5
"""SAGA's 95th percentile of a web tool before any was seen, s."""
_PRESERVE = Fate(action="pin", ttl_s=_MOST_TTL_S, again=True)
_SOFT, _HARD = 0.7, 0.9
_MEAN_WEIGHT = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """The engines' part of a policy; None leaves it to the experiment."""

    retention: Retention | None = None
    eviction: Callable[[], Eviction] | None = None


def companions_of(policy: Policy) -> Companions:
    """Return what a policy brings along; nothing for most."""
    if isinstance(policy, Astraea) and policy.adaptive_kv:
        return Companions(retention=AdaptiveKv(policy))
    if isinstance(policy, Saga):
        order = WaLru(policy)
        return Companions(
            retention=ToolTtl(policy) if policy.ttl else None,
            eviction=(lambda: order) if policy.wa_lru else None,
        )
    return Companions()


class AdaptiveKv:
    """Astraea's KV manager: the least waste of memory over time while a tool runs.

    Below the watermark KV is always preserved. Above it, with T the mean gap after the call's
    site, C the run's context and B that of the other calls on the endpoint,

        preserve: T C      drop: T_recompute B      swap: 2 T_swap B

    the least decides. T_recompute is a prefill of C tokens, T_swap their way over PCIe.

    Parameters
    ----------
    policy
        Has seen the gaps, and the endpoints' loads.

    References
    ----------
    Astraea (arXiv 2512.14142), section 4.4, after InferCept (arXiv 2402.01869). The gap's category
    is the call site.
    """

    def __init__(self, policy: Astraea) -> None:
        self._policy = policy

    def decide(self, idle: Idle) -> Fate:
        """Return what to do with the KV of a run that now waits."""
        gap_s = self._policy.gaps.mean_s(idle.call)
        fleet = self._policy.fleet
        if idle.kv_usage < self._policy.watermark or gap_s is None or fleet is None:
            return _PRESERVE
        state = fleet.states[idle.endpoint]
        endpoint, own = state.endpoint, float(idle.context_tokens)
        others = state.context_tokens
        waste = {"pin": gap_s * own, "drop": state.latency.prefill_s(own) * others}
        if endpoint.kv_bytes_per_token is not None:
            swap_s = own * endpoint.kv_bytes_per_token / (endpoint.pcie_gb_s * 1e9 * endpoint.tp)
            waste["offload"] = 2.0 * swap_s * others
        least = min(waste, key=lambda action: waste[action])
        if least == "pin":
            return _PRESERVE
        return Fate(action="drop" if least == "drop" else "offload")


class ToolTtl:
    """SAGA's time to live: KV is pinned for the tool's 95th percentile, less under pressure.

    ``min(P95 (1 - m / 2), 300 s)`` with the pressure m rising from 0 at 70 % of KV in use to 1 at
    90 %. A run whose graph says that nothing follows is left to the cache.

    Parameters
    ----------
    policy
        Has the graphs and the gaps.

    References
    ----------
    SAGA (arXiv 2605.00528), tool-call-aware TTL. The tool's type is the call site it follows.
    """

    def __init__(self, policy: Saga) -> None:
        self._policy = policy

    def decide(self, idle: Idle) -> Fate:
        """Return what to do with the KV of a run that now waits."""
        graph = self._policy.graph(idle.call.workflow_hash)
        if graph is None or graph.goes_on(idle.call.site) <= 0.0:
            return Fate()
        tool_s = self._policy.gaps.quantile_s(idle.call, 0.95)
        pressure = min(max((idle.kv_usage - _SOFT) / (_HARD - _SOFT), 0.0), 1.0)
        ttl_s = (_COLD_TTL_S if tool_s is None else tool_s) * (1.0 - 0.5 * pressure)
        return Fate(action="pin", ttl_s=min(max(ttl_s, _LEAST_TTL_S), _MOST_TTL_S))


class WaLru:
    """SAGA's workflow-aware LRU: age, reuse and size, weighted; the largest goes first.

    ``a R + b (1 - P_reuse) + g S`` with a = 0.3, b = 0.5, g = 0.2. R is the age over the longest
    age, S the session's size over the largest.

    Parameters
    ----------
    policy
        Knows the sessions, their sites and their graphs.

    Notes
    -----
    Deviations: entries are blocks, not whole sessions, and rank when they become idle, so ages
    are measured against SAGA's longest TTL (300 s) instead of the longest age of the moment.
    Blocks of several runs (system prompts) count as sure to be reused, blocks of an answer, which
    nobody owns until the next prompt holds them, as the mean of those ranked lately.

    References
    ----------
    SAGA (arXiv 2605.00528), workflow-aware LRU, with the artifact's weights.
    """

    age, reuse, size = 0.3, 0.5, 0.2
    reads_uses = False

    def __init__(self, policy: Saga) -> None:
        self._policy = policy
        self._mean = 0.0

    def ranks(self, contents: Sequence[int], uses: Mapping[int, int]) -> Sequence[float]:  # noqa: ARG002 - the policy knows better
        """Return minus the eviction score, up to what is the same for all at one instant."""
        mean, age = self._mean, self.age * self._policy.now_s / _MOST_TTL_S
        found: list[float] = []
        for held in self._policy.held_by(contents):
            if held is None:
                score = mean
            else:
                reuse, size = held
                score = self.reuse * (1.0 - reuse) + self.size * size
                mean += _MEAN_WEIGHT * (score - mean)
            found.append(age - score)
        self._mean = mean
        return found
