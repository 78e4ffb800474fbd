"""What a gateway keeps across restarts."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import httpx
import pytest

from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.workflow import END, START, CallSite, Node, Workflow
from runtime.config import GatewayConfig
from runtime.control import Control
from runtime.gateway import Gateway
from runtime.identity import Identity
from runtime.state import StateFile, snapshot

WORKFLOW = Workflow(
    name="flow",
    nodes=(Node(id="a", kind="llm", call_sites=(CallSite(id="a#0"),)),),
    edges=((START, "a"), ("a", END)),
)
SITE = SiteEstimate(output_tokens=Quantiles.constant(20.0), prompt_tokens=Quantiles.constant(50.0))
ESTIMATES = EstimateTable(
    workflows={WORKFLOW.content_hash: WorkflowEstimate(name="flow", sites={"a#0": SITE})}
)


def fresh(control, **changes):
    """Return a control like another one after a restart."""
    config = replace(control.config, **changes)
    return Control(control.fleet, estimates=ESTIMATES, policy="least_load", config=config)


async def ask(gateway, count=4):
    headers = {
        "x-almanac-run-id": "run", "x-almanac-workflow": WORKFLOW.content_hash,
        "x-almanac-node": "a", "x-session-id": "s",
    }  # fmt: skip
    async with httpx.AsyncClient(base_url=gateway.address) as http:
        for _ in range(count):
            answer = await http.post(
                "/v1/completions",
                json={"model": "m", "prompt": "words " * 200, "max_tokens": 30},
                headers=headers,
            )
            assert answer.status_code == 200


async def test_a_restart_takes_up_where_it_left(stack, tmp_path):
    """Learned rows, lengths, token scale, workflows, runs and warm caches are back at once."""
    path = tmp_path / "state.json"
    async with stack(2, policy="least_load", estimates=ESTIMATES, workflows=[WORKFLOW]) as s:
        control = s.control
        async with Gateway(fresh(control), port=0, state=StateFile(path, control)) as first:
            first._state = StateFile(path, first.control)
            first.control.add_workflow(WORKFLOW)
            await ask(first)
            old = first.control
            rows = [state.latency for state in old.router.view.states]
            lengths, scale = old.router.lengths.to_json(), old.scale.to_json()
            held = [state.prefix.held_tokens for state in old.router.view.states]
            arrival_s = old.runs.find("run").arrival_s - old.clock.now_s()
        # The gateway is gone; its file is all there is.
        again = fresh(control)
        async with Gateway(again, port=0, state=StateFile(path, again)) as second:
            restored = second.restored
            assert [state.latency for state in again.router.view.states] == rows
            assert again.router.lengths.to_json() == lengths
            assert again.scale.to_json() == scale
            assert list(again.workflows) == [WORKFLOW]
            assert restored.warm == ("e0", "e1")
            assert [state.prefix.held_tokens for state in again.router.view.states] == held
            run = again.runs.find("run")
            assert (run.calls, run.workflow, run.session_id) == (4, "flow", "s")
            assert run.arrival_s - again.clock.now_s() <= arrival_s
            await ask(second, 1)
            assert run.calls == 5


async def test_restarted_endpoints_are_cold(stack, tmp_path):
    """An endpoint that is another process than before, or does not tell, has an empty cache."""
    async with stack(2, policy="round_robin") as s:
        await ask(s.gateway)
        await s.gateway._scrape()
        document = snapshot(s.control, wall_s=0.0)
        document["endpoints"][0]["started_s"] -= 1.0
        path = tmp_path / "state.json"
        path.write_text(json.dumps(document))
        again = fresh(s.control)
        async with Gateway(again, port=0, state=StateFile(path, again)) as gateway:
            assert (gateway.restored.cold, gateway.restored.warm) == (("e0",), ("e1",))
            first, second = again.router.view.states
            assert first.prefix.held_tokens == 0.0
            assert second.prefix.held_tokens > 0.0


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"schema": "almanac.state/0"}', '{"schema": "almanac.state/1"}',
        '{"schema": "almanac.state/1", "saved_s": "x"}',
        '{"schema": "almanac.state/1", "saved_s": 0, "workflows": 3}',
        '{"schema": "almanac.state/1", "saved_s": 0, "workflows": [{}], "endpoints": []}',
        "\x00\xff",
    ],
)  # fmt: skip
def test_a_broken_file_costs_one_warning(fleet_of, tmp_path, caplog, text):
    """Whatever is in the file, the gateway starts, and says once that it starts fresh."""
    path = tmp_path / "state.json"
    path.write_text(text, encoding="latin-1")
    control = Control(fleet_of(1), policy="least_load")
    with caplog.at_level(logging.WARNING):
        restored = StateFile(path, control).load()
    assert (restored.runs, restored.table) == (0, "")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_no_file_is_no_warning(fleet_of, tmp_path, caplog):
    """The first start is a quiet one."""
    StateFile(tmp_path / "none.json", Control(fleet_of(1))).load()
    assert caplog.records == []


def test_what_does_not_fit_any_more_is_left_out(fleet_of, tmp_path):
    """Edited rows, moved endpoints and tables of other fleets stay as the file says now."""
    control = Control(fleet_of(2), policy="least_load", config=GatewayConfig())
    control.lifecycle.run_of(Identity(run_id="r"))
    path = tmp_path / "state.json"
    StateFile(path, control, wall=lambda: 100.0).save()
    changed = fleet_of(2)
    slow = replace(changed.endpoints[0].latency, decode_base_ms=60.0)
    other = replace(
        changed,
        endpoints=(
            replace(changed.endpoints[0], latency=slow),
            replace(changed.endpoints[1], url="http://127.0.0.1:9999"),
        ),
    )
    again = Control(other, policy="least_load")
    restored = StateFile(path, again, wall=lambda: 160.0).load()
    assert (restored.rows, restored.warm, restored.runs) == (0, (), 1)
    assert again.router.view.states[0].latency == slow
    assert again.runs.find("r").arrival_s == pytest.approx(-60.0, abs=1.0)


def test_a_file_that_cannot_be_written_leaves_the_old_one(fleet_of, tmp_path):
    """The file is replaced as a whole; beside it nothing is left."""
    path = tmp_path / "state.json"
    keeper = StateFile(path, Control(fleet_of(1)))
    keeper.save()
    keeper.save()
    assert [one.name for one in tmp_path.iterdir()] == ["state.json"]
    assert json.loads(path.read_text())["schema"] == "almanac.state/1"
