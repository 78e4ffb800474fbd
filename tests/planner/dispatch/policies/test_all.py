"""Promises that every registered policy keeps."""

import inspect

import pytest

from planner.dispatch.cost import call_cost, fleet_costs
from planner.dispatch.forecast import Forecast, Forecaster
from planner.dispatch.policies import POLICIES, make_policy
from planner.dispatch.policies.hexagent import HexAGenT
from planner.dispatch.policies.queued import QueuedPolicy
from planner.dispatch.view import FleetView
from planner.domain.blocks import Segment
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Fleet
from planner.domain.ids import NodeId, RunId, SiteId, WorkflowHash
from planner.domain.run import RunSpec, Task
from planner.domain.trace import RunRecord
from planner.sim.companions import companions_of
from planner.sim.kernel import simulate

from .bench import arrive, busy, endpoint, finish, fleet, router, states

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


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_calls_without_identity_are_served_and_forgotten(name: str) -> None:
    """A client that says nothing of runs is served like others, and leaves nothing behind."""
    policy = make_policy(name, seed=1)
    desk = router(policy, endpoint("e0", slots=2))
    waiting: list[str] = []
    for number in range(8):
        waiting += arrive(desk, f"c{number}", float(number), run_id="")
    for now_s in range(20, 40):
        if waiting:
            waiting += finish(desk, waiting.pop(0).partition("@")[0], float(now_s))
    assert (desk.in_flight, desk.held) == (0, 0)
    if isinstance(policy, QueuedPolicy):
        assert policy.runs.all() == []
    if isinstance(policy, HexAGenT):
        assert policy.tracked == 0


def test_decode_costs_of_a_fleet_are_those_of_each_endpoint() -> None:
    """`fleet_costs` and `call_cost` agree on a prompt that was computed elsewhere."""
    found = states(endpoint("a", slots=2), endpoint("b", speed=2.0, slots=2))
    view = FleetView(found)
    busy(found[0], 3)
    forecast = Forecast(output_tokens=50.0, criticality=1.0)
    both = fleet_costs(900, (), 16.0, forecast, view, 0.0, prefilled=True)
    for state in found:
        alone = call_cost(900, (), 16.0, forecast, state, 0.0, prefilled=True)
        assert both[state.index].own_s == pytest.approx(alone.own_s)
        assert both[state.index].service_s == pytest.approx(alone.service_s)
