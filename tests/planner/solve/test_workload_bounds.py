"""Bounds of whole workloads: no policy beats them, and each is what a small case says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import POLICIES, Planned, make_policy
from planner.dispatch.table import DispatchTable
from planner.domain.blocks import Segment
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import NodeId, RunId, SiteId, WorkflowHash
from planner.domain.run import RunSpec, Task
from planner.domain.trace import RunRecord
from planner.domain.workflow import Workflow
from planner.sim.kernel import simulate
from planner.sim.workload import burst_arrivals, poisson_arrivals, sampled_workload
from planner.solve.solver import Budget, Demand
from planner.solve.tables import mix_table
from planner.solve.workload_bounds import workload_bound
from tests.planner.graph.research import research_estimate, research_workflow

from .small import endpoint, fleet, session

WORKFLOW, ESTIMATE = research_workflow(), research_estimate()


def random_fleet(rng: np.random.Generator, *, pools: bool) -> Fleet:
    """Return two or three endpoints whose speeds and slots differ, with pools if asked."""
    scales = rng.uniform(0.02, 0.2, 3)
    kept: list[Endpoint] = [
        endpoint(f"e{n}", float(scale), int(rng.integers(1, 9)), "any", 4000)
        for n, scale in enumerate(scales[: 2 if pools else 3])
    ]
    if pools:
        kv = {"kv_bytes_per_token": 100_000}
        kept.append(replace(endpoint("p", 0.05, 8, "any", 4000), role="prefill", **kv))  # type: ignore[arg-type]
        kept.append(replace(endpoint("d", 0.05, 8, "any", 4000), role="decode", **kv))  # type: ignore[arg-type]
    return Fleet(name="random", endpoints=tuple(kept))


def planned(workflow: Workflow, machines: Fleet, estimates: EstimateTable) -> DispatchTable:
    """Return a quickly made dispatch table."""
    return mix_table(
        [Demand(workflow=workflow, rate_rps=1e-3)],
        machines,
        estimates,
        factors=(1.0,),
        budget=Budget.reproducible(0.1, relative_gap=0.5),
        run_classes=2,
        scenarios=2,
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["light", "heavy", "burst", "pools", "sessions"])
def test_no_policy_beats_the_bounds(kind: str, seed: int) -> None:
    """Every policy's realised mean and percentiles lie at or above the bounds of the same runs."""
    rng = np.random.default_rng((seed, len(kind)))
    machines = random_fleet(rng, pools=kind == "pools")
    workflow, estimate = session(4) if kind == "sessions" else (WORKFLOW, ESTIMATE)
    if kind == "sessions":
        nodes = tuple(
            replace(one, call_sites=tuple(replace(s, model="any") for s in one.call_sites))
            for one in workflow.nodes
        )
        workflow = replace(workflow, nodes=nodes)
    count = 10
    rate = {"light": 0.02, "heavy": 3.0}.get(kind, 0.3)
    times = burst_arrivals(count) if kind == "burst" else poisson_arrivals(rate, count, rng)
    specs = sampled_workload(workflow, estimate, times, seed=seed)
    bound = workload_bound(specs, machines)
    table = EstimateTable(workflows={workflow.content_hash: estimate})
    forecaster = Forecaster(table, [workflow])
    assert bound.mean_s == max(bound.parts.values())
    for name in POLICIES:
        policy = make_policy(name, seed=seed)
        if isinstance(policy, Planned):
            policy = make_policy(name, seed=seed, table=planned(workflow, machines, table))
        records = simulate(specs, machines, policy, forecaster, seed=seed)
        latencies = np.sort([r.finish_s - r.arrival_s for r in records if isinstance(r, RunRecord)])
        assert latencies.size == count
        assert float(latencies.mean()) >= bound.mean_s - 1e-9, name
        for percent, least_s in bound.percentile_s.items():
            value = float(latencies[int(np.ceil(percent / 100 * count)) - 1])
            assert value >= least_s - 1e-6, (name, percent)


def run(number: int, arrival_s: float, prompt: tuple[Segment, ...], output: int = 100) -> RunSpec:
    """Return a run of one call."""
    task = Task(
        index=0, node=NodeId("a"), kind="llm", site=SiteId("a#0"), prompt=prompt,
        output_tokens=output, output_key=10_000 + number,
    )  # fmt: skip
    return RunSpec(
        run_id=RunId(f"r{number}"), workflow="w", workflow_hash=WorkflowHash("w"),
        arrival_s=arrival_s, tasks=(task,),
    )  # fmt: skip


def test_critical_path_and_prefix_of_one_call() -> None:
    """Warm, 12 of 300 tokens do not fill a block; cold, all of them are prefilled at 1 ms.

    Then 9 ms for the prompt's step and 99 steps of 10 ms.
    """
    alone = workload_bound([run(0, 0.0, (Segment(1, 300),))], fleet(endpoint("e")))
    assert alone.parts["critical path"] == pytest.approx(0.012 + 0.009 + 0.99)
    assert alone.parts["prefix"] == pytest.approx(0.3 + 0.009 + 0.99)
    assert alone.mean_s >= alone.parts["prefix"]


def test_prefix_counts_what_others_can_have_left() -> None:
    """A second call that starts with the same 160 tokens may find them, nobody its own."""
    specs = [
        run(0, 0.0, (Segment(1, 160), Segment(2, 140))),
        run(1, 9.0, (Segment(1, 160), Segment(3, 140))),
    ]
    found = workload_bound(specs, fleet(endpoint("e")))
    assert found.parts["prefix"] == pytest.approx(0.14 + 0.009 + 0.99)


def test_load_bounds_a_burst() -> None:
    """Eight calls at once on one slot are served one after the other: 4.5 times the mean work."""
    specs = [run(n, 0.0, (Segment(n, 16),)) for n in range(8)]
    machines = fleet(endpoint("e", slots=1))
    found = workload_bound(specs, machines)
    work = 0.016 + 0.009 + 0.99
    assert found.parts["load"] == pytest.approx(4.5 * work)
    assert found.name == "load"
    assert found.parts["lp"] >= 3.9 * work
    assert found.percentile_s[95] == pytest.approx(8 * work, rel=1e-6)


def test_long_chains_and_queues_count_together() -> None:
    """Sixty calls at once wait for each other, eight long answers do not: lp sees both."""
    specs = [run(n, 0.0, (Segment(n, 16),)) for n in range(60)]
    specs += [run(60 + n, 500.0 * (n + 1), (Segment(90 + n, 16),), 3000) for n in range(8)]
    found = workload_bound(specs, fleet(endpoint("e", slots=8)))
    assert found.name == "lp"
    assert found.mean_s > 1.2 * max(found.parts["prefix"], found.parts["load"])


def test_faster_fleets_have_lower_bounds() -> None:
    """Another endpoint never raises a bound."""
    specs = sampled_workload(
        WORKFLOW, ESTIMATE, poisson_arrivals(1.0, 10, np.random.default_rng(1)), seed=1
    )
    one = endpoint("e0", 0.1, 4, "any", 4000)
    few = workload_bound(specs, fleet(one))
    more = workload_bound(specs, fleet(one, endpoint("e1", 0.05, 4, "any", 4000)))
    for name, value in more.parts.items():
        assert value <= few.parts[name] + 1e-6
    for percent, value in more.percentile_s.items():
        assert value <= few.percentile_s[percent] + 1e-6


def test_bad_workloads_are_refused() -> None:
    """No run, or a call that fits no endpoint, is bad input."""
    with pytest.raises(InvalidInput, match="no run"):
        workload_bound([], fleet(endpoint("e")))
    with pytest.raises(InvalidInput, match="needs 400 tokens"):
        workload_bound([run(0, 0.0, (Segment(1, 300),))], fleet(endpoint("e", kv_blocks=20)))
