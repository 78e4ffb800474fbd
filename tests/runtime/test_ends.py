"""Runs from first call to end, and hints at work, through the gateway."""

from __future__ import annotations

import httpx
import pytest
from multidict import CIMultiDict

from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.trace import CallRecord, load_trace
from planner.domain.workflow import END, START, CallSite, Node, Workflow
from runtime.clock import Clock
from runtime.config import GatewayConfig
from runtime.control import Control
from runtime.diagnostics import metrics_text
from runtime.fingerprint import read_prompt
from runtime.identity import Identity
from runtime.limits import ANYONE

WORKFLOW = Workflow(
    name="flow",
    nodes=(
        Node(id="a", kind="llm", call_sites=(CallSite(id="a#0"),)),
        Node(id="b", kind="llm", call_sites=(CallSite(id="b#0"),)),
    ),
    edges=((START, "a"), ("a", "b"), ("b", END)),
)
SITE = SiteEstimate(output_tokens=Quantiles.constant(20.0), prompt_tokens=Quantiles.constant(50.0))
ESTIMATES = EstimateTable(
    workflows={
        WORKFLOW.content_hash: WorkflowEstimate(name="flow", sites={"a#0": SITE, "b#0": SITE})
    }
)
CALL = {"model": "m", "prompt": "a b c", "max_tokens": 30}


@pytest.fixture
def timed(fleet_of):
    """Return a control without a network, and a function that lets time pass."""
    wall = [0.0]
    control = Control(
        fleet_of(1),
        estimates=ESTIMATES,
        workflows=[WORKFLOW],
        policy="round_robin",
        config=GatewayConfig(run_idle_s=900.0, run_done_idle_s=5.0),
        clock=Clock(wall=lambda: wall[0]),
    )

    def wait(seconds):
        wall[0] += seconds
        control.lifecycle.expire()

    return control, wait


def call(control, wait, run_id="r", node="", workflow="", took_s=1.0, **identity):
    run = control.lifecycle.begin_call(
        Identity(run_id=run_id, node=node, workflow=workflow, **identity), ANYONE
    )
    wait(took_s)
    run.open_calls -= 1
    run.last_s = control.clock.now_s()
    return run


def test_a_run_ends_soon_after_its_last_node(timed):
    """Where the graph says that it is over, seconds of silence end a run; before, they do not."""
    control, wait = timed
    key = WORKFLOW.content_hash
    call(control, wait, node="a", workflow=key)
    call(control, wait, node="b", workflow=key)
    wait(4.0)
    assert len(control.runs) == 1
    wait(2.0)
    assert len(control.runs) == 0


def test_an_unknown_run_ends_by_default_and_comes_back_as_new(timed):
    """Without a graph the default counts; a name that comes back later is a run of its own."""
    control, wait = timed
    first = call(control, wait)
    wait(800.0)
    assert control.runs.find("r") is first
    wait(200.0)
    assert control.runs.find("r") is None
    again = call(control, wait)
    assert again.arrival_s > first.last_s
    assert again.calls == 1


def test_no_run_leaks_however_many_say_nothing(timed):
    """A thousand programs that never say goodbye leave nothing behind."""
    control, wait = timed
    for number in range(1000):
        call(control, wait, run_id=f"r{number}", took_s=0.01)
    assert len(control.runs) == 1000
    wait(901.0)
    assert len(control.runs) == 0


def test_the_pauses_of_earlier_runs_shorten_the_wait(timed):
    """Sessions that always went on within a second are over when they do not."""
    control, wait = timed
    for _ in range(30):
        call(control, wait, run_id="talker", source="session")
        wait(1.0)
    wait(6.0)
    assert len(control.runs) == 0


def test_a_parent_takes_its_idle_children_along(timed):
    """The end of a run ends what it started, except for what still works."""
    control, wait = timed
    call(control, wait, "top")
    call(control, wait, "child", parent_id="top")
    busy = control.lifecycle.begin_call(Identity(run_id="busy", parent_id="child"), ANYONE)
    assert busy.since_s == control.runs.find("top").arrival_s
    control.lifecycle.end("top")
    assert [run.run_id for run in control.runs.active()] == ["busy"]


def test_answers_that_continue_each_other_are_one_run(timed):
    """The id of each answer leads back to the run it was given to."""
    control, _ = timed
    prompt = read_prompt({"input": "hello"})

    def identity(**payload):
        return control.identify(CIMultiDict(), payload, prompt, ANYONE)

    first = identity().run_id
    control.runs.answered("resp_1", first)
    second = identity(previous_response_id="resp_1")
    assert second.run_id == first
    assert identity(previous_response_id="resp_9").run_id == "resp_9"


@pytest.mark.parametrize("way", ["header", "own header", "session", "run", "event"])
async def test_every_way_to_say_goodbye(stack, way):
    """A run that says that it is over is over at once."""
    async with stack(1) as s, httpx.AsyncClient(base_url=s.gateway.address) as http:
        headers = {"x-session-id": "s", "x-almanac-run-id": "r"}
        if way == "header":
            headers["x-dynamo-session-final"] = "true"
        elif way == "own header":
            headers["x-almanac-run-final"] = "true"
        assert (await http.post("/v1/completions", json=CALL, headers=headers)).status_code == 200
        if way == "session":
            await http.post("/finish_session", json={"session_id": "s"})
        elif way == "run":
            assert (await http.post("/finish_session", json={"run_id": "r"})).json() == {"ended": 1}
        elif way == "event":
            events = {"events": [{"type": "run_end", "run_id": "r"}]}
            await http.post("/almanac/v1/events", json=events)
        assert len(s.control.runs) == 0
        again = await http.post("/finish_session", json={"session_id": "s"})
        assert (again.status_code, again.json()) == (200, {"ended": 0})
        assert (await http.post("/finish_session", json={})).status_code == 400


async def test_hints_move_calls_and_forecasts(stack, tmp_path):
    """The expected length replaces the forecast, urgency becomes vLLM's opposite priority."""
    seen = []
    async with (
        stack(1, policy="marginal_cost", changes={"scheduling": "priority"}) as s,
        httpx.AsyncClient(base_url=s.base_url) as http,
    ):
        s.control.set_trace(tmp_path / "t.jsonl")
        paced = s.mock.endpoints[0].paced
        submit = paced.submit

        def watched(call, *rest):
            seen.append(call.priority)
            return submit(call, *rest)

        paced.submit = watched
        for headers, extra in (
            ({}, {"nvext": {"agent_hints": {"osl": 17}}}),
            ({"x-almanac-priority": "2"}, {}),
            ({"x-llm-d-slo-ttft-ms": "500"}, {}),
            ({"x-almanac-priority": "-1"}, {}),
            ({"x-almanac-priority": "soon", "x-almanac-deadline-s": "never"}, {}),
        ):
            answer = await http.post(
                "/completions",
                json={**CALL, **extra},
                headers={"x-almanac-run-id": "r", **headers},
            )
            assert answer.status_code == 200
        text = metrics_text(s.control)
    plain, urgent, soon, later, wrong = seen
    assert soon < urgent < plain == wrong < later
    assert plain - urgent == pytest.approx(120_000, abs=2)
    calls = [one for one in load_trace(tmp_path / "t.jsonl") if isinstance(one, CallRecord)]
    assert calls[0].predicted_output_tokens == 17.0
    assert 'almanac_hints_ignored_total{hint="x-almanac-priority"} 1' in text
    assert 'almanac_hints_ignored_total{hint="x-almanac-deadline-s"} 1' in text


async def test_hints_order_calls_without_a_policy_of_order(stack):
    """Where the policy leaves the engine's order to arrival, hints alone make the priority."""
    seen = []
    async with (
        stack(1, policy="round_robin", changes={"scheduling": "priority"}) as s,
        httpx.AsyncClient(base_url=s.base_url) as http,
    ):
        paced = s.mock.endpoints[0].paced
        submit = paced.submit

        def watched(call, *rest):
            seen.append(call.priority)
            return submit(call, *rest)

        paced.submit = watched
        for headers in ({}, {"x-smg-priority": "high"}, {"x-smg-priority": "low"}):
            await http.post("/completions", json=CALL, headers=headers)
    assert seen == [0, -60_000, 60_000]


async def test_answers_say_what_was_decided(stack):
    """Endpoint, reason, plan, attempts and router time are in answers, the id in errors too."""
    async with stack(1) as s, httpx.AsyncClient(base_url=s.base_url) as http:
        answer = await http.post("/completions", json=CALL, headers={"x-request-id": "mine"})
        for name in ("endpoint", "reason", "plan", "attempts", "router-us"):
            assert f"x-almanac-{name}" in answer.headers
        assert answer.headers["x-request-id"] == "mine"
        answer = await http.post("/completions", content="{", headers={"x-request-id": "mine"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (400, "mine")
