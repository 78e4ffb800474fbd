"""Two plans, two dispatch tables or two fleets, compared row by row for a change review.

The same files give the same text, whatever made them and when: what depends on the machine or the
day (wall times, versions, hashes of the whole) is left out, and numbers that differ by less than a
part in a million are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from planner.dispatch.table import TABLE_SCHEMA, DispatchTable
from planner.domain.errors import InvalidInput
from planner.domain.files import read_json
from planner.domain.fleet import Fleet, load_fleet
from planner.domain.plan import PLAN_SCHEMA, Plan
from planner.report.terminal import align

__all__ = ["Change", "Diff", "compare", "compare_files", "load_comparable"]

Comparable = Plan | DispatchTable | Fleet
_EQUAL = 1e-6
Kind = Literal["added", "removed", "changed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One row that differs: which field, and both values (None if absent).

    Of a row that is in one of the two only, the values are all its fields, and ``field`` is empty.
    """

    kind: Kind
    row: str
    field: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """All differences, in the order of the rows' names.

    Parameters
    ----------
    what
        ``plan``, ``table`` or ``fleet``.
    changes
        Empty if the two say the same.
    rows
        Rows compared.
    """

    what: str
    changes: tuple[Change, ...]
    rows: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": "almanac.diff/1",
            "what": self.what,
            "rows": self.rows,
            "changes": [asdict(one) for one in self.changes],
        }

    def text(self) -> str:
        """Return the table for a terminal."""
        if not self.changes:
            return f"{self.what}: no change in {self.rows} rows"
        cells = [["row", "", "field", "before", "after"]]
        cells += [
            [one.row, one.kind, one.field, _shown(one.before), _shown(one.after)]
            for one in self.changes
        ]
        touched = len({one.row for one in self.changes})
        return f"{self.what}: {touched} of {self.rows} rows change\n{align(cells)}"

    def to_frame(self) -> Any:
        """Return a pandas data frame, a row per change."""
        import pandas as pd

        return pd.DataFrame([asdict(one) for one in self.changes])

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return str(self.to_frame().to_html(index=False))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return "present"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def compare_files(before: Path, after: Path) -> Diff:
    """Return the differences of two files.

    Raises
    ------
    InvalidInput
        If a file is no plan, table or fleet, or they are not of one kind.
    """
    return compare(load_comparable(before), load_comparable(after))


def load_comparable(path: Path) -> Comparable:
    """Read a plan or dispatch table (JSON) or a fleet file (YAML).

    Raises
    ------
    InvalidInput
        If it is none of them.
    """
    if path.suffix in (".yaml", ".yml"):
        return load_fleet(path)
    raw = read_json(path, what="plan, table or fleet")
    schema = raw.get("schema") if isinstance(raw, Mapping) else None
    if schema == PLAN_SCHEMA:
        return Plan.from_json(raw, str(path))
    if schema == TABLE_SCHEMA:
        return DispatchTable.from_json(raw, str(path))
    raise InvalidInput(
        f"schema {schema!r} is neither a plan nor a dispatch table",
        where=str(path),
        remedy="give plan.json, table.json or a fleet file (.yaml)",
    )


def compare(before: Comparable, after: Comparable) -> Diff:
    """Return the differences of two plans, tables or fleets.

    Raises
    ------
    InvalidInput
        If they are not of one kind.
    """
    if type(before) is not type(after):
        raise InvalidInput(
            f"a {_name(before)} and a {_name(after)}",
            where="diff",
            remedy="give two of the same kind",
        )
    old, new = _rows(before), _rows(after)
    names = sorted({*old, *new})
    changes = [change for name in names for change in _changes(name, old.get(name), new.get(name))]
    return Diff(what=_name(before), changes=tuple(changes), rows=len(names))


def _name(one: Comparable) -> str:
    return {Plan: "plan", DispatchTable: "table", Fleet: "fleet"}[type(one)]


def _changes(
    name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None
) -> Iterable[Change]:
    if old is None or new is None:
        kind: Kind = "added" if old is None else "removed"
        yield Change(kind=kind, row=name, field="", before=old, after=new)
        return
    for field in sorted({*old, *new}):
        before, after = old.get(field), new.get(field)
        if not _same(before, after):
            yield Change(kind="changed", row=name, field=field, before=before, after=after)


def _same(one: Any, other: Any) -> bool:
    numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    if numbers and not isinstance(one, bool) and not isinstance(other, bool):
        return math.isclose(one, other, rel_tol=_EQUAL, abs_tol=1e-12)
    return bool(one == other)


def _rows(one: Comparable) -> dict[str, dict[str, Any]]:
    if isinstance(one, Plan):
        return _plan_rows(one)
    return _table_rows(one) if isinstance(one, DispatchTable) else _fleet_rows(one)


def _plan_rows(plan: Plan) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {
        "": {
            "objective": plan.objective.name,
            "objective_s": plan.objective_s,
            "bound_s": plan.bound_s,
            "status": plan.status,
            "arrival_rate_rps": plan.arrival_rate_rps,
            "workflow_hash": plan.workflow_hash,
            "fleet_hash": plan.fleet_hash,
            "run_classes": plan.run_classes,
            "scenarios": plan.scenarios,
            "deadline_s": plan.deadline_s,
        }
    }
    for site, shares in plan.shares().items():
        rows[f"site {site}"] = {f"share on {name}": share for name, share in shares.items()}
    for endpoint, level in plan.levels.items():
        rows[f"level of {endpoint}"] = {"calls side by side": level}
    for kept in plan.retention:
        rows[f"session {kept.site}"] = {"share kept": kept.share}
    return rows


def _table_rows(table: DispatchTable) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {
        "": {
            "fleet_hash": table.fleet_hash,
            "endpoints": ", ".join(table.endpoints),
            "buckets": len(table.bounds),
            **{f"tuning {name}": value for name, value in asdict(table.tuning).items()},
        }
    }
    for row in table.rows:
        fields: dict[str, Any] = {
            "valid_from": row.valid_from,
            "valid_to": row.valid_to if math.isfinite(row.valid_to) else None,
            "priority": row.priority,
        }
        for rank, one in enumerate(row.ranked, start=1):
            fields[f"rank of {one.endpoint}"] = rank
            fields[f"share on {one.endpoint}"] = one.share
            fields[f"price of {one.endpoint}"] = one.price
            fields[f"cost on {one.endpoint}"] = one.cost_s
        rows[f"{row.workflow_hash} {row.site} bucket {row.bucket}"] = fields
    return rows


def _fleet_rows(fleet: Fleet) -> dict[str, dict[str, Any]]:
    rows = {}
    for one in fleet.endpoints:
        fields = asdict(one)
        latency = fields.pop("latency")
        fields.pop("id")
        labels = fields.pop("labels")
        fields |= {f"latency {name}": value for name, value in latency.items()}
        fields |= {f"label {name}": value for name, value in labels}
        rows[f"endpoint {one.id}"] = fields
    return rows
