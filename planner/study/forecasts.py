"""Forecasts of stated quality; every policy of a setting gets the same.

========== ==============================================================================
oracle     the truth's own distributions by call site, tool and branch
learned    trained on traces of other seeds, simulated under round robin at moderate load
noise30    learned, each mean off by a lognormal factor of sigma 0.3
type_mean  one answer length, one prompt and one tool delay for everything of a model
wrong      learned, with the answer lengths of the call sites dealt out anew
========== ==============================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.domain.errors import InvalidInput
from planner.domain.estimates import (
    EstimateTable,
    Quantiles,
    SiteEstimate,
    WorkflowEstimate,
    load_estimates,
    save_estimates,
)
from planner.domain.fleet import Fleet
from planner.domain.trace import save_trace
from planner.domain.workflow import save_workflow
from planner.sim.kernel import simulate
from planner.sim.workload import poisson_arrivals
from planner.study.lengths import plain, pooled
from planner.study.loads import capacity_rps
from planner.study.mixes import Mix

__all__ = ["FORECASTS", "estimates_of", "oracle"]

FORECASTS = ("oracle", "learned", "noise30", "type_mean", "wrong")
TRAINING_SEED = 5000
"""Seeds from here on train; tuning and evaluation use smaller ones."""
_TRAINING_LOAD = 0.3
_TRAINING_TRACES = 3
_TRAINING_RUNS = 250
_NOISE_SIGMA = 0.3


def estimates_of(quality: str, mix: Mix, fleet: Fleet, folder: Path | None = None) -> EstimateTable:
    """Return the forecasts that all policies get.

    Parameters
    ----------
    quality
        One of `FORECASTS`.
    folder
        Where learned tables are kept; None learns them again in each process.

    Raises
    ------
    InvalidInput
        If the quality is unknown.
    """
    if quality == "oracle":
        return oracle(mix)
    if quality not in FORECASTS:
        raise InvalidInput(
            f"{quality!r} is unknown", where="forecasts", remedy=f"use {', '.join(FORECASTS)}"
        )
    table = _learned(mix, fleet, folder)
    if quality == "noise30":
        return _noisy(table)
    if quality == "type_mean":
        return _pooled(table)
    if quality == "wrong":
        return _dealt(table)
    return table


def oracle(mix: Mix) -> EstimateTable:
    """Return the truth's distributions as forecasts."""

    def site(one: SiteEstimate) -> SiteEstimate:
        return SiteEstimate(
            output_tokens=plain(one.output_tokens),
            prompt_tokens=plain(one.prompt_tokens),
            shared_prefix_tokens=one.shared_prefix_tokens,
            growth_tokens=None if one.growth_tokens is None else plain(one.growth_tokens),
        )

    return EstimateTable(
        workflows={
            template.workflow.content_hash: WorkflowEstimate(
                name=template.workflow.name,
                sites={name: site(one) for name, one in template.truth.sites.items()},
                tools={name: plain(one) for name, one in template.truth.tools.items()},
                branches=template.truth.branches,
            )
            for template in mix.templates
        },
        version=f"oracle-{mix.fingerprint}",
    )


def _learned(mix: Mix, fleet: Fleet, folder: Path | None) -> EstimateTable:
    name = f"{mix.name}-{fleet.name}-{mix.fingerprint[:6]}{fleet.content_hash()[:6]}.json"
    file = None if folder is None else folder / name
    if file is not None and file.exists():
        return load_estimates(file)
    from models.training import train  # scikit-learn takes a second to load

    with _scratch() as scratch:
        for number in range(_TRAINING_TRACES):
            seed = TRAINING_SEED + number
            rate = _TRAINING_LOAD * capacity_rps(fleet, mix)
            times = poisson_arrivals(rate, _TRAINING_RUNS, np.random.default_rng([seed, 0]))
            records = simulate(
                mix.runs(times, seed=seed),
                fleet,
                make_policy("round_robin"),
                Forecaster(EstimateTable()),
                seed=seed,
                noise_cv=0.02,
            )
            save_trace(
                records, scratch / "traces" / f"{seed}.jsonl", policy="round_robin", seed=seed
            )
        for workflow in mix.workflows:
            save_workflow(workflow, scratch / "workflows" / f"{workflow.name}.json")
        report = train(scratch / "traces", scratch / "out", workflows=scratch / "workflows")
    assert report.table is not None  # noqa: S101 - the traces are our own
    if file is not None:
        save_estimates(report.table, file)
    return report.table


@contextmanager
def _scratch() -> Iterator[Path]:
    with TemporaryDirectory(prefix="almanac-study-") as name:
        path = Path(name)
        for part in ("traces", "workflows", "out"):
            (path / part).mkdir()
        yield path


def _scaled(quantiles: Quantiles, factor: float) -> Quantiles:
    return replace(
        quantiles,
        values=tuple(value * factor for value in quantiles.values),
        mean=quantiles.mean * factor,
    )


def _noisy(table: EstimateTable) -> EstimateTable:
    rng = np.random.default_rng(0)

    def off(quantiles: Quantiles) -> Quantiles:
        return _scaled(quantiles, float(rng.lognormal(-(_NOISE_SIGMA**2) / 2, _NOISE_SIGMA)))

    workflows = {}
    for key, one in sorted(table.workflows.items()):
        workflows[key] = replace(
            one,
            sites={
                name: replace(site, output_tokens=off(site.output_tokens))
                for name, site in sorted(one.sites.items())
            },
            tools={name: off(delay) for name, delay in sorted(one.tools.items())},
            remaining_s={
                name: seconds * float(rng.lognormal(-(_NOISE_SIGMA**2) / 2, _NOISE_SIGMA))
                for name, seconds in sorted(one.remaining_s.items())
            },
        )
    return replace(table, workflows=workflows, version=f"{table.version}-noise30")


def _pooled(table: EstimateTable) -> EstimateTable:
    sites = [site for one in table.workflows.values() for site in one.sites.values()]
    delays = [delay for one in table.workflows.values() for delay in one.tools.values()]
    lengths = pooled([site.output_tokens for site in sites])
    tool = pooled(delays) if delays else None
    workflows = {
        key: replace(
            one,
            sites={name: replace(site, output_tokens=lengths) for name, site in one.sites.items()},
            tools={name: tool or delay for name, delay in one.tools.items()},
            remaining_s={},
        )
        for key, one in table.workflows.items()
    }
    return replace(table, workflows=workflows, version=f"{table.version}-type_mean")


def _dealt(table: EstimateTable) -> EstimateTable:
    places = [
        (key, name) for key, one in sorted(table.workflows.items()) for name in sorted(one.sites)
    ]
    # The longest goes where the shortest was, and so on: as wrong as a permutation can be.
    ranked = sorted(places, key=lambda at: _output(table.workflows, at).mean)
    given = dict(zip(ranked, reversed(ranked), strict=True))
    workflows = {
        key: replace(
            one,
            sites={
                name: replace(site, output_tokens=_output(table.workflows, given[key, name]))
                for name, site in one.sites.items()
            },
        )
        for key, one in table.workflows.items()
    }
    return replace(table, workflows=workflows, version=f"{table.version}-wrong")


def _output(workflows: Mapping[str, WorkflowEstimate], at: tuple[str, str]) -> Quantiles:
    return workflows[at[0]].sites[at[1]].output_tokens
