"""`almanac plan-worker`: the planner as a long-lived process of the gateway's.

One JSON object a line. In: ``{"id", "snapshot", "hint", "incumbent", "recent"}``, where hint is
the ``plans`` of an earlier answer, incumbent a table or null, and recent the records of a trace.
Out, while it lives: ``{"beat": n}`` every second; once per question: ``{"id", "table", "plans",
"activation", "seconds"}``, or ``{"id", "error"}`` where there is no plan. It holds no state
between questions, so that a process that is started anew answers like the one that died. It ends
when its input does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, TextIO

from planner.cli.replan_options import add_step_arguments, step_from
from planner.dispatch.table import DispatchTable
from planner.domain.errors import InvalidInput, PlannerError
from planner.domain.plan import Plan
from planner.domain.snapshot import Snapshot
from planner.domain.trace import record_from_json

if TYPE_CHECKING:
    from planner.cli.rolling import RollingStep

__all__ = ["answer", "register", "run"]

BEAT_S = 1.0
_NICENESS = 10


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``plan-worker`` command."""
    parser = subparsers.add_parser(
        "plan-worker",
        help="plan for a gateway, snapshot by snapshot",
        description=(
            "Read snapshots as JSON lines from stdin and answer each with a verified plan, its "
            "dispatch table, and the verdict of a replay against the table in use. `almanac serve "
            "--replan` starts and supervises it; there is no need to start it by hand."
        ),
    )
    add_step_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer until the input ends; return 0."""
    step = step_from(args)
    # Solvers and libraries print to stdout as they like; answers have a channel of their own.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        # Planning takes whole seconds of processor time; the gateway beside it must not wait.
        os.nice(_NICENESS)
        line = _Line(out)
        stop = threading.Event()
        pulse = threading.Thread(target=_beat, args=(line, stop), daemon=True)
        pulse.start()
        try:
            for text in sys.stdin:
                if not line.say(answer(text, step)):
                    break
        finally:
            stop.set()
            pulse.join()
    return 0


def answer(text: str, step: RollingStep) -> dict[str, Any]:
    """Return the answer to one line; a question that cannot be answered gets its error."""
    identity: Any = None
    started_s = time.perf_counter()
    try:
        question = json.loads(text)
        if not isinstance(question, dict):
            raise InvalidInput("not an object", where="question", remedy="send a JSON object")
        identity = question.get("id")
        incumbent = question.get("incumbent")
        rolled = step.take(
            Snapshot.from_json(question.get("snapshot")),
            hint=[Plan.from_json(one, "hint") for one in question.get("hint", ())],
            incumbent=None
            if incumbent is None
            else DispatchTable.from_json(incumbent, "incumbent"),
            recent=[record_from_json(one, "recent") for one in question.get("recent", ())],
            timer=time.perf_counter,
        )
    except (PlannerError, json.JSONDecodeError) as error:
        return {"id": identity, "error": f"{type(error).__name__}: {error}"}
    return {
        "id": identity,
        "table": rolled.table.to_json(),
        "plans": [plan.to_json() for plan in rolled.planned.plans],
        "activation": rolled.facts(),
        "seconds": round(time.perf_counter() - started_s, 4),
    }


class _Line:
    """The way out, shared with the pulse; one whole line at a time."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()

    def say(self, message: dict[str, Any]) -> bool:
        """Write a line; return False if nobody listens any more."""
        try:
            with self._lock:
                self._out.write(json.dumps(message, separators=(",", ":")) + "\n")
                self._out.flush()
        except BrokenPipeError:
            return False
        return True


def _beat(line: _Line, stop: threading.Event) -> None:
    number = 0
    while line.say({"beat": number}) and not stop.wait(BEAT_S):
        number += 1
