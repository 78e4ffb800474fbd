"""Flow shops by local search: a start where intervals alone search too long.

A question is a flow shop if all chains visit the same endpoints in the same order, one mode each.
Then an order of the chains at the first endpoint decides all: at each later one, chains are taken
as they arrive. Such orders are searched first, forwards and for the mirrored question (last stage
first), since either may be the easier one. What no order reaches follows by justification:
a schedule's ends, disturbed at random, are the order in which each stage is moved as late as
possible, and those starts the order in which it is moved as early as possible again. In between,
part of the time goes to a bound that may end the search before.

References
----------
Nawaz, Enscore, Ham (1983) for the insertion heuristic; Ruiz, Vázquez-Rodríguez, The hybrid flow
shop scheduling problem, EJOR 2010, for decoding by arrival; Valls, Ballestín, Quintanilla,
Justification and RCPSP: a technique that pays, EJOR 2005.
"""

from __future__ import annotations

import math

import numpy as np

from planner.domain.schedule import Schedule, ScheduleQuestion
from planner.solve.effort import Effort
from planner.solve.flow_bound import flow_bound, least_makespan
from planner.solve.flow_decode import Array, Flow, decode

__all__ = ["flow_schedule"]

_BATCH = 256
"""Schedules decoded at once: numpy's overhead is then small beside its work."""
_PATIENCE = 25
"""Batches without an improvement before the order is disturbed."""
_ORDERS, _BOUND = 0.55, 0.65
"""Shares of the effort after which orders, and the bound, are done; the rest is justification."""
_KEPT = 32
"""Schedules that justification goes on from."""
_NOISE = (0.02, 1.0)
"""Least and largest deviation of a disturbance, in mean durations."""
_LEAST_SHARE = 0.01
"""Least share of the ends that are disturbed."""
_JUSTIFIED_STEPS = 3
"""What justifying costs: two passes, and about one for the disturbance."""


def flow_schedule(question: ScheduleQuestion, *, effort: Effort, seed: int = 0) -> Schedule | None:
    """Return the best schedule found and a bound, or None if the question is not a flow shop.

    Parameters
    ----------
    effort
        What may be spent.
    """
    chains = _chains(question)
    if chains is None:
        return None
    activities = question.activities
    ticks = np.array([[activities[a].modes[0].ticks for a in chain] for chain in chains]).T
    # No end is after all work in a row, and what disturbs it is shorter. Decoding appends the
    # number of a chain to a key; the smaller numbers sort twice as fast.
    small = int(ticks.sum()) << len(chains).bit_length() < 1 << 28
    endpoints = (activities[a].modes[0].endpoint for a in chains[0])
    flow = Flow(
        ticks.astype(np.int32 if small else np.int64),
        tuple(question.slots[i] for i in endpoints if i is not None),
    )
    ends, least = _searched(flow, effort, seed)
    starts = np.zeros(len(activities), dtype=np.int64)
    starts[np.array(chains).T] = ends - flow.ticks
    return Schedule(
        starts=tuple(starts.tolist()),
        modes=(0,) * len(activities),
        objective=question.makespan_weight * int(ends.max()),
        bound=question.makespan_weight * least,
    )


def _searched(flow: Flow, effort: Effort, seed: int) -> tuple[Array, int]:
    """Return the ends (S, J) of the best schedule found, and a makespan that none is below."""
    least = least_makespan(flow)
    ends = _Orders(flow, least, np.random.default_rng([seed, 0])).run(effort, _ORDERS / 2)
    if ends.max() > least:
        backwards = _Orders(flow.mirrored, least, np.random.default_rng([seed, 1]))
        other = _mirrored(flow.mirrored, backwards.run(effort, _ORDERS))
        ends = min(ends, other, key=lambda one: int(one.max()))
    if ends.max() > least:
        least = flow_bound(flow, makespan=int(ends.max()), effort=effort, share=_BOUND)
    return _justified(flow, ends, least, effort, np.random.default_rng([seed, 2])), least


def _chains(question: ScheduleQuestion) -> list[list[int]] | None:
    """Return the chains of a flow shop, if the question is one that asks for the makespan alone."""
    activities = question.activities
    if question.transfers or not question.makespan_weight or not activities:
        return None
    chains: list[list[int]] = []
    at: dict[int, int] = {}
    for a, one in enumerate(activities):
        mode = one.modes[0]
        simple = mode.endpoint is not None and mode.slots == 1 and not mode.lane_ticks
        if len(one.modes) > 1 or not simple or one.release or one.weight or len(one.preds) > 1:
            return None
        if one.preds:
            chain = at.pop(one.preds[0], None)
            if chain is None:
                return None
            chains[chain].append(a)
        else:
            chain = len(chains)
            chains.append([a])
        at[a] = chain
    stages = [activities[a].modes[0].endpoint for a in chains[0]]
    if len(set(stages)) < len(stages):
        return None
    if any([activities[a].modes[0].endpoint for a in chain] != stages for chain in chains):
        return None
    return chains


def _mirrored(flow: Flow, ends: Array) -> Array:
    """Return the ends (S, J) of a schedule with time running backwards."""
    return np.asarray((ends.max() - (ends - flow.ticks))[::-1])


def _justified(
    flow: Flow, ends: Array, least: int, effort: Effort, rng: np.random.Generator
) -> Array:
    """Return the ends (S, J) of the best schedule that disturbing and justifying finds."""
    backwards = flow.mirrored
    kept = ends[:, np.newaxis]
    makespans = kept[-1].max(axis=1)
    mean = float(flow.ticks.mean())
    stages, chains = flow.ticks.shape
    low, high = _NOISE
    while makespans[0] > least and effort.within(1.0):
        effort.count(_JUSTIFIED_STEPS * flow.steps)
        deviation = mean * np.exp(rng.uniform(math.log(low), math.log(high), size=(_BATCH, 1)))
        share = np.exp(rng.uniform(math.log(_LEAST_SHARE), 0.0, size=(_BATCH, 1)))
        noise = rng.standard_normal((stages, _BATCH, chains), dtype=np.float32) * deviation
        noise[rng.random(noise.shape, dtype=np.float32) > share] = 0.0
        latest = kept[:, rng.integers(len(makespans), size=_BATCH)] + noise.astype(kept.dtype)
        late = decode(backwards, -latest[::-1])
        early = decode(flow, -late[::-1])
        # Of equals the newest: plateaus are wide, and standing still does not cross them.
        kept = np.concatenate((early, kept), axis=1)
        makespans = np.concatenate((early[-1].max(axis=1), makespans))
        best = makespans.argsort(kind="stable")[:_KEPT]
        kept, makespans = kept[:, best], makespans[best]
    return np.asarray(kept[:, 0])


class _Orders:
    """Local search over the order of the chains at the first stage, held as rank by chain.

    It ends at a makespan of ``least`` ticks: no schedule is below.
    """

    def __init__(self, flow: Flow, least: int, rng: np.random.Generator) -> None:
        self._flow = flow
        self._least = least
        self._rng = rng

    def run(self, effort: Effort, share: float) -> Array:
        """Return the ends (S, J) of the best schedule found until a share of effort is spent."""
        ranks = self._first(effort, share)
        value = int(_makespans(self._flow, ranks[np.newaxis])[0])
        best, best_value, stale = ranks, value, 0
        while best_value > self._least and effort.within(share):
            effort.count(self._flow.steps)
            batch = self._moved(ranks)
            makespans = _makespans(self._flow, batch)
            # Of equals any, for the same reason as above.
            tied = np.flatnonzero(makespans == makespans.min())
            chosen = int(self._rng.choice(tied))
            stale = 0 if makespans[chosen] < value else stale + 1
            if makespans[chosen] <= value:
                ranks, value = _ranks(batch[chosen]), int(makespans[chosen])
            if value < best_value:
                best, best_value = ranks, value
            if stale > _PATIENCE:
                ranks, stale = best, 0
                for _ in range(3):
                    ranks = _ranks(self._moved(ranks)[0])
                value = int(_makespans(self._flow, ranks[np.newaxis])[0])
        return np.asarray(decode(self._flow, best[np.newaxis])[:, 0])

    def _first(self, effort: Effort, share: float) -> Array:
        """Return the better of a few sorted orders, improved by inserting each chain once."""
        ticks = self._flow.ticks
        total = ticks.sum(axis=0)
        lean = np.arange(len(ticks), dtype=ticks.dtype) @ ticks
        candidates = np.stack([_ranks(key) for key in (-total, total, lean, -lean)])
        ranks = candidates[int(_makespans(self._flow, candidates).argmin())]
        order = ranks.argsort()
        # Each further chain where the makespan grows least.
        built = ranks[order[:1]]
        for size in range(1, len(order)):
            if not effort.within(share):
                break
            flow = self._flow.of(order[: size + 1])
            effort.count(flow.steps)
            before = np.arange(size + 1, dtype=ranks.dtype)[:, np.newaxis]
            batch = np.concatenate(
                (np.repeat(2 * built[np.newaxis] + 1, size + 1, axis=0), 2 * before), 1
            )
            built = _ranks(batch[int(_makespans(flow, batch).argmin())])
        ranks[order] = np.arange(len(order))
        ranks[order[: len(built)]] = built
        return np.asarray(ranks)

    def _moved(self, ranks: Array) -> Array:
        """Return keys of random neighbours: two exchanged, or one elsewhere; shape (n, J)."""
        size = len(ranks)
        batch = np.repeat(2 * ranks[np.newaxis], _BATCH, axis=0)
        one = self._rng.integers(size, size=_BATCH)
        other = (one + self._rng.integers(1, size, size=_BATCH)) % size
        rows = np.arange(_BATCH)
        swap = rows < _BATCH // 2
        batch[rows, one] = 2 * ranks[other]
        batch[rows[swap], other[swap]] = 2 * ranks[one[swap]]
        # Towards the front before the other, towards the back behind it.
        behind = np.where(ranks[one] < ranks[other], 1, -1)
        batch[rows[~swap], one[~swap]] += behind[~swap].astype(batch.dtype)
        return batch


def _makespans(flow: Flow, keys: Array) -> Array:
    return np.asarray(decode(flow, keys)[-1].max(axis=1))


def _ranks(keys: Array) -> Array:
    """Return the rank of each chain by increasing key, ties by position; shape (J,)."""
    ranks = np.empty_like(keys)
    ranks[keys.argsort(kind="stable")] = np.arange(len(keys), dtype=keys.dtype)
    return ranks
