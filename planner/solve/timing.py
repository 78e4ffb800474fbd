"""Run latency as longest paths over sums: what the model and the heuristic evaluate.

A task with one predecessor starts when that one finishes, so serial parts of a run collapse into
sums; only where paths meet is a maximum needed. A *chain* is such a sum: it starts at a *join*
(or at the arrival of the run) and ends where its paths meet again or the run ends,

    end = start of its join + fixed + sum over k of ticks[k, option of k, level of its endpoint]
          + cold[k, option] where its prefix, + lost[k, option] where its sessions are not kept.

Visits of one site on a chain add up, since they share an option. All classes share the chains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.solve.arrays import Bools, Ints
from planner.solve.question import Instance

__all__ = ["Timing", "build_timing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """All chains of all scenarios.

    Parameters
    ----------
    ticks
        Service ticks by chain, site, option and level, all prefixes and sessions kept; shape
        (C, K, M, L).
    cold, lost
        Extra ticks without the site's prefix, without its sessions; shape (C, K, M).
    option_endpoint
        Endpoint whose level counts; shape (M,).
    weight
        Weight of each scenario in the mean; shape (S,).
    fixed
        Delay ticks by chain; shape (C,).
    base
        Join a chain starts at, -1 for the arrival of the run; shape (C,).
    joins
        Chains that end at each join; joins that come first in a run have smaller positions.
    ends
        The chain that ends each scenario; shape (S,).
    """

    ticks: Ints
    cold: Ints
    lost: Ints
    option_endpoint: Ints
    weight: Ints
    fixed: Ints
    base: Ints
    joins: tuple[tuple[int, ...], ...]
    ends: Ints

    def sums(self, placements: Ints, levels: Ints) -> Ints:
        """Return the chain sums of placements, everything kept, in ticks.

        Parameters
        ----------
        placements
            Option of each site; shape (n, K).
        levels
            Level position of each endpoint; shape (n, I).

        Returns
        -------
        Shape (n, C).
        """
        sites = np.arange(placements.shape[1])
        chosen = np.take_along_axis(levels, self.option_endpoint[placements], axis=1)
        return np.asarray(self.ticks[:, sites, placements, chosen].sum(axis=2).T)

    def extras(self, placements: Ints, warm: Bools, keep: Bools) -> Ints:
        """Return what chains take longer for prefixes and sessions not kept: (n, K) to (n, C)."""
        sites = np.arange(placements.shape[1])
        cold = np.where(warm, 0, self.cold[:, sites, placements])
        lost = np.where(keep, 0, self.lost[:, sites, placements])
        return np.asarray((cold + lost).sum(axis=2).T)

    def totals(self, placements: Ints, levels: Ints) -> Ints:
        """Return weighted sums of latencies of placements (n, K) at levels (n, I); shape (n,)."""
        return self.latency(self.sums(placements, levels))

    def join_starts(self, sums: Ints) -> Ints:
        """Return the start of each join for chain sums of shape (n, C); shape (n, joins + 1).

        The last column is 0: where chains with base -1 start.
        """
        starts = np.zeros((sums.shape[0], len(self.joins) + 1), dtype=np.int64)
        for j, chains in enumerate(self.joins):
            members = list(chains)
            reach = starts[:, self.base[members]] + sums[:, members] + self.fixed[members]
            starts[:, j] = reach.max(axis=1)
        return starts

    def latencies(self, sums: Ints) -> Ints:
        """Return the latency of each scenario in ticks for chain sums (n, C); shape (n, S)."""
        starts = self.join_starts(sums)
        return np.asarray(
            starts[:, self.base[self.ends]] + sums[:, self.ends] + self.fixed[self.ends]
        )

    def latency(self, sums: Ints) -> Ints:
        """Return weighted sums of the scenarios' latencies for chain sums (n, C); shape (n,)."""
        return np.asarray(self.latencies(sums) @ self.weight, dtype=np.int64)


def build_timing(instance: Instance) -> Timing:
    """Collapse the tasks of an instance into chains and joins."""
    builder = _Builder(instance)
    finish: list[_Open] = []
    sinks: list[set[int]] = [set() for _ in range(instance.scenarios)]
    for t, site in enumerate(instance.task_site):
        preds = instance.task_preds[t]
        start = builder.meet([finish[pred] for pred in preds])
        ticks = start.ticks.copy()
        if site >= 0:
            ticks[site, :, :-2] += instance.service_ticks[t]
            ticks[site, :, -2] += instance.memory.cold_ticks[t]
            ticks[site, :, -1] += instance.memory.lost_ticks[t]
        finish.append(_Open(start.base, start.fixed + int(instance.delay_ticks[t]), ticks))
        scenario = sinks[instance.task_scenario[t]]
        scenario.difference_update(preds)
        scenario.add(t)
    ends = [builder.close(builder.meet([finish[t] for t in sorted(last)])) for last in sinks]
    planes = np.stack([chain.ticks for chain in builder.chains])
    return Timing(
        ticks=np.ascontiguousarray(planes[..., :-2]),
        cold=np.ascontiguousarray(planes[..., -2]),
        lost=np.ascontiguousarray(planes[..., -1]),
        option_endpoint=instance.option_endpoint,
        weight=instance.scenario_weight,
        fixed=np.array([chain.fixed for chain in builder.chains], dtype=np.int64),
        base=np.array([chain.base for chain in builder.chains], dtype=np.int64),
        joins=tuple(builder.joins),
        ends=np.array(ends, dtype=np.int64),
    )


@dataclass(frozen=True, slots=True)
class _Open:
    """A chain that may still grow; its last two planes of ticks are the extras."""

    base: int
    fixed: int
    ticks: Ints

    def dominates(self, other: _Open) -> bool:
        """Whether this chain never ends before the other."""
        return (
            self.base == other.base
            and self.fixed >= other.fixed
            and bool((self.ticks >= other.ticks).all())
        )


class _Builder:
    def __init__(self, instance: Instance) -> None:
        sites, options, depth = instance.work_s.shape
        self._zero = np.zeros((sites, options, depth + 2), dtype=np.int64)
        self.chains: list[_Open] = []
        self.joins: list[tuple[int, ...]] = []

    def close(self, chain: _Open) -> int:
        """Keep a finished chain; return its position."""
        self.chains.append(chain)
        return len(self.chains) - 1

    def meet(self, arriving: list[_Open]) -> _Open:
        """Return the chain that starts when all of the arriving ones have ended."""
        kept: list[_Open] = []
        for chain in arriving:
            if any(other.dominates(chain) for other in kept):
                continue
            kept = [other for other in kept if not chain.dominates(other)]
            kept.append(chain)
        if not kept:
            return _Open(-1, 0, self._zero)
        if len(kept) == 1:
            return kept[0]
        self.joins.append(tuple(self.close(chain) for chain in kept))
        return _Open(len(self.joins) - 1, 0, self._zero)
