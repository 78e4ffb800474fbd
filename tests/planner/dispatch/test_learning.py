"""Routers that learn from the calls they sent."""

from dataclasses import astuple

import numpy as np
import pytest

from planner.dispatch.events import Call, CallArrived, CallFailed, CallFinished, FirstToken
from planner.dispatch.forecast import Forecaster
from planner.dispatch.learning import CorrectedForecaster
from planner.dispatch.policies import make_policy
from planner.dispatch.router import Router
from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import NodeId
from planner.domain.latency import LatencyRow
from planner.domain.workflow import END, START, CallSite, Node, Workflow
from planner.sim.engine import Engine, EngineConfig, EngineRequest, Finished
from planner.sim.engine import FirstToken as EngineFirst
from planner.sim.steptime import RowStepTime

TRUE = LatencyRow(
    prefill_base_ms=20, prefill_us_per_token=80, prefill_ns_per_token_sq=1,
    decode_base_ms=15, decode_us_per_call=200, decode_ns_per_kv_token=50,
)  # fmt: skip
WRONG = LatencyRow(
    prefill_base_ms=30, prefill_us_per_token=200, prefill_ns_per_token_sq=5,
    decode_base_ms=40, decode_us_per_call=100, decode_ns_per_kv_token=150,
)  # fmt: skip
SITE = SiteEstimate(
    output_tokens=Quantiles.constant(100.0), prompt_tokens=Quantiles.constant(800.0)
)
ESTIMATES = EstimateTable(workflows={"w": WorkflowEstimate(sites={"a#0": SITE})})


def _router(row, *, online=True, estimates=ESTIMATES, count=1):
    endpoints = tuple(
        Endpoint(
            id=f"e{number}", model="m", gpu="g", latency=row, kv_blocks=20_000, max_num_seqs=64
        )
        for number in range(count)
    )
    return Router(
        Fleet(endpoints=endpoints, name="f"),
        make_policy("marginal_cost"),
        Forecaster(estimates),
        online=online,
    )


def _serve(router, truth, *, calls, rate_rps=1.0, streamed=True, start_s=0.0):
    """Serve Poisson calls on simulated engines; return relative errors of the forecasts.

    ``truth`` is one row for all endpoints, or one each.
    """
    rng = np.random.default_rng(0)
    rows = [truth] * len(router.fleet.endpoints) if isinstance(truth, LatencyRow) else truth
    engines = [Engine(EngineConfig(kv_blocks=20_000), RowStepTime(row)) for row in rows]
    at = start_s
    sent, errors = {}, []

    def advance(to_s):
        events: list[object] = []
        for engine in engines:
            events += engine.advance(to_s)
        for event in sorted(events, key=lambda one: one.time_s):
            send, call, output = sent[event.request.request_id]
            if isinstance(event, EngineFirst):
                if streamed:
                    router.handle(FirstToken(call_id=call.call_id, now_s=event.time_s))
            elif isinstance(event, Finished):
                took_s = event.time_s - call.ready_s
                errors.append(abs(send.predicted_finish_s - event.time_s) / took_s)
                router.handle(
                    CallFinished(call_id=call.call_id, now_s=event.time_s, output_tokens=output)
                )

    for number in range(calls):
        at += float(rng.exponential(1 / rate_rps))
        advance(at)
        prompt, output = int(rng.integers(200, 2000)), int(rng.integers(40, 160))
        call = Call(
            call_id=f"{start_s}-{number}", workflow_hash="w", site="a#0", prompt_tokens=prompt,
            ready_s=at, max_tokens=output,
        )  # fmt: skip
        (send,) = router.handle(CallArrived(call=call, now_s=at))
        sent[call.call_id] = send, call, output
        engines[send.endpoint].submit(
            EngineRequest(
                request_id=call.call_id, prompt_tokens=prompt, output_tokens=output,
                block_hashes=(), priority=0, arrival_s=at,
            ),
            at,
        )  # fmt: skip
    advance(at + 1e4)
    return errors


@pytest.mark.parametrize("streamed", [True, False])
def test_a_wrong_row_is_corrected_by_tens_of_calls(streamed):
    """A wrong row doubles forecasts; after thirty calls they are nearly as good as the true row's.

    Even with the true row a forecast does not know the calls to come.
    """
    blind, learned, known = (
        _serve(_router(row, online=online), TRUE, calls=200, streamed=streamed)
        for row, online in ((WRONG, False), (WRONG, True), (TRUE, False))
    )
    assert np.median(blind[30:]) > 0.8
    assert np.median(learned[30:]) < np.median(known[30:]) + 0.03


def test_a_right_row_stays_right():
    """Where the row is true, learning does not make forecasts worse by more than a little."""
    blind = _serve(_router(TRUE, online=False), TRUE, calls=300, rate_rps=3.0)
    learned = _serve(_router(TRUE), TRUE, calls=300, rate_rps=3.0)
    assert np.median(learned) < np.median(blind) + 0.01


def test_a_slowdown_moves_the_row_and_raises_the_alarm():
    """An endpoint that turns twice as slow is forecast so, and says that it drifts."""
    router = _router(TRUE)
    _serve(router, TRUE, calls=150)
    state, row = router.view.states[0], router.learner.rows[0]
    before_s = state.latency.decode_step_s(2, 2000)
    assert not row.drifting
    _serve(router, TRUE.scaled(2.0), calls=150, start_s=1000.0)
    assert row.drifting
    assert state.latency.decode_step_s(2, 2000) == pytest.approx(2 * before_s, rel=0.15)


def test_learning_is_deterministic_and_off_unless_asked():
    """The same events teach the same row; a router that was not asked keeps the row it got."""
    rows = []
    for online in (True, True, False):
        router = _router(WRONG, online=online)
        _serve(router, TRUE, calls=40)
        rows.append(router.view.states[0].latency)
    assert astuple(rows[0]) == astuple(rows[1])
    assert rows[2] == WRONG


def test_the_slower_of_two_equal_endpoints_is_found_out():
    """Of two endpoints with one row in the fleet file the slower one gets fewer calls."""
    router = _router(TRUE, count=2)
    truths = (TRUE, TRUE.scaled(3.0))
    _serve(router, truths, calls=200)
    fast, slow = (state.latency.decode_step_s(4, 4000) for state in router.view.states)
    assert slow > 1.5 * fast
    assert router.learner.rows[0].observations > 1.5 * router.learner.rows[1].observations


def _finish(router, name, output, **more):
    call = Call(call_id=name, workflow_hash="w", site="a#0", prompt_tokens=10, **more)
    router.handle(CallArrived(call=call, now_s=0.0))
    router.handle(CallFinished(call_id=name, now_s=1.0, output_tokens=output))


def test_lengths_follow_a_site_that_writes_longer_answers():
    """The forecast moves to what the site writes now, within its declared limit."""
    router = _router(TRUE)
    for number in range(100):
        _finish(router, str(number), 300)
    call = Call(call_id="x", workflow_hash="w", site="a#0", prompt_tokens=10)
    assert router.forecaster.of(call).output_tokens == pytest.approx(260, rel=0.1)
    limited = Call(call_id="x", workflow_hash="w", site="a#0", prompt_tokens=10, max_tokens=150)
    assert router.forecaster.of(limited).output_tokens == 150
    other = Call(call_id="x", workflow_hash="w", site="b#0", prompt_tokens=10)
    assert router.forecaster.of(other) == Forecaster(ESTIMATES).of(other)
    kept = router.lengths.kept[1].to_json()
    assert kept["coverage"] == 0.0
    assert kept["coverage_corrected"] > 0.5


def test_calls_that_fail_or_say_no_length_teach_nothing():
    """Failures and answers of no tokens leave rows and lengths as they were."""
    router = _router(TRUE)
    for number, output in enumerate((0, None)):
        call = Call(call_id=str(number), workflow_hash="w", site="a#0", prompt_tokens=10)
        router.handle(CallArrived(call=call, now_s=0.0))
        router.handle(FirstToken(call_id=call.call_id, now_s=1.0))
        router.handle(
            CallFailed(call_id=call.call_id, now_s=9.0)
            if output is None
            else CallFinished(call_id=call.call_id, now_s=9.0, output_tokens=output)
        )
    assert router.learner.rows[0].observations == 0
    assert router.view.states[0].latency == TRUE
    assert router.lengths.kept[0].tracker.seen == 0


def test_a_corrected_forecast_keeps_what_remains_of_the_run():
    """Only the length is corrected: criticality and the run's remainder stay as forecast."""
    nodes = tuple(
        Node(id=NodeId(name), kind="llm", call_sites=(CallSite(id=f"{name}#0", model="m"),))
        for name in ("a", "b")
    )
    flow = Workflow(name="w", nodes=nodes, edges=((START, "a"), ("a", "b"), ("b", END)))
    estimates = EstimateTable(
        workflows={flow.content_hash: WorkflowEstimate(sites={"a#0": SITE, "b#0": SITE})}
    )
    base = Forecaster(estimates, [flow])
    lengths = CorrectedForecaster(base)
    call = Call(call_id="c", workflow_hash=flow.content_hash, site="a#0", prompt_tokens=800)
    lengths.observe(call, 200)
    forecast = lengths.of(call)
    assert forecast.output_tokens > 100.0
    assert forecast.remaining_s == base.of(call).remaining_s > 0.0
    assert forecast.criticality == base.of(call).criticality


def test_a_forecast_asked_for_again_follows_what_was_learned_in_between():
    """Answers are kept for one decision, never beyond the next call that finishes."""
    lengths = CorrectedForecaster(Forecaster(ESTIMATES))
    call = Call(call_id="c", workflow_hash="w", site="a#0", prompt_tokens=800)
    assert lengths.of(call) is lengths.of(call)
    lengths.observe(call, 200)
    longer = lengths.of(call).output_tokens
    assert longer > 100.0
    lengths.observe(call, 300)
    assert lengths.of(call).output_tokens > longer
