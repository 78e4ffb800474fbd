"""What came of a study as one document: figures, differences with intervals, and their origin."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner import __version__
from planner.domain.files import atomic_write, data_dir
from planner.metrics import paired_bootstrap, spread
from planner.report.comparison import BOOTSTRAP_SEED, Comparison
from planner.report.terminal import align, comparison_text
from planner.study.clairvoyant import Clairvoyant
from planner.study.grid import CODE_SCHEMA, Outcome
from planner.study.settings import Setting
from planner.study.studies import Study

__all__ = ["COMPARED", "METRICS", "STUDY_SCHEMA", "document", "save_document", "study_table"]

STUDY_SCHEMA = "almanac.study/1"
METRICS = (
    "mean_s", "p50_s", "p95_s", "p99_s", "stretch_mean", "stretch_p95", "stretch_p99", "jain",
    "throughput_rps", "prefix_hit_ratio", "prefilled_tokens", "refilled_tokens",
    "dispatch_p50_us", "dispatch_p99_us",
)  # fmt: skip
COMPARED = ("mean_s", "p95_s", "stretch_p95", "stretch_p99")
"""Metrics compared with the baseline and with the best other policy; less is better for all."""


def document(
    study: Study,
    outcomes: Sequence[Outcome],
    clairvoyants: Mapping[Setting, Sequence[Clairvoyant]],
) -> dict[str, Any]:
    """Return the JSON document of a study (schema ``almanac.study/1``).

    Parameters
    ----------
    outcomes
        Policy within setting.
    clairvoyants
        Estimates by setting, one per seed; may lack settings.
    """
    by_setting: dict[Setting, list[Outcome]] = {}
    for one in outcomes:
        by_setting.setdefault(one.setting, []).append(one)
    return {
        "schema": STUDY_SCHEMA,
        "study": study.name,
        "question": study.question,
        "config": {
            "policies": list(study.policies),
            "runs": study.runs,
            "seeds": study.seeds,
            "tuning_runs": study.tuning_runs,
            "tuning_seeds": study.tuning_seeds,
            "baseline": study.baseline,
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
        "settings": [
            {
                "name": setting.name,
                "setting": setting.to_json(),
                "rate_rps": setting.rate_rps,
                "policies": [_policy(one, group, study.baseline) for one in group],
                "clairvoyant": [one.to_json() for one in clairvoyants.get(setting, ())],
            }
            for setting, group in by_setting.items()
        ],
    }


def _policy(one: Outcome, group: Sequence[Outcome], baseline: str) -> dict[str, Any]:
    others = [other for other in group if other is not one]
    held = next((other for other in others if other.policy == baseline), None)
    return {
        "policy": one.policy,
        "parameters": {k: repr(v) for k, v in one.setup.shown_parameters.items()},
        "metrics": {
            metric: spread(found)._asdict() if (found := list(_values(one, metric).values()))
            else None
            for metric in METRICS
        },
        "against_baseline": _against([held] if held else [], one),
        "against_best": _against(others, one),
        "tenants": _tenants(one),
        "seeds": {
            str(seed): {metric: result.value(metric) for metric in METRICS}
            for seed, result in one.results.items()
        },
    }  # fmt: skip


def _values(one: Outcome, metric: str) -> dict[int, float]:
    found = {seed: result.value(metric) for seed, result in one.results.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def _against(others: Sequence[Outcome], one: Outcome) -> list[dict[str, Any]]:
    """Compare with the best of the others, metric by metric, on the seeds both have."""
    found = []
    for metric in COMPARED:
        mine = _values(one, metric)
        rivals = [(spread(list(v.values())).mean, o.policy, v) for o in others
                  if (v := _values(o, metric))]  # fmt: skip
        if not rivals or not mine:
            continue
        _, name, theirs = min(rivals, key=lambda rival: rival[:2])
        shared = [seed for seed in mine if theirs.get(seed, 0.0) > 0]
        if not shared:
            continue
        difference = paired_bootstrap(
            [theirs[seed] for seed in shared], [mine[seed] for seed in shared], seed=BOOTSTRAP_SEED
        )
        comparison = Comparison(
            metric=metric, baseline=name, difference=difference, pairs=len(shared)
        )
        found.append({**comparison.to_json(), "text": comparison_text(comparison)})
    return found


def _tenants(one: Outcome) -> dict[str, dict[str, float]]:
    names = sorted({tenant for result in one.results.values() for tenant in result.tenants})
    means: dict[str, dict[str, float]] = {}
    for name in names:
        rows = [result.tenants[name] for result in one.results.values() if name in result.tenants]
        means[name] = {
            key: spread([row[key] for row in rows if key in row]).mean
            for key in sorted({key for row in rows for key in row})
        }
    return means


def _commit() -> str | None:
    """Return the commit of a checkout, ``+`` if it was changed since; None outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(  # noqa: S603 - fixed words, no shell
            ["git", "-C", str(data_dir().parent), *words],  # noqa: S607 - wherever it is installed
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    try:
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


def save_document(found: Mapping[str, Any], path: Path) -> None:
    """Write the document as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def study_table(found: Mapping[str, Any]) -> str:
    """Return the document as aligned text, a table per setting."""
    return "\n\n".join(_setting_table(one) for one in found["settings"])


def _setting_table(one: Mapping[str, Any]) -> str:
    head = ["policy", "mean s", "P95 s", "P99 s", "Req95", "Req99", "hit %", "mean against best"]
    rows = [head]
    for policy in one["policies"]:
        metrics = policy["metrics"]
        best = next((x["text"] for x in policy["against_best"] if x["metric"] == "mean_s"), "-")
        rows.append(
            [
                policy["policy"],
                *(_mean(metrics[m]) for m in ("mean_s", "p95_s", "p99_s")),
                *(_mean(metrics[m]) for m in ("stretch_p95", "stretch_p99")),
                _mean(metrics["prefix_hit_ratio"], 100.0, 1),
                best,
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

    return (
        f"\nclairvoyant, {len(rows)} seeds: marginal_cost {mean('learned_s'):.2f} s, with exact "
        f"lengths {mean('exact_s'):.2f} s, best found {mean('found_s'):.2f} s (gap "
        f"{mean('gap'):.1%}), critical path {mean('bound_s'):.2f} s"
    )


def _mean(value: Mapping[str, float] | None, scale: float = 1.0, digits: int = 2) -> str:
    return "-" if value is None else f"{value['mean'] * scale:.{digits}f}"
