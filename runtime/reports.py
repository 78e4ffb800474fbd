"""The lifecycle events that agents report of their runs, read leniently.

An event that makes no sense is counted and left out: it must not cost the others of its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.clock import Clock
from runtime.identity import Identity
from runtime.lifecycle import Lifecycle
from runtime.limits import ANYONE, Tenant
from runtime.prometheus import Counter

__all__ = ["Reports"]

_EVENTS = frozenset({"run_start", "run_end", "tool_start", "tool_end", "branch"})
_STATUSES = frozenset({"ok", "failed", "cancelled"})


class Reports:
    """Applies events to runs.

    Parameters
    ----------
    lifecycle
        Of the runs.
    clock
        An event happens when it comes.
    counted
        Counts events by type and whether they were understood.
    """

    def __init__(self, lifecycle: Lifecycle, clock: Clock, counted: Counter) -> None:
        self._lifecycle = lifecycle
        self._clock = clock
        self._counted = counted

    def take(self, events: Sequence[Any], tenant: Tenant = ANYONE) -> int:
        """Apply lifecycle events; return how many were understood. The others are counted."""
        taken = 0
        for event in events:
            kind = _text(event, "type") if isinstance(event, dict) else ""
            understood = kind in _EVENTS and self._take(kind, event, tenant)
            taken += understood
            self._counted.inc(kind if kind in _EVENTS else "unknown", str(understood).lower())
        return taken

    def _take(self, kind: str, event: Mapping[str, Any], tenant: Tenant) -> bool:
        lifecycle = self._lifecycle
        run_id = _text(event, "run_id")
        if not run_id:
            return False
        run_id = tenant.own(run_id)
        if kind == "run_end":
            return lifecycle.end(run_id, _status(event))
        if kind == "run_start" and event.get("resumed") is True:
            lifecycle.runs.reopen(run_id)
        run = lifecycle.run_of(
            Identity(
                run_id=run_id,
                workflow=_text(event, "workflow_hash") or _text(event, "workflow"),
                session_id=_text(event, "session_id") or None,
                source="run",
            ),
            tenant,
        )
        run.workflow = run.workflow or _text(event, "workflow")
        run.workflow_hash = run.workflow_hash or _text(event, "workflow_hash")
        run.session_id = run.session_id or _text(event, "session_id") or None
        now_s = self._clock.now_s()
        visit = event.get("visit")
        visit = visit if isinstance(visit, int) and visit >= 0 else 0
        node = _text(event, "node")
        if kind == "tool_start":
            lifecycle.tool_started(run, node, visit, now_s)
        elif kind == "tool_end":
            return lifecycle.tool_ended(run, node, visit, now_s, _status(event))
        elif kind == "branch":
            branch, outcome = _text(event, "branch"), _text(event, "outcome")
            if not branch or not outcome:
                return False
            lifecycle.branch_taken(run, branch, outcome, visit, now_s)
        return True


def _text(event: Mapping[str, Any], name: str) -> str:
    value = event.get(name)
    return value[:200] if isinstance(value, str) else ""


def _status(event: Mapping[str, Any]) -> str:
    value = event.get("status", "ok")
    if value == "interrupted":  # it waits for a human and may go on under the same id
        return "cancelled"
    return value if value in _STATUSES else "failed"
