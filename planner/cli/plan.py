"""`almanac plan`: place the call sites of workflows on a fleet, check the plan, write its table."""

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
from planner.domain.errors import InvalidInput
from planner.domain.estimates import load_estimates
from planner.domain.fleet import load_fleet
from planner.domain.objective import Objective
from planner.domain.plan import save_plan
from planner.domain.workflow import load_workflow
from planner.verify import VerifyReport, verify_plans

if TYPE_CHECKING:
    from planner.solve.explain import EndpointUse, RunnerUp
    from planner.solve.solver import Demand, PlanResult, Progress

__all__ = ["register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``plan`` command."""
    parser = subparsers.add_parser(
        "plan",
        help="place a workflow on a fleet with CP-SAT; write plan and dispatch table",
        description=(
            "Sample runs of each workflow from its forecasts, choose an endpoint for each call "
            "site of each run class and a load level for each endpoint so that the expected run "
            "latency (or another objective) is least, and check the result independently. "
            "Objective, bound, gap, the checker's verdict and the placement go to stdout, "
            "progress to stderr."
        ),
    )
    parser.add_argument(
        "--workflow",
        type=Path,
        required=True,
        action="append",
        metavar="FILE",
        help="workflow graph (JSON); several are planned together",
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
        "--rate",
        type=float,
        required=True,
        action="append",
        metavar="RPS",
        help="runs per second to plan for; one for each --workflow, in the same order",
    )
    parser.add_argument(
        "--weight",
        type=float,
        action="append",
        metavar="W",
        help="weight of a workflow's runs in the objective; one for each (default: 1)",
    )
    parser.add_argument(
        "--objective",
        default="mean",
        metavar="TERMS",
        help=(
            "mean, cvar:0.95, makespan, deadline (mean tardiness) or miss (share that is late); "
            "summed as in mean+0.5*cvar:0.95, or one after the other as in 'miss>mean' "
            "(default: mean)"
        ),
    )
    parser.add_argument(
        "--deadline",
        type=float,
        action="append",
        metavar="S",
        help="seconds a run may take; one for all workflows, or one for each",
    )
    parser.add_argument(
        "--hard-deadline",
        action="store_true",
        help="every sampled run has to keep the deadline; without such a plan, say why",
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
        type=_count_or_auto,
        default=8,
        metavar="N",
        help=(
            "sampled runs of each workflow that the objective is stated over, or 'auto': as many "
            "as --target-error asks for (default: 8)"
        ),
    )
    parser.add_argument(
        "--target-error",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="relative standard error of the mean that 'auto' aims at (default: 0.02)",
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
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the plan (JSON); of several workflows, FILE-1.json, FILE-2.json and so on",
    )
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


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def run(args: argparse.Namespace) -> int:
    """Plan, check, print and write; return 0, or 1 if the checker or the replay rejects it."""
    from planner.solve.solver import Budget, solve_mix  # OR-Tools takes a second to load

    at_least(args, seed=0)
    out_file(args.out, "--out")
    out_file(args.table, "--table")
    objective = Objective.parse(args.objective)
    fleet = load_fleet(args.fleet)
    estimates = load_estimates(args.estimates)
    trial = activation_trial(args, fleet)
    demands = _demands(args)
    for demand in demands:
        workflow = demand.workflow
        if workflow.content_hash not in estimates.workflows:
            _note(
                f"no forecasts for workflow {workflow.name!r} ({workflow.content_hash}) in "
                f"{args.estimates}: its declarations and priors are used"
            )
    if args.deterministic:
        budget = Budget.reproducible(args.time_limit, args.gap)
    else:
        budget = Budget(wall_s=args.time_limit, relative_gap=args.gap)
    result = solve_mix(
        demands,
        fleet,
        estimates,
        run_classes=args.classes,
        scenarios=args.scenarios,
        target_error=args.target_error,
        seed=args.seed,
        budget=budget,
        progress=_show_progress,
        objective=objective,
    )
    report = verify_plans(
        result.plans, [one.workflow for one in demands], fleet, estimates, result.samples
    )
    print(_as_json(result, report) if args.json else _as_text(result, report, args.explain))
    if not report.ok:
        _note("the plan was rejected and nothing was written; this is a bug, please report it")
        return 1
    if args.out is not None:
        for path, plan in zip(_plan_files(args.out, len(demands)), result.plans, strict=True):
            save_plan(plan, path)
            _note(f"wrote {path}")
    if args.table is not None:
        from planner.dispatch.table import save_table
        from planner.solve.tables import mix_table

        table = mix_table(
            demands,
            fleet,
            estimates,
            base=result,
            budget=budget,
            seed=args.seed,
            objective=objective,
            run_classes=args.classes,
            scenarios=result.plan.scenarios,
            progress=_note,
        )
        if trial is not None:
            verdict = trial.judge(table, [one.workflow for one in demands], fleet, estimates)
            save_activation(verdict, args.table.with_suffix(".activation.json"))
            _note(verdict.text())
            if not verdict.activate:
                return 1
        save_table(table, args.table)
        _note(f"wrote {args.table}, table {table.version}, {len(table.rows)} rows")
    return 0


def _plan_files(out: Path, count: int) -> list[Path]:
    """Return where to write the plans: one file as named, several with a number each."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{n}{out.suffix}") for n in range(1, count + 1)]


def _demands(args: argparse.Namespace) -> list[Demand]:
    """Return the workflows with their rates, weights and deadlines.

    Raises
    ------
    InvalidInput
        If there are more or fewer of one than of the others.
    """
    from planner.solve.solver import Demand

    files: list[Path] = args.workflow
    weights = args.weight or [1.0] * len(files)
    deadlines = args.deadline or [None]
    if len(deadlines) == 1:
        deadlines *= len(files)
    for given, option in ((args.rate, "--rate"), (weights, "--weight"), (deadlines, "--deadline")):
        if len(given) != len(files):
            raise InvalidInput(
                f"{len(given)} values for {len(files)} workflows",
                where=option,
                remedy="give one for each --workflow, in the same order",
            )
    if args.hard_deadline and args.deadline is None:
        raise InvalidInput("no --deadline", where="--hard-deadline", remedy="give one")
    return [
        Demand(
            workflow=load_workflow(path),
            rate_rps=rate,
            weight=weight,
            deadline_s=deadline,
            hard=args.hard_deadline,
        )
        for path, rate, weight, deadline in zip(files, args.rate, weights, deadlines, strict=True)
    ]


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
        "plans": [plan.to_json() for plan in result.plans],
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
    name = plan.objective.name
    what = "expected run latency" if name == "mean" else name
    lines = [
        f"status      {plan.status}",
        (
            f"objective   {plan.objective_s:.3f} s {what} at "
            f"{result.instance.arrival_rate_rps:g} runs/s, over {plan.run_classes} classes x "
            f"{plan.scenarios} scenarios"
        ),
        f"bound       {plan.bound_s:.3f} s",
        f"gap         {plan.gap:.2%}",
    ]
    if name != "mean":
        lines += [f"value       {value:.3f} {term}" for term, value in plan.values.items()]
        if plan.objective.lexicographic:
            lines += [f"bound of    {value:.3f} {term}" for term, value in plan.bounds.items()]
    lines += [
        f"idle fleet  {plan.notes['critical_path_bound_s']:.3f} s critical path",
        f"capacity    {plan.notes['carried_rate_rps']:.4g} runs/s at most",
    ]
    if "scenario_error" in plan.notes:
        lines.append(f"sample      {plan.notes['scenario_error']:.2%} standard error of the mean")
    lines.append(f"wall time   {result.wall_s:.2f} s")
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
    levels = result.plan.levels
    names = result.instance.endpoints
    rows = [
        ["call site", *names],
        ["(level)", *(str(levels.get(name, "-")) for name in names)],
    ]
    for source, plan in zip(result.instance.sources, result.plans, strict=True):
        shares = plan.shares()
        for k, path in zip(source.sites, source.paths, strict=True):
            cells = [f"{shares[path][n]:.0%}" if n in shares[path] else "." for n in names]
            rows.append([result.instance.sites[k], *cells])
    return _aligned(rows)


def _explanation(result: PlanResult) -> list[str]:
    from planner.solve.explain import endpoint_use, runners_up

    uses = [["endpoint", "level", "busy calls", "room", "", "KV tokens", "room", "", "price"]]
    uses += [
        [
            use.endpoint,
            str(use.level),
            f"{use.busy:.2f}",
            f"{use.room:.2f}",
            "full: binding" if use.binding else "",
            str(use.kv_tokens),
            str(use.kv_room),
            "full: binding" if use.kv_binding else "",
            f"{1e6 * use.kv_price:.3g} s/Mtoken s" if use.kv_price else "",
        ]
        for use in endpoint_use(result)
    ]
    others = [["call site", "mostly on", "runner-up", "objective", "room there"]]
    for row in runners_up(result):
        if row.runner_up is None:
            others.append([row.site, row.endpoint, "none", "", ""])
        else:
            room = "yes" if row.fits else "no"
            others.append([row.site, row.endpoint, row.runner_up, f"{row.extra_s:+.3f} s", room])
    lines = [*_aligned(uses), "", *_aligned(others)]
    kept = [["session", "kept", "returns", "gap", "saves", "worth", "price of KV"]]
    for plan in result.plans:
        kept += [
            [
                one.site,
                f"{one.share:.0%}",
                f"{one.return_probability:.0%}",
                f"{one.gap_s:.2f} s",
                f"{one.saved_s:.3f} s",
                f"{1e6 * one.value:.3g}",
                f"{1e6 * one.price:.3g} s/Mtoken s",
            ]
            for one in plan.retention
        ]
    return [*lines, "", *_aligned(kept)] if len(kept) > 1 else lines


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
