"""`almanac simulate`: the policies compared on a simulated fleet, on sampled or recorded work."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from planner.cli.checks import at_least, keep_copy, out_folder
from planner.cli.compare import (
    add_comparison_arguments,
    policy_setups,
    progress,
    simulate_setups,
    tune_setups,
)
from planner.cli.replan_options import add_step_arguments, step_from
from planner.cli.workload_bound import shared_bound
from planner.dispatch.forecast import Forecaster
from planner.dispatch.table import DispatchTable, load_table, save_table
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable, load_estimates
from planner.domain.fleet import Fleet, load_fleet
from planner.domain.ids import EndpointId
from planner.domain.run import RunSpec
from planner.domain.workflow import Workflow, load_workflow, save_workflow
from planner.sim.disturbance import Disturbance
from planner.sim.experiment import World
from planner.sim.horizon import Replan
from planner.sim.kernel import ClosedLoop
from planner.sim.retention import Fate, FixedRetention
from planner.sim.workload import (
    SessionCall,
    Times,
    burst_arrivals,
    gamma_arrivals,
    poisson_arrivals,
    replayed_arrivals,
    run_from_session,
    sampled_workload,
    windowed_arrivals,
    with_clients,
)

__all__ = ["register", "run"]

_AGENTS = {
    "lmcache_agents": "lmcache_agents",
    "miniswe": "miniswe_swebench_verified",
    "claude_code": "claude_code_sessions",
}
_RECORDED = ("azure_code", "azure_conv", "mooncake_conversation")
_SERVEGEN = {"servegen_small": "m-small", "servegen_mid": "m-mid"}
_ARRIVALS = ("poisson", "gamma", "burst", "closed", *_RECORDED, *_SERVEGEN)
_NO_RATE = ("burst", "closed")
_TUNING_SEED = 1000
"""Tuning uses seeds from here on, the comparison seeds from 0: no run is in both."""


def register(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "simulate",
        help="compare policies on a simulated fleet",
        description="Run the same workload under several policies on a simulated vLLM fleet and "
        "print mean, percentiles, throughput and cache hits with their spread over seeds. Work "
        "comes from a workflow file with its distributions, or from recorded agent sessions.",
    )
    parser.add_argument("--fleet", type=Path, required=True, help="fleet file (YAML)")
    work = parser.add_argument_group("work from a workflow")
    work.add_argument("--workflow", type=Path, help="workflow file (JSON)")
    work.add_argument(
        "--truth", type=Path, help="distributions that realise the runs (estimates file)"
    )
    work.add_argument(
        "--estimates", type=Path, help="forecasts the policies get (default: the truth's)"
    )
    work.add_argument("--table", type=Path, help="dispatch table for policy almanac")
    real = parser.add_argument_group("work from recorded agents")
    real.add_argument(
        "--agents", metavar="A,B", help=f"recorded agents to draw from: {', '.join(_AGENTS)}"
    )
    real.add_argument("--traces", type=Path, help="folder of the public datasets")
    real.add_argument(
        "--max-prompt-tokens", type=int, default=32768, help="cut prompts (default: %(default)s)"
    )
    real.add_argument(
        "--max-output-tokens", type=int, default=4096, help="cut outputs (default: %(default)s)"
    )
    real.add_argument(
        "--max-gap", type=float, default=30.0,
        help="cut tool and thinking times, s (default: %(default)s)",
    )  # fmt: skip
    real.add_argument(
        "--max-calls", type=int, default=30, help="cut sessions (default: %(default)s calls)"
    )
    parser.add_argument(
        "--arrivals", choices=_ARRIVALS, default="poisson",
        help="pattern of run arrivals: burst is all at once, closed is --clients that start a run "
        "when their last one ended; recorded ones need --traces (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--rate", type=float, help="mean runs per second; not for burst and closed")
    parser.add_argument(
        "--burst-cv", type=float, default=3.0,
        help="variation of the gaps of gamma arrivals (default: %(default)s; 1 is Poisson)",
    )  # fmt: skip
    parser.add_argument(
        "--clients", type=int, default=8, help="clients of a closed loop (default: %(default)s)"
    )
    parser.add_argument(
        "--think-s", type=float, default=0.0,
        help="mean think time of a closed loop (default: %(default)s s)",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=200, help="runs per seed (%(default)s)")
    parser.add_argument("--seeds", type=int, default=10, help="replications (%(default)s)")
    parser.add_argument(
        "--noise-cv", type=float, default=0.02,
        help="variation of engine step times (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dispatch-ms", type=float, default=0.5,
        help="decision time charged to each call (default: %(default)s ms)",
    )  # fmt: skip
    world = parser.add_argument_group("what happens besides")
    world.add_argument(
        "--patience-s", type=float, metavar="S",
        help="mean time after which clients give up and cancel (default: never)",
    )  # fmt: skip
    world.add_argument(
        "--deadline-s", type=float, metavar="S", help="deadline of each run, kept in the traces"
    )
    world.add_argument(
        "--retain", default="leave", metavar="FATE",
        help="a run's KV while its tools run: leave (to the engine's LRU), pin, pin:SECONDS, "
        "offload or drop (default: %(default)s)",
    )  # fmt: skip
    world.add_argument(
        "--disturb", action="append", default=[], metavar="KIND:WORKER:FROM:TO[:FACTOR]",
        help="slow, ramp or crash a worker from one second to another; may be repeated",
    )  # fmt: skip
    rolling = parser.add_argument_group(
        "re-planning", "policy almanac gets a new table on the way, as `almanac serve --replan`"
    )
    rolling.add_argument(
        "--replan", type=float, metavar="S",
        help="plan every S seconds, and when load or fleet change (default: never)",
    )  # fmt: skip
    rolling.add_argument(
        "--planner-s", type=float, metavar="S",
        help="seconds from state to table (default: as measured on this machine)",
    )  # fmt: skip
    add_step_arguments(rolling)
    add_comparison_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder for results.json, table and workflow")
    parser.add_argument("--keep-traces", action="store_true", help="also write every trace there")
    parser.add_argument(
        "--bound", action="store_true",
        help="also print what no policy can be below on these runs, clairvoyant ones included",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(run=run)


@dataclass(frozen=True, kw_only=True)
class _Work:
    workflow: Workflow
    estimates: EstimateTable
    table: DispatchTable | None
    source: str
    draw: Callable[[Times, int, np.random.Generator], tuple[RunSpec, ...]]
    """Realises one run per arrival time, for a seed."""


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from planner.report.results import save_results
    from planner.report.terminal import results_table

    _check(args)
    fleet = load_fleet(args.fleet)
    work = _recorded(args, fleet) if args.agents else _sampled(args, fleet)
    arrivals = _arrivals(args)
    clients = (
        ClosedLoop(clients=args.clients, think_s=args.think_s)
        if args.arrivals == "closed"
        else None
    )
    setups = policy_setups(args.policies, work.table)
    world = World(
        fleet=fleet,
        forecaster=Forecaster(work.estimates, [work.workflow]),
        noise_cv=args.noise_cv,
        dispatch_s=args.dispatch_ms * 1e-3,
        clients=clients,
        disturbances=_disturbances(args.disturb, fleet),
        retention=_retention(args.retain),
    )

    def workload(seed: int) -> tuple[RunSpec, ...]:
        rng = np.random.default_rng([seed, 7])
        runs = work.draw(arrivals(rng), seed, rng)
        if args.deadline_s is None and args.patience_s is None:
            return runs
        tenants = [run.tenant for run in runs]
        return with_clients(
            runs, tenants, rng, deadline_s=args.deadline_s, patience_s=args.patience_s
        )

    if not args.no_tune:
        tuning = {_TUNING_SEED + k: workload(_TUNING_SEED + k) for k in range(args.tuning_seeds)}
        setups = tune_setups(setups, tuning, world, jobs=args.jobs)
    if args.keep_traces:
        (args.out / "traces").mkdir(parents=True, exist_ok=True)
    workloads = {seed: workload(seed) for seed in range(args.seeds)}
    bound = shared_bound(workloads, fleet) if args.bound else None
    results = simulate_setups(
        setups,
        workloads,
        replace(world, replan=_replan(args, work, fleet)),
        title=f"{work.source} on fleet {fleet.name}, {args.arrivals} arrivals",
        settings={
            "fleet": fleet.name,
            "workflow": work.workflow.name,
            "work": work.source,
            "arrivals": args.arrivals,
            **_arrival_settings(args),
            "runs_per_seed": args.runs,
            "seeds": args.seeds,
            "retain": args.retain,
            "disturb": list(args.disturb),
            "patience_s": args.patience_s,
            "deadline_s": args.deadline_s,
            "noise_cv": args.noise_cv,
            "dispatch_ms_charged": args.dispatch_ms,
            "tuned": not args.no_tune,
            **({} if args.replan is None else {"replan_s": args.replan}),
            **({} if bound is None else {"bound_mean_s": bound.mean_s, "bound_p95_s": bound.p95_s}),
        },
        jobs=args.jobs,
        folder=args.out if args.keep_traces else None,
    )
    if args.out:
        save_results(results, args.out)
        save_workflow(work.workflow, args.out / "workflow.json")
        keep_copy(args.fleet, args.out / "fleet.yaml")
        for setup in setups:
            if setup.table is not None:
                save_table(setup.table, args.out / "table.json")
    print(json.dumps(results.to_json()) if args.json else results_table(results))
    if bound is not None and not args.json:
        print(bound.text(noise=args.noise_cv > 0))
    return 0


def _check(args: argparse.Namespace) -> None:
    if bool(args.agents) == bool(args.workflow):
        raise InvalidInput(
            "give either --workflow or --agents",
            where="simulate",
            remedy="--workflow w.json --truth t.json, or --agents miniswe --traces FOLDER",
        )
    ignored = [name for name in ("truth", "estimates", "table") if getattr(args, name)]
    if args.agents and ignored:
        raise InvalidInput(
            f"--{ignored[0]} goes with --workflow, not with --agents",
            where="simulate",
            remedy="leave it out: recorded agents are learned from and planned for as they are",
        )
    if args.workflow and not args.truth:
        raise InvalidInput(
            "--workflow needs --truth", where="simulate", remedy="give an estimates file"
        )
    if (args.agents or args.arrivals in (*_RECORDED, *_SERVEGEN)) and not args.traces:
        raise InvalidInput(
            "recorded agents or arrivals need --traces",
            where="simulate",
            remedy="give the folder of the public datasets (see `almanac data list`)",
        )
    if args.keep_traces and not args.out:
        raise InvalidInput("--keep-traces needs --out", where="simulate", remedy="give a folder")
    if args.bound and (args.arrivals == "closed" or args.patience_s is not None):
        raise InvalidInput(
            "a closed loop, or clients who give up, arrive or leave as the policy makes them",
            where="--bound",
            remedy="leave it out, or use other arrivals without --patience-s",
        )
    plans = bool(args.agents) and "almanac" in args.policies
    if args.rate is None and (args.arrivals not in _NO_RATE or plans):
        what = "almanac's plan needs" if plans else f"{args.arrivals} arrivals need"
        raise InvalidInput(f"{what} a rate", where="--rate", remedy="give the mean runs per second")
    at_least(
        args, runs=1, seeds=1, tuning_seeds=1, jobs=1, rate=1e-9, noise_cv=0, dispatch_ms=0,
        clients=1, think_s=0, burst_cv=1e-3, max_calls=1, max_prompt_tokens=1,
        max_output_tokens=1, max_gap=0, replan=1e-9, planner_s=0,
    )  # fmt: skip
    out_folder(args.out, "--out")


def _replan(args: argparse.Namespace, work: _Work, fleet: Fleet) -> Replan | None:
    """Return the re-planning asked for; the planner believes the forecasts, not the truth."""
    if args.replan is None:
        return None
    from planner.cli.rolling import RollingPlanners  # OR-Tools takes a second to load

    return Replan(
        period_s=args.replan,
        planner_s=args.planner_s,
        planner=RollingPlanners(
            fleet=fleet,
            workflows=(work.workflow,),
            estimates=work.estimates,
            horizon_s=args.replan,
            step=step_from(args),
        ),
    )


def _retention(text: str) -> FixedRetention | None:
    """Return the retention policy of ``leave``, ``drop``, ``offload``, ``pin`` or ``pin:S``."""
    action, _, rest = text.partition(":")
    if action == "leave" and not rest:
        return None
    try:
        if action in ("drop", "offload") and not rest:
            return FixedRetention(fate=Fate(action=cast("Literal['drop', 'offload']", action)))
        if action == "pin":
            return FixedRetention(fate=Fate(action="pin", ttl_s=float(rest or 300.0)))
    except ValueError as error:
        raise InvalidInput(f"{text!r}", where="--retain", remedy="use pin:SECONDS") from error
    raise InvalidInput(
        f"{text!r} is unknown", where="--retain", remedy="use leave, pin, pin:S, offload or drop"
    )


def _disturbances(texts: Sequence[str], fleet: Fleet) -> tuple[Disturbance, ...]:
    """Return the disturbances written as ``kind:worker:from:to[:factor]``."""
    found = []
    for text in texts:
        kind, *rest = text.split(":")
        try:
            worker, *numbers = rest
            from_s, to_s, *more = map(float, numbers)
            (factor,) = more or [1.0]
        except ValueError as error:
            raise InvalidInput(
                f"{text!r}", where="--disturb", remedy="write KIND:WORKER:FROM:TO[:FACTOR]"
            ) from error
        if kind not in ("slow", "ramp", "crash"):
            raise InvalidInput(
                f"{kind!r} is unknown", where="--disturb", remedy="use slow, ramp or crash"
            )
        fleet.index_of(EndpointId(worker))
        found.append(
            Disturbance(
                endpoint=worker,
                kind=cast("Literal['slow', 'ramp', 'crash']", kind),
                from_s=from_s,
                to_s=to_s,
                factor=factor,
            )
        )
    return tuple(found)


def _sampled(args: argparse.Namespace, fleet: Fleet) -> _Work:
    workflow = load_workflow(args.workflow)
    truth = load_estimates(args.truth)
    estimates = load_estimates(args.estimates) if args.estimates else truth
    estimate = truth.workflows.get(workflow.content_hash)
    if estimate is None:
        raise InvalidInput(
            f"no distributions for workflow {workflow.name!r} ({workflow.content_hash})",
            where=str(args.truth),
            remedy="give the truth file of this workflow",
        )
    table = load_table(args.table) if args.table else None
    if table is not None:
        table.check_fleet(fleet, str(args.table))
    return _Work(
        workflow=workflow,
        estimates=estimates,
        table=table,
        source=f"workflow {workflow.name}",
        draw=lambda times, seed, _: sampled_workload(workflow, estimate, times, seed=seed),
    )


def _recorded(args: argparse.Namespace, fleet: Fleet) -> _Work:
    """Learn from the first families of the recorded sessions, keep the others to simulate."""
    from models.importers import AgentCall, AgentSession, agent_sessions
    from models.mining import mine_workflow, site_node, static_tokens
    from planner.solve.instance import Demand
    from planner.solve.tables import mix_table

    sessions: list[AgentSession] = []
    for name in filter(None, (part.strip() for part in args.agents.split(","))):
        if name not in _AGENTS:
            raise InvalidInput(
                f"{name!r} is unknown", where="--agents", remedy=f"use {', '.join(_AGENTS)}"
            )
        found = agent_sessions(args.traces / _AGENTS[name])
        progress(f"{name}: {len(found)} sessions, {sum(len(s.calls) for s in found)} calls")
        sessions += found

    def cut(call: AgentCall) -> AgentCall:
        return AgentCall(
            site=call.site,
            prompt_tokens=min(call.prompt_tokens, args.max_prompt_tokens),
            output_tokens=min(call.output_tokens, args.max_output_tokens),
            shared_prefix_tokens=min(call.shared_prefix_tokens, args.max_prompt_tokens),
            gap_s=min(call.gap_s, args.max_gap),
            next_action=call.next_action,
        )

    sessions = [
        AgentSession(
            source=s.source,
            session_id=s.session_id,
            family=s.family,
            calls=tuple(cut(call) for call in s.calls[: args.max_calls]),
        )
        for s in sessions
        if s.calls
    ]
    # Families stay whole; alternate ones train, so that each source is in both halves.
    families = sorted({(s.source, s.family) for s in sessions})
    training = set(families[::2])
    learned = [s for s in sessions if (s.source, s.family) in training]
    kept = [s for s in sessions if (s.source, s.family) not in training]
    if not kept:
        raise InvalidInput(
            "too few sessions to learn from some and simulate others",
            where="--agents",
            remedy="name more agents",
        )
    workflow, estimate = mine_workflow(learned, name="agents")
    estimates = EstimateTable(workflows={workflow.content_hash: estimate}, version="mined")
    table = None
    if "almanac" in args.policies:
        demand = Demand(workflow=workflow, rate_rps=args.rate)
        table = mix_table([demand], fleet, estimates, progress=progress)
    static = static_tokens(learned)

    def draw(times: Times, seed: int, rng: np.random.Generator) -> tuple[RunSpec, ...]:
        picks = rng.integers(len(kept), size=len(times))
        return tuple(
            run_from_session(
                [
                    SessionCall(
                        node=site_node(kept[pick].source, call.site),
                        prompt_tokens=call.prompt_tokens,
                        output_tokens=call.output_tokens,
                        shared_prefix_tokens=call.shared_prefix_tokens,
                        gap_s=call.gap_s,
                    )
                    for call in kept[pick].calls
                ],
                run_id=f"s{seed}-r{number}",
                arrival_s=float(time_s),
                workflow=workflow.name,
                workflow_hash=workflow.content_hash,
                static_tokens=static.get(kept[pick].source, 0),
                most_prompt_tokens=args.max_prompt_tokens,
            )
            for number, (time_s, pick) in enumerate(zip(times, picks, strict=True))
        )

    return _Work(
        workflow=workflow,
        estimates=estimates,
        table=table,
        source=f"recorded agents {args.agents}",
        draw=draw,
    )


def _arrivals(args: argparse.Namespace) -> Callable[[np.random.Generator], Times]:
    """Return what draws the arrival times of one seed."""
    rate, count = args.rate, args.runs
    if args.arrivals == "poisson":
        return lambda rng: poisson_arrivals(rate, count, rng)
    if args.arrivals == "gamma":
        return lambda rng: gamma_arrivals(rate, args.burst_cv, count, rng)
    if args.arrivals in _NO_RATE:
        return lambda _: burst_arrivals(count)
    if args.arrivals in _SERVEGEN:
        from models.importers import read_servegen

        windows = read_servegen(args.traces, _SERVEGEN[args.arrivals])
        return lambda rng: windowed_arrivals(windows, rate, count, rng)[0]
    from models.importers import arrivals

    recorded = arrivals(args.traces, args.arrivals).time_s
    return lambda rng: replayed_arrivals(recorded, rate, count, rng)


def _arrival_settings(args: argparse.Namespace) -> dict[str, object]:
    """Return what the results say about the load."""
    if args.arrivals == "closed":
        return {"clients": args.clients, "think_s": args.think_s}
    settings: dict[str, object] = {} if args.arrivals == "burst" else {"rate_rps": args.rate}
    return settings | ({"burst_cv": args.burst_cv} if args.arrivals == "gamma" else {})
