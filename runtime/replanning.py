"""Re-planning while the gateway serves: when to ask, what to ask, and what becomes of the answer.

The planner runs in its own process (`runtime.plan_process`); nothing here blocks the event loop,
and nothing here can fail a request. Whatever goes wrong, the table in use stays, and its age and
the reason show in the diagnostics and metrics.

An answer is

* ``adopted`` if the replay says it is not worse, and fleet and table are still those it is for;
* ``kept`` if the replay says it is worse, so that the table in use is kept;
* ``stale`` if an endpoint went down or came up meanwhile, or somebody else changed the table;
* ``refused`` if its table is for another fleet or cannot be read;
* ``failed`` if there is none: late, dead, silent, or no plan exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from planner.dispatch.replan import PlanBasis, ReplanTrigger, speed_s
from planner.dispatch.table import DispatchTable
from planner.dispatch.view import EndpointState
from planner.domain.errors import InvalidInput
from planner.domain.fleet import Fleet
from planner.domain.snapshot import Snapshot
from planner.domain.trace import TraceRecord, record_to_json
from runtime.control import Control
from runtime.fleets import present
from runtime.plan_process import PlanProcess, ProcessLimits, WorkerFailed
from runtime.recent import RecentWork

__all__ = ["ReplanConfig", "Replanner"]

_log = logging.getLogger(__name__)

ACTIVATION_SCHEMA = "almanac.activation/1"
"""Of the log's lines; those of answers that were weighed have it from the worker."""
_PROOF = ("status", "objective_s", "bound_s", "gap")
"""What the worker says of the plan behind a table, told while that table is in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplanConfig:
    """Settings of re-planning.

    Parameters
    ----------
    period_s
        Longest time between two plans, engine seconds, > 0.
    band, settle_s, least_gap_s
        See `ReplanTrigger`; engine seconds.
    window_s
        Time constant of arrival rates, engine seconds, > 0.
    poll_s
        How often the triggers are looked at, wall seconds, > 0.
    limits
        Of the process.
    log
        File that each outcome is appended to (JSON Lines), or None.
    """

    period_s: float = 300.0
    band: float = 1.5
    settle_s: float = 20.0
    least_gap_s: float = 10.0
    window_s: float = 60.0
    poll_s: float = 1.0
    limits: ProcessLimits = field(default_factory=ProcessLimits)
    log: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.poll_s < float("inf"):
            raise InvalidInput(
                f"{self.poll_s!r} s", where="replanning: poll_s", remedy="use a number above 0"
            )
        self.trigger()

    def trigger(self) -> ReplanTrigger:
        """Return a fresh trigger, or raise `InvalidInput`."""
        return ReplanTrigger(
            self.period_s,
            band=self.band,
            settle_s=self.settle_s,
            least_gap_s=self.least_gap_s,
            window_s=self.window_s,
        )


@dataclass(frozen=True, slots=True)
class _Question:
    """What was asked, to tell whether the answer still fits."""

    snapshot: Snapshot
    table: DispatchTable | None
    hint: tuple[Mapping[str, Any], ...]
    recent: tuple[TraceRecord, ...]

    def line(self, number: int) -> bytes:
        """Return the question as a line; slow, so not for the event loop."""
        fleet, table = self.snapshot.fleet, self.table
        # A table that was made for other endpoints cannot be replayed on these.
        ids = tuple(str(endpoint.id) for endpoint in fleet.endpoints)
        fits = table is not None and (table.fleet_hash, table.endpoints) == (
            fleet.content_hash(),
            ids,
        )
        body = {
            "id": number,
            "snapshot": self.snapshot.to_json(),
            "hint": self.hint,
            "incumbent": table.to_json() if table is not None and fits else None,
            "recent": [record_to_json(record) for record in self.recent],
        }
        return json.dumps(body, separators=(",", ":")).encode() + b"\n"


class Replanner:
    """Keeps a gateway's table fresh; an async context manager.

    Parameters
    ----------
    control
        The gateway's state.
    command
        How to start the planner's process.
    config
        Settings.
    """

    def __init__(
        self, control: Control, command: Sequence[str], config: ReplanConfig | None = None
    ) -> None:
        self.control = control
        self.config = config or ReplanConfig()
        self.process = PlanProcess(command, self.config.limits)
        self._trigger = self.config.trigger()
        self._recent = RecentWork(self.config.window_s, control.clock.now_s())
        self._hint: tuple[Mapping[str, Any], ...] = ()
        self._last: dict[str, Any] | None = None
        self._proof: dict[str, Any] | None = None
        self._outcomes: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.control.ledger.recent = self._recent
        self.control.replanning = self.facts
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_details: object) -> None:
        task, self._task = self._task, None
        self.control.ledger.recent = self.control.replanning = None
        try:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        finally:
            await self.process.aclose()

    def facts(self) -> dict[str, Any]:
        """Return what became of the plans so far, JSON-ready."""
        return {
            "period_s": self.config.period_s,
            "outcomes": dict(self._outcomes),
            "last": self._last,
            "proof": self._proof
            if self._proof and self._proof["version"] == self.control.table_version
            else None,
            "process": {
                "pid": self.process.pid,
                "starts": self.process.starts,
                "failures_in_a_row": self.process.failures,
            },
            "rates_rps": {
                key: round(rate, 5)
                for key, rate in self._recent.rates.rates_rps(self.control.clock.now_s()).items()
            },
            "uncovered": round(self._recent.uncovered, 4),
        }

    # When

    async def _run(self) -> None:
        while True:
            try:
                # Loaded ahead of the first question, and again when it has died meanwhile.
                await self.process.ensure()
                reason = self._trigger.due(self.control.clock.now_s(), self.basis())
                if reason is not None:
                    await self.plan(reason)
            except Exception:  # noqa: BLE001 - re-planning must outlive whatever befalls a plan
                _log.exception("re-planning failed")
            await asyncio.sleep(self.config.poll_s)

    def basis(self) -> PlanBasis:
        """Return what a plan made now would rest on."""
        now_s = self.control.clock.now_s()
        known = {workflow.content_hash for workflow in self.control.workflows}
        return PlanBasis(
            up=frozenset(self._up()),
            rates_rps={
                key: rate
                for key, rate in self._recent.rates.rates_rps(now_s).items()
                if key in known
            },
            speeds_s={str(state.endpoint.id): speed_s(state.latency) for state in self._states()},
            uncovered=self._recent.uncovered,
        )

    def _states(self) -> list[EndpointState]:
        absent = self.control.absent
        return [one for one in self.control.router.view.states if one.index not in absent]

    def _up(self) -> tuple[str, ...]:
        return tuple(str(state.endpoint.id) for state in self._states() if state.healthy)

    def _fleet(self) -> Fleet:
        return present(self.control.fleet, self.control.absent)

    # What

    def snapshot(self) -> Snapshot:
        """Return the gateway's state as the planner wants it."""
        control, basis = self.control, self.basis()
        active = self._recent.active()
        planned = [
            workflow
            for workflow in control.workflows
            if basis.rates_rps.get(workflow.content_hash) or active[workflow.content_hash]
        ]
        hashes = {str(workflow.content_hash) for workflow in planned}
        return Snapshot(
            now_s=control.clock.now_s(),
            fleet=self._fleet(),
            up=self._up(),
            workflows=tuple(planned),
            estimates=control.workflows.estimates,
            rates_rps={key: rate for key, rate in basis.rates_rps.items() if key in hashes},
            latency={str(state.endpoint.id): state.latency for state in self._states()},
            active_runs={key: count for key, count in active.items() if key in hashes},
            horizon_s=self.config.period_s,
        )

    async def plan(self, reason: str) -> str:
        """Ask for a plan, take it or leave it, and return the outcome; see the module's rules."""
        control = self.control
        at_s, started_s = control.clock.now_s(), time.monotonic()
        self._trigger.attempted(at_s, self.basis())
        question = _Question(
            self.snapshot(), control.table, self._hint, tuple(self._recent.records())
        )
        answer: dict[str, Any] = {}
        try:
            answer = await self.process.ask(question.line)
            outcome, detail = await self._consider(question, answer)
        except WorkerFailed as error:
            outcome, detail = "failed", str(error)
        self._trigger.answered(control.clock.now_s(), verdict=outcome in ("adopted", "kept"))
        verdict = answer.get("activation")
        self._last = {
            "schema": ACTIVATION_SCHEMA,
            "at_s": round(at_s, 3),
            "reason": reason,
            "outcome": outcome,
            "detail": detail,
            "wall_s": round(time.monotonic() - started_s, 3),
            **(verdict if isinstance(verdict, dict) else {}),
        }
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1
        control.metrics.replans.inc(reason, outcome)
        _log.info("re-planned", extra={"reason": reason, "outcome": outcome, "detail": detail})
        # At once, so that no swap goes unrecorded; a line takes about as long as a trace record.
        self._write_log(self._last)
        return outcome

    async def _consider(self, question: _Question, answer: dict[str, Any]) -> tuple[str, str]:
        """Return (outcome, detail) of an answer, with its table in use if it is adopted."""
        if "error" in answer:
            return "failed", str(answer["error"])
        try:
            table = await asyncio.to_thread(DispatchTable.from_json, answer.get("table"), "answer")
            table.check_fleet(self._fleet(), "answer")
            verdict = answer["activation"]
            activate = verdict["activate"]
        except (InvalidInput, KeyError, TypeError) as error:
            return "refused", str(error)
        plans = answer.get("plans")
        self._hint = tuple(plans) if isinstance(plans, list) else ()
        # From here on nothing is awaited: what is checked still holds when the table is swapped.
        if self._up() != question.snapshot.up:
            return "stale", "an endpoint went down or came up meanwhile"
        if self.control.table is not question.table:
            return "stale", "the table was changed meanwhile"
        if activate is not True:
            return "kept", "worse than the table in use on the replayed runs"
        self.control.set_table(table)
        self._proof = {"version": table.version, **{name: verdict.get(name) for name in _PROOF}}
        return "adopted", table.version

    def _write_log(self, record: Mapping[str, Any]) -> None:
        if self.config.log is None:
            return
        with contextlib.suppress(ValueError):  # a worker's figures may be no JSON
            line = json.dumps(record, separators=(",", ":"), allow_nan=False)
            try:
                with self.config.log.open("a", encoding="utf-8") as log:
                    log.write(line + "\n")
            except OSError as error:
                _log.warning(
                    "activation log not written",
                    extra={"path": str(self.config.log), "error": str(error)},
                )
