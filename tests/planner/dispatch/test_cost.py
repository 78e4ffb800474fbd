"""Costs of all endpoints in one pass, against the scalar form they replaced."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from planner.dispatch.cost import call_cost, fleet_costs
from planner.dispatch.events import Call
from planner.dispatch.forecast import Forecast, Forecaster
from planner.dispatch.view import EndpointState, FleetView, Resident
from planner.domain.estimates import (
    LEVELS,
    EstimateTable,
    Quantiles,
    SiteEstimate,
    WorkflowEstimate,
)
from planner.domain.fleet import Endpoint
from planner.domain.ids import EndpointId
from planner.domain.latency import LatencyRow
from tests.planner.dispatch.frozen import scalar_costs

FIELDS = ("own_s", "imposed_s", "cached_tokens", "service_s")


def busy_fleet(
    seed: int, *, count: int = 12, slots: int = 6, kv_blocks: int = 3000, asked: bool = False
) -> FleetView:
    """Return unlike endpoints with none to twice their slots of calls, some of them decoding.

    ``asked`` says that what calls impose on others was asked for before any came, so that it has
    been kept up since then.
    """
    rng = np.random.default_rng(seed)
    states = []
    for index in range(count):
        row = LatencyRow(
            prefill_base_ms=float(rng.uniform(5, 20)),
            prefill_us_per_token=float(rng.uniform(20, 200)),
            prefill_ns_per_token_sq=float(rng.uniform(0, 5)),
            decode_base_ms=float(rng.uniform(5, 30)),
            decode_us_per_call=float(rng.uniform(10, 400)),
            decode_ns_per_kv_token=float(rng.uniform(5, 100)),
            scale=float(rng.uniform(0.8, 1.5)),
        )
        endpoint = Endpoint(
            id=EndpointId(f"e{index}"),
            model="m",
            gpu="G",
            latency=row,
            kv_blocks=kv_blocks,
            max_num_seqs=slots,
        )
        states.append(EndpointState(index, endpoint, row))
    view = FleetView(states)
    if asked:
        assert not view.loads.imposed.any()
    for state in states:
        for number in range(int(rng.integers(0, 2 * slots + 1))):
            prompt = int(rng.integers(100, 3000))
            call_id = f"{state.index}-{number}"
            state.add(
                Resident(
                    call_id=call_id,
                    run_id="r",
                    prompt_tokens=prompt,
                    uncached_tokens=prompt * float(rng.random()),
                    output_tokens=float(rng.integers(20, 800)),
                    criticality=float(rng.random()),
                    sent_s=0.0,
                )
            )
            if rng.random() < 0.7:
                state.first_token(call_id, float(rng.uniform(0.0, 3.0)))
            if rng.random() < 0.2:
                state.remove(call_id)
        held = int(rng.integers(0, 200))
        state.prefix.record(tuple(range(held)), 16.0)
    return view


def call(prompt_tokens: int = 2000) -> Call:
    return Call(call_id="c", prompt_tokens=prompt_tokens, prefix=tuple(range(prompt_tokens // 16)))


def pass_of(one: Call, view: FleetView, output_tokens: float, now_s: float = 4.0):
    forecast = Forecast(output_tokens=output_tokens, criticality=1.0)
    costs = fleet_costs(one.prompt_tokens, one.prefix, one.prefix_tokens, forecast, view, now_s)
    return forecast, costs


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kv_blocks", [400, 3000])
def test_one_pass_equals_one_by_one(seed: int, kv_blocks: int) -> None:
    """The costs of all endpoints at once are those of each alone, also where KV is the limit."""
    view = busy_fleet(seed, kv_blocks=kv_blocks)
    for prompt, output in ((3, 1.0), (900, 60.0), (3000, 700.0)):
        one = call(prompt)
        forecast, costs = pass_of(one, view, output)
        for state, cost in zip(view.states, costs, strict=True):
            alone = call_cost(prompt, one.prefix, one.prefix_tokens, forecast, state, 4.0)
            for name in FIELDS:
                assert getattr(cost, name) == pytest.approx(getattr(alone, name), rel=1e-9)


@pytest.mark.parametrize("kv_blocks", [400, 3000])
def test_costs_stay_close_to_the_scalar_form(kv_blocks: int) -> None:
    """Service and cached tokens are exact; waits and imposed delays differ by what is rounded.

    What remains of residents is reckoned at the pace of the endpoint as it is, not with the call
    already on it, and F is read between knots.
    """
    own, imposed = [], []
    for seed in range(10):
        view = busy_fleet(seed, kv_blocks=kv_blocks, asked=bool(seed % 2))
        for prompt, output in ((900, 60.0), (3000, 700.0)):
            one = call(prompt)
            forecast, costs = pass_of(one, view, output)
            before = scalar_costs(one, forecast, view.states, 4.0)
            for old, new in zip(before, costs, strict=True):
                assert new.service_s == pytest.approx(old.service_s, rel=1e-9)
                assert new.cached_tokens == old.cached_tokens
                own.append(new.own_s / old.own_s - 1.0)
                if old.imposed_s:
                    imposed.append(new.imposed_s / old.imposed_s - 1.0)
    assert np.abs(own).max() < 0.2
    assert np.abs(own).mean() < 0.01
    assert np.abs(imposed).max() < 0.05
    assert np.abs(imposed).mean() < 0.005


def test_the_imposed_delay_may_be_left_out() -> None:
    """The rest is the same to the last bit, and what was left out is no number."""
    for kv_blocks in (3000, 300):
        view, one = busy_fleet(5, kv_blocks=kv_blocks), call()
        forecast, whole = pass_of(one, view, 200.0)
        brief = fleet_costs(
            one.prompt_tokens, one.prefix, one.prefix_tokens, forecast, view, 4.0, imposed=False
        )
        assert brief.imposed_s.size == 0
        for name in ("own_s", "service_s", "cached_tokens"):
            assert getattr(brief, name).tolist() == getattr(whole, name).tolist()
        some = brief.take(np.array([1, 3]))
        assert some[1].own_s == whole[3].own_s
        assert math.isnan(some[1].imposed_s)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_imposed_is_the_same_whenever_it_is_first_asked_for(seed: int) -> None:
    """Kept up call by call, or made at the first question: the same, to rounding.

    Without the last two knots, lengths of millions of tokens, which no decision reads.
    """

    def later(view: FleetView) -> FleetView:
        view.loads.advance(4.0)
        for state in view.states[::2]:
            for call_id in list(state.residents)[:2]:
                state.remove(call_id)
        return view

    for after in (lambda view: view, later):
        early, late = after(busy_fleet(seed, asked=True)), after(busy_fleet(seed))
        np.testing.assert_allclose(
            late.loads.imposed[:-2], early.loads.imposed[:-2], rtol=1e-9, atol=1e-6
        )


def test_what_remains_falls_with_time() -> None:
    """A resident that decodes imposes less and less, down to a quarter of its forecast."""
    view = busy_fleet(0, count=1)
    state = view.states[0]
    for call_id in list(state.residents):
        state.remove(call_id)
    state.add(
        Resident(
            call_id="r",
            run_id="r",
            prompt_tokens=100,
            uncached_tokens=0.0,
            output_tokens=400.0,
            criticality=1.0,
            sent_s=0.0,
        )
    )
    state.first_token("r", 0.0)
    delays = []
    for now_s in (0.0, 1.0, 2.0, 1000.0, 2000.0):
        view.loads.advance(now_s)
        delays.append(view.loads.delay_tokens(state, 10_000.0))
    assert delays[0] == pytest.approx(400.0)
    assert delays == sorted(delays, reverse=True)
    assert delays[-1] == delays[-2] == pytest.approx(100.0, rel=0.09)


@pytest.mark.parametrize("pooled", [False, True])
def test_how_long_an_overdue_call_keeps_its_slot(pooled: bool) -> None:
    """A quarter of its forecast, or with pools what its site has left; never-ending either way."""
    row = LatencyRow(
        prefill_base_ms=10.0, prefill_us_per_token=50.0, prefill_ns_per_token_sq=1.0,
        decode_base_ms=10.0, decode_us_per_call=0.0, decode_ns_per_kv_token=0.0,
    )  # fmt: skip
    endpoint = Endpoint(
        id=EndpointId("e"), model="m", gpu="G", latency=row, kv_blocks=3000, max_num_seqs=1,
        role="decode" if pooled else "both",
    )  # fmt: skip
    state = EndpointState(0, endpoint, row)
    view = FleetView([state])
    state.add(
        Resident(
            call_id="r",
            run_id="r",
            prompt_tokens=100,
            uncached_tokens=0.0,
            output_tokens=400.0,
            criticality=1.0,
            sent_s=0.0,
            least_left=0.8,
        )
    )
    state.first_token("r", 0.0)
    waits = {}
    for now_s in (0.0, 1.0, 1000.0):
        forecast, costs = pass_of(call(), view, 100.0, now_s=now_s)
        waits[now_s] = costs.own_s[0] - costs.service_s[0]
        alone = call_cost(call().prompt_tokens, (), 1.0, forecast, state, now_s, prefilled=True)
        assert alone.own_s - alone.service_s == pytest.approx(waits[now_s])
    assert waits[0.0] == pytest.approx(4.0)
    assert waits[1.0] == pytest.approx(3.2 if pooled else 3.0)
    assert waits[1000.0] == pytest.approx(3.2 if pooled else 1.0)


def test_what_a_site_has_left_comes_from_its_quantiles() -> None:
    """Lognormal lengths go on for long; forecasts that are sure still leave a tenth."""
    sigma, levels = 0.7, np.array(LEVELS)
    values = np.exp(sigma * np.array([NormalDist().inv_cdf(level) for level in levels]))
    heavy = Quantiles(values=tuple(100.0 * values), mean=100.0 * math.exp(sigma**2 / 2))
    sites = {
        name: SiteEstimate(output_tokens=length, prompt_tokens=length)
        for name, length in (("heavy", heavy), ("sure", Quantiles.constant(100.0)))
    }
    table = EstimateTable(workflows={"w": WorkflowEstimate(sites=sites)})
    forecaster = Forecaster(table)

    def least_left(site: str, max_tokens: int | None = None) -> float:
        one = replace(call(), workflow_hash="w", site=site, max_tokens=max_tokens)
        return forecaster.of(one).least_left

    assert least_left("heavy") == pytest.approx(0.75, abs=0.1)
    assert least_left("sure") == 0.1
    # Nothing is left beyond the cap that a client declares.
    assert least_left("heavy", 10_000) == least_left("heavy")
    assert least_left("heavy", 150) == pytest.approx(150 / heavy.mean - 1.0)
    assert least_left("heavy", 50) == 0.1


def test_counts_do_not_drift() -> None:
    """After thousands of calls came and went, the arrays are those of a view made afresh."""
    view = busy_fleet(3)
    rng = np.random.default_rng(0)
    for number in range(3000):
        state = view.states[int(rng.integers(len(view.states)))]
        if state.residents and rng.random() < 0.5:
            state.remove(next(iter(state.residents)))
            continue
        state.add(
            Resident(
                call_id=f"n{number}",
                run_id="r",
                prompt_tokens=500,
                uncached_tokens=100.0,
                output_tokens=float(rng.integers(1, 900)),
                criticality=1.0,
                sent_s=0.0,
            )
        )
    _, kept = pass_of(call(), view, 200.0, now_s=9.0)
    _, fresh = pass_of(call(), FleetView(view.states), 200.0, now_s=9.0)
    for one, other in zip(kept, fresh, strict=True):
        for name in FIELDS:
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6)


def test_a_changed_row_changes_costs_at_once() -> None:
    """A learned row that is put in is what the next decision is reckoned with."""
    view = busy_fleet(1)
    forecast, before = pass_of(call(), view, 100.0)
    view.states[4].latency = view.states[4].latency.scaled(2.0)
    _, after = pass_of(call(), view, 100.0)
    changed = after.service_s / before.service_s
    assert changed[4] == pytest.approx(2.0)
    assert np.delete(changed, 4) == pytest.approx(1.0)
    assert forecast.output_tokens == 100.0


def test_candidates_follow_health_room_and_model() -> None:
    """The kept answer is given up when an endpoint goes down, and depends on model and size."""
    view = busy_fleet(0, count=4)
    most = view.states[0].most_tokens
    assert view.candidates() == view.states
    assert view.candidates("m", frozenset(), 5) is view.candidates("m", frozenset(), 6)
    assert view.candidates("m", frozenset({1}), most) == tuple(
        one for one in view.states if one.index != 1
    )
    assert view.candidates("m", frozenset(), most + 1) == ()
    assert view.candidates("other") == ()
    view.states[2].healthy = False
    assert [one.index for one in view.candidates("m", frozenset(), most)] == [0, 1, 3]
    view.states[2].healthy = True
    assert view.candidates("m").whole
