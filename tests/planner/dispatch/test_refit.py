"""A router whose fleet changes while it serves."""

from __future__ import annotations

from dataclasses import replace

from planner.dispatch.events import Call, CallArrived, CallFinished, EndpointDown, FirstToken
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.dispatch.router import Router
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId
from planner.domain.latency import LatencyRow

ROW = LatencyRow(
    prefill_base_ms=3.0,
    prefill_us_per_token=20.0,
    prefill_ns_per_token_sq=0.5,
    decode_base_ms=6.0,
    decode_us_per_call=10.0,
    decode_ns_per_kv_token=40.0,
)


def endpoint(name, **changes):
    values = {"model": "m", "gpu": "H100", "latency": ROW, "kv_blocks": 500, "max_num_seqs": 4}
    return Endpoint(id=EndpointId(name), **{**values, **changes})


def fleet(*endpoints):
    return Fleet(name="f", endpoints=endpoints)


def call(name):
    return Call(call_id=name, prompt_tokens=64, prefix=(1, 2, 3, 4), prefix_tokens=16.0)


def router_of(*endpoints):
    forecaster = Forecaster(EstimateTable())
    return Router(fleet(*endpoints), make_policy("least_load"), forecaster, online=True)


def test_a_new_endpoint_takes_calls_and_old_ones_keep_theirs():
    """Counters, caches and learned rows stay in place; the new endpoint is the idle one."""
    router = router_of(endpoint("a"))
    (sent,) = router.handle(CallArrived(call=call("1"), now_s=0.0))
    learned = router.learner.rows[0]
    router.refit(fleet(endpoint("a"), endpoint("b")))
    assert router.view.states[0].in_flight == 1
    assert router.view.states[0].prefix.match((1, 2, 3, 4)) == 4
    assert router.learner.rows[0] is learned
    (second,) = router.handle(CallArrived(call=call("2"), now_s=0.1))
    assert (sent.endpoint, second.endpoint) == (0, 1)
    for name in ("1", "2"):
        router.handle(FirstToken(call_id=name, now_s=0.5))
        router.handle(CallFinished(call_id=name, now_s=1.0, output_tokens=5))
    assert [row.observations for row in router.learner.rows] == [2, 2]
    assert router.in_flight == 0


def test_changed_facts_are_taken_up_in_place():
    """Another latency row is learned anew, another size of the KV pool limits what fits."""
    router = router_of(endpoint("a"), endpoint("b"))
    learned = router.learner.rows
    slow = replace(ROW, decode_base_ms=60.0)
    router.refit(fleet(endpoint("a", latency=slow), endpoint("b", kv_blocks=10)))
    first, second = router.view.states
    assert first.latency == slow
    assert router.learner.rows[0] is not learned[0]
    assert router.learner.rows[1] is learned[1]
    assert second.most_tokens == 9 * 16


def test_an_endpoint_that_is_down_stays_down():
    """A change of the fleet says nothing of health."""
    router = router_of(endpoint("a"), endpoint("b"))
    router.handle(EndpointDown(endpoint=0, now_s=0.0))
    router.refit(fleet(endpoint("a"), endpoint("b"), endpoint("c")))
    assert [state.healthy for state in router.view.states] == [False, True, True]
