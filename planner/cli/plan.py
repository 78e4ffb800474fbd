"""`almanac plan`: place a workflow's call sites on a fleet, check the plan, write its table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.activation import (
    activation_trial,
    add_activation_arguments,
    save_activation,
)
from planner.cli.checks import at_least, out_file
from planner.domain.estimates import EstimateTable, load_estimates
from planner.domain.fleet import Fleet, load_fleet
from planner.domain.plan import save_plan
from planner.domain.workflow import Workflow, load_workflow
from planner.verify import VerifyReport, verify_plan

if TYPE_CHECKING:
    from planner.dispatch.table import DispatchTable
    from planner.solve.explain import EndpointUse, RunnerUp
    from planner.solve.solver import Budget, PlanResult, Progress

__all__ = ["register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``plan`` command."""
    parser = subparsers.add_parser(
        "plan",
        help="place a workflow on a fleet with CP-SAT; write plan and dispatch table",
        description=(
            "Sample runs of a workflow from its forecasts, choose an endpoint for each call site "
            "of each run class and a load level for each endpoint so that the expected run "
            "latency is least, and check the result independently. Objective, bound, gap, the "
            "checker's verdict and the placement go to stdout, progress to stderr."
        ),
    )
    parser.add_argument(
        "--workflow", type=Path, required=True, metavar="FILE", help="workflow graph (JSON)"
    )
    parser.add_argument(
        "--fleet", type=Path, required=True, metavar="FILE", help="fleet file (YAML)"
    )
    parser.add_argument(
        "--estimates",
        type=Path,
        required=True,
        metavar="FILE",
        help="estimate table (JSON) made by `almanac train`",
    )
    parser.add_argument(
        "--rate", type=float, required=True, metavar="RPS", help="runs per second to plan for"
    )
    parser.add_argument(
        "--classes",
        type=int,
        default=4,
        metavar="N",
        help="equal shares of the traffic with a placement each (default: 4)",
    )
    parser.add_argument(
        "--scenarios",
        type=int,
        default=8,
        metavar="N",
        help="sampled runs the objective is the mean of (default: 8)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of scenarios and solver")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=15.0,
        metavar="S",
        help="search time; deterministic time with --deterministic (default: 15)",
    )
    parser.add_argument(
        "--gap",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="stop at this proven relative gap (default: 0.01)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="one worker and a deterministic limit: the same plan every time, bit for bit",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the plan (JSON)")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="write a dispatch table (JSON), with plans for loads around the rate",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="list how full each endpoint is and each call site's runner-up",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_activation_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan, check, print and write; return 0, or 1 if the checker or the replay rejects it."""
    from planner.solve.solver import Budget, solve_plan  # OR-Tools takes a second to load

    at_least(args, seed=0)
    out_file(args.out, "--out")
    out_file(args.table, "--table")
    workflow = load_workflow(args.workflow)
    fleet = load_fleet(args.fleet)
    estimates = load_estimates(args.estimates)
    trial = activation_trial(args, fleet)
    if workflow.content_hash not in estimates.workflows:
        _note(
            f"no forecasts for workflow {workflow.name!r} ({workflow.content_hash}) in "
            f"{args.estimates}: its declarations and priors are used"
        )
    if args.deterministic:
        budget = Budget.reproducible(args.time_limit, args.gap)
    else:
        budget = Budget(wall_s=args.time_limit, relative_gap=args.gap)
    result = solve_plan(
        workflow,
        fleet,
        estimates,
        arrival_rate_rps=args.rate,
        run_classes=args.classes,
        scenarios=args.scenarios,
        seed=args.seed,
        budget=budget,
        progress=_show_progress,
    )
    report = verify_plan(result.plan, workflow, fleet, estimates, result.scenarios)
    print(_as_json(result, report) if args.json else _as_text(result, report, args.explain))
    if not report.ok:
        _note("the plan was rejected and nothing was written; this is a bug, please report it")
        return 1
    if args.out is not None:
        save_plan(result.plan, args.out)
        _note(f"wrote {args.out}")
    if args.table is not None:
        from planner.dispatch.table import save_table

        table = _compile(workflow, fleet, estimates, result, budget, args.seed)
        if trial is not None:
            verdict = trial.judge(table, [workflow], fleet, estimates)
            save_activation(verdict, args.table.with_suffix(".activation.json"))
            _note(verdict.text())
            if not verdict.activate:
                return 1
        save_table(table, args.table)
        _note(f"wrote {args.table}, table {table.version}, {len(table.rows)} rows")
    return 0


def _compile(
    workflow: Workflow,
    fleet: Fleet,
    estimates: EstimateTable,
    result: PlanResult,
    budget: Budget,
    seed: int,
) -> DispatchTable:
    """Return the dispatch table for loads around the planned rate."""
    from planner.study.tables import plan_table

    return plan_table(
        workflow,
        fleet,
        estimates,
        rate_rps=result.plan.arrival_rate_rps,
        base=result,
        budget=budget,
        seed=seed,
        progress=_note,
    )


def _note(line: str) -> None:
    print(f"plan: {line}", file=sys.stderr, flush=True)


def _show_progress(row: Progress) -> None:
    gap = 1.0 - row.bound_s / row.objective_s if row.objective_s > 0 else 0.0
    _note(
        f"{row.time_s:6.2f} s  objective {row.objective_s:.3f} s  bound {row.bound_s:.3f} s  "
        f"gap {gap:.2%}"
    )


def _as_json(result: PlanResult, report: VerifyReport) -> str:
    """Return plan, verdict, loads, solution log and explanation as one JSON document."""
    from planner.solve.explain import endpoint_use, runners_up

    document: dict[str, Any] = {
        "plan": result.plan.to_json(),
        "accepted": report.ok,
        "violations": [str(one) for one in report.violations],
        "checked_objective_s": report.objective_s,
        "wall_s": round(result.wall_s, 3),
        "log": [_fields(row) for row in result.log],
        "endpoints": [_fields(row) for row in endpoint_use(result)],
        "runners_up": [_fields(row) for row in runners_up(result)],
    }
    return json.dumps(document, indent=1)


def _fields(row: Progress | EndpointUse | RunnerUp) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}


def _as_text(result: PlanResult, report: VerifyReport, explain: bool) -> str:
    plan = result.plan
    lines = [
        f"status      {plan.status}",
        (
            f"objective   {plan.objective_s:.3f} s expected run latency at "
            f"{plan.arrival_rate_rps:g} runs/s, over {plan.run_classes} classes x "
            f"{plan.scenarios} scenarios"
        ),
        f"bound       {plan.bound_s:.3f} s",
        f"gap         {plan.gap:.2%}",
        f"idle fleet  {plan.notes['critical_path_bound_s']:.3f} s critical path",
        f"capacity    {plan.notes['carried_rate_rps']:.4g} runs/s at most",
        f"wall time   {result.wall_s:.2f} s",
    ]
    if report.ok:
        lines.append(f"checker     accepted (recomputed objective {report.objective_s:.3f} s)")
    else:
        lines.append("checker     REJECTED")
        lines += [f"  {violation}" for violation in report.violations]
    lines += ["", *_placement(result)]
    if explain:
        lines += ["", *_explanation(result)]
    return "\n".join(lines)


def _placement(result: PlanResult) -> list[str]:
    """Return the table of shares, call sites by endpoints, with the levels on top."""
    plan = result.plan
    names = result.instance.endpoints
    rows = [
        ["call site", *names],
        ["(level)", *(str(plan.levels.get(name, "-")) for name in names)],
    ]
    for site, shares in plan.shares().items():
        rows.append([site, *(f"{shares[n]:.0%}" if n in shares else "." for n in names)])
    return _aligned(rows)


def _explanation(result: PlanResult) -> list[str]:
    from planner.solve.explain import endpoint_use, runners_up

    uses = [["endpoint", "level", "busy calls", "room", ""]]
    for use in endpoint_use(result):
        full = "full: binding" if use.binding else ""
        uses.append([use.endpoint, str(use.level), f"{use.busy:.2f}", f"{use.room:.2f}", full])
    others = [["call site", "mostly on", "runner-up", "run latency", "room there"]]
    for row in runners_up(result):
        if row.runner_up is None:
            others.append([row.site, row.endpoint, "none", "", ""])
        else:
            room = "yes" if row.fits else "no"
            others.append([row.site, row.endpoint, row.runner_up, f"{row.extra_s:+.3f} s", room])
    return [*_aligned(uses), "", *_aligned(others)]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Return rows with columns padded to the widest cell, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if position else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
