"""Decisions and the dispatch table against their bars, beside what they replaced.

Run by hand: ``python tests/benchmarks/bench_dispatch.py [--json]``. A decision is a whole
`Router.handle(CallArrived)`. The fleet carries 1,000 active runs (at 5 endpoints as many per
endpoint), each with a call in flight whose prompt begins with its workflow's text and goes on with
its own; a decision places the next turn of one of them under policy ``almanac`` with a table, then
the call it follows ends. "Scalar" is the frozen form in `tests/planner/dispatch/frozen.py`: the
costs of each endpoint one by one, with a loop over its residents, measured alone. Times are of
the processor, so that what else runs on the machine does not count as waiting; it still slows the
caches, so run it on a machine that is idle.
"""

# ruff: noqa: T201 - a script run by hand
from __future__ import annotations

import gc
import json
import math
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from planner.dispatch.events import Call, CallArrived, CallFinished, FirstToken
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.dispatch.router import Router
from planner.dispatch.table import DispatchTable, Ranked, Row
from planner.domain.estimates import EstimateTable
from planner.domain.files import data_dir
from planner.domain.fleet import Endpoint, Fleet, load_fleet
from planner.domain.ids import EndpointId
from tests.planner.dispatch.frozen import scalar_costs

DECISIONS = 2000
RUNS_PER_ENDPOINT = 1000 / 64
HEAD, HISTORY, TURN = 40, 120, 12
"""Items of a prompt: the workflow's text, a run's history at first, what a turn adds."""
ITEM_TOKENS = 16


def fleet_of(count: int, slots: int) -> Fleet:
    """Return the demo fleet, repeated to ``count`` endpoints of ``slots`` slots each."""
    base = load_fleet(data_dir() / "fleets" / "demo.yaml").endpoints
    kinds = [base[number % len(base)] for number in range(count)]
    return Fleet(
        name=f"demo x {count}",
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


def table_rows(
    endpoints: tuple[str, ...], workflows: int, sites: int, bounds: tuple[float, ...]
) -> Iterator[Row]:
    """Yield rows like those of `compile_table`: numbers of four and five decimals."""
    rng = np.random.default_rng(0)
    for w in range(workflows):
        for k in range(sites):
            for bucket, bound in enumerate(bounds):
                numbers = rng.random((len(endpoints), 3)).tolist()
                ranked = tuple(
                    Ranked(endpoint=e, cost_s=round(9 * a, 4), share=round(b, 4), price=round(c, 5))
                    for e, (a, b, c) in zip(endpoints, numbers, strict=True)
                )
                yield Row(
                    workflow_hash=f"w{w}",
                    site=f"n{k}#0",
                    bucket=bucket,
                    valid_from=bounds[bucket - 1] if bucket else 0.0,
                    valid_to=bound,
                    ranked=ranked,
                    reason=f"planned for {w} runs/s, gap 1.0%; {endpoints[0]} takes "
                    f"{ranked[0].share:.0%}",
                )


class Load:
    """A router in the middle of its work."""

    def __init__(self, count: int, policy: str, *, slots: int, sites: int) -> None:
        fleet = fleet_of(count, slots)
        parameters: dict[str, Any] = {}
        if policy == "almanac":
            ids = tuple(str(endpoint.id) for endpoint in fleet.endpoints)
            bounds = (0.5, 1.0, 2.0, math.inf)
            parameters["table"] = DispatchTable(
                fleet_hash=fleet.content_hash(),
                endpoints=ids,
                bounds=bounds,
                rows=tuple(table_rows(ids, 1, sites, bounds)),
            )
        self.sites = sites
        self.router = Router(fleet, make_policy(policy, **parameters), Forecaster(EstimateTable()))
        self.rng = np.random.default_rng(1)
        self.now_s = 0.0
        heads = [self.items(HEAD) for _ in range(8)]
        self.running: list[Call] = []
        for run in range(round(count * RUNS_PER_ENDPOINT)):
            call = self.call(f"r{run}", heads[run % 8] + self.items(HISTORY), 0)
            self.router.handle(CallArrived(call=call, now_s=0.0))
            self.running.append(call)
            if run % 4:
                self.router.handle(FirstToken(call_id=call.call_id, now_s=0.0))

    def items(self, count: int) -> tuple[int, ...]:
        """Return items that no other prompt has."""
        return tuple(self.rng.integers(1 << 60, size=count).tolist())

    def call(self, run: str, prefix: tuple[int, ...], turn: int) -> Call:
        """Return the call of a run's turn."""
        return Call(
            call_id=f"{run}/{turn}",
            run_id=run,
            workflow_hash="w0",
            site=f"n{turn % self.sites}#0",
            prompt_tokens=ITEM_TOKENS * len(prefix) + 8,
            prefix=prefix,
            visit=turn,
        )

    def turn(self, act: Callable[[CallArrived], object]) -> None:
        """End the call that is oldest and let ``act`` deal with the one that follows it."""
        self.now_s += 0.004  # 250 calls a second
        last = self.running.pop(0)
        prefix = last.prefix + self.items(TURN)
        if len(prefix) > 500:
            prefix = prefix[:HEAD] + self.items(HISTORY)  # another run of the workflow
        call = self.call(last.run_id, prefix, last.visit + 1)
        self.router.handle(CallFinished(call_id=last.call_id, now_s=self.now_s, output_tokens=100))
        act(CallArrived(call=call, now_s=self.now_s))
        self.running.append(call)
        if self.rng.random() < 0.75:
            self.router.handle(FirstToken(call_id=call.call_id, now_s=self.now_s))


def decision_us(
    count: int, policy: str, *, slots: int = 32, sites: int = 50, scalar: bool = False
) -> tuple[float, float]:
    """Return p50 and p99 of one decision, or of the frozen costs alone, in microseconds."""
    load = Load(count, policy, slots=slots, sites=sites)
    took: list[float] = []

    def act(event: CallArrived) -> None:
        if scalar:
            forecast = load.router.forecaster.of(event.call)
            begin = time.thread_time_ns()
            scalar_costs(event.call, forecast, load.router.view.states, event.now_s)
            took.append((time.thread_time_ns() - begin) / 1e3)
            load.router.handle(event)
            return
        begin = time.thread_time_ns()
        load.router.handle(event)
        took.append((time.thread_time_ns() - begin) / 1e3)

    # What lives long is not collected again with each of the few calls measured.
    gc.collect()
    gc.freeze()
    for _ in range(200 if scalar else DECISIONS):
        load.turn(act)
    gc.unfreeze()
    return float(np.percentile(took, 50)), float(np.percentile(took, 99))


def decisions() -> Iterator[dict[str, Any]]:
    """Measure decisions by policy, fleet size, fullness and size of the graph."""
    for count, slots in ((5, 32), (64, 32), (64, 8)):
        full = "" if slots == 32 else ", no slot free"
        where = f"{count} endpoints{full}"
        p50, p99 = decision_us(count, "round_robin", slots=slots, scalar=True)
        yield entry(f"scalar costs alone p50, {where}", p50, "us")
        yield entry(f"scalar costs alone p99, {where}", p99, "us")
        for policy in ("round_robin", "least_expected_finish", "marginal_cost", "almanac"):
            p50, p99 = decision_us(count, policy, slots=slots)
            bars = (20.0, 100.0) if policy == "almanac" and count == 64 else (None, None)
            yield entry(f"decision p50, {policy}, {where}", p50, "us", bars[0])
            yield entry(f"decision p99, {policy}, {where}", p99, "us", bars[1])
    for sites in (1, 10, 100, 1000):
        p50, _ = decision_us(64, "almanac", sites=sites)
        yield entry(f"decision p50, almanac, 64 endpoints, graph of {sites}", p50, "us", 20.0)


def tables() -> Iterator[dict[str, Any]]:
    """Measure look-up and memory of 200 workflows x 50 call sites x 64 endpoints x 4 buckets."""
    endpoints = tuple(f"e{number:02d}" for number in range(64))
    bounds = (0.5, 1.0, 2.0, math.inf)
    few = list(table_rows(endpoints, 2, 50, bounds))
    tracemalloc.start()
    kept = list(table_rows(endpoints, 2, 50, bounds))
    as_rows = tracemalloc.get_traced_memory()[0] / len(kept) * 40_000 / 1e6
    tracemalloc.stop()
    yield entry("table memory as rows of objects (scaled)", as_rows, "MB")
    del few, kept
    gc.collect()
    before = resident_mb()
    table = DispatchTable(
        fleet_hash="bench",
        endpoints=endpoints,
        bounds=bounds,
        rows=table_rows(endpoints, 200, 50, bounds),  # type: ignore[arg-type]
    )
    gc.collect()
    yield entry("table memory, resident set", resident_mb() - before, "MB")
    took = []
    for number in range(20_000):
        workflow, site, load = f"w{number % 200}", f"n{number % 50}#0", number % 30 / 10
        begin = time.perf_counter_ns()
        table.find(workflow, site, load)
        took.append((time.perf_counter_ns() - begin) / 1e3)
    yield entry("table look-up p50", float(np.percentile(took, 50)), "us", 2.0)
    yield entry("table look-up p99", float(np.percentile(took, 99)), "us")
    del table
    gc.collect()
    tracemalloc.start()
    tenth = DispatchTable(
        fleet_hash="bench",
        endpoints=endpoints,
        bounds=bounds,
        rows=table_rows(endpoints, 20, 50, bounds),  # type: ignore[arg-type]
    )
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] / 1e6 * 10
    tracemalloc.stop()
    del tenth
    yield entry("table memory, traced (a tenth, scaled)", held, "MB", 50.0)


def resident_mb() -> float:
    """Return the resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def entry(name: str, value: float, unit: str, bar: float | None = None) -> dict[str, Any]:
    """Return one line of the report; a bar is an upper one."""
    holds = None if bar is None else value <= bar
    return {"name": name, "value": round(value, 2), "unit": unit, "bar": bar, "holds": holds}


def main() -> None:
    """Print each figure, or all as JSON."""
    rows = []
    for kind in (tables, decisions):
        for row in kind():
            rows.append(row)
            if "--json" not in sys.argv:
                bar = "" if row["bar"] is None else f"bar {row['bar']:g}"
                verdict = {True: "holds", False: "MISSED", None: ""}[row["holds"]]
                print(f"{row['name']:62s} {row['value']:9.2f} {row['unit']:3s} {bar:8s} {verdict}")
    if "--json" in sys.argv:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
