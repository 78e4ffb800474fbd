"""The gateway in front of mock endpoints, with the real client, in one process."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace

import httpx
import openai
import pytest

from planner.dispatch.table import LoadLevel, compile_table
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.plan import Assignment, Plan
from planner.domain.trace import BranchRecord, CallRecord, RunRecord, ToolRecord, load_trace
from planner.domain.workflow import END, START, CallSite, Node, Workflow
from runtime.control import Control
from runtime.diagnostics import diagnostics, metrics_text
from runtime.gateway import Gateway
from runtime.state import StateFile

ADMIN = {"authorization": "Bearer secret"}

WORKFLOW = Workflow(
    name="flow",
    nodes=(Node(id="a", kind="llm", call_sites=(CallSite(id="a#0"),)),),
    edges=((START, "a"), ("a", END)),
)
ESTIMATES = EstimateTable(
    workflows={
        WORKFLOW.content_hash: WorkflowEstimate(
            name="flow",
            sites={
                "a#0": SiteEstimate(
                    output_tokens=Quantiles.constant(20.0), prompt_tokens=Quantiles.constant(50.0)
                )
            },
            remaining_s={"a": 1.5},
        )
    },
    version="v7",
)


def user(text):
    return [{"role": "user", "content": text}]


def client(s, **options):
    return openai.AsyncOpenAI(base_url=s.base_url, api_key="none", **{"max_retries": 0, **options})


def xargs(tokens, reply=""):
    return {"vllm_xargs": {"mock_output_tokens": tokens, "mock_reply": reply}}


def table_for(fleet):
    """Return a table that sends the workflow's only site to the second endpoint."""
    plan = Plan(
        workflow_hash=WORKFLOW.content_hash,
        fleet_hash=fleet.content_hash(),
        arrival_rate_rps=1.0,
        run_classes=1,
        assignments=(Assignment(run_class=0, site="a#0", endpoint="e1"),),
        levels={},
        objective_s=1.0,
        bound_s=1.0,
        status="optimal",
        scenarios=1,
        seed=0,
    )
    level = LoadLevel(occupancy=100.0, plan=plan, prices={"e0": 50.0, "e1": 0.0})
    return compile_table([level], WORKFLOW, fleet, ESTIMATES)


async def test_openai_client_through_the_gateway(stack):
    """Whole and streamed answers come through, and the answer's headers say what was done."""
    async with stack(policy="least_expected_finish") as s, client(s) as ask:
        raw = await ask.chat.completions.with_raw_response.create(
            model="m",
            messages=user("a b"),
            extra_body=xargs(5, "deep"),
            extra_headers={"x-request-id": "mine"},
        )
        text = raw.parse().choices[0].message.content
        assert text.startswith("deep ")
        assert raw.headers["x-request-id"] == "mine"
        assert raw.headers["x-almanac-endpoint"] in ("e0", "e1")
        assert raw.headers["x-almanac-reason"] == "finish"
        stream = await ask.chat.completions.create(
            model="m", messages=user("a b"), extra_body=xargs(5, "deep"), stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == text
        assert all(chunk.usage is None for chunk in chunks)


async def test_many_streams_at_once_leave_nothing_behind(stack):
    """Concurrent streams over both endpoints all end, and every counter returns to zero."""
    patient = {"first_byte_floor_s": 60.0}  # a busy machine is no reason to try one twice
    async with stack(policy="power_of_two", config=patient) as s, client(s) as ask:

        async def one(number):
            stream = await ask.chat.completions.create(
                model="m", messages=user(f"w{number}"), extra_body=xargs(30), stream=True
            )
            return len([chunk async for chunk in stream])

        assert await asyncio.gather(*(one(number) for number in range(40))) == [31] * 40
        text = metrics_text(s.control)
        assert 'almanac_requests_total{model="m",status="200"} 40' in text
        assert 'almanac_worker_requests_active{endpoint="e0"} 0' in text
        assert 'almanac_decisions_total{policy="power_of_two",reason="load"} 40' in text


@pytest.mark.parametrize("online", [True, False])
async def test_endpoints_are_learned_from_live_calls_unless_told_not_to(stack, online):
    """Served calls, streamed or not, teach the endpoint's row; without online it stays as given."""
    async with stack(1, config={"online": online}) as s, client(s) as ask:
        given = s.control.fleet.endpoints[0].latency
        for number in range(4):
            answer = await ask.chat.completions.create(
                model="m", messages=user(f"w{number}"), extra_body=xargs(20), stream=number % 2 == 0
            )
            if number % 2 == 0:
                assert len([chunk async for chunk in answer]) == 21
        facts = diagnostics(s.control)
        (endpoint,) = facts["endpoints"]
        text = metrics_text(s.control)
        assert facts["online"] is online
        assert (s.control.router.view.states[0].latency == given) is not online
        if online:
            # First token and decode of two streams, two answers as a whole.
            assert endpoint["latency"]["observations"] == 6
            assert endpoint["latency"]["drifting"] is False
            assert 'almanac_worker_drift_ratio{endpoint="e0"} 1' in text
            assert [row["seen"] for row in facts["lengths"]] == [4, 4]
        else:
            assert endpoint["latency"] == {"row": asdict(given)}
            assert "almanac_worker_drift_ratio{" not in text
        assert [row["level"] for row in facts["forecast"]["quantiles"]] == [0.5, 0.9]
        json.dumps(facts)


async def test_leaving_a_stream_reaches_the_engine(stack, until):
    """A client that closes its stream cancels the call in the gateway and in the engine."""
    async with stack(1) as s, client(s) as ask:
        stream = await ask.chat.completions.create(
            model="m", messages=user("a"), extra_body=xargs(6000), stream=True
        )
        await anext(aiter(stream))
        assert s.control.router.in_flight == 1
        await stream.close()
        await until(lambda: s.control.router.in_flight == 0, 0.001)
        await until(lambda: s.mock.endpoints[0].paced.engine.num_running == 0, 0.001)
        text = metrics_text(s.control)
        assert 'almanac_attempts_total{endpoint="e0",status="cancelled"} 1' in text


async def test_an_endpoint_that_dies_is_replaced_and_comes_back(stack, until):
    """Calls survive the loss of an endpoint unnoticed; it serves again once it is back."""
    async with stack(2) as s, client(s) as ask:
        first = s.mock.endpoints[0]
        await first.go_down(abort=True)
        for number in range(6):
            answer = await ask.chat.completions.create(
                model="m", messages=user(f"w{number}"), extra_body=xargs(3)
            )
            assert answer.usage.completion_tokens == 3
        assert [one.down for one in s.control.breakers] == [True, False]
        await first.come_up()
        await until(lambda: not s.control.breakers[0].down, 0.005)
        assert s.control.router.view.states[0].healthy


async def test_calls_wait_for_a_fleet_that_is_down(stack, until):
    """With nothing up a call is held, readiness says so, and it is sent when one comes up."""
    async with stack(1) as s, client(s) as ask:
        s.control.endpoint_failed(0, "test", unreachable=True)
        async with httpx.AsyncClient(base_url=s.gateway.address) as http:
            ready = await http.get("/readiness")
            assert ready.status_code == 503
            assert int(ready.headers["retry-after"]) >= 1
            assert (await http.get("/health")).status_code == 200
        answer = await ask.chat.completions.create(
            model="m", messages=user("a"), extra_body=xargs(3)
        )
        assert answer.usage.completion_tokens == 3


async def test_a_refused_call_says_when_to_come_back(stack):
    """A call that waited in vain gets 503 with Retry-After and an OpenAI error body."""
    async with stack(1, config={"hold_timeout_s": 0.01, "breaker_pause_s": 60.0}) as s:
        s.control.endpoint_failed(0, "test", unreachable=True)
        async with httpx.AsyncClient(base_url=s.gateway.address) as http:
            answer = await http.post(
                "/v1/chat/completions", json={"model": "m", "messages": user("a")}
            )
        assert answer.status_code == 503
        assert 50 <= int(answer.headers["retry-after"]) <= 61
        assert answer.json()["error"]["type"] == "Service Unavailable"


async def test_client_errors_come_through_as_such(stack):
    """Unknown models, overlong prompts, wrong routes and bodies get 4xx, and nobody goes down."""
    async with stack(1, config={"max_body_bytes": 100_000}) as s, client(s) as ask:
        with pytest.raises(openai.NotFoundError):
            await ask.chat.completions.create(model="x", messages=user("a"))
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            await ask.chat.completions.create(model="m", messages=user("w " * 9000))
        with pytest.raises(openai.NotFoundError):
            await ask.embeddings.create(model="m", input="a", encoding_format="float")
        async with httpx.AsyncClient(base_url=s.gateway.address) as http:
            for method, path, body, status in (
                ("POST", "/v1/chat/completions", b"{", 400),
                ("POST", "/v1/chat/completions", b"x" * 200_000, 413),
                ("GET", "/v1/chat/completions", b"", 405),
                ("GET", "/nowhere", b"", 404),
                ("GET", "/v1/models/nope", b"", 404),
                ("POST", "/almanac/v1/workflows", b"[]", 400),
                ("POST", "/almanac/v1/workflows", b'{"schema": "x"}', 400),
                ("POST", "/almanac/v1/events", b'{"events": 3}', 400),
            ):
                answer = await http.request(method, path, content=body)
                assert (path, answer.status_code) == (path, status)
                assert answer.json()["error"]["code"] == status
        assert s.control.ready


async def test_facts(stack):
    """Models, version and metrics are served."""
    async with stack(2) as s, httpx.AsyncClient(base_url=s.gateway.address) as http:
        assert [one["id"] for one in (await http.get("/v1/models")).json()["data"]] == ["m"]
        assert (await http.get("/v1/models/m")).json()["id"] == "m"
        assert "version" in (await http.get("/version")).json()
        metrics = await http.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert 'almanac_worker_health{endpoint="e1"} 1' in metrics.text


async def test_a_run_s_trace(stack, tmp_path):
    """Workflow, events and calls of a run come out as its run, call, tool and branch records."""
    async with stack(2, policy="marginal_cost", estimates=ESTIMATES) as s, client(s) as ask:
        s.control.set_trace(tmp_path / "t.jsonl")
        who = {"run_id": "r1", "workflow": "flow", "workflow_hash": WORKFLOW.content_hash}
        async with httpx.AsyncClient(base_url=s.gateway.address) as http:
            answer = await http.post("/almanac/v1/workflows", json=WORKFLOW.to_json())
            assert answer.json() == {"workflow": "flow", "hash": WORKFLOW.content_hash}
            events = [
                {"type": "run_start", "session_id": "s1", **who},
                {"type": "tool_start", "node": "t", **who},
                {"type": "tool_end", "node": "t", "status": "odd", **who},
                {"type": "tool_end", "node": "never started", **who},
                {"type": "branch", "branch": "b", "outcome": "x", "visit": 1, **who},
                {"type": "invented", **who},
                {"type": "run_start"},
                17,
            ]
            answer = await http.post("/almanac/v1/events", json={"events": events})
            assert answer.json() == {"taken": 4, "ignored": 4}
            await ask.chat.completions.create(
                model="m",
                messages=user("a b c"),
                extra_body=xargs(20),
                extra_headers={
                    "x-almanac-run-id": "r1",
                    "x-almanac-workflow": WORKFLOW.content_hash,
                    "x-almanac-node": "a",
                },
            )
            end = {"events": [{"type": "run_end", "status": "ok", **who}]}
            answer = await http.post("/almanac/v1/events", json=end)
            assert answer.json()["taken"] == 1
        records = {type(record): record for record in load_trace(tmp_path / "t.jsonl")}
        run, call = records[RunRecord], records[CallRecord]
        assert (run.workflow, run.calls, run.session_id) == ("flow", 1, "s1")
        # One call of 20 tokens at 6 ms a step, on an idle fleet.
        assert run.predicted_s == pytest.approx(0.13, rel=0.1)
        assert run.arrival_s <= call.ready_s <= call.finish_s <= run.finish_s
        assert (call.site, call.predicted_output_tokens, call.reason) == ("a#0", 20.0, "cost")
        assert records[ToolRecord].status == "failed"
        assert (records[BranchRecord].outcome, records[BranchRecord].visit) == ("x", 1)


async def test_one_process_runs_several_policies(stack, tmp_path):
    """Policy, table and trace are switched while serving, each policy with a fresh router."""
    async with stack(2, estimates=ESTIMATES, workflows=[WORKFLOW]) as s, client(s) as ask:
        http = httpx.AsyncClient(base_url=s.gateway.address, headers=ADMIN)
        async with http:

            async def call():
                raw = await ask.chat.completions.with_raw_response.create(
                    model="m",
                    messages=user("a b c"),
                    extra_body=xargs(5),
                    extra_headers={
                        "x-almanac-run-id": "r",
                        "x-almanac-workflow": WORKFLOW.content_hash,
                        "x-almanac-node": "a",
                    },
                )
                return raw.headers["x-almanac-endpoint"], raw.headers["x-almanac-reason"]

            old = s.control.router
            answer = await http.post("/almanac/v1/policy", json={"policy": "almanac"})
            assert answer.status_code == 200
            assert s.control.router is not old
            assert (await call())[1] == "fallback"
            table = table_for(s.control.fleet)
            answer = await http.post("/almanac/v1/table", json=table.to_json())
            assert answer.json() == {"version": table.version, "rows": 1}
            path = tmp_path / "almanac.jsonl"
            await http.post("/almanac/v1/trace", json={"path": str(path), "header": {"seed": 4}})
            assert await call() == ("e1", "plan")
            answer = await http.post("/almanac/v1/policy", json={"policy": "marginal_cost:theta=2"})
            assert answer.status_code == 200
            assert (await call())[1] == "cost"
            await http.post("/almanac/v1/trace", json={"path": None})
            assert (await call())[1] == "cost"
            facts = (await http.get("/almanac/v1/diagnostics")).json()
            assert facts["policy"] == "marginal_cost:theta=2"
            assert facts["table_version"] == table.version
            assert facts["forecast"]["calls"] == 2
            assert facts["endpoints"][0]["up"]
            calls = [one for one in load_trace(path) if isinstance(one, CallRecord)]
            assert [one.policy for one in calls] == ["almanac", "marginal_cost"]
            assert [one.table_version for one in calls] == [table.version, ""]
            assert json.loads(path.read_text().splitlines()[0])["seed"] == 4


async def test_a_policy_switch_takes_held_calls_along(stack, until):
    """A call that waits while the policy is switched is placed by the new one."""
    async with stack(1, config={"breaker_pause_s": 60.0}) as s, client(s) as ask:
        s.control.endpoint_failed(0, "test", unreachable=True)
        waiting = asyncio.create_task(
            ask.chat.completions.create(model="m", messages=user("a"), extra_body=xargs(3))
        )
        await until(lambda: s.control.router.held == 1, 0.001)
        s.control.set_policy("least_load")
        await until(lambda: s.control.router.held == 1, 0.001)
        s.control.endpoint_recovered(0)
        assert (await waiting).usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("policy", {"policy": "nope"}),
        ("policy", {"policy": "marginal_cost:x=1"}),
        ("policy", {"policy": "marginal_cost:theta"}),
        ("policy", {}),
        ("table", {"schema": "x"}),
        ("trace", {"path": 5}),
        ("trace", {"path": "/"}),
    ],
)
async def test_bad_admin_input_changes_nothing(stack, path, body):
    """A bad policy, table or trace is a 400 with a remedy, and the old one stays."""
    async with stack(1, policy="least_load") as s:
        async with httpx.AsyncClient(base_url=s.gateway.address, headers=ADMIN) as http:
            answer = await http.post(f"/almanac/v1/{path}", json=body)
            assert answer.status_code == 400
        assert s.control.routing.policy_text == "least_load"


async def test_a_table_of_another_fleet_is_refused(stack, fleet_of):
    """A table compiled for another fleet never becomes active."""
    async with stack(2) as s:
        with pytest.raises(InvalidInput, match="another fleet"):
            s.control.set_table(table_for(fleet_of(2, max_num_seqs=3)))


async def test_a_table_follows_a_fleet_that_changes(stack, until):
    """A table for the endpoints left is read in their places; a new endpoint is not in its plan."""
    async with stack(3, policy="almanac", estimates=ESTIMATES, workflows=[WORKFLOW]) as s:
        whole = s.control.fleet
        rest = replace(whole, endpoints=whole.endpoints[1:])

        async def chosen():
            async with client(s) as ask:
                raw = await ask.chat.completions.with_raw_response.create(
                    model="m",
                    messages=user("a b c"),
                    extra_body=xargs(5),
                    extra_headers={
                        "x-almanac-workflow": WORKFLOW.content_hash,
                        "x-almanac-node": "a",
                    },
                )
            return raw.headers["x-almanac-endpoint"], raw.headers["x-almanac-reason"]

        s.gateway.set_fleet(rest)
        table = table_for(rest)
        s.control.set_table(table)
        assert await chosen() == ("e1", "plan")
        s.control.set_policy("almanac:")
        assert await chosen() == ("e1", "plan")
        with pytest.raises(InvalidInput, match="another fleet"):
            s.control.set_table(table_for(whole))
        assert s.control.table is table
        s.gateway.set_fleet(whole)
        await until(lambda: s.control.router.view.states[0].healthy, 0.005)
        assert (await chosen())[1] == "fallback"
        assert s.control.table is None


def test_the_newer_table_wins_at_a_restart(fleet_of, tmp_path):
    """The table in use comes back, unless a newer one was given or the fleet is another."""
    path = tmp_path / "state.json"

    def restarted(count=2, **options):
        fresh = Control(fleet_of(count), policy="almanac")
        StateFile(path, fresh, wall=lambda: 200.0).load(**options)
        return fresh.table

    control = Control(fleet_of(2), policy="almanac", workflows=[WORKFLOW])
    table = table_for(control.fleet)
    control.set_table(table)
    StateFile(path, control, wall=lambda: 100.0).save()
    assert restarted().version == table.version
    assert restarted(table_made_s=50.0).version == table.version
    assert restarted(table_made_s=150.0) is None
    assert restarted(3) is None


async def test_admin_routes_need_the_key(stack):
    """Without the right key admin routes answer 401; the key never reaches an endpoint."""
    async with stack(1) as s, httpx.AsyncClient(base_url=s.gateway.address) as http:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = await http.get("/almanac/v1/diagnostics", headers=headers)
            assert answer.status_code == 401
        assert (await http.get("/almanac/v1/diagnostics", headers=ADMIN)).status_code == 200


async def test_admin_routes_are_off_without_a_key(fleet_of):
    """A gateway without an admin key has no admin routes; silent endpoints are reported down."""
    gateway = Gateway(Control(fleet_of(1)), port=0)
    missing = await gateway.start()
    try:
        assert missing == ["e0"]
        async with httpx.AsyncClient(base_url=gateway.address) as http:
            answer = await http.post("/almanac/v1/policy", json={"policy": "least_load"})
            assert answer.status_code == 403
            assert (await http.get("/readiness")).status_code == 503
    finally:
        await gateway.aclose()


async def test_a_port_in_use_is_one_clear_error(stack):
    """A second gateway on the same port fails with one error and leaves the first alone."""
    async with stack(1) as s:
        port = int(s.gateway.address.rsplit(":", 1)[1])
        second = Gateway(Control(s.control.fleet), port=port)
        with pytest.raises(InvalidInput, match=rf"port {port}.*choose another"):
            await second.start()
        async with httpx.AsyncClient(base_url=s.gateway.address) as http:
            assert (await http.get("/health")).status_code == 200


def test_a_fleet_on_paper_is_refused(fleet_of, urls_of):
    """Endpoints without an address cannot be served, and the error names the field."""
    with pytest.raises(InvalidInput, match=r"workers\[0\]\.url"):
        Control(urls_of(fleet_of(1), [None]))


async def test_silent_runs_end_by_themselves(stack, tmp_path):
    """A program that never says goodbye leaves a run record and no run behind."""
    async with stack(1, config={"run_idle_s": 0.001}) as s, client(s) as ask:
        s.control.set_trace(tmp_path / "t.jsonl")
        await ask.chat.completions.create(model="m", messages=user("a"), extra_body=xargs(3))
        s.control.lifecycle.expire()
        assert len(s.control.runs) == 0
        (run,) = (one for one in load_trace(tmp_path / "t.jsonl") if isinstance(one, RunRecord))
        assert run.run_id.startswith("content-")
        assert run.calls == 1


async def test_priorities_reach_engines_that_read_them(stack):
    """Calls of the older run carry the smaller priority to engines with the priority policy."""
    seen = []
    async with (
        stack(1, policy="marginal_cost", changes={"scheduling": "priority"}) as s,
        client(s) as ask,
    ):
        paced = s.mock.endpoints[0].paced
        submit = paced.submit

        def watched(call, *rest):
            seen.append(call.priority)
            return submit(call, *rest)

        paced.submit = watched
        for run in ("old", "new", "old"):
            await ask.chat.completions.create(
                model="m",
                messages=user("a"),
                extra_body=xargs(50),
                extra_headers={"x-almanac-run-id": run},
            )
    assert seen[0] == seen[2] < seen[1]
