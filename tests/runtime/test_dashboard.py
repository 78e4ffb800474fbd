"""The live view: its facts, its page, and both together in a browser where there is one."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.parse import quote

import httpx
import pytest

from planner.dispatch.table import LoadLevel, Tuning, compile_table
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.plan import Assignment, Plan
from planner.domain.trace import BranchRecord, CallRecord, RunRecord, ToolRecord, record_from_json
from planner.domain.workflow import END, START, CallSite, Node, Workflow
from runtime.config import GatewayConfig
from runtime.dashboard.journal import Journal
from runtime.dashboard.live import LIVE_SCHEMA, RUN_SCHEMA
from runtime.dashboard.page import page_headers, page_text
from runtime.replanning import Replanner
from tests.runtime.browser import CHROMIUM, browser

ADMIN = {"authorization": "Bearer secret"}
HOSTILE = '<img src=x onerror="document.title=\'owned\'">/../"&\u202e run'
HOSTILE_ASCII = "<script>a/../b</script>?x#y&'\" run"
WORKFLOW = Workflow(
    name="<b>flow</b>",
    nodes=(
        Node(id="a", kind="llm", call_sites=(CallSite(id="a#0"),)),
        Node(id="b", kind="llm", call_sites=(CallSite(id="b#0"),)),
    ),
    edges=((START, "a"), ("a", "b"), ("b", END)),
)
SITE = SiteEstimate(output_tokens=Quantiles.constant(200.0), prompt_tokens=Quantiles.constant(50.0))
ESTIMATES = EstimateTable(
    workflows={
        WORKFLOW.content_hash: WorkflowEstimate(
            name="flow", sites={"a#0": SITE, "b#0": SITE}, remaining_s={"a": 3.0, "b": 1.5}
        )
    }
)


@asynccontextmanager
async def shown(stack, **options) -> AsyncIterator[tuple]:
    """Run a stack with the live view, and a client that has the key."""
    config = {"dashboard": True, "scrape_interval_s": 0.02, **options.pop("config", {})}
    settings = {
        "policy": "marginal_cost",
        "estimates": ESTIMATES,
        "workflows": [WORKFLOW],
        "config": config,
        **options,
    }
    async with (
        stack(**settings) as s,
        httpx.AsyncClient(base_url=s.gateway.address, headers=ADMIN) as http,
    ):
        yield s, http


def call(tokens=5, run="r", node="a", **headers):
    """Return the arguments of one request of a run."""
    identity = {"x-almanac-run-id": run, "x-almanac-node": node}
    identity["x-almanac-workflow"] = WORKFLOW.content_hash
    return {
        "json": {
            "model": "m", "prompt": "a b c", "max_tokens": 2000,
            "vllm_xargs": {"mock_output_tokens": tokens},
        },
        "headers": {**identity, **headers},
    }  # fmt: skip


async def live(http):
    answer = await http.get("/almanac/v1/live")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    return json.loads(answer.text, parse_constant=pytest.fail)


# The facts


async def test_live_facts_have_their_documented_shape(stack):
    """Endpoints, runs, plan, decisions and regret are there, as JSON that browsers read."""
    async with shown(stack) as (_, http):
        assert (await http.post("/v1/completions", **call())).status_code == 200
        facts = await live(http)
    assert facts["schema"] == LIVE_SCHEMA
    assert {"now_s", "dilation", "fleet", "policy", "in_flight", "waiting"} <= facts.keys()
    assert facts["plan"] == {
        "version": "", "age_s": None, "proof": None, "replans": None, "last": None,
    }  # fmt: skip
    assert [one["id"] for one in facts["endpoints"]] == ["e0", "e1"]
    assert facts["endpoints"][0].keys() == {
        "id", "model", "gpu", "up", "state", "why", "in_flight", "slots", "decoding",
        "prefill_tokens", "kv_state", "kv_usage", "engine_waiting", "speed", "observations",
        "drifting", "drift_ratio", "regret_s", "regret_calls",
    }  # fmt: skip
    assert facts["decisions"] == [{"policy": "marginal_cost", "reason": "cost", "count": 1}]
    (run,) = facts["runs"]
    assert run["id"] == "r"
    assert run["workflow"] == "<b>flow</b>"
    assert (run["calls"], run["open_calls"], run["nodes"]) == (1, 0, [])


async def test_a_run_in_progress_shows_progress_by_what_it_has_done(stack, until):
    """Elapsed over elapsed and remaining; when half of the graph is done, less remains."""
    async with shown(stack, dilation=5.0) as (s, http):
        request = asyncio.create_task(http.post("/v1/completions", **call(200)))
        await until(lambda: s.control.router.in_flight)
        (first,) = (await live(http))["runs"]
        assert first["nodes"] == ["a"]
        assert first["open_calls"] == 1
        assert 0 <= first["progress"] < 1
        assert first["progress"] == pytest.approx(
            first["elapsed_s"] / (first["elapsed_s"] + first["left_s"]), abs=1e-3
        )
        await request
        (second,) = (await live(http))["runs"]
        assert second["nodes"] == []
        assert second["left_s"] < 0.7 * first["left_s"]
        assert second["progress"] > first["progress"]


async def test_a_run_without_a_forecast_has_no_progress(stack):
    """Nothing is made up for runs of unknown workflows."""
    async with shown(stack, estimates=None, workflows=()) as (_, http):
        await http.post("/v1/completions", **call())
        (run,) = (await live(http))["runs"]
        assert (run["left_s"], run["progress"]) == (None, None)


def table_for(fleet):
    """Return a table that sends all calls of the workflow to the second endpoint."""
    plan = Plan(
        workflow_hash=WORKFLOW.content_hash,
        fleet_hash=fleet.content_hash(),
        arrival_rate_rps=1.0,
        run_classes=1,
        assignments=tuple(
            Assignment(run_class=0, site=site, endpoint="e1") for site in ("a#0", "b#0")
        ),
        levels={},
        objective_s=2.0,
        bound_s=1.9,
        status="feasible",
        scenarios=1,
        seed=0,
    )
    level = LoadLevel(occupancy=100.0, plan=plan, prices={"e0": 0.0, "e1": 0.0})
    return compile_table([level], WORKFLOW, fleet, ESTIMATES)


async def test_the_plan_shows_age_bound_and_gap_while_its_table_is_in_use(stack):
    """What was proven of an adopted plan is told, and no longer once another table is loaded."""
    async with shown(stack, policy="almanac") as (s, http):
        table = table_for(s.control.fleet)
        proof = {"status": "feasible", "objective_s": 2.0, "bound_s": 1.9, "gap": 0.05}

        async def ask(_line):
            verdict = {"activate": True, **proof}
            return {"table": table.to_json(), "plans": [], "activation": verdict}

        replanner = Replanner(s.control, ["never started"])
        replanner.process.ask = ask
        s.control.replanning = replanner.facts
        assert (await live(http))["plan"]["last"] is None
        assert await replanner.plan("start") == "adopted"
        plan = (await live(http))["plan"]
        assert plan["proof"] == {"version": table.version, **proof}
        assert plan["version"] == table.version
        assert plan["age_s"] >= 0
        assert plan["replans"] == {"adopted": 1}
        assert (plan["last"]["reason"], plan["last"]["outcome"]) == ("start", "adopted")

        await http.post("/v1/completions", **call())
        told = (await http.get("/almanac/v1/runs/r")).json()
        assert "e1 takes 100%" in told["why"]["a#0"]
        assert told["records"][1]["reason"] == "plan"

        s.control.set_table(replace(table, tuning=Tuning(theta=2.0)))
        plan = (await live(http))["plan"]
        assert (plan["proof"], plan["version"] != table.version) == (None, True)


async def test_kv_use_and_load_are_told_of_each_endpoint(stack, until):
    """KV use is what the engine said of late; where it says nothing, neither does the view."""
    async with shown(stack) as (s, http):
        await until(lambda: s.control.scraper.report(0, s.control.clock.now_s()), 0.005)
        told = (await live(http))["endpoints"][0]
        assert told["kv_state"] == "fresh"
        assert told["kv_usage"] == 0.0
        assert (told["in_flight"], told["slots"], told["state"], told["up"]) == (
            0, 4, "closed", True,
        )  # fmt: skip
    async with shown(stack, config={"scrape_interval_s": 0}) as (_, http):
        told = (await live(http))["endpoints"][0]
        assert (told["kv_state"], told["kv_usage"]) == ("missing", None)


async def test_the_facts_need_the_admin_key(stack):
    """Without the key, or with another, there are no facts; the page itself holds none."""
    async with shown(stack) as (s, _), httpx.AsyncClient(base_url=s.gateway.address) as nobody:
        for path in ("/almanac/v1/live", "/almanac/v1/runs/r"):
            for headers in ({}, {"authorization": "Bearer wrong"}):
                assert (await nobody.get(path, headers=headers)).status_code == 401
            assert (await nobody.post(path, headers=ADMIN)).status_code == 405
        page = await nobody.get("/dashboard")
        assert page.status_code == 200
        assert page.text == page_text()


# One run


async def test_a_run_tells_choice_runner_up_forecast_and_outcome(stack, until):
    """While a call is under way its choice is known, afterwards what came of it."""
    async with shown(stack, dilation=5.0) as (s, http):
        request = asyncio.create_task(http.post("/v1/completions", **call(100, run=HOSTILE_ASCII)))
        await until(lambda: s.control.router.in_flight)
        path = f"/almanac/v1/runs/{quote(HOSTILE_ASCII, safe='')}"
        told = (await http.get(path)).json()
        assert told["schema"] == RUN_SCHEMA
        run, going = (record_from_json(one, "test") for one in told["records"])
        assert isinstance(run, RunRecord)
        assert isinstance(going, CallRecord)
        assert (run.status, going.status, going.finish_s) == ("running", "running", None)
        assert {going.endpoint, going.runner_up} == {"e0", "e1"}
        assert going.runner_up_excess_s >= 0
        assert told["predicted_finish_s"] > told["now_s"]
        await request
        s.control.lifecycle.end(HOSTILE_ASCII)
        told = (await http.get(path)).json()
        run, done = (record_from_json(one, "test") for one in told["records"])
        assert (run.status, done.status) == ("ok", "ok")
        assert done.finish_s > done.sent_s
        assert done.runner_up_finish_s == pytest.approx(going.runner_up_finish_s, abs=1e-5)
        assert told["predicted_finish_s"] is None
        regret = (await live(http))["regret"]
        assert regret["calls"] == 1
        assert regret["values_s"] == [
            pytest.approx(done.finish_s - done.runner_up_finish_s, abs=2e-3)
        ]
        missing = await http.get("/almanac/v1/runs/nobody")
        assert missing.status_code == 404
        assert "nobody" in missing.json()["error"]["message"]


def test_the_journal_is_bounded():
    """However many runs and records come, what is kept stays within its limits."""
    journal = Journal()
    for number in range(2000):
        journal.add(
            BranchRecord(run_id=f"r{number}", workflow_hash="", branch="b", outcome="o", time_s=0.0)
        )
    for number in range(2000):
        journal.add(
            ToolRecord(run_id="long", workflow_hash="", node="t", start_s=0.0, finish_s=1.0)
        )
        journal.add(finished(number))
    assert journal.find("r0") is None
    assert journal.find("r1999") is not None
    log = journal.find("long")
    assert len(log.records) == 256
    assert log.done["t"] == 2000
    assert len(journal.regrets) == 200


def finished(number):
    return CallRecord(
        run_id="long", call_id=f"c{number}", workflow_hash="", node="a", site="a#0", ready_s=0.0,
        sent_s=0.0, endpoint="e0", prompt_tokens=1, output_tokens=1, finish_s=2.0,
        runner_up="e1", runner_up_finish_s=1.5, runner_up_excess_s=0.1,
    )  # fmt: skip


# The page


async def test_there_is_no_page_unless_it_is_asked_for(stack):
    """Without the option the address is unknown."""
    async with shown(stack, config={"dashboard": False}) as (_, http):
        assert (await http.get("/dashboard")).status_code == 404


def test_the_view_without_a_key_is_refused():
    """Asking for a view that could show nothing is an error that names the remedy."""
    with pytest.raises(InvalidInput, match="--admin-key-env"):
        GatewayConfig(dashboard=True)


def test_the_page_is_one_small_file_that_loads_nothing():
    """No address of elsewhere, no inline handler or style attribute, at most 60 KB."""
    text = page_text()
    assert len(text.encode()) <= 60_000
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    markup = re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"<[^>]*\s(on\w+|style|src)\s*=", markup)
    assert "innerHTML" not in text
    assert "localStorage" not in text


def test_the_page_runs_nothing_but_its_own_script():
    """The policy allows one script and one style by hash, questions to its own origin, no more."""
    policy = page_headers()["content-security-policy"]
    rules = dict(one.split(" ", 1) for one in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == "'none'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules[kind])


def test_tables_are_tables():
    """Each table has a caption, and each head cell says what it heads."""
    text = page_text()
    assert text.count("<table>") == text.count("<caption>") == 4
    assert all('scope="col"' in one for one in re.findall(r"<th[ >][^>]*>?", text))
    assert text.count('role="status"') == text.count('role="alert"') == 1
    assert "prefers-reduced-motion" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
async def test_a_browser_shows_it(stack, tmp_path):
    """Key, wrong key, live figures, hostile ids as text, a run by keyboard, narrow and dark."""
    async with shown(stack) as (s, http), browser(tmp_path) as tab:
        hostile = {"type": "run_start", "run_id": HOSTILE, "workflow": HOSTILE}
        await http.post("/almanac/v1/events", json={"events": [hostile]})
        await http.post("/v1/completions", **call(run="plain"))
        await tab.look(width=360, still=True)
        await tab.open(f"{s.gateway.address}/dashboard")
        assert await tab.js("document.activeElement.id") == "key"

        await tab.type("wrong")
        await tab.press("Enter", 13, "\r")
        told = await tab.until("document.querySelector('#ask-error').textContent")
        assert "not the admin key" in told
        assert await tab.js("sessionStorage.length") == 0

        await tab.type("secret")
        await tab.press("Enter", 13, "\r")
        await tab.until("document.querySelector('#status').textContent === 'live'")
        assert await tab.js("[localStorage.length, document.cookie]") == [0, ""]
        rows = "[...document.querySelectorAll('#runs tr')].map((row) => row.dataset.key)"
        assert await tab.js(rows) == [HOSTILE, "plain"]
        assert await tab.js("document.querySelectorAll('#runs img, #runs script').length") == 0
        assert await tab.js("document.title") == "Almanac live view"

        await tab.js("document.querySelectorAll('#runs button')[1].focus()")
        await tab.press("Enter", 13, "\r")
        await tab.until("!document.querySelector('#run').hidden")
        await tab.until("document.activeElement.id === 'h-run'")
        assert await tab.js("document.querySelector('#calls th').textContent") == "a#0"
        assert await tab.js("document.documentElement.scrollWidth") == 360
        assert (await tab.picture()).startswith(b"\x89PNG")

        light = await tab.js("getComputedStyle(document.body).backgroundColor")
        await tab.look(width=1280, dark=True)
        assert await tab.js("getComputedStyle(document.body).backgroundColor") != light
        assert await tab.js("document.documentElement.scrollWidth") == 1280

        await tab.js("document.querySelector('#forget').click()")
        assert await tab.js("[sessionStorage.length, document.activeElement.id]") == [0, "key"]
        assert await tab.js("document.querySelector('#view').hidden")
        # The refused key is all that the console may complain about.
        assert [one for one in tab.complaints if "401" not in one] == []
