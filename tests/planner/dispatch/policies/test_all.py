"""Promises that every registered policy keeps."""

import inspect

import pytest

from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import POLICIES, make_policy
from planner.domain.blocks import Segment
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Fleet
from planner.domain.ids import NodeId, RunId, SiteId, WorkflowHash
from planner.domain.run import RunSpec, Task
from planner.domain.trace import RunRecord
from planner.sim.companions import companions_of
from planner.sim.kernel import simulate

from .bench import endpoint, fleet

WHOLE = fleet(*(endpoint(f"e{n}", speed=1.0 + n, slots=2, kv_blocks=120) for n in range(3)))
POOLS = fleet(
    *(
        endpoint(f"{role[0]}{n}", role=role, speed=1.0 + n, slots=2, kv_bytes_per_token=1000,
                 kv_blocks=120)
        for role in ("prefill", "decode") for n in range(2)
    )
)  # fmt: skip


def burst(count: int) -> list[RunSpec]:
    """Return runs of one shape: a fan of two calls, a tool, and a call that has read both."""
    runs = []
    for number in range(count):
        key = 1000 * number

        def llm(index: int, preds: tuple[int, ...], *more: Segment, key: int = key) -> Task:
            return Task(
                index=index, node=NodeId(f"n{index}"), kind="llm", preds=preds,
                site=SiteId(f"n{index}#0"), prompt=(Segment(1, 64), *more),
                output_tokens=5 + (key // 1000 + index) % 20, output_key=key + 10 + index,
            )  # fmt: skip

        tasks = (
            llm(0, (), Segment(key, 100)),
            llm(1, (), Segment(key, 100)),
            Task(index=2, node=NodeId("tool"), kind="tool", preds=(0, 1), delay_s=0.05),
            llm(3, (2,), Segment(key, 100), Segment(key + 1, 200)),
        )
        runs.append(
            RunSpec(
                run_id=RunId(f"r{number}"),
                workflow="burst",
                workflow_hash=WorkflowHash("w"),
                arrival_s=0.001 * number,
                tasks=tasks,
                tenant=f"t{number % 3}",
            )
        )
    return runs


@pytest.mark.parametrize("which", [WHOLE, POOLS], ids=["whole", "pools"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_burst_drains(name: str, which: Fleet) -> None:
    """Sixty runs on few slots and little KV all end: nothing deadlocks, nothing is forgotten."""
    policy = make_policy(name, seed=1)
    own = companions_of(policy)
    records = simulate(
        burst(60), which, policy, Forecaster(EstimateTable()), seed=1,
        retention=own.retention, eviction=own.eviction,
    )  # fmt: skip
    ends = [record for record in records if isinstance(record, RunRecord)]
    assert [record.status for record in ends] == ["ok"] * 60


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_parameters_are_numbers_with_defaults(name: str) -> None:
    """So they can be written as name:key=value, tuned and reported."""
    parameters = inspect.signature(POLICIES[name]).parameters
    for key, parameter in parameters.items():
        assert key == "table" or isinstance(parameter.default, int | float)
