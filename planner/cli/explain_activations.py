"""What became of new tables: the facts of activation records, one or a log of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.domain.errors import InvalidInput
from planner.domain.files import read_jsonl

__all__ = ["explain_activation", "explain_activations", "is_activation_log"]

SCHEMA = "almanac.activation/1"


def is_activation_log(path: Path) -> bool:
    """Return whether a JSON Lines file holds activation records; what cannot be read does not."""
    try:
        with path.open(encoding="utf-8") as lines:
            first = json.loads(lines.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and first.get("schema") == SCHEMA


def explain_activations(path: Path) -> dict[str, Any]:
    """Return the facts of a log: how many plans there were, and a row for each.

    Raises
    ------
    InvalidInput
        If a line is no activation record.
    """
    rows = []
    for number, raw in read_jsonl(path, what="activation log"):
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            raise InvalidInput(
                "not an activation record",
                where=f"{path}:{number}",
                remedy="give the --replan-log of `almanac serve`",
            )
        rows.append(_row(raw))
    outcomes = Counter(str(row["outcome"]) for row in rows)
    return {
        "kind": "activations",
        "facts": {"plans": len(rows), **{name: outcomes[name] for name in sorted(outcomes)}},
        "rows": rows,
    }


def explain_activation(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of one record, and the rows of the table that differ."""
    row = _row(raw)
    return {
        "kind": "activation",
        "facts": {name: value for name, value in row.items() if value is not None},
        "rows": [
            {
                "site": change.get("site"),
                "bucket": change.get("bucket"),
                "before": _shares(change.get("before")),
                "after": _shares(change.get("after")),
                "prices": "differ" if change.get("priced") else "same",
            }
            for change in raw.get("changes", ())
        ],
    }


def _row(raw: dict[str, Any]) -> dict[str, Any]:
    activate = raw.get("activate")
    outcome = raw.get("outcome", "activated" if activate else "not activated")
    return {
        "at_s": raw.get("at_s"),
        "reason": raw.get("reason"),
        "outcome": outcome,
        "candidate": raw.get("candidate"),
        "incumbent": raw.get("incumbent"),
        "mean_s": _mean(raw.get("candidate_s")),
        "was_mean_s": _mean(raw.get("incumbent_s")),
        "p95_s": _mean(raw.get("candidate_p95_s")),
        "was_p95_s": _mean(raw.get("incumbent_p95_s")),
        "rows_changed": len(raw.get("changes", ())),
        "took_s": raw.get("wall_s", raw.get("seconds")),
        # Of an adopted table the detail is its version, which is in the row already.
        "detail": raw.get("detail") if outcome in ("failed", "refused", "stale") else None,
    }


def _mean(values: Sequence[float | None] | None) -> float | None:
    known = [value for value in values or () if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values or ()) else None


def _shares(shares: dict[str, float] | None) -> str:
    if shares is None:
        return "no row"
    ranked = sorted(shares.items(), key=lambda one: (-one[1], one[0]))
    return ", ".join(f"{endpoint} {share:.0%}" for endpoint, share in ranked)
