"""Bars that need the engine model: what the online parts make of a simulated fleet.

Kept beside the command because neither `models` nor `planner.dispatch` may know the simulator.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models.calibration import conformal_offsets
from models.evaluate import Bar, bar
from models.importers.own import read_own_traces
from models.snapshot import estimate_table
from planner.dispatch.forecast import Forecaster
from planner.dispatch.online import LatencyBook, OnlineLatency, Scrape, scrape_counts
from planner.dispatch.policies import make_policy
from planner.dispatch.remaining import EndpointLoad, Progress, fleet_service, remaining_s
from planner.domain.calibration import adapted
from planner.domain.estimates import LEVELS, EstimateTable, load_estimates
from planner.domain.files import data_dir
from planner.domain.fleet import Fleet, latency_rows, load_fleet
from planner.domain.latency import LatencyRow
from planner.domain.run import RunSpec
from planner.domain.trace import BranchRecord, CallRecord, RunRecord, ToolRecord, TraceRecord
from planner.domain.workflow import Workflow, load_workflow
from planner.graph.sampling import scenarios
from planner.sim.engine import Engine, EngineConfig, EngineRequest, FirstToken
from planner.sim.kernel import simulate
from planner.sim.steptime import RowStepTime
from planner.sim.workload import poisson_arrivals, sampled_workload

__all__ = [
    "FinishCheck",
    "finish_check",
    "lookup_seconds",
    "scrape_errors",
    "scraped_row",
    "self_bars",
]

PROGRESS = (0.0, 0.25, 0.5)
CALIBRATION_SHARE = 1 / 3
_STATES = (
    (500, 100, 4, 4_000),
    (1500, 200, 16, 20_000),
    (1000, 50, 32, 40_000),
    (300, 300, 1, 500),
)
"""Prompt, output, calls, context at which learned and true rows are compared."""


def scraped_row(
    truth: LatencyRow,
    prior: LatencyRow,
    rate_rps: float,
    seed: int,
    *,
    seconds: float = 150.0,
    every_s: float = 1.0,
    kv_blocks: int = 20_000,
) -> tuple[OnlineLatency, int]:
    """Serve Poisson calls on a simulated engine and learn its row from scrapes of it alone.

    Returns
    -------
    the learner, and the number of scrapes that said something.
    """
    rng = np.random.default_rng(seed)
    engine = Engine(EngineConfig(kv_blocks=kv_blocks), RowStepTime(truth))
    arrivals = poisson_arrivals(rate_rps, int(rate_rps * seconds), rng)
    learner = OnlineLatency(prior)
    before: Scrape | None = None
    place, prompts, used = 0, 0, 0

    def advance(to_s: float) -> None:
        nonlocal prompts
        prompts += sum(isinstance(event, FirstToken) for event in engine.advance(to_s))

    for tick in range(1, int(seconds / every_s) + 1):
        now_s = tick * every_s
        while place < len(arrivals) and arrivals[place] <= now_s:
            at = float(arrivals[place])
            advance(at)
            request = EngineRequest(
                request_id=str(place),
                prompt_tokens=int(rng.integers(200, 2000)),
                output_tokens=int(rng.integers(20, 300)),
                block_hashes=(),
                priority=0,
                arrival_s=at,
            )
            engine.submit(request, at)
            place += 1
        advance(now_s)
        after = Scrape(
            time_s=now_s,
            steps=engine.steps_total,
            generation_tokens=engine.generation_tokens_total,
            prompt_tokens=engine.prompt_tokens_total,
            cached_tokens=engine.prefix_hits_total,
            prompts=prompts,
            running=engine.num_running,
            kv_tokens=engine.kv_usage * kv_blocks * 16,
        )
        found = scrape_counts(before, after) if before else None
        if found is not None:
            learner.observe(*found, now_s)
            used += 1
        before = after
    return learner, used


def scrape_errors(seed: int = 0) -> list[float]:
    """Return relative end-to-end errors of rows learned from scrapes of differing engines.

    Engines start from a wrong prior: twice too slow, another GPU's row, and a roofline.
    """
    rows = latency_rows()
    truth = rows["8b-a100-1-bf16"]
    roofline = LatencyRow.roofline(
        weight_gb=16.0, parameters_b=8.0, kv_kb_per_token=131.0, bandwidth_gb_s=2039.0, tflops=312.0
    )
    errors = []
    for prior in (truth.scaled(2.0), rows["8b-h100-1-bf16"], rows["8b-l4-1-bf16"], roofline):
        for rate in (0.5, 2.0, 6.0):
            learner, _ = scraped_row(truth, prior, rate, seed)
            errors += [
                abs(_end_to_end(learner.row, state) / _end_to_end(truth, state) - 1)
                for state in _STATES
            ]
    return errors


def _end_to_end(row: LatencyRow, state: tuple[int, int, int, int]) -> float:
    prompt, output, calls, kv_tokens = state
    found = LatencyBook([row]).forecast(
        prompt, output, np.array([float(calls)]), np.array([float(kv_tokens)])
    )
    return float(found[2][0])


def lookup_seconds(
    table: EstimateTable, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Return seconds of one frozen look-up and of a forecast for 100 endpoints; best of ten."""
    keys = [(key, site) for key, one in table.workflows.items() for site in one.sites] or [("", "")]
    book = LatencyBook([latency_rows()["8b-a100-1-bf16"]] * 100)
    calls, kv_tokens = np.full(100, 4.0), np.full(100, 4_000.0)

    def best(work: Callable[[], None], times: int) -> float:
        spent = []
        for _ in range(10):
            began = clock()
            for _ in range(times):
                work()
            spent.append((clock() - began) / times)
        return min(spent)

    key, site = keys[-1]
    single = best(lambda: _noop(table.site(key, site).output_tokens.at(0.9)), 2000)
    return single, best(lambda: _noop(book.forecast(500.0, 100.0, calls, kv_tokens)), 200)


def _noop(_: object) -> None:
    """Take a result, so that a measured call is an expression with a use."""


FINISH_RATES = (0.3, 1.0, 2.0)


def self_bars(seed: int = 0, progress: Callable[[str], None] = lambda _: None) -> list[Bar]:
    """Return the bars on look-ups, scrapes and finish times of the demo workflow."""
    progress("learning rows from scrapes of simulated engines")
    errors = 100 * np.array(scrape_errors(seed))
    bars = [
        bar(
            "latency, scrapes alone against the mock engine: median error",
            float(np.median(errors)),
            "% end to end",
            most=15.0,
            note="priors: twice too slow, H100, L4, roofline; 0.5, 2 and 6 calls a second; "
            f"worst state {errors.max():.0f} %",
        )
    ]
    demo = data_dir() / "demo"
    workflow = load_workflow(demo / "research.json")
    truth = load_estimates(demo / "truth.json")
    fleet = load_fleet(data_dir() / "fleets" / "demo.yaml")
    own = read_own_traces(sorted((demo / "traces").glob("*.jsonl")))
    estimates = estimate_table(own, {workflow.content_hash: workflow}, {})
    single, hundred = lookup_seconds(estimates)
    bars += [
        bar("frozen single look-up", 1e6 * single, "us", most=5.0),
        bar("forecast for 100 endpoints", 1e3 * hundred, "ms", most=1.0),
    ]
    for rate_rps in FINISH_RATES:
        progress(f"forecasting finish times at {rate_rps:g} runs a second")
        for check in finish_check(
            workflow, estimates, truth, fleet, rate_rps=rate_rps, runs=240, seed=seed
        ):
            for level in (0.5, 0.9):
                bars.append(
                    bar(
                        f"workflow finish, {rate_rps:g} runs/s, at {100 * check.progress:.0f} % of "
                        f"the run: coverage of {level:g}",
                        check.coverage(level, corrected=True),
                        "1",
                        note=f"simulated runs; {check.coverage(level, corrected=False):.2f} before "
                        "calibration on earlier runs",
                    )
                )
    return bars


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishCheck:
    """Forecasts of remaining time at one point of progress, against what happened.

    Parameters
    ----------
    progress
        Share of the run's time that had passed.
    quantiles, corrected
        Forecast per run at `LEVELS`, s: as sampled; and with the conformal offsets of the runs
        before (`CALIBRATION_SHARE` of all, not counted here), corrected further run by run.
    observed_s
        What was left, s.
    """

    progress: float
    quantiles: tuple[tuple[float, ...], ...]
    corrected: tuple[tuple[float, ...], ...]
    observed_s: tuple[float, ...]

    def coverage(self, level: float, *, corrected: bool) -> float:
        """Return the share of runs that took no longer than the quantile said."""
        column = LEVELS.index(level)
        rows = self.corrected if corrected else self.quantiles
        hits = [value <= row[column] for row, value in zip(rows, self.observed_s, strict=True)]
        return sum(hits) / len(hits)


def finish_check(
    workflow: Workflow,
    estimates: EstimateTable,
    truth: EstimateTable,
    fleet: Fleet,
    *,
    rate_rps: float,
    runs: int,
    seed: int,
    samples: int = 200,
    policy: str = "marginal_cost",
) -> tuple[FinishCheck, ...]:
    """Simulate runs of a workflow and forecast each one's remaining time as it goes.

    Parameters
    ----------
    estimates, truth
        What is forecast with, and what the simulated runs follow.
    rate_rps
        Arrivals of runs a second.
    samples
        Sampled runs behind a forecast.
    """
    key = workflow.content_hash
    arrivals = poisson_arrivals(rate_rps, runs, np.random.default_rng(seed))
    specs = sampled_workload(workflow, truth.workflows[key], arrivals, seed=seed, defaults=truth)
    records = simulate(
        specs, fleet, make_policy(policy), Forecaster(estimates, [workflow]), seed=seed
    )
    sampled = scenarios(workflow, estimates.workflows[key], samples, seed, defaults=estimates)
    history = _History(records, fleet)
    ends = sorted(
        (one for one in records if isinstance(one, RunRecord)), key=lambda one: one.arrival_s
    )
    out = []
    for share in PROGRESS:
        quantiles, observed = [], []
        for run in ends:
            now_s = run.arrival_s + share * (run.finish_s - run.arrival_s)
            quantiles.append(history.forecast(run.run_id, now_s, sampled))
            observed.append(run.finish_s - now_s)
        first = int(CALIBRATION_SHARE * len(ends))
        offsets = conformal_offsets(np.array(quantiles[:first]), np.array(observed[:first]), LEVELS)
        later, left = quantiles[first:], observed[first:]
        out.append(
            FinishCheck(
                progress=share,
                quantiles=tuple(later),
                corrected=tuple(map(tuple, adapted(later, left, LEVELS, offsets.tolist()))),
                observed_s=tuple(left),
            )
        )
    return tuple(out)


class _History:
    """What was known of each run and endpoint at any instant."""

    def __init__(self, records: Sequence[TraceRecord], fleet: Fleet) -> None:
        self.fleet = fleet
        self.calls = [one for one in records if isinstance(one, CallRecord)]
        self.of_run: defaultdict[str, list[CallRecord | ToolRecord]] = defaultdict(list)
        self.branches: defaultdict[str, list[BranchRecord]] = defaultdict(list)
        for one in records:
            if isinstance(one, (CallRecord, ToolRecord)):
                self.of_run[one.run_id].append(one)
            elif isinstance(one, BranchRecord):
                self.branches[one.run_id].append(one)
        prompts = sum(one.prompt_tokens for one in self.calls)
        cached = sum(one.cached_tokens or 0 for one in self.calls)
        self.cached_share = cached / prompts if prompts else 0.0

    def forecast(self, run_id: str, now_s: float, sampled: Sequence[RunSpec]) -> tuple[float, ...]:
        done: Counter[str] = Counter()
        running = {}
        for one in self.of_run[run_id]:
            start = one.ready_s if isinstance(one, CallRecord) else one.start_s
            finish = one.finish_s if one.finish_s is not None else np.inf
            if finish <= now_s:
                done[one.node] += 1
            elif start <= now_s:
                running[one.node] = now_s - start
        outcomes: defaultdict[str, list[str]] = defaultdict(list)
        for branch in sorted(self.branches[run_id], key=lambda one: one.time_s):
            if branch.time_s <= now_s:
                outcomes[branch.branch].append(branch.outcome)
        service = fleet_service(self._loads(now_s), self.cached_share)
        progress = Progress(done=done, running=running, outcomes=outcomes)  # type: ignore[arg-type]
        return remaining_s(sampled, service, progress).values

    def _loads(self, now_s: float) -> list[EndpointLoad]:
        flying: defaultdict[str, list[int]] = defaultdict(list)
        for one in self.calls:
            if one.sent_s <= now_s < (one.finish_s or 0.0):
                flying[one.endpoint].append(one.prompt_tokens)
        return [
            EndpointLoad(
                row=endpoint.latency,
                calls=len(flying[endpoint.id]),
                kv_tokens=sum(flying[endpoint.id]),
                slots=endpoint.max_num_seqs,
            )
            for endpoint in self.fleet.endpoints
        ]
