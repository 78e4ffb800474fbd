"""Never worse: a new dispatch table is replayed against the one in use before it takes over.

Both tables serve the same recent runs in the simulator, with the same seeds; the candidate is
activated only if neither mean nor P95 of the run latency is above the incumbent's by more than a
tolerance. Where no table is in use yet, the live marginal cost is what it has to match. Verdict
and differences are one record, to be kept whatever the verdict is.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planner.cli.checks import at_least
from planner.dispatch.forecast import Forecaster
from planner.dispatch.table import DispatchTable, Row, load_table
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.files import atomic_write
from planner.domain.fleet import Fleet
from planner.domain.run import RunSpec
from planner.domain.trace import TraceRecord, load_trace
from planner.domain.workflow import Workflow
from planner.graph.rebuild import runs_from_trace
from planner.metrics import summarise
from planner.sim.disturbance import Disturbance
from planner.sim.experiment import Cell, PolicySetup, World, run_cell

__all__ = [
    "ACTIVATION_SCHEMA",
    "NO_TABLE",
    "TOLERANCE",
    "Activation",
    "RowChange",
    "Trial",
    "activation_trial",
    "add_activation_arguments",
    "save_activation",
    "weigh_tables",
]

ACTIVATION_SCHEMA = "almanac.activation/1"
NO_TABLE = "marginal_cost"
"""What a first table is weighed against."""
TOLERANCE = 0.01
"""Relative excess of mean or P95 that still counts as not worse: below it two tables cannot be
told apart by a few dozen runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChange:
    """How one row differs.

    Parameters
    ----------
    workflow_hash, site, bucket
        The row.
    before, after
        Shares by endpoint, without those of none; None where a table has no such row.
    priced
        Whether any opportunity price differs.
    """

    workflow_hash: str
    site: str
    bucket: int
    before: Mapping[str, float] | None
    after: Mapping[str, float] | None
    priced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """The verdict on a candidate table, with its evidence.

    Parameters
    ----------
    candidate, incumbent
        Versions of the tables; the incumbent is `NO_TABLE` where there is none.
    candidate_s, incumbent_s
        Mean run latency of each replication, seconds, in the order of the seeds; infinite where
        no run finished.
    candidate_p95_s, incumbent_p95_s
        95th percentile of the same.
    seeds
        Seeds of the replications.
    runs
        Runs of a replication, on average.
    tolerance
        Relative excess that was let pass.
    activate
        Whether the candidate may go live.
    tuning_changed
        Whether the weights of the live score differ.
    changes
        Rows that differ.
    seconds
        What the comparison took on the caller's timer; 0 without one.
    """

    candidate: str
    incumbent: str
    candidate_s: tuple[float, ...]
    incumbent_s: tuple[float, ...]
    candidate_p95_s: tuple[float, ...]
    incumbent_p95_s: tuple[float, ...]
    seeds: tuple[int, ...]
    runs: float
    tolerance: float
    activate: bool
    tuning_changed: bool
    changes: tuple[RowChange, ...]
    seconds: float = 0.0

    def text(self) -> str:
        """Return the verdict in one line."""

        def pair(new: Sequence[float], old: Sequence[float]) -> str:
            return f"{sum(new) / len(new):.2f} s against {sum(old) / len(old):.2f} s"

        return (
            f"{'activated' if self.activate else 'not activated: worse'} on {self.runs:.0f} runs: "
            f"mean {pair(self.candidate_s, self.incumbent_s)}, "
            f"P95 {pair(self.candidate_p95_s, self.incumbent_p95_s)}, "
            f"{len(self.changes)} rows changed"
        )

    def to_json(self, **facts: Any) -> dict[str, Any]:
        """Return the JSON form, schema included; ``facts`` are added to it."""
        # JSON has no infinity: a replication in which no run finished is null.
        body: dict[str, Any] = asdict(self)
        for name in ("candidate_s", "incumbent_s", "candidate_p95_s", "incumbent_p95_s"):
            body[name] = [value if math.isfinite(value) else None for value in body[name]]
        return {"schema": ACTIVATION_SCHEMA, **facts, **body}


def weigh_tables(
    candidate: DispatchTable,
    incumbent: DispatchTable | None,
    recent: Mapping[int, Sequence[RunSpec]],
    fleet: Fleet,
    forecaster: Forecaster,
    *,
    engines: Fleet | None = None,
    down: Sequence[str] = (),
    noise_cv: float = 0.0,
    tolerance: float = 0.0,
    timer: Callable[[], float] | None = None,
) -> Activation:
    """Replay both tables and say whether the candidate may take over.

    Parameters
    ----------
    incumbent
        The table in use; None weighs against marginal cost.
    recent
        Recent runs by the seed of their replication; at least one run.
    fleet
        What the tables were made for.
    engines
        The same endpoints with their latency as it is now; the fleet's own unless given.
    down
        Ids of endpoints that are down, in the replay too.
    noise_cv
        Coefficient of variation of the engines' steps, >= 0; what tells replications apart that
        share their runs.
    tolerance
        Relative excess of mean and P95 that still counts as not worse, >= 0.
    timer
        A clock in seconds to measure the comparison with.

    Raises
    ------
    InvalidInput
        If there are no runs, or a table is for another fleet.
    NoEndpointAvailable
        If a call fits no endpoint that is up.
    """
    if not recent or not all(recent.values()):
        raise InvalidInput("no recent runs", where="recent", remedy="give at least one run a seed")
    started_s = timer() if timer else 0.0
    for table in (candidate, incumbent):
        if table is not None:
            table.check_fleet(fleet)
    world = World(
        fleet=engines or fleet,
        forecaster=forecaster,
        noise_cv=noise_cv,
        disturbances=tuple(Disturbance(endpoint=one, kind="crash") for one in down),
    )
    new, old = (
        [_latencies(_setup(table), seed, runs, world) for seed, runs in sorted(recent.items())]
        for table in (candidate, incumbent)
    )
    return Activation(
        candidate=candidate.version,
        incumbent=NO_TABLE if incumbent is None else incumbent.version,
        candidate_s=tuple(mean for mean, _ in new),
        incumbent_s=tuple(mean for mean, _ in old),
        candidate_p95_s=tuple(p95 for _, p95 in new),
        incumbent_p95_s=tuple(p95 for _, p95 in old),
        seeds=tuple(sorted(recent)),
        runs=sum(map(len, recent.values())) / len(recent),
        tolerance=tolerance,
        activate=all(_not_worse(new, old, which, tolerance) for which in (0, 1)),
        tuning_changed=incumbent is None or candidate.tuning != incumbent.tuning,
        changes=_changes(candidate, incumbent),
        seconds=timer() - started_s if timer else 0.0,
    )


def save_activation(activation: Activation, path: Path) -> None:
    """Write the record as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(activation.to_json(), indent=1) + "\n", encoding="utf-8")


def add_activation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options under which a table is written only if it is not worse."""
    group = parser.add_argument_group(
        "never worse", "the verdict and its evidence are kept beside the table (*.activation.json)"
    )
    group.add_argument(
        "--activate-against",
        type=Path,
        metavar="TRACE",
        help="replay the runs of this trace under the new table and the incumbent; write the new "
        "one only if neither mean nor P95 is worse, else exit with 1",
    )
    group.add_argument(
        "--incumbent",
        type=Path,
        metavar="TABLE",
        help="the table in use (default: none, which means marginal cost)",
    )
    group.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="SHARE",
        help=f"excess of mean and P95 that counts as not worse (default: {TOLERANCE})",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a new table has to stand: the trace that judges it, and the table in use.

    Parameters
    ----------
    records
        The trace.
    incumbent
        The table in use, or None.
    tolerance
        See `weigh_tables`.
    where
        The trace's file, for errors.
    """

    records: tuple[TraceRecord, ...]
    incumbent: DispatchTable | None
    tolerance: float
    where: str

    def judge(
        self,
        candidate: DispatchTable,
        workflows: Sequence[Workflow],
        fleet: Fleet,
        estimates: EstimateTable,
    ) -> Activation:
        """Return the verdict on a table.

        Raises
        ------
        InvalidInput
            If the trace holds no run that ended well with its calls, or a table is for another
            fleet.
        """
        runs = runs_from_trace(self.records, workflows, estimates)
        if not runs:
            raise InvalidInput(
                "no run that ended well with its calls",
                where=self.where,
                remedy="give a trace of `almanac serve --trace` with finished runs",
            )
        return weigh_tables(
            candidate,
            self.incumbent,
            {0: runs},
            fleet,
            Forecaster(estimates, workflows),
            tolerance=self.tolerance,
        )


def activation_trial(args: argparse.Namespace, fleet: Fleet) -> Trial | None:
    """Return the trial that the options ask for, or None; all files are read and checked.

    Raises
    ------
    InvalidInput
        If a file or a combination of options is wrong.
    """
    if args.activate_against is None:
        if args.incumbent is not None:
            raise InvalidInput(
                "nothing to compare on", where="--incumbent", remedy="add --activate-against TRACE"
            )
        return None
    if args.table is None:
        raise InvalidInput(
            "no table is made", where="--activate-against", remedy="add --table FILE"
        )
    at_least(args, tolerance=0)
    incumbent = None if args.incumbent is None else load_table(args.incumbent)
    if incumbent is not None:
        incumbent.check_fleet(fleet, str(args.incumbent))
    return Trial(
        records=tuple(load_trace(args.activate_against)),
        incumbent=incumbent,
        tolerance=args.tolerance,
        where=str(args.activate_against),
    )


def _setup(table: DispatchTable | None) -> PolicySetup:
    if table is None:
        return PolicySetup(policy=NO_TABLE)
    return PolicySetup(policy="almanac", table=table)


def _latencies(
    setup: PolicySetup, seed: int, runs: Sequence[RunSpec], world: World
) -> tuple[float, float]:
    """Return mean and P95 of the run latency in seconds, infinite if no run finished."""
    metrics = summarise(run_cell(Cell(setup=setup, seed=seed, runs=runs, world=world)))
    if metrics.mean_s is None or metrics.p95_s is None:
        return math.inf, math.inf
    return metrics.mean_s, metrics.p95_s


def _not_worse(
    new: Sequence[tuple[float, float]],
    old: Sequence[tuple[float, float]],
    which: int,
    tolerance: float,
) -> bool:
    candidate = sum(pair[which] for pair in new)
    # A candidate under which nothing finishes never goes live.
    return math.isfinite(candidate) and candidate <= sum(pair[which] for pair in old) * (
        1 + tolerance
    )


def _changes(candidate: DispatchTable, incumbent: DispatchTable | None) -> tuple[RowChange, ...]:
    new = _by_key(candidate)
    old = {} if incumbent is None else _by_key(incumbent)
    found = []
    for key in sorted(new.keys() | old.keys()):
        after, before = new.get(key), old.get(key)
        shares = (_shares(before), _shares(after))
        priced = _prices(before) != _prices(after)
        if shares[0] != shares[1] or priced:
            workflow_hash, site, bucket = key
            found.append(
                RowChange(
                    workflow_hash=workflow_hash,
                    site=site,
                    bucket=bucket,
                    before=shares[0],
                    after=shares[1],
                    priced=priced,
                )
            )
    return tuple(found)


def _by_key(table: DispatchTable) -> dict[tuple[str, str, int], Row]:
    return {(row.workflow_hash, row.site, row.bucket): row for row in table.rows}


def _shares(row: Row | None) -> dict[str, float] | None:
    return None if row is None else {o.endpoint: o.share for o in row.ranked if o.share > 0}


def _prices(row: Row | None) -> dict[str, float] | None:
    return None if row is None else {one.endpoint: one.price for one in row.ranked}
