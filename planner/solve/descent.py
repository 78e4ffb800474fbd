"""Descent at fixed levels: moves of one call, exchanges of two, weighed by what they would gain.

With fixed levels a move changes one class only. Let B be the longest way through a chain of a
scenario and A the longest way past it: the latency is max(A, B), and with the chain longer by d
it is max(A, B + d). If B is not the latency, A is. If it is, A is at least the longest way
through another chain that ends where this one does, and exactly that in workflows made of layers.
So one table of sites by endpoints estimates all moves at once, and the best estimates are then
computed exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.solve.arrays import Ints
from planner.solve.question import Instance
from planner.solve.timing import Timing

__all__ = ["Descent"]

_TRIED = (4, 44)
"""Best estimates that are computed exactly, in two helpings, before a kind of move is given up."""

_Change = tuple[int, int, int]
"""Class, site, new endpoint."""


@dataclass(slots=True)
class _State:
    """Placements (R, K), chain sums (R, C), totals (R,), room left (I,), estimates (R, K, I)."""

    placements: Ints
    sums: Ints
    totals: Ints
    free: Ints
    gains: Ints


class Descent:
    """Improves placements of a question without prefill/decode pairs.

    Parameters
    ----------
    levels
        Level position of each endpoint; shape (I,).
    effort
        Estimates and chain lengths that may be computed: a count and not a time, so that the
        result is reproducible.

    Attributes
    ----------
    spent
        How many were.
    """

    def __init__(self, instance: Instance, timing: Timing, levels: Ints, effort: float) -> None:
        self.spent = 0.0
        self._effort = effort
        self._timing = timing
        self._allowed = instance.allowed
        endpoints = np.arange(len(instance.endpoints))
        self._load = instance.class_load[:, endpoints, levels]
        self._room = instance.room[endpoints, levels]
        self._ticks = timing.ticks[:, endpoints, levels]
        sites = len(instance.sites)
        self._parts = [np.flatnonzero(timing.site == k) for k in range(sites)]
        # Parts of one site in chains that end together stand for one way: the longest.
        ending = np.arange(timing.base.size) + len(timing.joins)
        for j, chains in enumerate(timing.joins):
            ending[list(chains)] = j
        together = ending[timing.chain]
        self._order = np.lexsort((together, timing.site))
        keys = np.stack((timing.site[self._order], together[self._order]))
        new = np.append(True, (keys[:, 1:] != keys[:, :-1]).any(axis=0))
        self._first = np.flatnonzero(new)
        own_site = keys[0, self._first]
        self._scenario = timing.scenario[timing.chain[self._order[self._first]]]
        self._seen, self._site_first = np.unique(own_site, return_index=True)
        # The other chains that end there; one past the last chain where there are none.
        self._past, self._past_first = _others(timing, keys, self._order, self._first)

    def improve(self, placements: Ints) -> int:
        """Improve placements (R, K) in place until no move or exchange does, or effort is spent.

        Returns
        -------
        Weighted sum of the latencies of all classes, ticks.
        """
        parts, site = np.arange(self._ticks.shape[0]), self._timing.site
        sums = self._timing.by_chain(self._ticks[parts, placements[:, site]])
        state = _State(
            placements=placements,
            sums=sums,
            totals=self._timing.latency(sums),
            free=self._free(placements),
            gains=np.zeros((*placements.shape, self._room.size), dtype=np.int64),
        )
        changed = set(range(len(placements)))
        while changed and self.spent < self._effort:
            for r in changed:
                state.gains[r] = self.gains(placements[r], state.sums[r])
            changed = self._move(state) or self._exchange(state)
        return int(state.totals.sum())

    def disturbed(self, placements: Ints, rng: np.random.Generator) -> Ints:
        """Return a copy with a few calls moved at random to where there is room."""
        out = placements.copy()
        free = self._free(out)
        classes, sites = out.shape
        for _ in range(int(rng.integers(2, 7))):
            r, k = int(rng.integers(classes)), int(rng.integers(sites))
            here = int(out[r, k])
            room = np.flatnonzero(self._allowed[k] & (self._load[k] <= free))
            if room.size:
                there = int(rng.choice(room))
                out[r, k] = there
                free[here] += self._load[k, here]
                free[there] -= self._load[k, there]
        return out

    def _free(self, placements: Ints) -> Ints:
        """Return the room left at each endpoint."""
        free = self._room.copy()
        flat = placements.ravel()
        site = np.tile(np.arange(placements.shape[1]), len(placements))
        np.subtract.at(free, flat, self._load[site, flat])
        return free

    def gains(self, row: Ints, sums: Ints) -> Ints:
        """Return by how much each move of one class would shorten its total; shape (K, I).

        Parameters
        ----------
        row
            Endpoint of each site; shape (K,).
        sums
            Its chain sums; shape (C,).
        """
        timing = self._timing
        self.spent += self._ticks.size
        through = timing.through(sums[np.newaxis])[0]
        latency = timing.latencies(sums[np.newaxis])[0][self._scenario]
        own = self._ticks[np.arange(timing.site.size), row[timing.site]]
        rest = (through[timing.chain] - own)[self._order]
        ways = np.maximum.reduceat(rest[:, np.newaxis] + self._ticks[self._order], self._first)
        longest = np.maximum.reduceat(through[timing.chain][self._order], self._first)
        past = np.maximum.reduceat(np.append(through, 0)[self._past], self._past_first)
        past = np.where(longest < latency, latency, past)
        after = np.maximum(past[:, np.newaxis], ways)
        gain = (latency[:, np.newaxis] - after) * timing.weight[self._scenario][:, np.newaxis]
        out = np.zeros((row.size, self._room.size), dtype=np.int64)
        out[self._seen] = np.add.reduceat(gain, self._site_first)
        return out

    def _move(self, state: _State) -> set[int]:
        """Take the best move of one site of one class; return the classes that it changed."""
        fits = self._allowed & (self._load <= state.free)
        estimate = np.where(fits, state.gains, 0)
        promising = np.argwhere(estimate > 0)
        if not promising.size:
            return set()
        ranking = np.argsort(-estimate[tuple(promising.T)], kind="stable")[: sum(_TRIED)]
        return self._best(state, [((r, k, j),) for r, k, j in promising[ranking].tolist()])

    def _exchange(self, state: _State) -> set[int]:
        """Let the best two calls exchange endpoints; return the classes that this changed."""
        sites, flat = state.placements.shape[1], state.placements.ravel()
        self.spent += flat.size**2
        site = np.arange(flat.size) % sites
        load = self._load[site]
        # [a, b]: of call a at the endpoint of call b, and what is left where a was.
        there = load[:, flat]
        left = (state.free[flat] + np.diagonal(there))[:, np.newaxis] - there.T
        may = self._allowed[site][:, flat] & (left >= 0)
        gain = state.gains.reshape(flat.size, -1)[:, flat]
        estimate = np.triu(np.where(may & may.T, gain + gain.T, 0), k=1)
        promising = np.argwhere(estimate > 0)
        if not promising.size:
            return set()
        ranking = np.argsort(-estimate[tuple(promising.T)], kind="stable")[: sum(_TRIED)]
        return self._best(
            state,
            [
                ((a // sites, a % sites, int(flat[b])), (b // sites, b % sites, int(flat[a])))
                for a, b in promising[ranking].tolist()
            ],
        )

    def _best(self, state: _State, candidates: list[tuple[_Change, ...]]) -> set[int]:
        """Apply the candidate that gains most in truth; return the classes that it changed."""
        begin = 0
        for helping in _TRIED:
            chosen = candidates[begin : begin + helping]
            begin += helping
            if not chosen:
                break
            before = state.totals.sum()
            sums = np.repeat(state.sums[np.newaxis], len(chosen), axis=0)
            for n, changes in enumerate(chosen):
                for r, k, j in changes:
                    parts = self._parts[k]
                    longer = self._ticks[parts, j] - self._ticks[parts, state.placements[r, k]]
                    sums[n, r, self._timing.chain[parts]] += longer
            self.spent += sums.size
            flat = self._timing.latency(sums.reshape(-1, sums.shape[2]))
            totals = flat.reshape(len(chosen), -1)
            best = int(totals.sum(axis=1).argmin())
            if totals[best].sum() < before:
                for r, k, j in chosen[best]:
                    state.free[state.placements[r, k]] += self._load[k, state.placements[r, k]]
                    state.free[j] -= self._load[k, j]
                    state.placements[r, k] = j
                state.sums, state.totals = sums[best], totals[best]
                return {r for r, _, _ in chosen[best]}
        return set()


def _others(timing: Timing, keys: Ints, order: Ints, first: Ints) -> tuple[Ints, Ints]:
    """Return for each way the chains that end where it does without its site, and where they begin.

    ``keys`` are site and join of the parts in ``order``; ways begin at ``first``.
    """
    flat: list[int] = []
    begins: list[int] = []
    for begin, end in zip(first, np.append(first[1:], order.size), strict=True):
        begins.append(len(flat))
        join = int(keys[1, begin])
        mine = set(timing.chain[order[begin:end]].tolist())
        rest = set(timing.joins[join]) - mine if join < len(timing.joins) else set()
        flat += sorted(rest) or [timing.base.size]
    return np.array(flat, dtype=np.int64), np.array(begins, dtype=np.int64)
