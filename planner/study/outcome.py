"""What came of a study as one document: figures, differences with intervals, and their origin."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planner import __version__
from planner.domain.files import atomic_write
from planner.metrics import spread, standard_error
from planner.report.comparison import Comparison
from planner.report.terminal import align, comparison_text
from planner.study.bars import bars_of, bars_text
from planner.study.clairvoyant import Clairvoyant
from planner.study.figures import Figures, shared_seeds
from planner.study.grid import CODE_SCHEMA, Outcome
from planner.study.measure import GOOD_SCALE, CellResult
from planner.study.settings import Setting
from planner.study.studies import Study

__all__ = ["COMPARED", "METRICS", "STUDY_SCHEMA", "document", "save_document", "study_table"]

STUDY_SCHEMA = "almanac.study/2"
METRICS = (
    "mean_s", "p50_s", "p95_s", "p99_s", "stretch_mean", "stretch_p95", "stretch_p99", "jain",
    "throughput_rps", "goodput_rps", "prefix_hit_ratio", "prefilled_tokens", "refilled_tokens",
    "refilled_share", "belady_ratio", "belady_refills", "kv_usage", "busy_spread",
    "dispatch_p50_us", "dispatch_p99_us",
)  # fmt: skip
COMPARED = ("mean_s", "p95_s", "stretch_p95", "stretch_p99")
"""Metrics compared with the baseline and with the best other policy; less is better for all."""
SCALES = tuple(round(float(scale), 3) for scale in np.geomspace(1.0, 30.0, 41))
"""Multiples of the time alone at which attainment is told."""


def document(
    study: Study,
    outcomes: Sequence[Outcome],
    clairvoyants: Mapping[Setting, Sequence[Clairvoyant]],
    bounds: Mapping[Setting, Mapping[int, float]] | None = None,
) -> dict[str, Any]:
    """Return the JSON document of a study (schema ``almanac.study/2``).

    Parameters
    ----------
    outcomes
        Policy within setting.
    clairvoyants
        Estimates by setting, one per seed; may lack settings.
    bounds
        Means that no policy beats, s, by setting and seed; may lack settings.

    Notes
    -----
    Figures are of all seeds' runs together where they are quantiles of runs, and means over the
    seeds otherwise; ``seeds`` has every seed's own. Contenders have further seeds: differences are
    of all that both sides have, ``pairs`` of them, and figures of those that all policies have.
    """
    figures = Figures(outcomes)
    limits = bounds or {}
    return {
        "schema": STUDY_SCHEMA,
        "study": study.name,
        "question": study.question,
        "config": {
            "policies": list(study.policies),
            "runs": study.runs,
            "seeds": study.seeds,
            "more_seeds": study.more_seeds,
            "tuning_runs": study.tuning_runs,
            "tuning_seeds": study.tuning_seeds,
            "baseline": study.baseline,
            "tuned": study.tuned,
            "good_scale": GOOD_SCALE,
        },
        "code": {"version": __version__, "commit": _commit(), "cell_schema": CODE_SCHEMA},
        "hardware": {
            "machine": platform.machine(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "threats": list(study.threats),
        "bars": [bar.to_json() for bar in bars_of(study, figures, clairvoyants)],
        "settings": [
            {
                "name": setting.name,
                "setting": setting.to_json(),
                "rate_rps": setting.rate_rps,
                "policies": [
                    _policy(one, figures, study.baseline, limits.get(setting, {})) for one in group
                ],
                "clairvoyant": [one.to_json() for one in clairvoyants.get(setting, ())],
            }
            for setting, group in figures.by_setting.items()
        ],
    }


def _policy(
    one: Outcome, figures: Figures, baseline: str, limits: Mapping[int, float]
) -> dict[str, Any]:
    others = figures.others(one)
    group = figures.by_setting[one.setting]
    held = [other for other in group if other.policy == baseline and other is not one]
    return {
        "policy": one.policy,
        "name": one.entry.policy,
        "variant": one.entry.variant,
        "parameters": {k: repr(v) for k, v in one.setup.shown_parameters.items()},
        "metrics": {metric: figures.summary(one, metric) for metric in METRICS},
        "regret": _regret(one, limits),
        "attainment": figures.attainment(one, SCALES),
        "against_baseline": _against(held, one, figures),
        "against_best": _against(others, one, figures),
        "tenants": _tenants(figures.common(one).values()),
        "seeds": {
            str(seed): {metric: result.value(metric) for metric in METRICS}
            for seed, result in one.results.items()
        },
    }


def _regret(one: Outcome, limits: Mapping[int, float]) -> float | None:
    """Return the share by which the mean lies above the one that nobody beats."""
    found = [
        mean_s / limit_s - 1.0
        for seed, limit_s in limits.items()
        if seed in one.results and (mean_s := one.results[seed].all_mean_s) is not None
    ]
    return float(np.mean(found)) if found else None


def _against(others: Sequence[Outcome], one: Outcome, figures: Figures) -> list[dict[str, Any]]:
    """Compare with the best of the others, metric by metric, on the seeds both have."""
    found = []
    for metric in COMPARED:
        rival = figures.least(others, metric)
        if rival is None:
            continue
        difference = figures.difference(rival, one, metric)
        if difference is None:
            continue
        comparison = Comparison(
            metric=metric,
            baseline=rival.policy,
            difference=difference,
            pairs=len(shared_seeds(rival, one)),
        )
        found.append({**comparison.to_json(), "text": comparison_text(comparison)})
    return found


def _tenants(results: Collection[CellResult]) -> dict[str, dict[str, float]]:
    names = sorted({tenant for result in results for tenant in result.tenants})
    means: dict[str, dict[str, float]] = {}
    for name in names:
        rows = [result.tenants[name] for result in results if name in result.tenants]
        means[name] = {
            key: spread([row[key] for row in rows if key in row]).mean
            for key in sorted({key for row in rows for key in row})
        }
    return means


def _commit() -> str | None:
    """Return the commit that this code was checked out from, ``+`` if it was changed since.

    None outside of a checkout, also where some other repository holds the installed package.
    """
    here = Path(__file__)

    def git(*words: str) -> str:
        done = subprocess.run(  # noqa: S603 - fixed words, no shell
            ["git", "-C", str(here.parent), *words],  # noqa: S607 - wherever it is installed
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), None)


def save_document(found: Any, path: Path) -> None:
    """Write a document, or a part of it, as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def study_table(found: Mapping[str, Any]) -> str:
    """Return the document as aligned text, a table per setting, and its bars."""
    tables = [_setting_table(one) for one in found["settings"]]
    return "\n\n".join([*tables, *([bars_text(found["bars"])] if found["bars"] else [])])


def _setting_table(one: Mapping[str, Any]) -> str:
    head = ["policy", "mean s", "P95 s", "P99 s", "Req95", "Req99", "hit %"]
    head += ["mean against best", "P95 against best"]
    rows = [head]
    for policy in one["policies"]:
        metrics = policy["metrics"]
        best = {one["metric"]: one["text"] for one in policy["against_best"]}
        rows.append(
            [
                policy["policy"],
                *(_mean(metrics[m]) for m in ("mean_s", "p95_s", "p99_s")),
                *(_mean(metrics[m]) for m in ("stretch_p95", "stretch_p99")),
                _mean(metrics["prefix_hit_ratio"], 100.0, 1),
                best.get("mean_s", "-"),
                best.get("p95_s", "-"),
            ]
        )
    text = f"{one['name']}  ({one['rate_rps']:.3g} runs/s)\n{align(rows)}"
    return text + _clairvoyance(one["clairvoyant"])


def _clairvoyance(found: Iterable[Mapping[str, float]]) -> str:
    rows = list(found)
    if not rows:
        return ""

    def mean(key: str) -> float:
        return spread([row[key] for row in rows]).mean

    error = standard_error([row["gap"] for row in rows])
    return (
        f"\nclairvoyant, {len(rows)} seeds: marginal_cost {mean('learned_s'):.2f} s, with exact "
        f"lengths {mean('exact_s'):.2f} s, best found {mean('found_s'):.2f} s (gap "
        f"{mean('gap'):.1%}, standard error {error:.1%}), critical path {mean('bound_s'):.2f} s"
    )


def _mean(value: Mapping[str, float] | None, scale: float = 1.0, digits: int = 2) -> str:
    return "-" if value is None else f"{value['mean'] * scale:.{digits}f}"
