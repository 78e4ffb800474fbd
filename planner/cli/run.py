"""`almanac run`: a LangGraph app live in front of the gateway and mock endpoints, by policy."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.cli.checks import at_least, keep_copy, out_folder
from planner.cli.compare import (
    add_comparison_arguments,
    policy_setups,
    progress,
    simulate_setups,
    tune_setups,
)
from planner.dispatch.forecast import Forecaster
from planner.dispatch.table import load_table, save_table
from planner.domain.errors import EndpointFailed, InvalidInput
from planner.domain.estimates import load_estimates
from planner.domain.fleet import load_fleet
from planner.domain.run import RunSpec
from planner.domain.trace import load_trace
from planner.domain.workflow import Workflow, save_workflow
from planner.metrics import summarise
from planner.report.results import PolicyResult, Results, SeedResult, save_results
from planner.sim.experiment import PolicySetup, World
from planner.sim.workload import poisson_arrivals, sampled_workload

if TYPE_CHECKING:
    from runtime.live import Driven

__all__ = ["register", "run"]

_TUNING_SEED = 1000
_DISPATCH_S = 0.0005
"""Decision time charged to each simulated call: more than a live decision takes."""


def register(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "run",
        help="run the demo app live under several policies",
        description="Start mock vLLM endpoints and the gateway on loopback, run the demo LangGraph "
        "application open-loop against them under each policy, on the same runs, and do the same "
        "in the simulator. Tuned policies are tuned in the simulator on other seeds.",
    )
    parser.add_argument("--fleet", type=Path, required=True, help="fleet file with addresses")
    parser.add_argument(
        "--truth", type=Path, required=True, help="distributions that realise the runs"
    )
    parser.add_argument(
        "--estimates", type=Path, required=True, help="forecasts the policies get (from train)"
    )
    parser.add_argument("--table", type=Path, help="dispatch table for policy almanac (from plan)")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and traces")
    parser.add_argument("--rate", type=float, default=1.0, help="runs per second (%(default)s)")
    parser.add_argument("--runs", type=int, default=30, help="live runs per seed (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="live replications (%(default)s)")
    parser.add_argument(
        "--dilation", type=float, default=6.0,
        help="model seconds per wall second, the same for every policy (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--stream-interval", type=int, default=8, help="tokens per chunk (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8100, help="gateway port (%(default)s)")
    parser.add_argument(
        "--noise-cv", type=float, default=0.02, help="variation of step times (%(default)s)"
    )
    parser.add_argument(
        "--simulated-runs", type=int, default=120,
        help="runs per seed in the simulated twin (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--simulated-seeds", type=int, default=12, help="replications there (%(default)s)"
    )
    add_comparison_arguments(parser)
    parser.add_argument(
        "--online",
        action="store_true",
        help="let the gateway learn from finished calls, each policy afresh; off by default, "
        "because the simulated twin does not",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from planner.report.terminal import results_table
    from runtime.langgraph import demo
    from runtime.langgraph.ir import workflow_ir
    from runtime.live import check_ports

    at_least(
        args, rate=1e-9, runs=1, seeds=1, dilation=1e-9, stream_interval=1, port=1, noise_cv=0,
        simulated_runs=1, simulated_seeds=1, jobs=1, tuning_seeds=1,
    )  # fmt: skip
    out_folder(args.out, "--out")
    fleet = load_fleet(args.fleet)
    check_ports(fleet, args.fleet, args.port)
    workflow = Workflow.from_json(workflow_ir(demo.app()), where="demo app")
    truth = load_estimates(args.truth).workflows.get(workflow.content_hash)
    if truth is None:
        raise InvalidInput(
            f"no distributions for workflow {workflow.content_hash}",
            where=str(args.truth),
            remedy="give the truth file of the demo app",
        )
    estimates = load_estimates(args.estimates)
    table = load_table(args.table) if args.table else None
    if table is not None:
        table.check_fleet(fleet, str(args.table))
    setups = policy_setups(args.policies, table)
    world = World(
        fleet=fleet,
        forecaster=Forecaster(estimates, [workflow]),
        noise_cv=args.noise_cv,
        dispatch_s=_DISPATCH_S,
    )

    def workload(seed: int, count: int) -> tuple[RunSpec, ...]:
        rng = np.random.default_rng([seed, 7])
        times = poisson_arrivals(args.rate, count, rng)
        return sampled_workload(workflow, truth, times, seed=seed)

    args.out.mkdir(parents=True, exist_ok=True)
    if not args.no_tune:
        progress("tuning in the simulator, on runs that are not used again")
        tuning = {
            _TUNING_SEED + k: workload(_TUNING_SEED + k, args.simulated_runs)
            for k in range(args.tuning_seeds)
        }
        setups = tune_setups(setups, tuning, world, jobs=args.jobs)
    settings = {
        "fleet": fleet.name,
        "workflow": workflow.name,
        "rate_rps": args.rate,
        "seeds": args.seeds,
        "noise_cv": args.noise_cv,
        "tuned": not args.no_tune,
    }
    # Results of an earlier run would not belong to what is written from here on.
    (args.out / "results.json").unlink(missing_ok=True)
    save_workflow(workflow, args.out / "workflow.json")
    keep_copy(args.fleet, args.out / "fleet.yaml")
    for setup in setups:
        if setup.table is not None:
            save_table(setup.table, args.out / "table.json")

    def simulated(title: str, seeds: int, count: int) -> Results:
        return simulate_setups(
            setups,
            {seed: workload(seed, count) for seed in range(seeds)},
            world,
            title=title,
            settings={**settings, "seeds": seeds, "runs_per_seed": count},
            jobs=args.jobs,
        )

    question = f"{workflow.name} on fleet {fleet.name}"
    progress("simulating the live runs, then the same question over more seeds")
    save_results(
        simulated(f"simulated twin: {question}", args.seeds, args.runs),
        args.out / "simulated.json",
    )
    study = simulated(f"simulated: {question}", args.simulated_seeds, args.simulated_runs)
    save_results(study, args.out / "study.json")
    policies = _live(args, setups, {s: workload(s, args.runs) for s in range(args.seeds)})
    results = Results(
        title=f"live: {question}",
        mode="live",
        settings={
            **settings,
            "runs_per_seed": args.runs,
            "dilation": args.dilation,
            "stream_interval": args.stream_interval,
        },
        policies=policies,
    )
    save_results(results, args.out)
    if args.json:
        print(json.dumps({"live": results.to_json(), "study": study.to_json()}))
    else:
        print(results_table(results))
        print()
        print(results_table(study))
    return 0


def _live(
    args: argparse.Namespace,
    setups: Sequence[PolicySetup],
    workloads: dict[int, tuple[RunSpec, ...]],
) -> tuple[PolicyResult, ...]:
    from runtime.live import LiveServers, app_environment

    gateway = ["--estimates", str(args.estimates), "--policy", "round_robin"]
    gateway += ["--workflow", str(args.out / "workflow.json")]
    gateway += ["--online" if args.online else "--no-online"]
    if any(setup.table is not None for setup in setups):
        gateway += ["--table", str(args.out / "table.json")]
    traces = args.out / "traces"
    shutil.rmtree(traces, ignore_errors=True)
    traces.mkdir(parents=True)
    fleet = load_fleet(args.fleet)
    found: dict[str, list[SeedResult]] = {setup.policy: [] for setup in setups}
    total = len(setups) * len(workloads)
    with (
        app_environment(),
        LiveServers(
            args.fleet,
            fleet,
            port=args.port,
            dilation=args.dilation,
            stream_interval=args.stream_interval,
            noise_cv=args.noise_cv,
            seed=0,
            gateway_arguments=gateway,
            folder=args.out / "logs",
        ) as servers,
    ):
        number = 0
        for seed, runs in workloads.items():
            # Policies alternate within a seed, so that slow drifts of the machine hit all alike.
            for setup in setups:
                number += 1
                name = f"traces/{setup.policy}-{seed}.jsonl"
                servers.begin(_policy_text(setup), args.out / name)
                driven = asyncio.run(_drive(args, servers.url, runs))
                servers.end()
                if driven.failed == len(runs):
                    raise EndpointFailed(
                        f"every run under {setup.policy} failed, the first by {driven.error}; "
                        f"see {args.out / 'logs'}"
                    )
                metrics = summarise(load_trace(args.out / name))
                found[setup.policy].append(SeedResult(seed=seed, metrics=metrics, trace=name))
                mean = "-" if metrics.mean_s is None else f"{metrics.mean_s:.2f} s"
                progress(
                    f"[{number}/{total}] live {setup.policy} seed {seed}: mean run latency {mean}, "
                    f"{driven.failed} failed{f' ({driven.error})' if driven.failed else ''}, "
                    f"starts late by at most {driven.late_s * 1e3:.0f} ms"
                )
    return tuple(
        PolicyResult(
            policy=setup.policy,
            label=setup.policy,
            parameters=setup.shown_parameters,
            seeds=tuple(found[setup.policy]),
        )
        for setup in setups
    )


def _policy_text(setup: PolicySetup) -> str:
    parameters = ",".join(f"{name}={value!r}" for name, value in setup.parameters.items())
    return f"{setup.policy}:{parameters}" if parameters else setup.policy


async def _drive(args: argparse.Namespace, url: str, runs: Sequence[RunSpec]) -> Driven:
    from runtime.langgraph import demo
    from runtime.langgraph.identity import aclose_clients, openai_client_kwargs
    from runtime.langgraph.instrument import instrument
    from runtime.live import drive

    clients = openai_client_kwargs()
    graph = demo.build(f"{url}/v1", script_dilation=args.dilation, clients=clients)
    app = instrument(graph, workflow="research", gateway=url)
    try:
        return await drive(
            lambda spec: demo.run_once(
                app, {"tasks": _script(spec)}, run_id=spec.run_id, session_id=None
            ),
            runs,
            dilation=args.dilation,
            limit_s=120.0 + 20 * runs[-1].arrival_s / args.dilation,
        )
    finally:
        await app.almanac.aclose()
        await aclose_clients(clients)


def _script(spec: RunSpec) -> list[dict[str, Any]]:
    """Return a run's tasks as the demo app takes them: what the mock model will say, and when."""
    return [
        {
            "node": task.node,
            "visit": task.visit,
            "prompt_tokens": task.prompt_tokens,
            "static_tokens": task.prompt[0].tokens if len(task.prompt) > 1 else 0,
            "output_tokens": task.output_tokens,
            "delay_s": task.delay_s,
            "outcomes": [list(pair) for pair in task.outcomes],
        }
        for task in spec.tasks
    ]
