"""What a study reports of one cell: run metrics, stretch, goodput, fairness, caches, KV in use."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from planner.dispatch.policies import make_policy
from planner.domain.blocks import BLOCK_TOKENS
from planner.domain.fleet import Fleet
from planner.domain.ids import EndpointId
from planner.domain.run import RunSpec
from planner.domain.trace import CallRecord, RunRecord, TraceRecord
from planner.metrics import RunMetrics, summarise
from planner.sim.belady import cost_ratios
from planner.sim.experiment import World, mean_latency_s
from planner.sim.kernel import simulate

__all__ = [
    "GOOD_SCALE",
    "CellResult",
    "Texts",
    "endpoint_use",
    "jain_index",
    "measure",
    "refilled_tokens",
    "standalone_s",
    "texts_of",
]

Texts: TypeAlias = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Texts of calls as shared parts, see `texts_of`."""

WARM_UP = 0.15
"""Share of the runs, the first to arrive, that is simulated and not counted: the fleet is empty
when they come, and no text is cached."""
GOOD_SCALE = 5.0
"""A run without a deadline is good if it takes no longer than this many times its time alone."""
_IDLE_S = 10_000.0
"""Time between two runs on an idle fleet: longer than any run lasts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """One policy on the runs of one seed, without the warm-up.

    Parameters
    ----------
    metrics
        Run metrics; ``metrics.prefilled_tokens`` counts new and refilled text.
    stretch_mean, stretch_p95, stretch_p99
        Run latency over the run's latency alone on the idle fleet (``Req95``, ``Req99``).
    jain
        Jain's index of the stretches, 1 if all runs are slowed alike.
    refilled_tokens
        Prompt tokens computed anew where they had been before; see `refilled_tokens`.
    goodput_rps
        Runs per second that kept their deadline, or `GOOD_SCALE` if they had none.
    kv_usage, busy_spread
        See `endpoint_use`; warm-up included.
    belady_ratio, belady_refills
        Blocks computed, and computed anew, over those that Belady's rule would; see
        `planner.sim.belady`. None where it was not asked for.
    all_mean_s
        Mean latency of all runs, warm-up included: what bounds of whole workloads bound.
    stretches
        Of the runs behind the figures, increasing.
    tenants
        By tenant: runs, mean_s, stretch_p95, stretch_p99, and the share of runs within their
        deadline.
    """

    metrics: RunMetrics
    stretch_mean: float | None = None
    stretch_p95: float | None = None
    stretch_p99: float | None = None
    jain: float | None = None
    refilled_tokens: int = 0
    goodput_rps: float | None = None
    kv_usage: float | None = None
    busy_spread: float | None = None
    belady_ratio: float | None = None
    belady_refills: float | None = None
    all_mean_s: float | None = None
    stretches: tuple[float, ...] = ()
    tenants: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def refilled_share(self) -> float | None:
        """Share of the prefilled tokens that had been computed there before."""
        done = self.metrics.prefilled_tokens
        return self.refilled_tokens / done if done else None

    def value(self, metric: str) -> float | None:
        """Return a figure by name: of the cell, its run metrics, or ``tenants.NAME.FIGURE``."""
        if metric.startswith("tenants."):
            _, tenant, figure = metric.split(".")
            return self.tenants.get(tenant, {}).get(figure)
        holder = self.metrics if metric in RunMetrics.__dataclass_fields__ else self
        found = getattr(holder, metric)
        return None if found is None else float(found)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        stretches = [round(value, 4) for value in self.stretches]
        return {**asdict(self), "metrics": self.metrics.to_json(), "stretches": stretches}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> CellResult:
        """Rebuild a result, or raise `InvalidInput`."""
        metrics = RunMetrics.from_json(raw["metrics"], where)
        return cls(**{**raw, "metrics": metrics, "stretches": tuple(raw["stretches"])})


def measure(
    records: Sequence[TraceRecord],
    runs: Sequence[RunSpec],
    alone_s: Sequence[float],
    fleet: Fleet,
    *,
    belady: bool = False,
    texts: Texts | None = None,
) -> CellResult:
    """Return the figures of a cell.

    Parameters
    ----------
    records
        Of the whole cell, warm-up included.
    runs
        Its runs, in order of arrival.
    alone_s
        Latency of each run alone on the idle fleet, s, in the same order.
    belady
        Whether to replay the cache under Belady's rule, which takes more than half as long as the
        simulation.
    texts
        `texts_of` the runs, for who knows it from another cell of the same runs.
    """
    skipped = {run.run_id for run in runs[: int(WARM_UP * len(runs))]}
    counted = [one for one in records if one.run_id not in skipped]
    alone = dict(zip((run.run_id for run in runs), alone_s, strict=True))
    ended = [one for one in counted if isinstance(one, RunRecord) and one.status == "ok"]
    stretches = [(one.finish_s - one.arrival_s) / max(alone[one.run_id], 1e-3) for one in ended]  # type: ignore[index]
    known = bool(stretches)
    metrics = summarise(counted)
    good = [_good(one, stretch) for one, stretch in zip(ended, stretches, strict=True)]
    kv_usage, busy_spread = endpoint_use(records, fleet)
    ratios = cost_ratios(runs, records, fleet) if belady else None
    return CellResult(
        metrics=metrics,
        stretch_mean=float(np.mean(stretches)) if known else None,
        stretch_p95=float(np.percentile(stretches, 95)) if known else None,
        stretch_p99=float(np.percentile(stretches, 99)) if known else None,
        jain=jain_index(stretches) if known else None,
        refilled_tokens=refilled_tokens(records, texts or texts_of(runs), skipped),
        goodput_rps=float(np.mean(good)) * (metrics.throughput_rps or 0.0) if known else None,
        kv_usage=kv_usage,
        busy_spread=busy_spread,
        belady_ratio=ratios.computed if ratios else None,
        belady_refills=ratios.refilled if ratios else None,
        all_mean_s=mean_latency_s(records) if known else None,
        stretches=tuple(sorted(stretches)),
        tenants=_tenants(ended, stretches),
    )


def _good(run: RunRecord, stretch: float) -> bool:
    if run.deadline_s is None:
        return stretch <= GOOD_SCALE
    return run.finish_s - run.arrival_s <= run.deadline_s


def endpoint_use(records: Sequence[TraceRecord], fleet: Fleet) -> tuple[float | None, float | None]:
    """Return the mean share of KV in use, and how far apart the endpoints' busy shares are.

    Both from the first arrival to the last finish, over endpoints that answer (a prefill endpoint
    holds its KV only until it has moved on). A call holds its prompt and half its answer from its
    first token to its end; text that only a cache holds does not count. The busy share of an
    endpoint is the mean share of its slots taken; the spread is the largest less the least.
    """
    held = {one.id: 0.0 for one in fleet.endpoints if one.role != "prefill"}
    busy = dict(held)
    first_s, last_s = float("inf"), 0.0
    for one in records:
        if isinstance(one, RunRecord):
            first_s, last_s = min(first_s, one.arrival_s), max(last_s, one.finish_s)
        if not isinstance(one, CallRecord) or one.status != "ok" or one.finish_s is None:
            continue
        since_s = one.sent_s if one.first_token_s is None else one.first_token_s
        name = EndpointId(one.endpoint)
        held[name] += (one.prompt_tokens + one.output_tokens / 2) * (one.finish_s - since_s)
        busy[name] += one.finish_s - one.sent_s
    if not last_s > first_s:
        return None, None
    length_s = last_s - first_s
    answering = [one for one in fleet.endpoints if one.id in held]
    usage = [held[one.id] / (one.kv_tokens * length_s) for one in answering]
    shares = [busy[one.id] / (one.max_num_seqs * length_s) for one in answering]
    return float(np.mean(usage)), max(shares) - min(shares)


def _tenants(ended: Sequence[RunRecord], stretches: Sequence[float]) -> dict[str, dict[str, float]]:
    grouped: dict[str, list[tuple[RunRecord, float]]] = {}
    for one, stretch in zip(ended, stretches, strict=True):
        grouped.setdefault(one.tenant, []).append((one, stretch))
    found = {}
    for tenant, pairs in sorted(grouped.items()):
        latencies = [one.finish_s - one.arrival_s for one, _ in pairs]
        met = [
            latency <= one.deadline_s
            for (one, _), latency in zip(pairs, latencies, strict=True)
            if one.deadline_s is not None
        ]
        found[tenant] = {
            "runs": float(len(pairs)),
            "mean_s": float(np.mean(latencies)),
            "stretch_p95": float(np.percentile([stretch for _, stretch in pairs], 95)),
            "stretch_p99": float(np.percentile([stretch for _, stretch in pairs], 99)),
            **({"within_deadline": float(np.mean(met))} if met else {}),
        }
    return found


def standalone_s(runs: Sequence[RunSpec], world: World) -> list[float]:
    """Return the latency of each run alone on the fleet, seconds, in the order of the runs.

    The same simulator, least expected finish, no noise; static prefixes are warm as they would be
    in service. Joins still share the fleet with their own branches.
    """
    apart = [_arriving(run, number * _IDLE_S) for number, run in enumerate(runs)]
    records = simulate(
        apart,
        world.fleet,
        make_policy("least_expected_finish"),
        world.forecaster,
        dispatch_s=world.dispatch_s,
    )
    latency = {
        one.run_id: one.finish_s - one.arrival_s for one in records if isinstance(one, RunRecord)
    }
    return [latency[run.run_id] for run in runs]


def _arriving(run: RunSpec, arrival_s: float) -> RunSpec:
    return RunSpec(
        run_id=run.run_id,
        workflow=run.workflow,
        workflow_hash=run.workflow_hash,
        arrival_s=arrival_s,
        tasks=run.tasks,
    )


def texts_of(runs: Iterable[RunSpec]) -> Texts:
    """Return what each call reads and writes, by its name, as parts that others share or do not.

    For each part its last block, and the number of blocks of the text up to there, rising. A text
    of hundreds of blocks has a handful of parts, and who asks how much of it was seen before need
    not look at each block.
    """
    chains = {
        f"{run.run_id}/{task.index}": task.chain
        for run in runs
        for task in run.tasks
        if task.kind == "llm"
    }
    ends: dict[int, int] = {}
    ordered = sorted(set(chains.values()))
    for chain in ordered:
        if chain:
            ends[chain[-1]] = len(chain)
    # In this order any two texts part where two neighbours between them do.
    for one, other in pairwise(ordered):
        same = bisect_left(
            range(min(len(one), len(other))), True, key=lambda at: one[at] != other[at]
        )
        if same:
            ends[one[same - 1]] = same
    found: Texts = {}
    for name, chain in chains.items():
        blocks = tuple(filter(ends.__contains__, chain))
        found[name] = blocks, tuple(ends[block] for block in blocks)
    return found


def refilled_tokens(
    records: Iterable[TraceRecord], texts: Texts, skipped: Iterable[str] = ()
) -> int:
    """Return the prompt tokens that an endpoint computed although it had computed them before.

    A block counts if the endpoint once held its whole prefix, from a prompt or from an answer,
    and no longer did: what a larger KV cache or another eviction order would have saved there.
    Calls of ``skipped`` runs are not counted, their text is. ``texts`` is what `texts_of` says of
    the runs.
    """
    left_out = set(skipped)
    calls = [one for one in records if isinstance(one, CallRecord) and one.status == "ok"]
    calls.sort(key=lambda call: call.finish_s or 0.0)
    held: dict[str, set[int]] = {}
    refilled = 0
    for call in calls:
        blocks, ends = texts[call.call_id.partition("#")[0]]
        seen = held.setdefault(call.prefill_endpoint or call.endpoint, set())
        parts = 0
        while parts < len(blocks) and blocks[parts] in seen:
            parts += 1
        known = ends[parts - 1] if parts else 0
        if call.run_id not in left_out:
            # The last prompt token is always computed.
            before = min(known, (call.prompt_tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
            refilled += max(0, before - (call.cached_tokens or 0))
        seen.update(blocks[parts:])
    return refilled


def jain_index(values: Sequence[float]) -> float:
    """Return Jain's fairness index of non-negative values, from 1/n to 1 (all alike).

    References
    ----------
    Jain, Chiu, Hawe, A quantitative measure of fairness, DEC TR-301, 1984.
    """
    array = np.asarray(values, dtype=float)
    return float(array.sum() ** 2 / (array.size * (array**2).sum()))
