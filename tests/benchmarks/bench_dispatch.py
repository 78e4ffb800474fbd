"""Time of one dispatch decision by policy, as ratios to round robin measured in the same run.

Run by hand: ``python tests/benchmarks/bench_dispatch.py [--json]``. A fleet of 5 and of 64
endpoints carries half its slots in calls; each policy then places and removes calls.
"""

# ruff: noqa: T201 - a script run by hand
from __future__ import annotations

import json
import sys
import time

import numpy as np

from planner.dispatch.events import Call, CallArrived, CallFinished
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.dispatch.router import Router
from planner.domain.estimates import EstimateTable
from planner.domain.files import data_dir
from planner.domain.fleet import Endpoint, Fleet, load_fleet
from planner.domain.ids import EndpointId

POLICIES = (
    "round_robin", "power_of_two", "prefix_affinity", "least_expected_finish", "marginal_cost",
)  # fmt: skip
DECISIONS = 400


def fleet_of(count: int) -> Fleet:
    """Return the demo fleet, repeated to ``count`` endpoints."""
    base = load_fleet(data_dir() / "fleets" / "demo.yaml").endpoints
    kinds = [base[number % len(base)] for number in range(count)]
    return Fleet(
        name=f"demo x {count}",
        endpoints=tuple(
            Endpoint(
                id=EndpointId(f"e{number}"),
                model=kind.model,
                gpu=kind.gpu,
                latency=kind.latency,
                kv_blocks=kind.kv_blocks,
                max_num_seqs=kind.max_num_seqs,
            )
            for number, kind in enumerate(kinds)
        ),
    )


def decision_us(policy: str, count: int) -> tuple[float, float]:
    """Return p50 and p99 of one decision in microseconds."""
    router = Router(fleet_of(count), make_policy(policy), Forecaster(EstimateTable()))
    rng = np.random.default_rng(0)
    for number in range(4 * count):
        prefix = tuple(int(item) for item in rng.integers(1 << 60, size=60))
        call = Call(call_id=f"load-{number}", prompt_tokens=960, prefix=prefix)
        router.handle(CallArrived(call=call, now_s=0.0))
    took = []
    for number in range(DECISIONS):
        call = Call(
            call_id=f"c{number}", prompt_tokens=960, prefix=tuple(range(number, number + 60))
        )
        arrived = CallArrived(call=call, now_s=1.0)
        begin = time.perf_counter()
        router.handle(arrived)
        took.append((time.perf_counter() - begin) * 1e6)
        router.handle(CallFinished(call_id=call.call_id, now_s=1.0, output_tokens=1))
    return float(np.percentile(took, 50)), float(np.percentile(took, 99))


def main() -> None:
    """Print p50, p99 and the ratio to round robin for each policy and fleet size."""
    rows = []
    for count in (5, 64):
        base, _ = decision_us("round_robin", count)
        for policy in POLICIES:
            p50, p99 = decision_us(policy, count)
            for name, value in (("p50", p50), ("p99", p99)):
                rows.append(
                    {
                        "name": f"decision {name}, {policy}, {count} endpoints",
                        "value": round(value, 1),
                        "unit": "us",
                        "bar": None,
                        "holds": None,
                    }
                )
            if "--json" not in sys.argv:
                print(
                    f"{count:3d} endpoints  {policy:22s} p50 {p50:8.1f} us  p99 {p99:8.1f} us  "
                    f"{p50 / base:6.1f} x round robin"
                )
    if "--json" in sys.argv:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
