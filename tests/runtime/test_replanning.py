"""Re-planning beside a live gateway: tables come and go, and no request notices."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from argparse import Namespace
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest

from planner.cli.explain import run as explain
from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.trace import RunRecord
from planner.domain.workflow import END, START, CallSite, Node, Workflow
from planner.solve.budget import Budget
from planner.solve.horizon import plan_snapshot
from runtime.diagnostics import diagnostics, metrics_text
from runtime.plan_process import ProcessLimits
from runtime.recent import RecentWork
from runtime.replanning import ReplanConfig, Replanner
from tests.runtime.test_commands import FLEET, free_port, start, stop

WORKFLOW = Workflow(
    name="flow",
    nodes=(Node(id="a", kind="llm", call_sites=(CallSite(id="a#0"),)),),
    edges=((START, "a"), ("a", END)),
)
HASH = WORKFLOW.content_hash
ESTIMATES = EstimateTable(
    workflows={
        HASH: WorkflowEstimate(
            name="flow",
            sites={
                "a#0": SiteEstimate(
                    output_tokens=Quantiles.constant(20.0), prompt_tokens=Quantiles.constant(10.0)
                )
            },
        )
    }
)
WORKER = [
    sys.executable, "-m", "planner.cli.main", "plan-worker", "--deterministic", "--plan-limit", "2",
    "--replay-runs", "10", "--tolerance", "10", "--keep-weights",
]  # fmt: skip

PRELUDE = """
import json, sys
def tell(**answer):
    print(json.dumps(answer), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
"""


def fake(body: str) -> list[str]:
    """Return a worker that answers each question with some lines of code."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return [sys.executable, "-c", PRELUDE + lines]


def config(**changes):
    values = {
        "period_s": 1e6, "settle_s": 2.0, "least_gap_s": 0.5, "window_s": 20.0, "poll_s": 0.01,
        "limits": ProcessLimits(deadline_s=60.0, silence_s=60.0, pause_s=0.01),
    }  # fmt: skip
    return ReplanConfig(**(values | changes))


@asynccontextmanager
async def traffic(s):
    """Send runs of one call from as many clients as ``load[0]`` says; gives (load, statuses)."""
    load, statuses, stopping = [1], [], asyncio.Event()

    async def client(http, number):
        count = 0
        while not stopping.is_set():
            if number >= load[0]:
                await asyncio.sleep(0.005)
                continue
            count += 1
            run = f"r{number}-{count}"
            answer = await http.post(
                "/v1/chat/completions",
                json={
                    "model": "m",
                    "messages": [{"role": "user", "content": "a few words"}],
                    "max_tokens": 20,
                },
                headers={
                    "x-almanac-run-id": run,
                    "x-almanac-workflow": HASH,
                    "x-almanac-node": "a",
                },
            )
            statuses.append(answer.status_code)
            event = {"type": "run_end", "run_id": run}
            await http.post("/almanac/v1/events", json={"events": [event]})

    async with httpx.AsyncClient(base_url=s.gateway.address, trust_env=False) as http:
        clients = [asyncio.create_task(client(http, number)) for number in range(6)]
        try:
            yield load, statuses
        finally:
            stopping.set()
            await asyncio.gather(*clients)


async def eventually(condition, limit_s=60.0):
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - the condition belongs to the code under test
            await asyncio.sleep(0.01)


def test_a_shifted_load_gets_a_new_table_and_no_request_fails(stack, tmp_path, capsys):
    """Start, drift and a killed worker: tables go live one after the other, every call is served.

    The log of it all can be explained.
    """
    log = tmp_path / "activations.jsonl"

    async def live():
        async with stack(2, policy="almanac", workflows=[WORKFLOW], estimates=ESTIMATES) as s:
            replanner = Replanner(s.control, WORKER, config(log=log))
            async with traffic(s) as (load, statuses), replanner:
                outcomes = replanner.facts()["outcomes"]
                await eventually(lambda: s.control.table is not None)
                first = s.control.table
                await eventually(lambda: replanner.process.pid is not None)
                os.kill(replanner.process.pid, signal.SIGKILL)
                served = len(statuses)
                load[0] = 6
                await eventually(lambda: s.control.table.version != first.version)
                assert len(statuses) > served
                facts = diagnostics(s.control)
                assert facts["table_version"] == s.control.table.version
                assert facts["table_age_s"] >= 0.0
                outcomes = facts["replanning"]["outcomes"]
                assert outcomes["adopted"] >= 2
                assert facts["replanning"]["process"]["starts"] >= 2
                assert "almanac_table_age_seconds" in metrics_text(s.control)
                assert 'almanac_replans_total{reason="start",outcome="adopted"} 1' in (
                    metrics_text(s.control)
                )
            assert set(statuses) == {200}
            assert replanner.process.pid is None
            assert s.control.ledger.recent is None

    asyncio.run(live())
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[0]["reason"] == "start"
    # The killed process may have taken the first question about the new load with it.
    assert {"drift", "retry"} & {one["reason"] for one in records if one["outcome"] == "adopted"}
    assert records[0]["incumbent"] == "marginal_cost"
    assert explain(Namespace(file=log, site=None, run=None, gateway=None, json=False)) == 0
    assert "adopted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "outcome", "detail"),
    [
        ("tell(id=asked['id'], error='Infeasible: too much')", "failed", "too much"),
        ("tell(id=asked['id'], table={'schema': 'x'})", "refused", "not a dispatch table"),
        ("tell(id=asked['id'], table=asked['incumbent'])", "refused", "activation"),
        (
            "tell(id=asked['id'], table=asked['incumbent'], activation={'activate': False})",
            "kept",
            "worse",
        ),
        (
            "tell(id=asked['id'], table=asked['incumbent'], activation={'activate': True})",
            "adopted",
            "",
        ),
        ("sys.exit(1)", "failed", "ended"),
        ("print('{')", "failed", ""),
        ("import time; time.sleep(30)", "failed", "late"),
    ],
)
def test_whatever_the_worker_answers_the_gateway_stays_whole(stack, body, outcome, detail):
    """Errors, nonsense, deaths and lateness keep the table; only a whole good answer swaps it."""

    async def live():
        async with stack(2, policy="almanac", workflows=[WORKFLOW], estimates=ESTIMATES) as s:
            table = table_for(s)
            s.control.set_table(table)
            limits = ProcessLimits(deadline_s=0.7 if detail == "late" else 20.0)
            replanner = Replanner(s.control, fake(body), config(limits=limits))
            try:
                assert await replanner.plan("period") == outcome
            finally:
                await replanner.process.aclose()
            assert detail in replanner.facts()["last"]["detail"]
            assert s.control.table.version == table.version
            assert (s.control.table is table) == (outcome != "adopted")

    asyncio.run(live())


def test_an_answer_for_an_old_state_is_dropped(stack, tmp_path):
    """A table for another fleet is refused; one whose endpoints or rivals changed is stale."""
    good = "tell(id=asked['id'], table=asked['incumbent'], activation={'activate': True})"
    waiting = f"import os, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\n{good}"

    async def live(tmp, change, outcome):
        async with stack(2, policy="almanac", workflows=[WORKFLOW], estimates=ESTIMATES) as s:
            s.control.set_table(table_for(s))
            replanner = Replanner(s.control, [*fake(waiting), str(tmp)], config())
            try:
                planning = asyncio.create_task(replanner.plan("period"))
                await eventually(lambda: replanner.process.pid is not None)
                change(s)
                tmp.touch()
                assert await planning == outcome
            finally:
                await replanner.process.aclose()

    def down(s):
        s.control.router.view.states[0].healthy = False

    def rival(s):
        table = table_for(s)
        s.control.set_table(replace(table, tuning=replace(table.tuning, theta=2.0)))

    for number, (change, outcome) in enumerate(
        ((down, "stale"), (rival, "stale"), (lambda _: None, "adopted"))
    ):
        asyncio.run(live(tmp_path / str(number), change, outcome))


def test_the_command_starts_a_worker_and_takes_it_along(tmp_path):
    """`almanac serve --replan` has a planner's process beside it, and none is left at the end."""
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(FLEET.format(port=free_port()))
    gateway, line = start(
        "serve", fleet, "--port", 0, "--replan", "60", "--admin-key-env", "THE_KEY",
        THE_KEY="secret",
    )  # fmt: skip
    while not line.startswith("ready: "):
        line = gateway.stderr.readline()
        assert line
    url = line.split()[1].rstrip(",")
    key = {"authorization": "Bearer secret"}
    worker = None
    while worker is None:
        facts = httpx.get(f"{url}/almanac/v1/diagnostics", headers=key, trust_env=False).json()
        worker = facts["replanning"]["process"]["pid"]
    assert facts["replanning"]["period_s"] == 60.0
    code, _, err = stop(gateway)
    assert code == 0
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def table_for(s):
    """Return a table that fits the gateway's fleet."""
    snapshot = Replanner(s.control, WORKER, config()).snapshot()
    snapshot = replace(snapshot, workflows=(WORKFLOW,), rates_rps={HASH: 1.0})
    return plan_snapshot(snapshot, (), Budget.reproducible(1.0, 0.02)).table


def test_recent_work_is_bounded_and_counts():
    """Ended runs are kept up to a number, with their records; uncovered calls fade."""

    def run(name):
        return RunRecord(run_id=name, workflow="", workflow_hash="w", arrival_s=0.0, finish_s=1.0)

    recent = RecentWork(60.0, 0.0, runs=2)
    for number in range(4):
        recent.arrived(f"r{number}", "w", float(number))
    assert recent.active() == {"w": 4}
    for number in range(3):
        recent.add(run(f"r{number}"))
    recent.add(run("unknown"))
    assert [record.run_id for record in recent.records()] == ["r1", "r2"]
    assert recent.active() == {"w": 1}
    for _ in range(200):
        recent.decided(covered=False)
    assert recent.uncovered == pytest.approx(1.0, abs=0.05)
    for _ in range(200):
        recent.decided(covered=True)
    assert recent.uncovered < 0.05
