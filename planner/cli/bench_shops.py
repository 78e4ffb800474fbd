"""`almanac bench-planner`, shops: published instances, the best known, and a peer."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.bench_figures import Bar, at_most, check, note, published_rows
from planner.domain.errors import InvalidInput

if TYPE_CHECKING:
    from planner.domain.schedule import ScheduleQuestion

__all__ = ["peer_objective", "shop_bars"]

_PEER = """
import json, sys
from pyjobshop import Model
question = json.load(sys.stdin)
model = Model()
machines = [[model.add_machine() for _ in range(n)] for n in question["slots"]]
tasks = []
for modes, preds in question["activities"]:
    task = model.add_task()
    tasks.append(task)
    for endpoint, ticks in modes:
        for machine in machines[endpoint]:
            model.add_mode(task, machine, ticks)
    for pred in preds:
        model.add_end_before_start(tasks[pred], task)
result = model.solve(solver="ortools", time_limit=question["limit"], num_workers=2, display=False)
print(result.objective)
"""
"""Solves a question given as JSON with PyJobShop on two workers, in another Python."""


def shop_bars(path: Path, args: argparse.Namespace) -> Iterator[Bar]:
    """Solve shop instances; compare with the best known, and with the peer if there is one."""
    from planner.solve.budget import Budget
    from planner.solve.intervals import solve_schedule
    from planner.solve.public import fjsp_question, hfsp_question
    from planner.verify_schedule import verify_schedule

    kind = path.stem
    make = fjsp_question if kind == "fjsp" else hfsp_question
    limit = args.time_limit or (5.0 if args.quick else 60.0)
    rows = sorted(published_rows(path), key=lambda row: (_size(row), row["instance"]))
    wanted = args.instances or (3 if args.quick else len(rows))
    rows = [rows[(2 * n + 1) * len(rows) // (2 * wanted)] for n in range(min(wanted, len(rows)))]
    questions = [make(row) for row in rows]
    found, proven, others, missed = [], [], [], 0
    for row, question in zip(rows, questions, strict=True):
        result = solve_schedule(
            question, budget=Budget(wall_s=limit, relative_gap=0.0), timer=time.perf_counter
        )
        check(verify_schedule(question, result.schedule), f"{kind} {row['instance']}")
        found.append(result.schedule.objective)
        proven.append(max(int(row["best_known"]), result.schedule.bound))
        solved = row["reference"]["ortools"]["status"] == "Optimal"
        missed += solved and found[-1] > int(row["best_known"])
        out_of_reach = proven[-1] > int(row["best_known"])
        mark = f" (proven out of reach: at least {proven[-1]})" if out_of_reach else ""
        note(f"{kind} {row['instance']}: {found[-1]}, best known {row['best_known']}{mark}")
        if args.peer_python is not None:
            # By turns: then both meet the same other load on the machine.
            others.append(peer_objective(args.peer_python, question, limit))
            note(f"{kind} {row['instance']}: PyJobShop {others[-1]:g}")
    gaps = [value / int(row["best_known"]) - 1 for value, row in zip(found, rows, strict=True)]
    name = f"{kind}_gap_{limit:g}s_{len(rows)}_instances"
    # The bars are stated for 60 s; shorter limits are shown beside them without a verdict.
    judged = limit >= 60.0
    mean = 100 * statistics.fmean(gaps)
    yield Bar(name=name, value=mean, unit="%", bar=1.5, holds=mean <= 1.5 if judged else None)
    yield Bar(
        name=f"{kind}_reference_optimal_missed",
        value=missed,
        unit="instances",
        bar=0,
        holds=missed == 0 if judged else None,
    )
    # No schedule of these data has a published value below what is proven.
    unreachable = sum(p > int(row["best_known"]) for p, row in zip(proven, rows, strict=True))
    yield Bar(name=f"{kind}_best_known_out_of_reach", value=unreachable, unit="instances")
    left = statistics.fmean(value / p - 1 for value, p in zip(found, proven, strict=True))
    yield Bar(name=f"{kind}_gap_to_known_or_proven_{limit:g}s", value=100 * left, unit="%")
    # An instance that the peer finds no schedule for in time says nothing about the distance.
    behind = [100 * (a / b - 1) for a, b in zip(found, others, strict=False) if b < math.inf]
    if behind:
        yield at_most(f"{kind}_behind_pyjobshop_{limit:g}s", statistics.fmean(behind), "%", 1.0)


def _size(row: Mapping[str, Any]) -> int:
    return sum(map(len, row["jobs"] if "jobs" in row else row["times"]))


def peer_objective(python: Path, question: ScheduleQuestion, limit: float) -> float:
    """Return the peer's objective, infinite if it finds no schedule in time."""
    asked = {
        "slots": question.slots,
        "limit": limit,
        "activities": [
            ([(mode.endpoint, mode.ticks) for mode in one.modes], one.preds)
            for one in question.activities
        ],
    }
    try:
        done = subprocess.run(  # noqa: S603 - the interpreter is the user's choice
            [str(python), "-c", _PEER],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise InvalidInput(
            f"PyJobShop did not run: {said.strip().splitlines()[-1]}",
            where=f"--peer-python {python}",
            remedy="give an interpreter that can import pyjobshop",
        ) from error
    return float(done.stdout)
