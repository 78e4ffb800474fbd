"""Run latency as longest paths over sums: what the model and the heuristic evaluate.

A task with one predecessor starts when that one finishes, so serial parts of a run collapse into
sums; only where paths meet is a maximum needed. A *chain* is such a sum: it starts at a *join*
(or at the arrival of the run) and ends where its paths meet again or the run ends,

    end = start of its join + fixed + sum over k of ticks[k, endpoint of k, level of endpoint].

Visits of one site on a chain add up, since they share an endpoint. All classes share the chains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.solve.instance import Instance, Ints

__all__ = ["Timing", "build_timing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """All chains of all scenarios.

    Parameters
    ----------
    ticks
        Service ticks by chain, site, endpoint and level; shape (C, K, I, L).
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
    fixed: Ints
    base: Ints
    joins: tuple[tuple[int, ...], ...]
    ends: Ints

    def totals(self, placements: Ints, levels: Ints) -> Ints:
        """Return the run latencies of placements, summed over the scenarios, in ticks.

        Parameters
        ----------
        placements
            Endpoint of each site; shape (n, K).
        levels
            Level position of each endpoint; shape (n, I).

        Returns
        -------
        Shape (n,).
        """
        sites = np.arange(placements.shape[1])
        chosen = np.take_along_axis(levels, placements, axis=1)
        return self.latency(self.ticks[:, sites, placements, chosen].sum(axis=2).T)

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

    def latency(self, sums: Ints) -> Ints:
        """Return run latencies summed over the scenarios for chain sums (n, C); shape (n,)."""
        starts = self.join_starts(sums)
        ends = starts[:, self.base[self.ends]] + sums[:, self.ends] + self.fixed[self.ends]
        return np.asarray(ends.sum(axis=1), dtype=np.int64)


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
            ticks[site] += instance.service_ticks[t]
        finish.append(_Open(start.base, start.fixed + int(instance.delay_ticks[t]), ticks))
        scenario = sinks[instance.task_scenario[t]]
        scenario.difference_update(preds)
        scenario.add(t)
    ends = [builder.close(builder.meet([finish[t] for t in sorted(last)])) for last in sinks]
    return Timing(
        ticks=np.stack([chain.ticks for chain in builder.chains]),
        fixed=np.array([chain.fixed for chain in builder.chains], dtype=np.int64),
        base=np.array([chain.base for chain in builder.chains], dtype=np.int64),
        joins=tuple(builder.joins),
        ends=np.array(ends, dtype=np.int64),
    )


@dataclass(frozen=True, slots=True)
class _Open:
    """A chain that may still grow."""

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
        self._zero = np.zeros(instance.work_s.shape, dtype=np.int64)
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
