"""`almanac bench-planner`, speed: windows, fleet plans, how times grow, the dispatch table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

from planner.cli.bench_figures import Bar, at_most, check, timed

__all__ = ["fleet_plan", "fleet_plans", "growth", "offline", "table_bars", "windows"]


def windows(count: int) -> Iterator[Bar]:
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
            greedy, seconds = timed(greedy_window, window)
            first.append(seconds)
            _, seconds = timed(WindowModel, window, np.array(greedy), -np.inf)
            build.append(seconds)
            plan, seconds = timed(solve_window, window, budget=budget)
            total.append(seconds)
            proven.append(plan.gap)
            if abs(window_cost(window, plan.endpoints) - plan.cost_s) > 1e-6 * plan.cost_s:
                check(("cost",), f"window {seed}")
            if seed < 3:
                longer = Budget(wall_s=2.0, relative_gap=0.0)
                best = solve_window(window, budget=longer)
                off.append(plan.cost_s / min(best.cost_s, plan.cost_s) - 1)
    yield at_most("window_first_plan_longest", 1e3 * max(first), "ms", 50)
    yield at_most("window_total_median", 1e3 * statistics.median(total), "ms", 300)
    yield at_most("window_build_share_of_300ms", statistics.median(build) / 0.3 * 100, "%", 20)
    yield at_most("window_proven_gap_median", 100 * statistics.median(gaps), "%", 3)
    yield at_most("window_proven_gap_median_with_joins", 100 * statistics.median(loose), "%", 3)
    yield Bar(name="window_above_longer_search", value=100 * statistics.fmean(off), unit="%")


def fleet_plans(count: int) -> Iterator[Bar]:
    """Measure the fleet plan: 30 call sites, 16 endpoints, to a gap of 2 %."""
    seconds, gaps, build = [], [], []
    for seed in range(count):
        for load in (0.5, 0.8):
            took, gap, built = fleet_plan(30, 16, seed, load, 5.0)
            seconds.append(took)
            gaps.append(gap)
            build.append(built)
    yield at_most("fleet_plan_longest", max(seconds), "s", 5.0)
    yield at_most("fleet_plan_largest_gap", 100 * max(gaps), "%", 2.0)
    yield Bar(name="fleet_plan_median", value=statistics.median(seconds), unit="s")
    yield at_most("fleet_plan_build_share_of_5s", 100 * statistics.median(build) / 5.0, "%", 20)


def fleet_plan(
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
    result, took = timed(
        solve_plan, workflow, fleet, estimates, arrival_rate_rps=rate, budget=budget
    )
    report = verify_plan(result.plan, workflow, fleet, estimates, result.scenarios)
    check(report.violations, f"fleet plan {seed}")
    built = 0.0
    if sites <= 60:
        stage = Stage(goal=Goal(result.instance))
        _, built = timed(build_model, result.instance, result.timing, stage, 0)
    return took, result.plan.gap, built


def growth(*, quick: bool) -> Iterator[Bar]:
    """Measure how times grow with the question."""
    import numpy as np

    from planner.cli.bench_questions import random_window
    from planner.solve.window import greedy_window

    sizes = ((24, 8), (100, 32)) if quick else ((24, 8), (50, 16), (100, 32), (200, 64))
    for calls, endpoints in sizes:
        window = random_window(calls, endpoints, 5, np.random.default_rng(0))
        _, seconds = timed(greedy_window, window)
        yield Bar(name=f"window_descent_{calls}x{endpoints}", value=seconds, unit="s")
    for calls, endpoints in sizes:
        yield from offline(calls, endpoints, 2.0 if quick else 10.0)
    for sites, endpoints in ((30, 16), (60, 32)) if quick else ((30, 16), (60, 32), (200, 64)):
        took, gap, _ = fleet_plan(sites, endpoints, 0, 0.8, 30.0)
        yield Bar(name=f"fleet_plan_{sites}x{endpoints}", value=took, unit="s")
        yield Bar(name=f"fleet_plan_gap_{sites}x{endpoints}", value=100 * gap, unit="%")


def offline(calls: int, endpoints: int, limit: float) -> Iterator[Bar]:
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
    result, seconds = timed(solve_schedule, question, budget=budget)
    check(verify_schedule(question, result.schedule), f"offline {calls}x{endpoints}")
    yield Bar(name=f"offline_{calls}x{endpoints}", value=seconds, unit="s")
    gap = 100 * result.schedule.gap
    yield Bar(name=f"offline_gap_{calls}x{endpoints}", value=gap, unit="%")


def table_bars(workflows: int) -> Iterator[Bar]:
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
    yield at_most("table_lookup_p50", statistics.median(times) / 1e3, "us", 2.0)
    yield at_most("table_memory_four_buckets", held / 1e6, "MB", 50.0)
