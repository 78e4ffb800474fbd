"""Decisions in process: a router in the middle of its work, timed call by call.

The fleet has 64 endpoints and 1,000 active runs, each with a call in flight whose prompt begins
with its workflow's text and goes on with its own. A decision is a whole `Router.handle` of the next
turn of one of them under policy ``almanac`` with a table; then the call it follows ends. Times are
of the processor, so that what else runs on the machine does not count as waiting.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence

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

__all__ = ["decision_figures", "decision_us"]

_ENDPOINTS, _SLOTS, _RUNS = 64, 32, 1000
_HEAD, _HISTORY, _TURN, _LONGEST = 40, 120, 12, 500
"""Items of a prompt: the workflow's text, a run's history at first, what a turn adds; most."""
_ITEM_TOKENS = 16
_BOUNDS = (0.5, 1.0, 2.0, math.inf)


def decision_figures(decisions: int) -> Iterator[Figure]:
    """Yield p50 and p99 of a decision, and p50 by the size of the graph."""
    took = decision_us(decisions, sites=50)
    yield Figure.at_most("decision_p50", quantile(took, 0.5), "us", 20.0)
    yield Figure.at_most("decision_p99", quantile(took, 0.99), "us", 100.0)
    by_size = {}
    for sites in (1, 10, 100, 1000):
        by_size[sites] = quantile(decision_us(decisions, sites=sites), 0.5)
        yield Figure.at_most(f"decision_p50_graph_of_{sites}", by_size[sites], "us", 20.0)
    yield Figure.at_most("decision_p50_graph_1000_over_1", by_size[1000] / by_size[1], "x", 1.5)


def decision_us(decisions: int, *, sites: int) -> list[float]:
    """Return what each of a number of decisions took, microseconds.

    Parameters
    ----------
    sites
        Call sites of the workflow, each with rows in the dispatch table.
    """
    load = _Load(sites)
    # What lives long is not collected again with each of the few calls measured.
    gc.collect()
    gc.freeze()
    try:
        return [load.turn() for _ in range(decisions)]
    finally:
        gc.unfreeze()


class _Load:
    """A router in the middle of its work."""

    def __init__(self, sites: int) -> None:
        fleet = _fleet()
        ids = tuple(str(endpoint.id) for endpoint in fleet.endpoints)
        self._rng = np.random.default_rng(1)
        table = DispatchTable(
            fleet_hash=fleet.content_hash(),
            endpoints=ids,
            bounds=_BOUNDS,
            rows=tuple(self._rows(ids, sites)),
        )
        self._sites = sites
        self._router = Router(
            fleet, make_policy("almanac", table=table), Forecaster(EstimateTable())
        )
        self._now_s = 0.0
        heads = [self._items(_HEAD) for _ in range(8)]
        self._running: list[Call] = []
        for run in range(_RUNS):
            call = self._call(f"r{run}", heads[run % 8] + self._items(_HISTORY), 0)
            self._router.handle(CallArrived(call=call, now_s=0.0))
            self._running.append(call)
            if run % 4:
                self._router.handle(FirstToken(call_id=call.call_id, now_s=0.0))

    def turn(self) -> float:
        """End the call that is oldest, place the one that follows it; return its microseconds."""
        self._now_s += 0.004  # 250 calls a second
        last = self._running.pop(0)
        prefix = last.prefix + self._items(_TURN)
        if len(prefix) > _LONGEST:
            prefix = prefix[:_HEAD] + self._items(_HISTORY)  # another run of the workflow
        call = self._call(last.run_id, prefix, last.visit + 1)
        done = CallFinished(call_id=last.call_id, now_s=self._now_s, output_tokens=100)
        self._router.handle(done)
        event = CallArrived(call=call, now_s=self._now_s)
        begun = time.thread_time_ns()
        self._router.handle(event)
        took_us = (time.thread_time_ns() - begun) / 1e3
        self._running.append(call)
        if self._rng.random() < 0.75:
            self._router.handle(FirstToken(call_id=call.call_id, now_s=self._now_s))
        return took_us

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

    def _rows(self, ids: Sequence[str], sites: int) -> Iterator[Row]:
        for site in range(sites):
            for bucket, bound in enumerate(_BOUNDS):
                numbers = self._rng.random((len(ids), 3)).tolist()
                yield Row(
                    workflow_hash="w0",
                    site=f"n{site}#0",
                    bucket=bucket,
                    valid_from=_BOUNDS[bucket - 1] if bucket else 0.0,
                    valid_to=bound,
                    ranked=tuple(
                        Ranked(endpoint=name, cost_s=9 * cost, share=share, price=price)
                        for name, (cost, share, price) in zip(ids, numbers, strict=True)
                    ),
                )


def _fleet() -> Fleet:
    """Return the demo fleet, repeated."""
    base = load_fleet(data_dir() / "fleets" / "demo.yaml").endpoints
    kinds = [base[number % len(base)] for number in range(_ENDPOINTS)]
    return Fleet(
        name="bench",
        endpoints=tuple(
            Endpoint(
                id=EndpointId(f"e{number:02d}"),
                model=kind.model,
                gpu=kind.gpu,
                latency=kind.latency,
                kv_blocks=_SLOTS * 500,
                max_num_seqs=_SLOTS,
            )
            for number, kind in enumerate(kinds)
        ),
    )
