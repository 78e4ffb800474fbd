"""A small results folder with every part, made by hand: two baselines and Almanac on three seeds.

Run ``k`` of seed ``s`` takes 10 + k + s seconds under round_robin, 8 + k + s under marginal_cost
and ``factor`` times the latter under almanac, so every difference is known.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from planner.dispatch.table import DispatchTable, Ranked, Row, save_table
from planner.domain.plan import Assignment, Plan, save_plan
from planner.domain.trace import CallRecord, RunRecord, ToolRecord, TraceRecord, save_trace
from planner.domain.workflow import save_workflow
from planner.metrics import summarise
from planner.report.results import PolicyResult, Results, SeedResult, save_results
from tests.planner.graph.research import research_workflow

SEEDS = (0, 1, 2)
RUNS = 5
WORKFLOW = research_workflow()


def latency_s(policy: str, seed: int, number: int, factor: float = 0.9) -> float:
    """Return the latency of a run."""
    if policy == "round_robin":
        return 10.0 + number + seed
    base = 8.0 + number + seed
    return factor * base if policy == "almanac" else base


def records(policy: str, seed: int, factor: float = 0.9) -> list[TraceRecord]:
    """Return the trace of a policy on a seed: per run two calls on unlike endpoints and a tool."""
    out: list[TraceRecord] = []
    for number in range(RUNS):
        run_id, start = f"s{seed}-r{number}", 3.0 * number
        end = start + latency_s(policy, seed, number, factor)
        third = (end - start) / 3
        for position, (node, endpoint) in enumerate((("triage", "h100"), ("draft", "a100"))):
            ready = start + 2 * third * position
            out.append(
                CallRecord(
                    run_id=run_id,
                    call_id=f"{run_id}/{position}",
                    workflow_hash=WORKFLOW.content_hash,
                    node=node,
                    site=f"{node}#0",
                    ready_s=ready,
                    sent_s=ready + 0.1,
                    first_token_s=ready + 0.4 * third,
                    finish_s=ready + third,
                    endpoint=endpoint,
                    prompt_tokens=100,
                    cached_tokens=25,
                    output_tokens=40,
                    policy=policy,
                    reason="plan" if policy == "almanac" else "policy",
                    predicted_finish_s=ready + 1.2 * third,
                    predicted_output_tokens=50.0,
                    decision_us=20.0,
                )
            )
        out.append(
            ToolRecord(
                run_id=run_id,
                workflow_hash=WORKFLOW.content_hash,
                node="search",
                start_s=start + third,
                finish_s=start + 2 * third,
            )
        )
        out.append(
            RunRecord(
                run_id=run_id,
                workflow="research",
                workflow_hash=WORKFLOW.content_hash,
                arrival_s=start,
                finish_s=end,
                predicted_s=11.0,
                calls=2,
            )
        )
    return out


def results(factor: float = 0.9, *, traces: bool = False) -> Results:
    """Return the results of all policies."""
    return Results(
        title="Three seeds <by hand>",
        mode="simulated",
        settings={"fleet": "demo", "rate_rps": 0.5, "dilation": 4, "notes": ["A note & more."]},
        policies=tuple(
            PolicyResult(
                policy=name,
                label=name,
                parameters={"theta": 1.5} if name != "round_robin" else {},
                seeds=tuple(
                    SeedResult(
                        seed=seed,
                        metrics=summarise(records(name, seed, factor)),
                        trace=f"traces/{name}-{seed}.jsonl" if traces else None,
                    )
                    for seed in SEEDS
                ),
            )
            for name in ("round_robin", "marginal_cost", "almanac")
        ),
    )


def plan() -> Plan:
    """Return a plan of two classes for two call sites."""
    return Plan(
        workflow_hash=WORKFLOW.content_hash,
        fleet_hash="f" * 16,
        arrival_rate_rps=0.5,
        run_classes=2,
        assignments=tuple(
            Assignment(run_class=number, site=site, endpoint=endpoint)
            for number in range(2)
            for site, endpoint in (("triage#0", "h100"), ("draft#0", ("h100", "a100")[number]))
        ),
        levels={"h100": 3, "a100": 1},
        objective_s=10.0,
        bound_s=9.5,
        status="feasible",
        scenarios=8,
        seed=0,
    )


def table() -> DispatchTable:
    """Return a table of two call sites in two buckets."""
    return DispatchTable(
        fleet_hash="f" * 16,
        endpoints=("h100", "a100"),
        bounds=(0.5, math.inf),
        rows=tuple(
            Row(
                workflow_hash=WORKFLOW.content_hash,
                site=site,
                bucket=bucket,
                valid_from=0.5 * bucket,
                valid_to=(0.5, math.inf)[bucket],
                ranked=(
                    Ranked(endpoint="h100", cost_s=1.25, share=0.75, price=0.5),
                    Ranked(endpoint="a100", cost_s=2.5, share=0.25, price=0.125),
                ),
                reason="h100 takes 75%",
            )
            for site in ("triage#0", "draft#0")
            for bucket in range(2)
        ),
    )


def write_folder(folder: Path, factor: float = 0.9) -> Path:
    """Write a results folder with traces, twin, workflow, plan, table and model card."""
    made = results(factor, traces=True)
    for policy in made.policies:
        for one in policy.seeds:
            assert one.trace is not None
            save_trace(records(policy.policy, one.seed, factor), folder / one.trace)
    save_results(made, folder)
    save_results(results(factor), folder / "simulated.json")
    save_workflow(WORKFLOW, folder / "workflow.json")
    save_plan(plan(), folder / "plan.json")
    save_table(table(), folder / "table.json")
    (folder / "models").mkdir()
    card = {"rows": 120, "models": [{"name": "output tokens", "pinball": 21.5, "constant": 30.0}]}
    (folder / "models" / "model_card.json").write_text(json.dumps(card))
    return folder
