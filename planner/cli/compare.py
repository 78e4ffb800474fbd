"""What `simulate` and `run` share: the policies to compare, their tuning, tables and results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from joblib import Parallel, delayed

from planner.dispatch.policies import parse_policy
from planner.dispatch.table import DispatchTable
from planner.domain.errors import InvalidInput
from planner.domain.run import RunSpec
from planner.domain.trace import TraceRecord, save_trace
from planner.metrics import RunMetrics, summarise
from planner.report.results import PolicyResult, Results, SeedResult
from planner.sim.experiment import (
    Cell,
    PolicySetup,
    World,
    run_cell,
    run_latencies_s,
    tune,
    tuning_score_s,
)
from planner.sim.horizon import ReplanLog

__all__ = [
    "COMPARED",
    "add_comparison_arguments",
    "policy_setups",
    "progress",
    "simulate_setups",
    "tune_setups",
]

COMPARED = "round_robin,power_of_two,prefix_affinity,least_expected_finish,marginal_cost,almanac"


def progress(text: str) -> None:
    """Show what is going on, on standard error."""
    print(text, file=sys.stderr, flush=True)


def add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every comparison of policies has."""
    parser.add_argument(
        "--policies",
        default=COMPARED,
        metavar="A,B",
        help="policies to compare; several parameters of one go in as name:key=value+key=value "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--no-tune",
        action="store_true",
        help="keep the default parameters; otherwise each policy that has any, and got none by "
        "hand, is tuned on runs of other seeds, with the same number of trials",
    )
    parser.add_argument(
        "--tuning-seeds", type=int, default=3, help="replications used for tuning (%(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes to simulate with (default: %(default)s)"
    )


def policy_setups(text: str, table: DispatchTable | None) -> list[PolicySetup]:
    """Return the policies named on the command line.

    Raises
    ------
    InvalidInput
        If one is unknown or named twice, or ``almanac`` has no table.
    """
    setups: list[PolicySetup] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, parameters = parse_policy(part.replace("+", ","))
        if any(setup.policy == name for setup in setups):
            raise InvalidInput(
                f"{name!r} is named twice", where="--policies", remedy="name each policy once"
            )
        if name == "almanac" and table is None:
            raise InvalidInput(
                "policy 'almanac' needs a dispatch table",
                where="--policies",
                remedy="give --table FILE (made by `almanac plan`) or leave it out",
            )
        setups.append(
            PolicySetup(
                policy=name, parameters=parameters, table=table if name == "almanac" else None
            )
        )
    if not setups:
        raise InvalidInput("no policy", where="--policies", remedy="name at least one")
    return setups


def _cells(
    setups: Sequence[PolicySetup], workloads: Mapping[int, Sequence[RunSpec]], world: World
) -> list[Cell]:
    """Return one cell per policy and seed, seed within policy."""
    return [
        Cell(setup=setup, seed=seed, runs=runs, world=world)
        for setup in setups
        for seed, runs in sorted(workloads.items())
    ]


def _score(cell: Cell) -> float:
    return tuning_score_s(run_latencies_s(run_cell(cell)))


def tune_setups(
    setups: Sequence[PolicySetup],
    workloads: Mapping[int, Sequence[RunSpec]],
    world: World,
    *,
    jobs: int,
) -> list[PolicySetup]:
    """Return the setups tuned on the given workloads (seed -> runs), all by the same score.

    Parameters given by hand are kept.
    """

    def score(candidates: Sequence[PolicySetup]) -> list[float]:
        cells = _cells(candidates, workloads, world)
        scores = Parallel(n_jobs=jobs)(delayed(_score)(cell) for cell in cells)
        size = len(workloads)
        return [sum(scores[i * size : (i + 1) * size]) / size for i in range(len(candidates))]

    return [setup if setup.parameters else tune(setup, score, progress) for setup in setups]


def _measured(cell: Cell, folder: Path | None) -> tuple[RunMetrics, str | None, ReplanLog]:
    log = ReplanLog()
    records: list[TraceRecord] = run_cell(cell, time.perf_counter, log)
    name = None
    if folder is not None:
        name = f"traces/{cell.setup.policy}-{cell.seed}.jsonl"
        save_trace(records, folder / name, policy=cell.setup.policy, seed=cell.seed)
    return summarise(records), name, log


def _replan_facts(logs: Sequence[ReplanLog]) -> dict[str, float]:
    """Return what became of the plans, on average over the replications that made any."""
    count = len(logs)
    return {
        "plans_made": sum(log.made for log in logs) / count,
        "plans_adopted": sum(log.adopted for log in logs) / count,
        "mean_age_s": sum(log.mean_age_s for log in logs) / count,
        "planner_s": sum(log.planner_s for log in logs) / max(1, sum(log.made for log in logs)),
    }


def simulate_setups(
    setups: Sequence[PolicySetup],
    workloads: Mapping[int, Sequence[RunSpec]],
    world: World,
    *,
    title: str,
    settings: Mapping[str, object],
    jobs: int = 2,
    folder: Path | None = None,
) -> Results:
    """Simulate every policy on every workload (seed -> runs) and return the results.

    ``folder``, if given, receives one trace per cell. Where the world re-plans, the settings of
    the results say how many plans a replication made and adopted, their mean age over decisions
    and the planner's seconds.
    """
    cells = _cells(setups, workloads, world)
    outcomes: Iterable[tuple[RunMetrics, str | None, ReplanLog]] = Parallel(
        n_jobs=jobs, return_as="generator"
    )(delayed(_measured)(cell, folder) for cell in cells)
    by_policy: dict[str, list[SeedResult]] = {setup.policy: [] for setup in setups}
    logs: list[ReplanLog] = []
    for number, (cell, (metrics, trace, log)) in enumerate(
        zip(cells, outcomes, strict=True), start=1
    ):
        if log.made:
            logs.append(log)
        by_policy[cell.setup.policy].append(
            SeedResult(seed=cell.seed, metrics=metrics, trace=trace)
        )
        mean = "-" if metrics.mean_s is None else f"{metrics.mean_s:.2f} s"
        progress(
            f"[{number}/{len(cells)}] {cell.setup.policy} seed {cell.seed}: mean run latency {mean}"
        )
    return Results(
        title=title,
        mode="simulated",
        settings={**settings, **({"replanning": _replan_facts(logs)} if logs else {})},
        policies=tuple(
            PolicyResult(
                policy=setup.policy,
                label=setup.policy,
                parameters=setup.shown_parameters,
                seeds=tuple(by_policy[setup.policy]),
            )
            for setup in setups
        ),
    )
