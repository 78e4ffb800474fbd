"""Forecasts of whole runs at their arrival."""

from itertools import pairwise

import numpy as np
import pytest

from planner.dispatch.arrival import ArrivalForecast
from planner.dispatch.remaining import EndpointLoad, Progress, fleet_service, remaining_s
from planner.domain.estimates import Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.latency import LatencyRow
from planner.domain.workflow import END, START, CallSite, Node, Workflow
from planner.graph.sampling import scenarios

ROW = LatencyRow(
    prefill_base_ms=3, prefill_us_per_token=20, prefill_ns_per_token_sq=0.5,
    decode_base_ms=6, decode_us_per_call=10, decode_ns_per_kv_token=40,
)  # fmt: skip
FLEET = Fleet(
    name="f",
    endpoints=(Endpoint(id="e", model="m", gpu="g", latency=ROW, kv_blocks=500, max_num_seqs=8),),
)
FLOW = Workflow(
    name="flow",
    nodes=(Node(id="a", kind="llm", call_sites=(CallSite(id="a#0"),)),),
    edges=((START, "a"), ("a", END)),
)
SITE = SiteEstimate(output_tokens=Quantiles.constant(20.0), prompt_tokens=Quantiles.constant(50.0))
RUNS = scenarios(FLOW, WorkflowEstimate(sites={"a#0": SITE}), 20, 0)


def test_on_the_ladder_it_is_the_slow_forecast():
    """At a load of the ladder the value is that of `remaining_s` at the start of a run."""
    load = EndpointLoad(row=ROW, calls=4.0, kv_tokens=4 * 60.0, slots=8)
    slow = remaining_s(RUNS, fleet_service([load]), Progress()).at(0.5)
    assert ArrivalForecast(RUNS, FLEET).at(4.0) == pytest.approx(slow)


def test_more_load_never_makes_a_run_faster():
    """Between and beyond the steps of the ladder forecasts do not fall as the load grows."""
    forecast = ArrivalForecast(RUNS, FLEET)
    seconds = [forecast.at(calls) for calls in np.linspace(0, 500, 200)]
    assert all(after >= before for before, after in pairwise(seconds))
    assert seconds[-1] == forecast.at(16.0)
