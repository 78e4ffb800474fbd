"""What a set of runs amounted to, and how two policies compare, computed from trace records.

Percentiles are linear between order statistics (Hyndman and Fan, 1996, type 7; NumPy's default).
A metric nothing was observed for is None, never zero.

References
----------
Efron, Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: the percentile interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from planner.domain.check import closed_mapping, integer, items, number
from planner.domain.errors import InvalidInput
from planner.domain.trace import CallRecord, RunRecord, TraceRecord

__all__ = [
    "PairedDifference",
    "RunMetrics",
    "Spread",
    "paired_bootstrap",
    "relative_difference",
    "spread",
    "standard_error",
    "summarise",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMetrics:
    """The figures of one set of runs: one policy, one seed.

    Parameters
    ----------
    runs, failed_runs, cancelled_runs
        Runs that ended well, that failed, and that their client gave up.
    mean_s, p50_s, p95_s, p99_s
        Run latency (arrival of the run to its last finish) of the runs that ended well, seconds.
    throughput_rps
        Runs that ended well per second, from the first arrival to the last finish.
    prefix_hit_ratio
        Prompt tokens found in a cache / prompt tokens, over calls whose endpoint reported it.
    prefilled_tokens
        Prompt tokens that had to be computed, over the same calls. The trace holds no prompts, so
        it cannot tell text seen before from new text; between policies on the same runs the
        difference is text computed again.
    dispatch_p50_us, dispatch_p99_us
        Time a decision took, microseconds.
    latencies_s
        Run latencies behind the figures, increasing.
    """

    runs: int
    failed_runs: int = 0
    cancelled_runs: int = 0
    mean_s: float | None = None
    p50_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None
    throughput_rps: float | None = None
    prefix_hit_ratio: float | None = None
    prefilled_tokens: int | None = None
    dispatch_p50_us: float | None = None
    dispatch_p99_us: float | None = None
    latencies_s: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; times are rounded to the microsecond."""
        raw = asdict(self)
        raw["latencies_s"] = [round(value, 6) for value in self.latencies_s]
        return raw

    @classmethod
    def from_json(cls, raw: Any, where: str = "metrics") -> RunMetrics:
        """Rebuild the metrics.

        Raises
        ------
        InvalidInput
            If a field is unknown, missing or not a number.
        """
        values: dict[str, Any] = dict(closed_mapping(raw, where, {f.name for f in fields(cls)}))
        for name, value in values.items():
            place = f"{where}.{name}"
            if name == "latencies_s":
                values[name] = tuple(number(v, place, least=0) for v in items(value, place))
            elif name.endswith("runs") or (name == "prefilled_tokens" and value is not None):
                values[name] = integer(value, place)
            elif value is not None:
                values[name] = number(value, place, least=0)
        if "runs" not in values:
            raise InvalidInput(
                "field 'runs' is missing", where=where, remedy="give the number of runs"
            )
        return cls(**values)


class Spread(NamedTuple):
    """Mean, sample standard deviation (0 for a single value), least and most of some values."""

    mean: float
    sd: float
    least: float
    most: float


class PairedDifference(NamedTuple):
    """Mean relative difference of paired values with an interval; -0.1 means 10 % less."""

    mean: float
    low: float
    high: float


def summarise(records: Iterable[TraceRecord], warmup_s: float = 0.0) -> RunMetrics:
    """Return the metrics of the runs that arrived at ``warmup_s`` (seconds) or later.

    Calls of runs that arrived earlier are left out too; calls without a run record count by the
    instant they became ready.
    """
    runs: list[RunRecord] = []
    calls: list[CallRecord] = []
    for record in records:
        if isinstance(record, RunRecord):
            runs.append(record)
        elif isinstance(record, CallRecord):
            calls.append(record)
    arrival_s = {run.run_id: run.arrival_s for run in runs}
    runs = [run for run in runs if run.arrival_s >= warmup_s]
    calls = [call for call in calls if arrival_s.get(call.run_id, call.ready_s) >= warmup_s]

    ok = [run for run in runs if run.status == "ok"]
    cancelled = sum(run.status == "cancelled" for run in runs)
    latencies = np.sort([run.finish_s - run.arrival_s for run in ok])
    observed_s = max((run.finish_s for run in ok), default=0.0) - min(
        (run.arrival_s for run in runs), default=0.0
    )
    reported = [
        (call.prompt_tokens, call.cached_tokens) for call in calls if call.cached_tokens is not None
    ]
    prompt = sum(tokens for tokens, _ in reported)
    cached = sum(tokens for _, tokens in reported)
    decisions = [call.decision_us for call in calls if call.decision_us is not None]
    return RunMetrics(
        runs=len(ok),
        failed_runs=len(runs) - len(ok) - cancelled,
        cancelled_runs=cancelled,
        mean_s=float(latencies.mean()) if ok else None,
        p50_s=_percentile(latencies, 50),
        p95_s=_percentile(latencies, 95),
        p99_s=_percentile(latencies, 99),
        throughput_rps=len(ok) / observed_s if ok and observed_s > 0 else None,
        prefix_hit_ratio=cached / prompt if prompt else None,
        prefilled_tokens=prompt - cached if reported else None,
        dispatch_p50_us=_percentile(decisions, 50),
        dispatch_p99_us=_percentile(decisions, 99),
        latencies_s=tuple(float(value) for value in latencies),
    )


def _percentile(values: Any, percent: float) -> float | None:
    return float(np.percentile(values, percent)) if len(values) else None


def spread(values: Sequence[float]) -> Spread:
    """Return mean, standard deviation, least and most of at least one value.

    Raises
    ------
    InvalidInput
        If there is no value.
    """
    if not values:
        raise InvalidInput("no value", where="spread", remedy="give at least one")
    array = np.asarray(values, dtype=float)
    sd = float(array.std(ddof=1)) if array.size > 1 else 0.0
    return Spread(float(array.mean()), sd, float(array.min()), float(array.max()))


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of at least one value, 0 for a single one."""
    return spread(values).sd / math.sqrt(len(values))


def relative_difference(baseline: float, value: float) -> float:
    """Return how much ``value`` lies above (+) or below (-) a baseline > 0, relative to it.

    Raises
    ------
    InvalidInput
        If the baseline is not positive.
    """
    if not baseline > 0:
        raise InvalidInput(
            f"{baseline!r} cannot be a baseline", where="baseline", remedy="give a number > 0"
        )
    return value / baseline - 1.0


def paired_bootstrap(
    baseline: Sequence[float],
    other: Sequence[float],
    *,
    seed: int,
    draws: int = 2000,
    level: float = 0.95,
) -> PairedDifference:
    """Return the mean over pairs of ``other / baseline - 1`` with its bootstrap interval.

    Parameters
    ----------
    baseline, other
        One value per seed, in the same order, so that a pair saw the same runs; baseline > 0.
    seed
        Of the resampling.
    draws
        Resamples of the pairs, >= 1.
    level
        Coverage meant, in (0, 1).

    Raises
    ------
    InvalidInput
        If the lengths differ, are zero, or a baseline is not positive.

    Notes
    -----
    Percentile interval; with fewer than about ten pairs it is somewhat too narrow. One pair says
    nothing of its spread: its interval is the whole line.
    """
    if len(baseline) != len(other) or not baseline:
        raise InvalidInput(
            f"{len(baseline)} and {len(other)} values",
            where="paired bootstrap",
            remedy="give as many of one as of the other, at least one",
        )
    differences = np.array(
        [relative_difference(a, b) for a, b in zip(baseline, other, strict=True)], dtype=float
    )
    mean = float(differences.mean())
    if differences.size == 1:
        return PairedDifference(mean, -math.inf, math.inf)
    generator = np.random.default_rng(seed)
    chosen = generator.integers(differences.size, size=(draws, differences.size))
    means = differences[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return PairedDifference(mean, float(low), float(high))
