"""Run latency as longest paths over sums: what the model and the heuristic evaluate.

A task with one predecessor starts when that one finishes, so serial parts of a run collapse into
sums; only where paths meet is a maximum needed. A *chain* is such a sum: it starts at a *join*
(or at the arrival of the run) and ends where its paths meet again or the run ends,

    end = start of its join + fixed + sum over k of ticks[k, option of k, level of its endpoint]
          + cold[k, option] where its prefix, + lost[k, option] where its sessions are not kept.

Visits of one site on a chain add up to one *part*, since they share an option. A chain visits few
of a large question's sites, so parts are stored chain after chain, and no chain knows the others'
sites. All classes share the chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from planner.solve.arrays import Bools, Ints
from planner.solve.question import Instance

__all__ = ["Mixed", "Timing", "build_timing"]


@dataclass(frozen=True, slots=True)
class Mixed:
    """A weighted sum of chains by site.

    Parameters
    ----------
    sites
        Sites with a part in it, increasing; shape (n,).
    ticks, cold, lost
        As in `Timing`, summed by site; shapes (n, M, L), (n, M), (n, M).
    starts
        (join, factor) of the joins they start at; the arrival of the run is left out.
    fixed
        Delay ticks.
    """

    sites: Ints
    ticks: Ints
    cold: Ints
    lost: Ints
    starts: tuple[tuple[int, int], ...]
    fixed: int


@dataclass(frozen=True, slots=True)
class _Wave:
    """Joins that do not depend on each other, and chains of each, one join after the other.

    Of the many joins of all scenarios, those equally far from the arrival are one step.
    """

    joins: Ints
    chains: Ints
    first: Ints
    counts: Ints

    @classmethod
    def of(cls, joins: Ints, chains: Sequence[Sequence[int]]) -> _Wave:
        counts = np.array([len(chains[j]) for j in joins], dtype=np.int64)
        members = np.array([c for j in joins for c in chains[j]], dtype=np.int64)
        return cls(joins, members, counts.cumsum() - counts, counts)

    def largest(self, values: Ints) -> Ints:
        """Return the largest value of each join's chains; (n, chains) to (n, joins)."""
        return np.asarray(np.maximum.reduceat(values, self.first, axis=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """All chains of all scenarios.

    Parameters
    ----------
    site
        Call site of each part; shape (N,).
    ticks
        Service ticks by part, option and level, all prefixes and sessions kept; shape (N, M, L).
    cold, lost
        Extra ticks without the site's prefix, without its sessions; shape (N, M).
    first
        First part of each chain; its parts end where those of the next begin. A chain has at
        least one part, of zero ticks if it has no call. Shape (C,).
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

    Attributes
    ----------
    chain
        Chain of each part; shape (N,).
    scenario
        Scenario of each chain; shape (C,).
    """

    site: Ints
    ticks: Ints
    cold: Ints
    lost: Ints
    first: Ints
    option_endpoint: Ints
    weight: Ints
    fixed: Ints
    base: Ints
    joins: tuple[tuple[int, ...], ...]
    ends: Ints
    chain: Ints = field(init=False, repr=False, compare=False)
    scenario: Ints = field(init=False, repr=False, compare=False)
    _into: tuple[_Wave, ...] = field(init=False, repr=False, compare=False)
    _out_of: tuple[_Wave, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        counts = np.diff(np.append(self.first, self.site.size))
        scenario = np.zeros(self.base.size, dtype=np.int64)
        scenario[self.ends] = np.arange(self.ends.size)
        depth = np.zeros(len(self.joins) + 1, dtype=np.int64)
        leaving: list[list[int]] = [[] for _ in self.joins]
        for chain, join in enumerate(self.base.tolist()):
            if join >= 0:
                leaving[join].append(chain)
        for j, chains in enumerate(self.joins):
            depth[j] = 1 + depth[self.base[list(chains)]].max()
        for j in range(len(self.joins) - 1, -1, -1):
            scenario[list(self.joins[j])] = scenario[leaving[j][0]]
        waves = [np.flatnonzero(depth == d) for d in range(1, int(depth.max()) + 1)]
        object.__setattr__(self, "chain", np.repeat(np.arange(counts.size), counts))
        object.__setattr__(self, "scenario", scenario)
        object.__setattr__(self, "_into", tuple(_Wave.of(js, self.joins) for js in waves))
        object.__setattr__(self, "_out_of", tuple(_Wave.of(js, leaving) for js in waves))

    def by_chain(self, parts: Ints) -> Ints:
        """Return sums over the parts of each chain; shape (..., N) to (..., C)."""
        return np.asarray(np.add.reduceat(parts, self.first, axis=-1))

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
        chosen = np.take_along_axis(levels, self.option_endpoint[placements], axis=1)
        parts = np.arange(self.site.size)
        option, level = placements[:, self.site], chosen[:, self.site]
        return self.by_chain(self.ticks[parts, option, level])

    def extras(self, placements: Ints, warm: Bools, keep: Bools) -> Ints:
        """Return what chains take longer for prefixes and sessions not kept: (n, K) to (n, C)."""
        parts, option = np.arange(self.site.size), placements[:, self.site]
        cold = np.where(warm[:, self.site], 0, self.cold[parts, option])
        lost = np.where(keep[:, self.site], 0, self.lost[parts, option])
        return self.by_chain(cold + lost)

    def join_starts(self, sums: Ints) -> Ints:
        """Return the start of each join for chain sums of shape (n, C); shape (n, joins + 1).

        The last column is 0: where chains with base -1 start.
        """
        starts = np.zeros((sums.shape[0], len(self.joins) + 1), dtype=np.int64)
        for wave in self._into:
            own = sums[:, wave.chains] + self.fixed[wave.chains]
            starts[:, wave.joins] = wave.largest(starts[:, self.base[wave.chains]] + own)
        return starts

    def through(self, sums: Ints) -> Ints:
        """Return the longest way of its run that goes through each chain, in ticks; (n, C) each."""
        tails = np.zeros_like(sums)
        for into, out_of in zip(reversed(self._into), reversed(self._out_of), strict=True):
            own = sums[:, out_of.chains] + self.fixed[out_of.chains]
            left = out_of.largest(own + tails[:, out_of.chains])
            tails[:, into.chains] = np.repeat(left, into.counts, axis=1)
        return self.join_starts(sums)[:, self.base] + sums + self.fixed + tails

    def latencies(self, sums: Ints) -> Ints:
        """Return the latency of each scenario in ticks for chain sums (n, C); shape (n, S)."""
        starts = self.join_starts(sums)
        return np.asarray(
            starts[:, self.base[self.ends]] + sums[:, self.ends] + self.fixed[self.ends]
        )

    def latency(self, sums: Ints) -> Ints:
        """Return weighted sums of the scenarios' latencies for chain sums (n, C); shape (n,)."""
        return np.asarray(self.latencies(sums) @ self.weight, dtype=np.int64)

    def mixed(self, chains: Sequence[int], factors: Sequence[int]) -> Mixed:
        """Return the sum of chains, each times its factor."""
        stops = np.append(self.first, self.site.size)
        parts = np.concatenate([np.arange(stops[c], stops[c + 1]) for c in chains])
        factor = np.repeat(factors, [stops[c + 1] - stops[c] for c in chains])
        sites, position = np.unique(self.site[parts], return_inverse=True)

        def summed(values: Ints) -> Ints:
            out = np.zeros((sites.size, *values.shape[1:]), dtype=np.int64)
            own = factor.reshape(-1, *(1 for _ in values.shape[1:]))
            np.add.at(out, position, values[parts] * own)
            return out

        return Mixed(
            sites=sites,
            ticks=summed(self.ticks),
            cold=summed(self.cold),
            lost=summed(self.lost),
            starts=tuple(
                (int(self.base[c]), int(one))
                for c, one in zip(chains, factors, strict=True)
                if self.base[c] >= 0
            ),
            fixed=int(self.fixed[list(chains)] @ np.asarray(factors)),
        )


def build_timing(instance: Instance) -> Timing:
    """Collapse the tasks of an instance into chains and joins."""
    memory = instance.memory
    # Of each task: its service ticks by option and level, then the two extras by option.
    planes = np.concatenate(
        (instance.service_ticks, memory.cold_ticks[..., None], memory.lost_ticks[..., None]), axis=2
    )
    builder = _Builder()
    finish: list[_Open] = []
    met: dict[tuple[int, ...], _Open] = {}
    sinks: list[set[int]] = [set() for _ in range(instance.scenarios)]
    for t, site in enumerate(instance.task_site):
        preds = instance.task_preds[t]
        # Tasks that wait for the same ones start together: one join serves them all.
        key = tuple(sorted(preds))
        start = met.get(key)
        if start is None:
            start = met[key] = builder.meet([finish[pred] for pred in preds])
        parts = start.parts
        if site >= 0:
            so_far = parts.get(site)
            parts = {**parts, site: planes[t] if so_far is None else so_far + planes[t]}
        finish.append(_Open(start.base, start.fixed + int(instance.delay_ticks[t]), parts))
        scenario = sinks[instance.task_scenario[t]]
        scenario.difference_update(preds)
        scenario.add(t)
    ends = [builder.close(builder.meet([finish[t] for t in sorted(last)])) for last in sinks]
    nothing = {0: np.zeros_like(planes[0])}
    parts_of = [chain.parts or nothing for chain in builder.chains]
    stacked = np.stack([part for parts in parts_of for part in parts.values()])
    return Timing(
        site=np.array([site for parts in parts_of for site in parts], dtype=np.int64),
        ticks=np.ascontiguousarray(stacked[..., :-2]),
        cold=np.ascontiguousarray(stacked[..., -2]),
        lost=np.ascontiguousarray(stacked[..., -1]),
        first=np.cumsum([0, *map(len, parts_of[:-1])]),
        option_endpoint=instance.option_endpoint,
        weight=instance.scenario_weight,
        fixed=np.array([chain.fixed for chain in builder.chains], dtype=np.int64),
        base=np.array([chain.base for chain in builder.chains], dtype=np.int64),
        joins=tuple(builder.joins),
        ends=np.array(ends, dtype=np.int64),
    )


@dataclass(frozen=True, slots=True)
class _Open:
    """A chain that may still grow: ticks of its visited sites, the last two planes the extras."""

    base: int
    fixed: int
    parts: dict[int, Ints]

    def dominates(self, other: _Open) -> bool:
        """Whether this chain never ends before the other."""
        return (
            self.base == other.base
            and self.fixed >= other.fixed
            and other.parts.keys() <= self.parts.keys()
            and all(bool((self.parts[site] >= own).all()) for site, own in other.parts.items())
        )


class _Builder:
    def __init__(self) -> None:
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
            return _Open(-1, 0, {})
        if len(kept) == 1:
            return kept[0]
        self.joins.append(tuple(self.close(chain) for chain in kept))
        return _Open(len(self.joins) - 1, 0, {})
