"""Looking through a queue answers as offering its calls one by one does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.dispatch.events import Call, CallArrived, Send
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.dispatch.router import Router
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Fleet
from planner.domain.ids import EndpointId
from planner.domain.trace import CallRecord
from planner.sim.kernel import simulate
from planner.study.settings import Setting, workload


@pytest.mark.parametrize("name", ["fcfs_call", "llf_workflow", "atlas", "hexagent", "astraea"])
@pytest.mark.parametrize(
    "setting",
    [
        Setting(mix="tree", load=1.1, forecasts="oracle"),
        Setting(mix="agents", kv="scarce", load=1.1, forecasts="oracle"),
        Setting(fleet="hetero1", mix="rag", arrivals="burst", forecasts="oracle"),
    ],
    ids=["tree", "scarce", "pools"],
)
def test_same_decisions(name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where and when calls are sent does not depend on how many are looked at together."""
    world, runs = setting.world(), workload(setting, 3, 40)

    def sent() -> list[tuple[str, str, float, float | None]]:
        policy = make_policy(name, seed=0)
        found = simulate(runs, world.fleet, policy, world.forecaster)
        return [
            (one.call_id, one.endpoint, one.sent_s, one.predicted_finish_s)
            for one in found
            if isinstance(one, CallRecord)
        ]

    together = sent()
    monkeypatch.setattr(type(make_policy(name, seed=0)), "looks_ahead", 0)
    assert sent() == together


def test_a_fleet_that_grows_while_calls_wait() -> None:
    """What was kept of calls that wait for a fast endpoint is of the old fleet; a new one comes."""
    one = Setting(load=0.5).make_fleet().endpoints[0]
    fast = replace(one, id=EndpointId("fast"), max_num_seqs=1)
    slow = replace(one, id=EndpointId("slow"), latency=replace(one.latency, scale=1e4))
    router = Router(
        Fleet(name="two", endpoints=(fast, slow)),
        make_policy("fcfs_call"),
        Forecaster(EstimateTable()),
    )
    for n in range(8):
        call = Call(call_id=f"r/{n}", prompt_tokens=64, prefix=(1, 2, 3 + n), ready_s=0.1 * n)
        router.handle(CallArrived(call=call, now_s=0.1 * n))
    assert router.held == 7
    other = replace(fast, id=EndpointId("other"))
    router.refit(Fleet(name="three", endpoints=(fast, slow, other)))
    call = Call(call_id="r/8", prompt_tokens=64, prefix=(1, 2, 11), ready_s=1.0)
    commands = router.handle(CallArrived(call=call, now_s=1.0))
    assert [(one.call_id, one.endpoint) for one in commands if isinstance(one, Send)] == [
        ("r/1", 2)
    ]
