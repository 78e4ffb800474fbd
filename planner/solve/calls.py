"""Calls of sampled runs as arrays of tokens, and how long each takes where.

Service times, extras for what is not cached, and gaps follow `planner.domain.plan`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planner.domain.fleet import Endpoint
from planner.domain.latency import LatencyRow
from planner.domain.plan import TRANSFER_SETUP_S
from planner.domain.run import RunSpec
from planner.graph.analysis import finish_times
from planner.solve.arrays import Bools, Floats, Ints

__all__ = ["Calls", "collect_calls", "extra_s", "pair_s", "session_gaps", "transfer_s", "whole_s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """All calls of the scenarios; arrays of one length, in order of the tasks.

    Parameters
    ----------
    task, site
        Position among all tasks; call site.
    uncached, cached, output
        Tokens.
    session
        Whether the cached tokens are of an earlier call of the run, beyond the static prefix.
    weight
        Calls per run of the mix that one of these stands for.
    """

    task: Ints
    site: Ints
    uncached: Floats
    cached: Floats
    output: Floats
    session: Bools
    weight: Floats

    @property
    def mean_output(self) -> float:
        """Mean answer length, tokens."""
        return float(np.average(self.output, weights=self.weight))

    @property
    def context(self) -> float:
        """Context of a call found decoding: mean weighted by output length, tokens; 0 for none."""
        if not self.task.size:
            return 0.0
        held = self.cached + self.uncached + self.output / 2
        return float(np.average(held, weights=self.weight * self.output))


def collect_calls(
    samples: Sequence[Sequence[RunSpec]],
    index: Sequence[Mapping[str, int]],
    frequency: Sequence[float],
) -> Calls:
    """Return the calls of all samples, one sample per workflow.

    Parameters
    ----------
    samples
        Scenarios by workflow.
    index
        Call site -> index, by workflow.
    frequency
        Share of each workflow in the arrivals; they sum to one.
    """
    rows: list[tuple[int, int, int, int, int, int]] = []
    weights: list[float] = []
    position = 0
    for runs, sites, share in zip(samples, index, frequency, strict=True):
        for run in runs:
            known: dict[str, set[int]] = {}
            static: dict[str, int] = {}
            for task in run.tasks:
                if task.site is not None:
                    # What the first visit shares with nothing earlier is its static prefix, if
                    # any: the sampler puts it in a segment of its own before the fresh one.
                    first = {task.prompt[0].key} - {task.prompt[-1].key}
                    warm = known.setdefault(task.site, first)
                    static.setdefault(task.site, task.prompt[0].tokens if first else 0)
                    cached = 0
                    for segment in task.prompt[:-1]:
                        if segment.key not in warm:
                            break
                        cached += segment.tokens
                    warm.update(segment.key for segment in task.prompt)
                    warm.add(task.output_key)
                    fresh, session = task.prompt_tokens - cached, cached > static[task.site]
                    rows.append(
                        (position, sites[task.site], fresh, cached, task.output_tokens, session)
                    )
                    weights.append(share / len(runs))
                position += 1
    table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    return Calls(
        task=table[:, 0],
        site=table[:, 1],
        uncached=table[:, 2].astype(float),
        cached=table[:, 3].astype(float),
        output=table[:, 4].astype(float),
        session=table[:, 5] > 0,
        weight=np.array(weights),
    )


def _prefill_s(row: LatencyRow, tokens: Floats, depth: Floats) -> Floats:
    """Return `LatencyRow.prefill_marginal_s` by element."""
    work = row.prefill_us_per_token * 1e-6 * tokens
    work = work + row.prefill_ns_per_token_sq * 1e-9 * tokens * (tokens + 2.0 * depth)
    return np.asarray(row.scale * work)


def whole_s(row: LatencyRow, level: int, calls: Calls) -> Floats:
    """Return the service time of each call on an endpoint that serves it whole, seconds."""
    if not calls.task.size:
        return np.zeros(0)
    stall = _prefill_s(row, calls.uncached, calls.cached)
    token_s = row.decode_step_s(level, level * calls.context)
    token_s += (level - 1) * float(np.average(stall, weights=calls.weight)) / calls.mean_output
    return row.prefill_s(0.0) + stall + calls.output * token_s


def extra_s(row: LatencyRow, calls: Calls) -> Floats:
    """Return what each call takes longer if its cached tokens are gone, seconds."""
    return _prefill_s(row, calls.cached, np.zeros(calls.cached.shape))


def pair_s(prefill: LatencyRow, decode: LatencyRow, level: int, calls: Calls) -> tuple[Floats, ...]:
    """Return the prefill and the decode time of each call on a pair, seconds."""
    if not calls.task.size:
        return np.zeros(0), np.zeros(0)
    first = prefill.prefill_s(0.0) + _prefill_s(prefill, calls.uncached, calls.cached)
    return first, calls.output * decode.decode_step_s(level, level * calls.context)


def transfer_s(prefill: Endpoint, decode: Endpoint, calls: Calls) -> Floats:
    """Return how long each prompt's KV is under way between two endpoints, seconds."""
    link = min(prefill.link_gb_s, decode.link_gb_s) * 1e9
    size = (calls.uncached + calls.cached) * (prefill.kv_bytes_per_token or 0)
    return np.asarray(TRANSFER_SETUP_S + size / link)


def session_gaps(
    samples: Sequence[Sequence[RunSpec]], index: Sequence[Mapping[str, int]], idle_s: Floats
) -> Floats:
    """Return the mean time between two visits of each site in a run, 0 if there are none; (K,).

    Parameters
    ----------
    idle_s
        Duration of each task on an idle fleet: delays, and calls averaged over the endpoints that
        serve their model; by position among all tasks.
    """
    gaps: dict[int, list[float]] = {}
    position = 0
    for runs, sites in zip(samples, index, strict=True):
        for run in runs:
            durations = idle_s[position : position + len(run.tasks)].tolist()
            finish = finish_times(run, durations)
            last: dict[int, float] = {}
            for task in run.tasks:
                if task.site is not None:
                    k = sites[task.site]
                    if k in last:
                        start = finish[task.index] - durations[task.index]
                        gaps.setdefault(k, []).append(max(0.0, start - last[k]))
                    last[k] = finish[task.index]
            position += len(run.tasks)
    count = sum(map(len, index))
    return np.array([float(np.mean(gaps[k])) if k in gaps else 0.0 for k in range(count)])
