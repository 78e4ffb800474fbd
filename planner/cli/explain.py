"""`almanac explain`: why a plan, a row of a dispatch table or the calls of a run are so."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.cli.explain_activations import SCHEMA as ACTIVATION_SCHEMA
from planner.cli.explain_activations import (
    explain_activation,
    explain_activations,
    is_activation_log,
)
from planner.cli.explain_live import DEFAULT_KEY, ask_run
from planner.dispatch.table import TABLE_SCHEMA, DispatchTable, Row
from planner.domain.errors import InvalidInput
from planner.domain.files import read_json
from planner.domain.plan import PLAN_SCHEMA, Plan
from planner.domain.trace import CallRecord, RunRecord, TraceRecord, load_trace
from planner.report.terminal import align

__all__ = ["explain_plan", "explain_run", "explain_table", "register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``explain`` command."""
    parser = subparsers.add_parser(
        "explain",
        help="say why: a plan, a table row, or the calls of a run",
        description="Of a plan: shares per call site, objective, bound and gap. Of a dispatch "
        "table: the ranked endpoints of each row with cost, share and price, the load it is valid "
        "for, and why. Of a trace: where each call of a run went, the reason given then, and the "
        "predicted against the actual finish, there and at the best other endpoint. Of activation "
        "records: what new tables were weighed against, and what became of them. With --gateway, "
        "the same of a run that a gateway is serving or served of late.",
    )
    parser.add_argument(
        "file",
        metavar="FILE|RUN",
        help="plan.json, table.json, an activation record or log, or a trace (.jsonl); with "
        "--gateway the id of a run",
    )
    parser.add_argument(
        "--gateway", metavar="URL", help="ask this gateway, http://host:port, about a run"
    )
    parser.add_argument(
        "--key-env",
        default=DEFAULT_KEY,
        metavar="NAME",
        help="environment variable with its admin key (default: %(default)s)",
    )
    parser.add_argument("--site", metavar="SITE", help="only this call site")
    parser.add_argument("--run", metavar="RUN", help="run of a trace (default: the slowest)")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the explanation and return 0.

    Raises
    ------
    InvalidInput
        If the file is no plan, table or trace, holds no such site or run, or the gateway does not
        tell of the run.
    """
    facts = _live_facts(args) if args.gateway is not None else _file_facts(args)
    print(json.dumps(facts, indent=1) if args.json else _text(facts))
    return 0


def _live_facts(args: argparse.Namespace) -> dict[str, Any]:
    if args.run is not None:
        raise InvalidInput(
            "the run is named already", where="--run", remedy="leave it out with --gateway"
        )
    live = ask_run(args.file, args.gateway, args.key_env)
    facts = explain_run(live.records, live.own.run_id, args.site, where=f"gateway {args.gateway}")
    if live.predicted_finish_s is not None:
        facts["facts"]["predicted_now_s"] = live.predicted_finish_s - live.own.arrival_s
    shown = {row["site"] for row in facts["rows"]}
    return {**facts, "why": {site: live.why[site] for site in sorted(shown & live.why.keys())}}


def _file_facts(args: argparse.Namespace) -> dict[str, Any]:
    path = Path(args.file)
    if path.suffix == ".jsonl" and is_activation_log(path):
        facts = explain_activations(path)
    elif path.suffix == ".jsonl":
        facts = explain_run(load_trace(path), args.run, args.site, where=str(path))
    else:
        raw = read_json(path, what="plan or table")
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if args.run is not None and schema in (PLAN_SCHEMA, TABLE_SCHEMA):
            raise InvalidInput("only a trace has runs", where=str(path), remedy="leave --run out")
        if schema == PLAN_SCHEMA:
            facts = explain_plan(Plan.from_json(raw, str(path)), args.site)
        elif schema == ACTIVATION_SCHEMA:
            facts = explain_activation(raw)
        elif schema == TABLE_SCHEMA:
            facts = explain_table(DispatchTable.from_json(raw, str(path)), args.site)
        else:
            raise InvalidInput(
                f"schema {schema!r} is neither a plan nor a dispatch table",
                where=str(path),
                remedy="give plan.json or table.json of `almanac plan`, or a trace (.jsonl)",
            )
    return facts


def explain_plan(plan: Plan, site: str | None = None) -> dict[str, Any]:
    """Return the facts of a plan: what was proven, and each call site's shares."""
    shares = plan.shares()
    _check_site(site, sorted(shares), "plan")
    return {
        "kind": "plan",
        "facts": {
            "status": plan.status,
            "objective": plan.objective.name,
            "objective_s": plan.objective_s,
            "bound_s": plan.bound_s,
            "gap": plan.gap,
            **{f"value of {name}": value for name, value in plan.values.items()},
            **{f"bound of {name}": value for name, value in plan.bounds.items()},
            "weight": plan.weight,
            "deadline_s": plan.deadline_s,
            "hard_deadline": plan.hard_deadline,
            **plan.notes,
            "arrival_rate_rps": plan.arrival_rate_rps,
            "run_classes": plan.run_classes,
            "scenarios": plan.scenarios,
            "workflow_hash": plan.workflow_hash,
            "fleet_hash": plan.fleet_hash,
        },
        "rows": [
            {
                "site": name,
                "endpoint": endpoint,
                "share": share,
                "calls_side_by_side": plan.levels.get(endpoint),
                **_kept_at(plan, name, endpoint),
            }
            for name, row in sorted(shares.items())
            if site in (None, name)
            for endpoint, share in sorted(row.items(), key=lambda one: (-one[1], one[0]))
        ],
        "sessions": [
            {
                "site": one.site,
                "kept_share": one.share,
                "return_share": one.return_probability,
                "gap_s": one.gap_s,
                "saved_s": one.saved_s,
                "worth_per_mtoken_s": 1e6 * one.value,
                "price_per_mtoken_s": 1e6 * one.price,
            }
            for one in plan.retention
            if site in (None, one.site)
        ],
    }


def _kept_at(plan: Plan, site: str, endpoint: str) -> dict[str, float]:
    """Return the shares of a site's traffic at an endpoint whose prefix and sessions are kept."""
    own = [
        one
        for one in plan.assignments
        if one.site == site and (one.prefill or one.endpoint) == endpoint
    ]
    return {
        "prefix_share": sum(one.warm for one in own) / len(own),
        "session_share": sum(one.keep for one in own) / len(own),
    }


def explain_table(table: DispatchTable, site: str | None = None) -> dict[str, Any]:
    """Return the facts of a dispatch table: every row, ranked, with its validity and reason."""
    _check_site(site, sorted({row.site for row in table.rows}), "table")
    return {
        "kind": "table",
        "facts": {
            "version": table.version,
            "fleet_hash": table.fleet_hash,
            "endpoints": ", ".join(table.endpoints),
        },
        "rows": [one for row in table.rows if site in (None, row.site) for one in _table_rows(row)],
    }


def _table_rows(row: Row) -> list[dict[str, Any]]:
    return [
        {
            "site": row.site,
            "bucket": row.bucket,
            "load_from": row.valid_from,
            "load_to": row.valid_to if math.isfinite(row.valid_to) else None,
            "rank": rank,
            "endpoint": one.endpoint,
            "cost_s": one.cost_s,
            "share": one.share,
            "price": one.price,
            "priority": row.priority,
            "retain_kv": row.retain_kv,
            "reason": row.reason,
        }
        for rank, one in enumerate(row.ranked, start=1)
    ]


def explain_run(
    records: Sequence[TraceRecord],
    run_id: str | None = None,
    site: str | None = None,
    *,
    where: str = "trace",
) -> dict[str, Any]:
    """Return the facts of one run of a trace, the slowest unless named, call by call.

    Times are seconds from the run's arrival; predicted and actual finish are both on that clock.
    """
    runs = {one.run_id: one for one in records if isinstance(one, RunRecord)}
    if run_id is None:
        if not runs:
            raise InvalidInput("no run", where=where, remedy="give a trace with runs")
        run_id = max(runs, key=lambda name: (runs[name].finish_s - runs[name].arrival_s, name))
    elif run_id not in runs:
        shown = ", ".join(list(runs)[:8])
        raise InvalidInput(
            f"no run {run_id!r}",
            where=where,
            remedy=f"known: {shown}{' and others' if len(runs) > 8 else ''}",
        )
    chosen = runs[run_id]
    calls = sorted(
        (one for one in records if isinstance(one, CallRecord) and one.run_id == run_id),
        key=lambda one: (one.ready_s, one.call_id),
    )
    _check_site(site, sorted({one.site for one in calls}), where)
    return {
        "kind": "run",
        "facts": {
            "run": run_id,
            "workflow": chosen.workflow,
            "status": chosen.status,
            "latency_s": chosen.finish_s - chosen.arrival_s,
            "predicted_s": chosen.predicted_s,
            "calls": len(calls),
        },
        "rows": [_call_row(one, chosen.arrival_s) for one in calls if site in (None, one.site)],
    }


def _call_row(one: CallRecord, origin_s: float) -> dict[str, Any]:
    def since(later: float | None, earlier: float | None) -> float | None:
        return None if later is None or earlier is None else later - earlier

    return {
        "site": one.site,
        "endpoint": one.endpoint,
        "reason": one.reason,
        "ready_s": one.ready_s - origin_s,
        "predicted_finish_s": since(one.predicted_finish_s, origin_s),
        "finish_s": since(one.finish_s, origin_s),
        "waiting_s": one.sent_s - one.ready_s,
        "ttft_s": since(one.first_token_s, one.sent_s),
        "decode_s": since(one.finish_s, one.first_token_s),
        "prompt_tokens": one.prompt_tokens,
        "cached_tokens": one.cached_tokens,
        "predicted_output_tokens": one.predicted_output_tokens,
        "output_tokens": one.output_tokens,
        "in_flight": one.in_flight,
        "runner_up": one.runner_up,
        "runner_up_finish_s": since(one.runner_up_finish_s, origin_s),
        "runner_up_excess_s": one.runner_up_excess_s,
        "decided_by": _decided_by(one),
        "status": one.status,
    }


def _decided_by(one: CallRecord) -> str | None:
    """Return which part of the score made the difference to the runner-up, if it is known."""
    here_s, there_s = one.predicted_finish_s, one.runner_up_finish_s
    if here_s is None or there_s is None:
        return None
    # Where the call itself would have been done earlier, only delay of others or prices are left.
    return "own finish" if here_s <= there_s else "cost to others"


def _check_site(site: str | None, known: Sequence[str], where: str) -> None:
    if site is not None and site not in known:
        raise InvalidInput(
            f"no call site {site!r}", where=where, remedy=f"known: {', '.join(known)}"
        )


def _text(facts: dict[str, Any]) -> str:
    lines = [f"{name}: {_cell(name, value)}" for name, value in facts["facts"].items()]
    rows: list[dict[str, Any]] = facts["rows"]
    # The reason of a table row is a sentence, the same for all its endpoints: it goes in front.
    if facts["kind"] == "table":
        for key in dict.fromkeys((row["site"], row["bucket"]) for row in rows):
            group = [row for row in rows if (row["site"], row["bucket"]) == key]
            first = group[0]
            upper = "" if first["load_to"] is None else f" to {first['load_to']:.3g}"
            heading = (
                f"{first['site']}, load from {first['load_from']:.3g}{upper} calls per slot "
                f"(bucket {first['bucket']}, priority {first['priority']}"
                f"{', KV kept for the next visit' if first['retain_kv'] else ''}): "
                f"{first['reason']}"
            )
            lines += [
                "",
                heading,
                _grid(group, ("rank", "endpoint", "cost_s", "share", "price")),
            ]
    elif rows and facts["kind"] == "run":
        lines += ["", "choice, seconds from the run's arrival", _grid(rows, _CHOICE)]
        lines += ["", "outcome", _grid(rows, _OUTCOME)]
    elif rows:
        lines += ["", _grid(rows, tuple(rows[0]))]
    if sessions := facts.get("sessions"):
        lines += ["", "KV of sessions until the next visit", _grid(sessions, tuple(sessions[0]))]
    lines += [f"table on {site}: {reason}" for site, reason in facts.get("why", {}).items()]
    return "\n".join(lines)


_CHOICE = (
    "site", "endpoint", "reason", "in_flight", "ready_s", "predicted_finish_s", "runner_up",
    "runner_up_finish_s", "runner_up_excess_s", "decided_by",
)  # fmt: skip
_OUTCOME = (
    "site", "endpoint", "waiting_s", "ttft_s", "decode_s", "finish_s", "prompt_tokens",
    "cached_tokens", "predicted_output_tokens", "output_tokens", "status",
)  # fmt: skip
"""Columns of a run's calls for people; the JSON has all."""


def _grid(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    return align([columns, *([_cell(name, row[name]) for name in columns] for row in rows)])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if name == "gap" or name.endswith("share"):
        return f"{value:.1%}"
    return f"{value:.3f}" if name.endswith("_s") else f"{value:.4g}"
