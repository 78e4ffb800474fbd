"""What a study reports of one cell: run metrics, stretch, fairness, text computed again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from planner.domain.blocks import BLOCK_TOKENS, Segment, block_hashes
from planner.domain.run import RunSpec
from planner.domain.trace import CallRecord, RunRecord, TraceRecord

__all__ = ["jain_index", "refilled_tokens"]


def refilled_tokens(records: Iterable[TraceRecord], runs: Sequence[RunSpec]) -> int:
    """Return the prompt tokens that an endpoint computed although it had computed them before.

    A block counts if the endpoint once held its whole prefix, from a prompt or from an answer,
    and no longer did: what a larger KV cache or another eviction order would have saved there.
    """
    tasks = {f"{run.run_id}/{task.index}": task for run in runs for task in run.tasks}
    calls = [one for one in records if isinstance(one, CallRecord) and one.status == "ok"]
    calls.sort(key=lambda call: call.finish_s or 0.0)
    held: dict[str, set[int]] = {}
    refilled = 0
    for call in calls:
        task = tasks[call.call_id.partition("#")[0]]
        chain = block_hashes((*task.prompt, Segment(task.output_key, task.output_tokens)))
        prompt = chain[: (call.prompt_tokens - 1) // BLOCK_TOKENS]
        seen = held.setdefault(call.prefill_endpoint or call.endpoint, set())
        known = sum(1 for block in prompt if block in seen) * BLOCK_TOKENS
        refilled += max(0, known - (call.cached_tokens or 0))
        seen.update(chain)
    return refilled


def jain_index(values: Sequence[float]) -> float:
    """Return Jain's fairness index of non-negative values, from 1/n to 1 (all alike).

    References
    ----------
    Jain, Chiu, Hawe, A quantitative measure of fairness, DEC TR-301, 1984.
    """
    array = np.asarray(values, dtype=float)
    return float(array.sum() ** 2 / (array.size * (array**2).sum()))
