"""Never worse: a new dispatch table is replayed against the one in use before it takes over.

Both tables serve the same recent runs in the simulator, with the same seeds; the candidate is
activated only if its mean run latency is not above the incumbent's. Verdict and differences are
one record, to be kept whatever the verdict is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from planner.dispatch.forecast import Forecaster
from planner.dispatch.table import DispatchTable, Row
from planner.domain.errors import InvalidInput
from planner.domain.files import atomic_write
from planner.domain.fleet import Fleet
from planner.domain.run import RunSpec
from planner.sim.experiment import Cell, PolicySetup, World, mean_latency_s, run_cell

__all__ = ["ACTIVATION_SCHEMA", "Activation", "RowChange", "save_activation", "weigh_tables"]

ACTIVATION_SCHEMA = "almanac.activation/1"


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
        Versions of the tables.
    candidate_s, incumbent_s
        Mean run latency of each replication, seconds, in the order of the seeds.
    seeds
        Seeds of the replications.
    activate
        Whether the candidate may go live.
    tuning_changed
        Whether the weights of the live score differ.
    changes
        Rows that differ.
    """

    candidate: str
    incumbent: str
    candidate_s: tuple[float, ...]
    incumbent_s: tuple[float, ...]
    seeds: tuple[int, ...]
    activate: bool
    tuning_changed: bool
    changes: tuple[RowChange, ...]


def weigh_tables(
    candidate: DispatchTable,
    incumbent: DispatchTable,
    recent: Mapping[int, Sequence[RunSpec]],
    fleet: Fleet,
    forecaster: Forecaster,
    *,
    tolerance: float = 0.0,
) -> Activation:
    """Replay both tables and say whether the candidate may take over.

    Parameters
    ----------
    recent
        Recent runs by the seed of their replication; at least one run.
    tolerance
        Relative excess of the mean latency that still counts as not worse, >= 0.

    Raises
    ------
    InvalidInput
        If there are no runs, or a table is for another fleet.
    """
    if not recent or not all(recent.values()):
        raise InvalidInput("no recent runs", where="recent", remedy="give at least one run a seed")
    for table in (candidate, incumbent):
        table.check_fleet(fleet)
    world = World(fleet=fleet, forecaster=forecaster)
    means = {}
    for name, table in (("candidate", candidate), ("incumbent", incumbent)):
        setup = PolicySetup(policy="almanac", table=table)
        means[name] = tuple(
            mean_latency_s(run_cell(Cell(setup=setup, seed=seed, runs=runs, world=world)))
            for seed, runs in sorted(recent.items())
        )
    new, old = sum(means["candidate"]), sum(means["incumbent"])
    return Activation(
        candidate=candidate.version,
        incumbent=incumbent.version,
        candidate_s=means["candidate"],
        incumbent_s=means["incumbent"],
        seeds=tuple(sorted(recent)),
        # A candidate under which nothing finishes never goes live.
        activate=math.isfinite(new) and new <= old * (1 + tolerance),
        tuning_changed=candidate.tuning != incumbent.tuning,
        changes=_changes(candidate, incumbent),
    )


def save_activation(activation: Activation, path: Path) -> None:
    """Write the record as JSON, atomically."""
    # JSON has no infinity: a replication in which no run finished is null.
    body = asdict(activation)
    for name in ("candidate_s", "incumbent_s"):
        body[name] = [value if math.isfinite(value) else None for value in body[name]]
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps({"schema": ACTIVATION_SCHEMA, **body}, indent=1) + "\n", encoding="utf-8"
        )


def _changes(candidate: DispatchTable, incumbent: DispatchTable) -> tuple[RowChange, ...]:
    new, old = _by_key(candidate), _by_key(incumbent)
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
