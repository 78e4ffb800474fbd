"""`almanac bench-planner`: measure the planner against its own bars, on this machine."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from planner.domain.errors import InvalidInput
from planner.domain.files import read_jsonl

if TYPE_CHECKING:
    from planner.domain.schedule import ScheduleQuestion

__all__ = ["Bar", "register", "run"]

P = ParamSpec("P")
T = TypeVar("T")

_GRAPHS = "dag_sets/dagbench.jsonl"
_PLANS = "dag_sets/asynchow_plans.jsonl"
_PUBLISHED = {
    "critical-paths": _PLANS,
    "task-graphs": _GRAPHS,
    "fjsp": "shop_scheduling/fjsp.jsonl",
    "hfsp": "shop_scheduling/hfsp.jsonl",
}
"""Parts that need published instances, and the file of each."""
_PARTS = (
    "critical-paths",
    "task-graphs",
    "windows",
    "fleet-plans",
    "growth",
    "table",
    "fjsp",
    "hfsp",
)
"""All parts, the longest last."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A measured value and the bar it is held against; None where there is no bar."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    holds: bool | None = None


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``bench-planner`` command."""
    parser = subparsers.add_parser(
        "bench-planner",
        help="measure the planner against its bars",
        description=(
            "Solve published scheduling instances and random questions of stated size, check "
            "every schedule independently, and print each figure beside the bar it has to keep. "
            "Run it on an idle machine; times are of this machine. Exit code 0 whether or not "
            "the bars hold."
        ),
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder with shop_scheduling/ and dag_sets/; without it they are left out",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few instances and short limits; a bar stated for a longer limit is then not judged",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="S",
        help="seconds for each shop instance (default: 60, with --quick 5)",
    )
    parser.add_argument(
        "--instances",
        type=int,
        metavar="N",
        help="shop instances of each kind, spread over all sizes (default: all, with --quick 3)",
    )
    parser.add_argument(
        "--peer-python",
        type=Path,
        metavar="FILE",
        help="Python interpreter with PyJobShop, to solve the same shop instances as long",
    )
    parser.add_argument(
        "--only",
        metavar="NAME,..",
        help=f"parts to run, of {', '.join(_PARTS)} (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, return 0."""
    rows: list[Bar] = []
    for row in _measured(args):
        _note(_line(row))
        rows.append(row)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print("\n".join(map(_line, rows)))
    return 0


def _measured(args: argparse.Namespace) -> Iterator[Bar]:
    wanted = _wanted(args.only)
    if args.data is None:
        left_out = [part for part in wanted if part in _PUBLISHED]
        if args.only and left_out:
            raise InvalidInput(
                f"{', '.join(left_out)} without --data",
                where="--only",
                remedy="give the folder with published instances",
            )
        if left_out:
            _note("no --data: published instances are left out")
        wanted = [part for part in wanted if part not in _PUBLISHED]
    for name in [_PUBLISHED[part] for part in wanted if part in _PUBLISHED]:
        if not (args.data / name).is_file():
            raise InvalidInput(
                f"no file {name}", where=str(args.data), remedy="give the folder that holds it"
            )
    for part in wanted:
        yield from _part(part, args)


def _wanted(only: str | None) -> Sequence[str]:
    """Return the parts to run, in the order in which they always run."""
    if only is None:
        return _PARTS
    names = [name.strip() for name in only.split(",")]
    unknown = [name for name in names if name not in _PARTS]
    if unknown:
        raise InvalidInput(
            f"part {unknown[0]!r}", where="--only", remedy=f"name some of {', '.join(_PARTS)}"
        )
    return [part for part in _PARTS if part in names]


def _part(part: str, args: argparse.Namespace) -> Iterator[Bar]:
    match part:
        case "critical-paths":
            yield _critical_paths(args.data / _PLANS)
        case "task-graphs":
            yield from _task_graphs(args.data / _GRAPHS, 0.5 if args.quick else 5.0)
        case "windows":
            yield from _windows(8 if args.quick else 40)
        case "fleet-plans":
            yield from _fleet_plans(3 if args.quick else 10)
        case "growth":
            yield from _growth(quick=args.quick)
        case "table":
            yield from _table(10 if args.quick else 50)
        case _:
            yield from _shop(args.data / _PUBLISHED[part], args)


def _at_most(name: str, value: float, unit: str, bar: float) -> Bar:
    return Bar(name=name, value=value, unit=unit, bar=bar, holds=value <= bar)


# -- against others -----------------------------------------------------------------------------


def _shop(path: Path, args: argparse.Namespace) -> Iterator[Bar]:
    """Solve shop instances; compare with the best known, and with the peer if there is one."""
    from planner.solve.budget import Budget
    from planner.solve.intervals import solve_schedule
    from planner.solve.public import fjsp_question, hfsp_question
    from planner.verify_schedule import verify_schedule

    kind = path.stem
    make = fjsp_question if kind == "fjsp" else hfsp_question
    limit = args.time_limit or (5.0 if args.quick else 60.0)
    rows = sorted(_rows(path), key=lambda row: (_size(row), row["instance"]))
    wanted = args.instances or (3 if args.quick else len(rows))
    rows = [rows[(2 * n + 1) * len(rows) // (2 * wanted)] for n in range(min(wanted, len(rows)))]
    questions = [make(row) for row in rows]
    found, others, missed = [], [], 0
    for row, question in zip(rows, questions, strict=True):
        result = solve_schedule(question, budget=Budget(wall_s=limit, relative_gap=0.0))
        _check(verify_schedule(question, result.schedule), f"{kind} {row['instance']}")
        found.append(result.schedule.objective)
        proven = row["reference"]["ortools"]["status"] == "Optimal"
        missed += proven and found[-1] > int(row["best_known"])
        _note(f"{kind} {row['instance']}: {found[-1]}, best known {row['best_known']}")
        if args.peer_python is not None:
            # By turns: then both meet the same other load on the machine.
            others.append(_peer(args.peer_python, question, limit))
            _note(f"{kind} {row['instance']}: PyJobShop {others[-1]:g}")
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
    if args.peer_python is not None:
        behind = [100 * (a / b - 1) for a, b in zip(found, others, strict=True)]
        yield _at_most(f"{kind}_behind_pyjobshop_{limit:g}s", statistics.fmean(behind), "%", 1.0)


def _size(row: Mapping[str, Any]) -> int:
    return sum(map(len, row["jobs"] if "jobs" in row else row["times"]))


def _peer(python: Path, question: ScheduleQuestion, limit: float) -> float:
    """Return the peer's objective."""
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


def _task_graphs(path: Path, limit: float) -> Iterator[Bar]:
    """Schedule task graphs; count those where a list schedule is better."""
    from planner.solve.budget import Budget
    from planner.solve.intervals import solve_schedule
    from planner.solve.list_schedules import LIST_SCHEDULES
    from planner.solve.public import dagbench_question
    from planner.verify_schedule import verify_schedule

    worse, gain, optimal, count = 0, [], 0, 0
    for row in _rows(path):
        question = dagbench_question(row)
        others = {name: rule(question) for name, rule in LIST_SCHEDULES.items()}
        result = solve_schedule(question, budget=Budget(wall_s=limit, relative_gap=0.0))
        for one in (result.schedule, *others.values()):
            _check(verify_schedule(question, one), row["id"])
        best = min(one.objective for one in others.values())
        worse += result.schedule.objective > best
        gain.append(100 * (1 - result.schedule.objective / others["HEFT"].objective))
        optimal += result.status == "optimal"
        count += 1
    yield _at_most("dagbench_worse_than_heft_cpop_peft", worse, "graphs", 0)
    yield Bar(name="dagbench_below_heft_mean", value=statistics.fmean(gain), unit="%")
    yield Bar(name="dagbench_proven_optimal", value=100 * optimal / count, unit="%")


def _critical_paths(path: Path) -> Bar:
    """Count plans whose longest path is not the published answer."""
    from planner.domain.ids import NodeId, RunId, WorkflowHash
    from planner.domain.run import RunSpec, Task
    from planner.graph.analysis import completion_s

    wrong = 0
    for row in _rows(path):
        order = _ordered(row["dur_s_min_max"], row["edges"])
        position = {name: n for n, name in enumerate(order)}
        preds: dict[str, list[int]] = {name: [] for name in order}
        for source, target in row["edges"]:
            preds[target].append(position[source])
        run = RunSpec(
            run_id=RunId(str(row["id"])),
            workflow="plan",
            workflow_hash=WorkflowHash("plan"),
            arrival_s=0.0,
            tasks=tuple(
                Task(index=n, node=NodeId(name), kind="tool", preds=tuple(preds[name]))
                for n, name in enumerate(order)
            ),
        )
        for side in (0, 1):
            length = completion_s(run, [row["dur_s_min_max"][name][side] for name in order])
            if abs(length - row["critical_path_s_min_max"][side]) > 1e-6 * max(1.0, length):
                wrong += 1
                break
    return _at_most("asynchow_critical_paths_wrong", wrong, "plans", 1)


def _ordered(names: Mapping[str, Any], edges: Sequence[Sequence[str]]) -> list[str]:
    """Return the steps with predecessors first."""
    before = {name: {source for source, target in edges if target == name} for name in names}
    order: list[str] = []
    while before:
        ready = sorted(name for name, left in before.items() if left <= set(order))
        order += ready
        for name in ready:
            del before[name]
    return order


# -- speed --------------------------------------------------------------------------------------


def _windows(count: int) -> Iterator[Bar]:
    """Measure the window plan: 24 calls, 8 endpoints, 5 scenarios, two workers."""
    import numpy as np

    from planner.cli.bench_questions import random_window
    from planner.solve.budget import Budget
    from planner.solve.window import WindowModel, greedy_window, solve_window, window_cost

    first: list[float] = []
    total: list[float] = []
    build: list[float] = []
    gaps: list[float] = []
    loose: list[float] = []
    off: list[float] = []
    budget = Budget(wall_s=0.1, relative_gap=0.01)
    for seed in range(count):
        for joins, proven in ((3, loose), (0, gaps)):
            window = random_window(24, 8, 5, np.random.default_rng(seed), joins=joins)
            greedy, seconds = _timed(greedy_window, window)
            first.append(seconds)
            _, seconds = _timed(WindowModel, window, np.array(greedy), -np.inf)
            build.append(seconds)
            plan, seconds = _timed(solve_window, window, budget=budget)
            total.append(seconds)
            proven.append(plan.gap)
            if abs(window_cost(window, plan.endpoints) - plan.cost_s) > 1e-6 * plan.cost_s:
                _check(("cost",), f"window {seed}")
            if seed < 3:
                longer = Budget(wall_s=2.0, relative_gap=0.0)
                best = solve_window(window, budget=longer)
                off.append(plan.cost_s / min(best.cost_s, plan.cost_s) - 1)
    yield _at_most("window_first_plan_longest", 1e3 * max(first), "ms", 50)
    yield _at_most("window_total_median", 1e3 * statistics.median(total), "ms", 300)
    yield _at_most("window_build_share_of_300ms", statistics.median(build) / 0.3 * 100, "%", 20)
    yield _at_most("window_proven_gap_median", 100 * statistics.median(gaps), "%", 3)
    yield _at_most("window_proven_gap_median_with_joins", 100 * statistics.median(loose), "%", 3)
    yield Bar(name="window_above_longer_search", value=100 * statistics.fmean(off), unit="%")


def _fleet_plans(count: int) -> Iterator[Bar]:
    """Measure the fleet plan: 30 call sites, 16 endpoints, to a gap of 2 %."""
    seconds, gaps, build = [], [], []
    for seed in range(count):
        for load in (0.5, 0.8):
            took, gap, built = _fleet_plan(30, 16, seed, load, 5.0)
            seconds.append(took)
            gaps.append(gap)
            build.append(built)
    yield _at_most("fleet_plan_longest", max(seconds), "s", 5.0)
    yield _at_most("fleet_plan_largest_gap", 100 * max(gaps), "%", 2.0)
    yield Bar(name="fleet_plan_median", value=statistics.median(seconds), unit="s")
    yield _at_most("fleet_plan_build_share_of_5s", 100 * statistics.median(build) / 5.0, "%", 20)


def _fleet_plan(
    sites: int, endpoints: int, seed: int, load: float, limit_s: float
) -> tuple[float, float, float]:
    """Return seconds in all, gap, and seconds to build the model, which is built apart."""
    import numpy as np

    from planner.cli.bench_questions import random_fleet, random_workflow
    from planner.domain.estimates import WorkflowEstimate
    from planner.graph.sampling import scenarios
    from planner.solve.bounds import carried_rate_rps
    from planner.solve.budget import Budget
    from planner.solve.instance import build_instance
    from planner.solve.objective import Goal
    from planner.solve.search import Stage, build_model
    from planner.solve.solver import solve_plan
    from planner.verify import verify_plan

    rng = np.random.default_rng(seed)
    fleet = random_fleet(endpoints, rng)
    workflow, estimates = random_workflow(sites, rng)
    estimate = estimates.workflows.get(workflow.content_hash, WorkflowEstimate())
    runs = scenarios(workflow, estimate, 8, 0, defaults=estimates)
    instance = build_instance(workflow, fleet, estimates, runs, arrival_rate_rps=1.0, run_classes=4)
    rate = load * carried_rate_rps(instance)
    # What comes before the search (sample, relaxation, rounding) takes up to half of a short limit.
    budget = Budget(wall_s=limit_s / 2, relative_gap=0.02)
    result, took = _timed(
        solve_plan, workflow, fleet, estimates, arrival_rate_rps=rate, budget=budget
    )
    report = verify_plan(result.plan, workflow, fleet, estimates, result.scenarios)
    _check(report.violations, f"fleet plan {seed}")
    built = 0.0
    if sites <= 60:
        stage = Stage(goal=Goal(result.instance))
        _, built = _timed(build_model, result.instance, result.timing, stage, 0)
    return took, result.plan.gap, built


def _growth(*, quick: bool) -> Iterator[Bar]:
    """Measure how times grow with the question."""
    import numpy as np

    from planner.cli.bench_questions import random_window
    from planner.solve.window import greedy_window

    sizes = ((24, 8), (100, 32)) if quick else ((24, 8), (50, 16), (100, 32), (200, 64))
    for calls, endpoints in sizes:
        window = random_window(calls, endpoints, 5, np.random.default_rng(0))
        _, seconds = _timed(greedy_window, window)
        yield Bar(name=f"window_descent_{calls}x{endpoints}", value=seconds, unit="s")
    for calls, endpoints in sizes:
        yield from _offline(calls, endpoints, 2.0 if quick else 10.0)
    for sites, endpoints in ((30, 16), (60, 32)) if quick else ((30, 16), (60, 32), (200, 64)):
        took, gap, _ = _fleet_plan(sites, endpoints, 0, 0.8, 30.0)
        yield Bar(name=f"fleet_plan_{sites}x{endpoints}", value=took, unit="s")
        yield Bar(name=f"fleet_plan_gap_{sites}x{endpoints}", value=100 * gap, unit="%")


def _offline(calls: int, endpoints: int, limit: float) -> Iterator[Bar]:
    """Schedule known runs of four calls each on unlike endpoints of one slot."""
    import numpy as np

    from planner.domain.schedule import Activity, Mode, ScheduleQuestion
    from planner.solve.budget import Budget
    from planner.solve.intervals import solve_schedule
    from planner.verify_schedule import verify_schedule

    rng = np.random.default_rng(0)
    tokens = rng.lognormal(5.0, 0.6, calls)
    speed = 2.0 ** rng.uniform(-1.0, 1.0, endpoints)
    question = ScheduleQuestion(
        slots=(1,) * endpoints,
        activities=tuple(
            Activity(
                modes=tuple(
                    Mode(endpoint=i, ticks=max(1, round(float(tokens[a] / speed[i]))))
                    for i in range(endpoints)
                ),
                preds=(a - 1,) if a % 4 else (),
            )
            for a in range(calls)
        ),
    )
    budget = Budget(wall_s=limit, relative_gap=0.0)
    result, seconds = _timed(solve_schedule, question, budget=budget)
    _check(verify_schedule(question, result.schedule), f"offline {calls}x{endpoints}")
    yield Bar(name=f"offline_{calls}x{endpoints}", value=seconds, unit="s")
    gap = 100 * result.schedule.gap
    yield Bar(name=f"offline_gap_{calls}x{endpoints}", value=gap, unit="%")


def _table(workflows: int) -> Iterator[Bar]:
    """Measure a table of four loads: look-up, and memory scaled to 200 workflows of 50 sites.

    As in planned tables every site has costs of its own, divides its runs in quarters, and shares
    the prices of its workflow and load.
    """
    import tracemalloc

    import numpy as np

    from planner.dispatch.rows import Rows
    from planner.dispatch.table import DispatchTable, Ranked, Row

    endpoints = tuple(f"e{i:02d}" for i in range(64))
    bounds = (0.25, 0.5, 0.75, float("inf"))
    rng = np.random.default_rng(0)

    def ranked(prices: Sequence[float]) -> tuple[Ranked, ...]:
        costs = np.round(rng.lognormal(0.0, 1.0, len(endpoints)), 4).tolist()
        taken = rng.integers(len(endpoints), size=4)
        shares = (np.bincount(taken, minlength=len(endpoints)) / 4).tolist()
        return tuple(
            Ranked(endpoint=e, cost_s=cost, share=share, price=price)
            for e, cost, share, price in zip(endpoints, costs, shares, prices, strict=True)
        )

    def rows() -> Iterator[Row]:
        for w in range(workflows):
            prices = np.round(rng.random((len(bounds), len(endpoints))), 5).tolist()
            for k in range(50):
                for b, bound in enumerate(bounds):
                    yield Row(
                        workflow_hash=f"w{w}",
                        site=f"n{k}#0",
                        bucket=b,
                        valid_from=0.25 * b,
                        valid_to=bound,
                        ranked=ranked(prices[b]),
                    )

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    table = DispatchTable(
        fleet_hash="bench",
        endpoints=endpoints,
        bounds=bounds,
        rows=Rows(rows(), endpoints),
    )
    held = (tracemalloc.get_traced_memory()[0] - before) / workflows * 200
    tracemalloc.stop()
    times = []
    for n in range(2000):
        workflow, site = f"w{n % workflows}", f"n{n % 50}#0"
        begin = time.perf_counter_ns()
        table.find(workflow, site, 0.5)
        times.append(time.perf_counter_ns() - begin)
    yield _at_most("table_lookup_p50", statistics.median(times) / 1e3, "us", 2.0)
    yield _at_most("table_memory_four_buckets", held / 1e6, "MB", 50.0)


def _timed(action: Callable[P, T], *args: P.args, **options: P.kwargs) -> tuple[T, float]:
    """Return what an action returns, and how long it took in seconds."""
    begin = time.perf_counter()
    result = action(*args, **options)
    return result, time.perf_counter() - begin


def _rows(path: Path) -> list[Mapping[str, Any]]:
    return [row for _, row in read_jsonl(path, what="instance file")]


def _check(violations: Sequence[object], what: str) -> None:
    if violations:
        raise AssertionError(f"{what}: {violations[0]}")


def _line(row: Bar) -> str:
    verdict = {True: "holds", False: "MISSED", None: ""}[row.holds]
    bar = "" if row.bar is None else f"bar {row.bar:g}"
    return f"{row.name:<42} {row.value:>10.3f} {row.unit:<9} {bar:<9} {verdict}".rstrip()


def _note(line: str) -> None:
    print(f"bench-planner: {line}", file=sys.stderr, flush=True)
