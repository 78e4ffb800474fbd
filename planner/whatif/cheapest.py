"""The cheapest fleet that meets a target, of the kinds of endpoints that a fleet file prices.

Fleets are tried by price. Two proofs save simulations: a fleet whose capacity is below the load is
passed over, and so are all fleets of a set of kinds on which, with as many of each as may be
bought, no policy could meet the target. What is left is simulated, with the same runs for all; the
first that meets the target is the answer, and cheaper ones are listed with what ruled them out.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.domain.errors import Infeasible, InvalidInput
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId
from planner.report.terminal import align
from planner.whatif.answer import Answer
from planner.whatif.asking import ask
from planner.whatif.capacity import capacity_rps
from planner.whatif.effort import Effort
from planner.whatif.question import Question, Target, check_deadlines
from planner.whatif.sample import BoundTask
from planner.whatif.store import Store

__all__ = ["Cheapest", "cheapest_fleet"]

_SCREEN = 2
_HOPELESS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Cheapest:
    """The cheapest fleet found.

    Parameters
    ----------
    target
        What it meets.
    answer
        Its figures, None if no fleet of the size allowed meets the target.
    simulated
        Cheaper fleets that were simulated and missed it, with what they came to.
    beyond_capacity, proven_out
        Cheaper fleets that cannot carry the load, and that a bound rules out.
    """

    target: Target
    answer: Answer | None
    simulated: tuple[tuple[str, float, float], ...]
    beyond_capacity: int
    proven_out: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": "almanac.cheapest/1",
            "target": str(self.target),
            "answer": None if self.answer is None else self.answer.to_json(),
            "missed": [
                {"fleet": name, "usd_per_hour": price, "value": value}
                for name, price, value in self.simulated
            ],
            "beyond_capacity": self.beyond_capacity,
            "proven_out": self.proven_out,
        }

    def text(self) -> str:
        """Return it for a terminal."""
        rows = [["fleet", "$/h", str(self.target.metric)]]
        rows += [[name, f"{price:.2f}", f"{value:.3f}"] for name, price, value in self.simulated]
        if self.answer is None:
            said = f"no fleet of the size allowed meets {self.target}"
        else:
            price = self.answer.question.usd_per_hour or 0.0
            figure = self.answer.figures[self.target.metric].text(3)
            rows.append([self.answer.label, f"{price:.2f}", figure])
            said = (
                f"{self.target}: {self.answer.label} for {price:.2f} $/h, "
                f"{self.answer.question.usd_per_run or 0.0:.4f} $ per run"
            )
        return (
            f"{said}\n\n{align(rows)}\n{self.beyond_capacity} cheaper fleets cannot carry the "
            f"load, {self.proven_out} are ruled out by a bound"
        )

    def _repr_html_(self) -> str:
        """Return the text for a notebook."""
        from html import escape

        return f"<pre>{escape(self.text())}</pre>"


def cheapest_fleet(
    question: Question,
    target: Target,
    *,
    most: int = 6,
    tries: int = 40,
    effort: Effort | None = None,
    store: Store | None = None,
) -> Cheapest:
    """Return the cheapest fleet made of the question's kinds of endpoints that meets a target.

    Parameters
    ----------
    question
        Its fleet's endpoints, one of each GPU and model, are what may be bought; each needs
        ``usd_per_hour``.
    most
        Endpoints of a fleet, >= 1.
    tries
        Fleets to simulate at most, >= 1.

    Raises
    ------
    InvalidInput
        If an endpoint has no price, or the fleet serves in pools.
    """
    check_deadlines(target, question.streams)
    if most < 1 or tries < 1:
        raise InvalidInput(
            f"{most} endpoints, {tries} fleets", where="cheapest", remedy="use at least 1 of each"
        )
    search = _Search(question, target, effort or Effort(seeds=4, runs=120), store or Store(), most)
    return search.run(tries)


class _Search:
    """Fleets by price."""

    def __init__(
        self, question: Question, target: Target, effort: Effort, store: Store, most: int
    ) -> None:
        self._question = question
        self._target = target
        self._effort = replace(effort, bounds=() if target.least else (target.metric,))
        self._store = store
        self._most = most
        self._kinds = _kinds(question.fleet)
        self._possible: dict[tuple[bool, ...], bool] = {}

    def run(self, tries: int) -> Cheapest:
        """Try fleets by price until one meets the target."""
        simulated: list[tuple[str, float, float]] = []
        beyond = proven = 0
        answer = None
        for counts in self._by_price():
            if len(simulated) >= tries:
                break
            if not self._allowed(counts):
                proven += 1
                continue
            changed = replace(self._question, fleet=self._fleet(counts))
            if not _carries(changed):
                beyond += 1
                continue
            found, value = self._simulated(counts, changed)
            if found is not None:
                answer = found
                break
            simulated.append((self._name(counts), changed.usd_per_hour or 0.0, value))
        return Cheapest(
            target=self._target,
            answer=answer,
            simulated=tuple(simulated),
            beyond_capacity=beyond,
            proven_out=proven,
        )

    def _by_price(self) -> Iterator[tuple[int, ...]]:
        """Yield counts of the kinds, cheapest fleet first; of one price the smaller first."""
        prices = [one.usd_per_hour or 0.0 for one in self._kinds]
        start = (0,) * len(prices)
        heap: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, start)]
        seen = {start}
        while heap:
            price, size, counts = heapq.heappop(heap)
            if size:
                yield counts
            if size == self._most:
                continue
            for place, more in enumerate(prices):
                larger = (*counts[:place], counts[place] + 1, *counts[place + 1 :])
                if larger not in seen:
                    seen.add(larger)
                    heapq.heappush(heap, (price + more, size + 1, larger))

    def _allowed(self, counts: Sequence[int]) -> bool:
        """Whether some fleet of these kinds is not proven to miss the target."""
        if not self._effort.bounds:
            return True
        used = tuple(count > 0 for count in counts)
        if used not in self._possible:
            largest = self._fleet([self._most if one else 0 for one in used])
            tasks = [
                BoundTask(
                    question=replace(self._question, fleet=largest),
                    seed=seed,
                    runs=self._effort.runs,
                    metrics=self._effort.bounds,
                )
                for seed in self._effort.all_seeds
            ]
            values = [one["values"].get(self._target.metric) for one in self._store.results(tasks)]
            self._possible[used] = (
                None not in values and sum(values) / len(values) <= self._target.value
            )
        return self._possible[used]

    def _simulated(self, counts: Sequence[int], changed: Question) -> tuple[Answer | None, float]:
        """Return the answer if it meets the target, and the figure."""
        value = 0.0
        name = self._name(counts)
        screen = replace(self._effort, bounds=(), seeds=min(_SCREEN, self._effort.seeds))
        for effort in (screen, self._effort):
            answer = ask([(name, changed)], effort, store=self._store)[0]
            value = answer.figures[self._target.metric].value
            lacks = self._target.value - value if self._target.least else value - self._target.value
            if lacks > (_HOPELESS * self._target.value if effort is screen else 0.0):
                return None, value
        return answer, value

    def _fleet(self, counts: Sequence[int]) -> Fleet:
        return Fleet(
            name=self._name(counts),
            endpoints=tuple(
                replace(kind, id=EndpointId(f"{kind.id}-{number}"), url=None)
                for kind, count in zip(self._kinds, counts, strict=True)
                for number in range(1, count + 1)
            ),
        )

    def _name(self, counts: Sequence[int]) -> str:
        return " + ".join(
            f"{count}x{kind.id}" for kind, count in zip(self._kinds, counts, strict=True) if count
        )


def _kinds(fleet: Fleet) -> tuple[Endpoint, ...]:
    found: dict[tuple[str, str, int], Endpoint] = {}
    for position, one in enumerate(fleet.endpoints):
        if one.usd_per_hour is None:
            raise InvalidInput(
                f"endpoint {one.id!r} has no price",
                where=f"workers[{position}].usd_per_hour",
                remedy="give it",
            )
        if one.role != "both":
            raise InvalidInput(
                f"endpoint {one.id!r} has role {one.role}",
                where="cheapest",
                remedy="give a fleet whose endpoints serve calls whole",
            )
        found.setdefault((one.gpu, one.model, one.tp), one)
    return tuple(found.values())


def _carries(question: Question) -> bool:
    try:
        return question.rate_rps < capacity_rps(question)
    except Infeasible:
        return False
