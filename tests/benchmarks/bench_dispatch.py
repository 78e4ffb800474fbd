"""Decisions and the dispatch table by policy, fleet and size, beside what they replaced.

Run by hand: ``python tests/benchmarks/bench_dispatch.py [--json]``. What a decision is and how it
is timed says `runtime.bench.decisions`. "Scalar" is the frozen form in
`tests/planner/dispatch/frozen.py`: the costs of each endpoint one by one, with a loop over its
residents, measured alone.
"""

# ruff: noqa: T201 - a script run by hand
from __future__ import annotations

import gc
import json
import os
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from planner.dispatch.events import CallArrived
from planner.dispatch.router import Router
from planner.dispatch.table import DispatchTable
from runtime.bench.decisions import BOUNDS, decision_us, table_rows
from runtime.bench.processes import resident_mb
from tests.planner.dispatch.frozen import scalar_costs

DECISIONS = 2000


def scalar(router: Router, event: CallArrived) -> None:
    """Reckon costs as they were reckoned before there were arrays."""
    forecast = router.forecaster.of(event.call)
    scalar_costs(event.call, forecast, router.view.states, event.now_s)


def quantiles(values: list[float]) -> tuple[float, float]:
    """Return p50 and p99."""
    return float(np.percentile(values, 50)), float(np.percentile(values, 99))


def decisions() -> Iterator[dict[str, Any]]:
    """Measure decisions by policy, fleet size, fullness and size of the graph."""
    for count, slots in ((5, 32), (64, 32), (64, 8)):
        full = "" if slots == 32 else ", no slot free"
        where = f"{count} endpoints{full}"
        p50, p99 = quantiles(
            decision_us(
                200, endpoints=count, slots=slots, policy="round_robin", instead=scalar
            ).answer
        )
        yield entry(f"scalar costs alone p50, {where}", p50, "us")
        yield entry(f"scalar costs alone p99, {where}", p99, "us")
        for policy in ("round_robin", "least_expected_finish", "marginal_cost", "almanac"):
            p50, p99 = quantiles(
                decision_us(DECISIONS, endpoints=count, slots=slots, policy=policy).answer
            )
            bars = (20.0, 100.0) if policy == "almanac" and count == 64 else (None, None)
            yield entry(f"decision p50, {policy}, {where}", p50, "us", bars[0])
            yield entry(f"decision p99, {policy}, {where}", p99, "us", bars[1])
    for sites in (1, 10, 100, 1000):
        p50, _ = quantiles(decision_us(DECISIONS, sites=sites).answer)
        yield entry(f"decision p50, almanac, 64 endpoints, graph of {sites}", p50, "us", 20.0)


def tables() -> Iterator[dict[str, Any]]:
    """Measure look-up and memory of 200 workflows x 50 call sites x 64 endpoints x 4 buckets."""
    endpoints = tuple(f"e{number:02d}" for number in range(64))
    few = list(table_rows(endpoints, workflows=2, sites=50))
    tracemalloc.start()
    kept = list(table_rows(endpoints, workflows=2, sites=50))
    as_rows = tracemalloc.get_traced_memory()[0] / len(kept) * 40_000 / 1e6
    tracemalloc.stop()
    yield entry("table memory as rows of objects (scaled)", as_rows, "MB")
    del few, kept
    gc.collect()
    before = resident_mb([os.getpid()])
    table = DispatchTable(
        fleet_hash="bench",
        endpoints=endpoints,
        bounds=BOUNDS,
        rows=table_rows(endpoints, workflows=200, sites=50),  # type: ignore[arg-type]
    )
    gc.collect()
    yield entry("table memory, resident set", resident_mb([os.getpid()]) - before, "MB")
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
        bounds=BOUNDS,
        rows=table_rows(endpoints, workflows=20, sites=50),  # type: ignore[arg-type]
    )
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] / 1e6 * 10
    tracemalloc.stop()
    del tenth
    yield entry("table memory, traced (a tenth, scaled)", held, "MB", 50.0)


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
