"""The results table as data: one row per policy, each compared with the best baseline.

A baseline is every policy that is not Almanac's own (whose names begin with ``almanac``). For each
compared metric the best baseline is chosen anew, by its mean over the seeds, so Almanac is held
against the strongest opponent of that metric; the choice is made on the same data, which favours
the baseline. Every policy gets the same treatment: a loss is a row like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from planner.metrics import PairedDifference, Spread, paired_bootstrap, spread
from planner.report.results import PolicyResult, Results

__all__ = [
    "COLUMNS",
    "COMPARED",
    "Column",
    "Comparison",
    "ComparisonRow",
    "ComparisonTable",
    "Verdict",
    "compare",
    "lost_runs",
    "seeds_note",
]

Verdict = Literal["win", "loss", "tie"]
BOOTSTRAP_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One metric of the table: its field in `RunMetrics`, its heading with unit, its format.

    ``scale`` multiplies the value before it is formatted (100 for a ratio shown in per cent).
    """

    metric: str
    heading: str
    digits: int
    scale: float = 1.0


COLUMNS = (
    Column(metric="mean_s", heading="mean s", digits=2),
    Column(metric="p50_s", heading="P50 s", digits=2),
    Column(metric="p95_s", heading="P95 s", digits=2),
    Column(metric="throughput_rps", heading="runs/s", digits=3),
    Column(metric="prefix_hit_ratio", heading="prefix hit %", digits=1, scale=100.0),
    Column(metric="dispatch_p50_us", heading="dispatch us", digits=1),
)
COMPARED = ("mean_s", "p95_s")
"""Metrics compared with the best baseline; less is better for both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A policy against the best baseline of one metric, on the seeds both have.

    ``difference`` is relative: -0.1 means 10 % less time. ``verdict`` is ``win`` (``loss``) if the
    whole interval lies below (above) zero, else ``tie``.
    """

    metric: str
    baseline: str
    difference: PairedDifference
    pairs: int

    @property
    def verdict(self) -> Verdict:
        """What the interval says."""
        if self.difference.high < 0:
            return "win"
        return "loss" if self.difference.low > 0 else "tie"

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; an unbounded interval has null ends."""
        low, high = self.difference.low, self.difference.high
        return {
            "metric": self.metric,
            "baseline": self.baseline,
            "difference": self.difference.mean,
            "low": low if math.isfinite(low) else None,
            "high": high if math.isfinite(high) else None,
            "pairs": self.pairs,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow:
    """One policy.

    ``values`` has an entry per column, None where nothing was observed; ``comparisons`` has one
    per compared metric, None for the best baseline itself and where there is nothing to compare.
    """

    label: str
    policy: str
    seeds: int
    runs: int
    failed_runs: int
    cancelled_runs: int
    values: tuple[Spread | None, ...]
    comparisons: tuple[Comparison | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "label": self.label,
            "policy": self.policy,
            "seeds": self.seeds,
            "runs": self.runs,
            "failed_runs": self.failed_runs,
            "cancelled_runs": self.cancelled_runs,
            "metrics": {
                column.metric: None if value is None else value._asdict()
                for column, value in zip(COLUMNS, self.values, strict=True)
            },
            "comparisons": [one.to_json() for one in self.comparisons if one],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonTable:
    """All rows in the order of the results, and the best baseline per compared metric."""

    rows: tuple[ComparisonRow, ...]
    best: tuple[str | None, ...]

    def to_frame(self) -> Any:
        """Return a row per policy as a pandas data frame: means over seeds, and the differences."""
        import pandas as pd

        rows = []
        for row in self.rows:
            facts: dict[str, Any] = {"policy": row.label}
            for column, value in zip(COLUMNS, row.values, strict=True):
                facts[column.heading] = None if value is None else value.mean * column.scale
            for metric, one in zip(COMPARED, row.comparisons, strict=True):
                mean, low, high = (None,) * 3 if one is None else one.difference
                facts[f"{metric} against best"] = mean
                facts[f"{metric} low"], facts[f"{metric} high"] = low, high
            rows.append(facts)
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return str(self.to_frame().to_html(index=False, float_format=lambda value: f"{value:.3g}"))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "best_baseline": dict(zip(COMPARED, self.best, strict=True)),
            "rows": [row.to_json() for row in self.rows],
        }


def compare(results: Results) -> ComparisonTable:
    """Return the table of some results."""
    best = tuple(_best_baseline(results.policies, metric) for metric in COMPARED)
    rows = []
    for policy in results.policies:
        values = []
        for column in COLUMNS:
            found = list(policy.values(column.metric).values())
            values.append(spread(found) if found else None)
        rows.append(
            ComparisonRow(
                label=policy.label,
                policy=policy.policy,
                seeds=len(policy.seeds),
                runs=sum(one.metrics.runs for one in policy.seeds),
                failed_runs=sum(one.metrics.failed_runs for one in policy.seeds),
                cancelled_runs=sum(one.metrics.cancelled_runs for one in policy.seeds),
                values=tuple(values),
                comparisons=tuple(
                    None if baseline is None else _against(baseline, policy, metric)
                    for baseline, metric in zip(best, COMPARED, strict=True)
                ),
            )
        )
    return ComparisonTable(
        rows=tuple(rows),
        best=tuple(None if baseline is None else baseline.label for baseline in best),
    )


def _best_baseline(policies: Sequence[PolicyResult], metric: str) -> PolicyResult | None:
    candidates = [
        (spread(list(values.values())).mean, policy.label, policy)
        for policy in policies
        if not policy.policy.startswith("almanac") and (values := policy.values(metric))
    ]
    return min(candidates, key=lambda one: one[:2])[2] if candidates else None


def _against(baseline: PolicyResult, policy: PolicyResult, metric: str) -> Comparison | None:
    if policy is baseline:
        return None
    before, after = baseline.values(metric), policy.values(metric)
    shared = [seed for seed in before if seed in after and before[seed] > 0]
    if not shared:
        return None
    difference = paired_bootstrap(
        [before[seed] for seed in shared], [after[seed] for seed in shared], seed=BOOTSTRAP_SEED
    )
    return Comparison(
        metric=metric, baseline=baseline.label, difference=difference, pairs=len(shared)
    )


def lost_runs(row: ComparisonRow) -> str:
    """Return how many runs of a policy did not end well, in words; empty if all did."""
    lost = ((row.failed_runs, "failed"), (row.cancelled_runs, "cancelled by their clients"))
    return ", ".join(f"{count} {how}" for count, how in lost if count)


def seeds_note(table: ComparisonTable) -> str:
    """Return what the number of seeds does to the verdicts, in words; empty from ten seeds on.

    Notes
    -----
    If a policy made no difference, all of ``n`` paired differences would still have the same sign
    with probability ``2 ** (1 - n)``, and every bootstrap interval would then exclude zero.
    """
    seeds = min(row.seeds for row in table.rows)
    if seeds == 1:
        return "One seed gives no interval: no win or loss is claimed."
    if seeds >= 10:
        return ""
    return (
        f"With {seeds} seeds the intervals are somewhat too narrow: chance alone gives all "
        f"differences the same sign {2.0 ** (1 - seeds):.1%} of the time."
    )
