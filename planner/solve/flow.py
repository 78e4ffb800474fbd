"""Flow shops by local search over permutations: a hint where intervals alone search too long.

A question is a flow shop if all chains visit the same endpoints in the same order, one mode each.
Then an order of the chains at the first endpoint decides all: at each later one, chains are taken
as they arrive. Hundreds of orders are decoded at once, one numpy step per chain and stage. The
mirrored question (last stage first) is searched as well, since either may be the easier one.

References
----------
Nawaz, Enscore, Ham (1983) for the insertion heuristic; Ruiz, Vázquez-Rodríguez, The hybrid flow
shop scheduling problem, EJOR 2010, for decoding by arrival.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.domain.schedule import Schedule, ScheduleQuestion
from planner.solve.instance import Ints

__all__ = ["flow_schedule"]

_BATCH = 256
"""Orders decoded at once: numpy's overhead is then small beside its work."""
_PATIENCE = 25
"""Batches without an improvement before the order is disturbed."""


@dataclass(frozen=True, slots=True)
class _Flow:
    """Ticks (J, S), machines of each stage, and the activities (J, S)."""

    ticks: Ints
    machines: tuple[int, ...]
    activities: Ints

    @property
    def mirrored(self) -> _Flow:
        """The same question with time running backwards."""
        return _Flow(self.ticks[:, ::-1], self.machines[::-1], self.activities[:, ::-1])


def flow_schedule(question: ScheduleQuestion, *, effort: float, seed: int = 0) -> Schedule | None:
    """Return the best schedule found, or None if the question is not a flow shop.

    Parameters
    ----------
    effort
        Numpy steps to spend after the first orders: about 40,000 take a second. A count and not
        a time, so that the result is reproducible.
    """
    flow = _flow(question)
    if flow is None:
        return None
    best: tuple[int, Ints, bool] | None = None
    for turn, one in enumerate((flow, flow.mirrored)):
        search = _Search(one, np.random.default_rng([seed, turn]))
        order, makespan = search.run(effort / 2)
        if best is None or makespan < best[0]:
            best = makespan, order, turn == 1
    assert best is not None  # noqa: S101 - two were tried
    makespan, order, backwards = best
    ends = _ends(flow.mirrored if backwards else flow, order[np.newaxis])[0]
    starts = ends - (flow.mirrored if backwards else flow).ticks
    if backwards:
        starts = (makespan - ends)[:, ::-1]
    by_activity = np.zeros(len(question.activities), dtype=np.int64)
    by_activity[flow.activities.ravel()] = starts.ravel()
    return Schedule(
        starts=tuple(by_activity.tolist()),
        modes=(0,) * len(question.activities),
        objective=question.makespan_weight * makespan,
        bound=0,
    )


def _flow(question: ScheduleQuestion) -> _Flow | None:
    """Return the question as a flow shop, if it is one that asks for the makespan alone."""
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
    return _Flow(
        np.array([[activities[a].modes[0].ticks for a in chain] for chain in chains]),
        tuple(question.slots[i] for i in stages if i is not None),
        np.array(chains),
    )


def _ends(flow: _Flow, orders: Ints) -> Ints:
    """Return the end of each stage of each chain for orders (n, j); shape (n, J, S).

    Chains that an order leaves out end at 0.
    """
    count, length = orders.shape
    rows = np.arange(count)
    ends = np.zeros((count, *flow.ticks.shape), dtype=np.int64)
    ready = np.zeros((count, len(flow.ticks)), dtype=np.int64)
    for s, machines in enumerate(flow.machines):
        if s:
            arrival = np.take_along_axis(ready, orders, axis=1)
            # Stable: of two that arrive together, the one earlier before goes first.
            orders = np.take_along_axis(orders, arrival.argsort(axis=1, kind="stable"), axis=1)
        free = np.zeros((count, machines), dtype=np.int64)
        ticks = flow.ticks[:, s]
        for position in range(length):
            chain = orders[:, position]
            machine = free.argmin(axis=1)
            end = np.maximum(free[rows, machine], ready[rows, chain]) + ticks[chain]
            free[rows, machine] = end
            ready[rows, chain] = end
        ends[:, :, s] = ready
    return ends


class _Search:
    def __init__(self, flow: _Flow, rng: np.random.Generator) -> None:
        self._flow = flow
        self._rng = rng
        self.spent = 0.0

    def run(self, effort: float) -> tuple[Ints, int]:
        """Return the best order and its makespan."""
        order = self._first()
        value = int(self._makespans(order[np.newaxis])[0])
        best, best_value, stale = order, value, 0
        self.spent = 0.0
        while self.spent < effort and len(order) > 1:
            batch = self._moved(order)
            makespans = self._makespans(batch)
            # Of equals any: plateaus are wide, and standing still does not cross them.
            tied = np.flatnonzero(makespans == makespans.min())
            chosen = int(self._rng.choice(tied))
            stale = 0 if makespans[chosen] < value else stale + 1
            if makespans[chosen] <= value:
                order, value = batch[chosen], int(makespans[chosen])
            if value < best_value:
                best, best_value = order, value
            if stale > _PATIENCE:
                order, stale = best, 0
                for _ in range(3):
                    order = self._moved(order)[0]
                value = int(self._makespans(order[np.newaxis])[0])
        return best, best_value

    def _first(self) -> Ints:
        """Return the better of a few sorted orders, improved by inserting each chain once."""
        ticks = self._flow.ticks
        total = ticks.sum(axis=1)
        place = np.arange(ticks.shape[1])
        candidates = np.stack(
            [
                np.argsort(-total, kind="stable"),
                np.argsort(total, kind="stable"),
                np.argsort(ticks @ place, kind="stable"),
                np.argsort(-(ticks @ place), kind="stable"),
            ]
        )
        order = candidates[int(self._makespans(candidates).argmin())]
        return self._inserted(order)

    def _inserted(self, order: Ints) -> Ints:
        """Build the order anew: chain after chain where the makespan grows least."""
        ranked = order.tolist()
        built = [ranked[0]]
        for chain in ranked[1:]:
            batch = np.array(
                [[*built[:p], chain, *built[p:]] for p in range(len(built) + 1)], dtype=np.int64
            )
            position = int(self._makespans(batch).argmin())
            built.insert(position, chain)
        return np.array(built)

    def _moved(self, order: Ints) -> Ints:
        """Return random neighbours: one chain elsewhere, or two exchanged; shape (n, J)."""
        size = len(order)
        batch = np.repeat(order[np.newaxis], _BATCH, axis=0)
        source = self._rng.integers(size, size=_BATCH)
        target = (source + self._rng.integers(1, size, size=_BATCH)) % size
        rows = np.arange(_BATCH)
        half = _BATCH // 2
        batch[rows[:half], source[:half]] = order[target[:half]]
        batch[rows[:half], target[:half]] = order[source[:half]]
        for n in range(half, _BATCH):
            batch[n] = np.insert(np.delete(order, source[n]), target[n], order[source[n]])
        return batch

    def _makespans(self, orders: Ints) -> Ints:
        self.spent += orders.shape[1] * len(self._flow.machines)
        return np.asarray(_ends(self._flow, orders)[:, :, -1].max(axis=1), dtype=np.int64)
