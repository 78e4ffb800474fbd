"""Decisions in process: a router in the middle of its work, timed call by call.

The fleet has 64 endpoints and 1,000 active runs (fewer of both in the same proportion, where asked
for), each with a call in flight whose prompt begins with its workflow's text and goes on with its
own. A decision is the arrival of the next turn of one of them under a policy, with a table if it is
``almanac``, from the event to the command that says where it goes (`Router.decide`). Counting it
(`Router.settle`) comes after the command and before the next event, and is timed by itself; so is
the sum of both. Then the call it follows ends. Times are by the clock on the wall, as a call waits
and as the gateway tells them (`x-almanac-router-us`); to read that of the thread costs more than
half a microsecond. What else runs on the machine counts where it takes the processor away, and
slows the caches, so measure on a machine that is idle. Each load is run a few times and the
quietest one told.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from planner.dispatch.events import Call, CallArrived, CallFinished, FirstToken
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.dispatch.router import Router
from planner.dispatch.table import DispatchTable, Ranked, Row
from planner.domain.estimates import EstimateTable
from planner.domain.files import data_dir
from planner.domain.fleet import Endpoint, Fleet, load_fleet
from planner.domain.ids import EndpointId
from runtime.bench.figures import Figure, quantile

__all__ = ["BOUNDS", "Load", "Took", "decision_figures", "decision_us", "table_rows"]

BOUNDS = (0.5, 1.0, 2.0, math.inf)
"""Of the load buckets of a table."""
_ENDPOINTS, _SLOTS, _RUNS = 64, 32, 1000
_HEAD, _HISTORY, _TURN, _LONGEST = 40, 120, 12, 500
"""Items of a prompt: the workflow's text, a run's history at first, what a turn adds; most."""
_ITEM_TOKENS = 16


class Took(NamedTuple):
    """Microseconds of each decision: until its command is known, and of its counting after it."""

    answer: list[float]
    counting: list[float]

    @property
    def both(self) -> list[float]:
        """Of the two together."""
        return list(map(sum, zip(self.answer, self.counting, strict=True)))


def decision_figures(decisions: int, *, rounds: int = 3) -> Iterator[Figure]:
    """Yield p50 and p99 of a decision, of its counting, and p50 by the size of the graph.

    Parameters
    ----------
    decisions
        Of each round.
    rounds
        Of each load; the figure is the least of them.
    """
    took = [decision_us(decisions) for _ in range(rounds)]
    answers = [one.answer for one in took]
    yield Figure.at_most("decision_p50", _least(answers, 0.5), "us", 20.0)
    yield Figure.at_most("decision_p99", _least(answers, 0.99), "us", 100.0)
    for name, times in (
        ("counting_after_it", [one.counting for one in took]),
        ("and_counting", [one.both for one in took]),
    ):
        yield Figure.of(f"decision_{name}_p50", _least(times, 0.5), "us")
        yield Figure.of(f"decision_{name}_p99", _least(times, 0.99), "us")
    by_size = {}
    for sites in (1, 10, 100, 1000):
        by_size[sites] = _least(
            [decision_us(decisions, sites=sites).answer for _ in range(rounds)], 0.5
        )
        yield Figure.at_most(f"decision_p50_graph_of_{sites}", by_size[sites], "us", 20.0)
    yield Figure.at_most("decision_p50_graph_1000_over_1", by_size[1000] / by_size[1], "x", 1.5)


def _least(rounds: Iterable[list[float]], level: float) -> float:
    return min(quantile(times, level) for times in rounds)


def decision_us(
    decisions: int,
    *,
    endpoints: int = _ENDPOINTS,
    slots: int = _SLOTS,
    sites: int = 50,
    policy: str = "almanac",
    instead: Callable[[Router, CallArrived], object] | None = None,
) -> Took:
    """Return what each of a number of decisions took, microseconds.

    Parameters
    ----------
    endpoints, slots, sites, policy
        See `Load`.
    instead
        What is timed instead of the answer, just before it.
    """
    load = Load(endpoints, slots=slots, sites=sites, policy=policy)
    router, clock = load.router, time.perf_counter_ns
    took = Took([], [])

    def act(event: CallArrived) -> None:
        begun = clock()
        if instead is None:
            router.decide(event)
        else:
            instead(router, event)
        answered = clock()
        if instead is not None:
            router.decide(event)
        between = clock()
        router.settle()
        took.counting.append((clock() - between) / 1e3)
        took.answer.append((answered - begun) / 1e3)

    # What lives long is not collected again with each of the few calls measured.
    gc.collect()
    gc.freeze()
    try:
        for _ in range(decisions):
            load.turn(act)
    finally:
        gc.unfreeze()
    return took


class Load:
    """A router in the middle of its work.

    Parameters
    ----------
    endpoints
        In the fleet; there are as many runs for each as a thousand are for 64.
    slots
        Of each endpoint.
    sites
        Call sites of the workflow, each with rows in the dispatch table.
    policy
        Its name.

    Attributes
    ----------
    router
        As it is now.
    """

    def __init__(
        self,
        endpoints: int = _ENDPOINTS,
        *,
        slots: int = _SLOTS,
        sites: int = 50,
        policy: str = "almanac",
    ) -> None:
        fleet = _fleet(endpoints, slots)
        parameters: dict[str, Any] = {}
        if policy == "almanac":
            ids = tuple(str(endpoint.id) for endpoint in fleet.endpoints)
            parameters["table"] = DispatchTable(
                fleet_hash=fleet.content_hash(),
                endpoints=ids,
                bounds=BOUNDS,
                rows=tuple(table_rows(ids, workflows=1, sites=sites)),
            )
        self._rng = np.random.default_rng(1)
        self._sites = sites
        self.router = Router(fleet, make_policy(policy, **parameters), Forecaster(EstimateTable()))
        self._now_s = 0.0
        heads = [self._items(_HEAD) for _ in range(8)]
        self._running: list[Call] = []
        for run in range(round(endpoints * _RUNS / _ENDPOINTS)):
            call = self._call(f"r{run}", heads[run % 8] + self._items(_HISTORY), 0)
            self.router.handle(CallArrived(call=call, now_s=0.0))
            self._running.append(call)
            if run % 4:
                self.router.handle(FirstToken(call_id=call.call_id, now_s=0.0))

    def turn(self, act: Callable[[CallArrived], object]) -> None:
        """End the call that is oldest and let ``act`` place the one that follows it."""
        self._now_s += 0.004  # 250 calls a second
        last = self._running.pop(0)
        prefix = last.prefix + self._items(_TURN)
        if len(prefix) > _LONGEST:
            prefix = prefix[:_HEAD] + self._items(_HISTORY)  # another run of the workflow
        call = self._call(last.run_id, prefix, last.visit + 1)
        self.router.handle(CallFinished(call_id=last.call_id, now_s=self._now_s, output_tokens=100))
        act(CallArrived(call=call, now_s=self._now_s))
        self._running.append(call)
        if self._rng.random() < 0.75:
            self.router.handle(FirstToken(call_id=call.call_id, now_s=self._now_s))

    def _items(self, count: int) -> tuple[int, ...]:
        """Return items that no other prompt has."""
        return tuple(self._rng.integers(1 << 60, size=count).tolist())

    def _call(self, run: str, prefix: tuple[int, ...], turn: int) -> Call:
        return Call(
            call_id=f"{run}/{turn}",
            run_id=run,
            workflow_hash="w0",
            site=f"n{turn % self._sites}#0",
            prompt_tokens=_ITEM_TOKENS * len(prefix) + 8,
            prefix=prefix,
            visit=turn,
        )


def table_rows(endpoints: Sequence[str], *, workflows: int, sites: int) -> Iterator[Row]:
    """Yield rows like those of `compile_table`: numbers of four and five decimals."""
    rng = np.random.default_rng(0)
    for workflow in range(workflows):
        for site in range(sites):
            for bucket, bound in enumerate(BOUNDS):
                numbers = rng.random((len(endpoints), 3)).tolist()
                ranked = tuple(
                    Ranked(
                        endpoint=name,
                        cost_s=round(9 * cost, 4),
                        share=round(share, 4),
                        price=round(price, 5),
                    )
                    for name, (cost, share, price) in zip(endpoints, numbers, strict=True)
                )
                yield Row(
                    workflow_hash=f"w{workflow}",
                    site=f"n{site}#0",
                    bucket=bucket,
                    valid_from=BOUNDS[bucket - 1] if bucket else 0.0,
                    valid_to=bound,
                    ranked=ranked,
                    reason=f"planned for {workflow} runs/s, gap 1.0%; {endpoints[0]} takes "
                    f"{ranked[0].share:.0%}",
                )


def _fleet(count: int, slots: int) -> Fleet:
    """Return the demo fleet, repeated."""
    base = load_fleet(data_dir() / "fleets" / "demo.yaml").endpoints
    kinds = [base[number % len(base)] for number in range(count)]
    return Fleet(
        name="bench",
        endpoints=tuple(
            Endpoint(
                id=EndpointId(f"e{number:02d}"),
                model=kind.model,
                gpu=kind.gpu,
                latency=kind.latency,
                kv_blocks=slots * 500,
                max_num_seqs=slots,
            )
            for number, kind in enumerate(kinds)
        ),
    )
