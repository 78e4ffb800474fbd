"""Routers that add up scores: Dynamo's cost in KV blocks, llm-d's weighted scorers."""

from __future__ import annotations

from planner.dispatch.policies.base import Choice, Ready, least

__all__ = ["KvCost", "WeightedScorers"]


class KvCost:
    """Dynamo's cost: prefill to be done plus decode under way, in KV blocks; the least wins.

    ``prefill_load_scale x max(active prefill + prompt - overlap credit, 0) + active decode +
    prompt``, all of one endpoint. Active prefill are the uncached tokens of calls that have not
    shown a first token, active decode the context of all calls in flight.

    Parameters
    ----------
    prefill_load_scale
        Weight of a block to prefill against one to decode, >= 0.
    overlap_credit
        Blocks of prefill saved per cached block; Dynamo's for the device's cache is 1.

    Notes
    -----
    Deviations: the context counts the expected answer, which Dynamo adds as it grows; ties go to
    the first endpoint, where Dynamo draws; temperature 0 only; no host or disk tier.

    References
    ----------
    ai-dynamo/dynamo 1.4.2, KV router, default cost.
    """

    name = "kv_cost"

    def __init__(self, *, prefill_load_scale: float = 1.0, overlap_credit: float = 1.0) -> None:
        self.prefill_load_scale = prefill_load_scale
        self.overlap_credit = overlap_credit

    def choose(self, ready: Ready) -> Choice:
        """Return the candidate of the least cost."""
        call = ready.call
        costs = []
        for state in ready.candidates:
            cached = min(state.prefix.match(call.prefix) * call.prefix_tokens, call.prompt_tokens)
            prefill = state.prefill_tokens + call.prompt_tokens - self.overlap_credit * cached
            tokens = self.prefill_load_scale * max(prefill, 0.0)
            tokens += state.context_tokens + call.prompt_tokens
            costs.append(tokens / state.endpoint.block_tokens)
        return Choice(ready.candidates[least(costs)].index, "blocks")


class WeightedScorers:
    """llm-d's default profile: queue, KV use and prefix scores in [0, 1], weighted; the most wins.

    * queue: (longest - own) / (longest - shortest), 1 if all are equal;
    * KV use: 1 - share in use;
    * prefix: cached share of the prompt.

    Parameters
    ----------
    queue, kv, prefix
        Weights, >= 0.

    Notes
    -----
    Deviations: the queue is what has been sent and has not shown a first token, where llm-d scrapes
    the engine's waiting queue; KV use counts expected answers; the index is bounded by the KV
    cache; ties go to the first endpoint, where llm-d shuffles.

    References
    ----------
    llm-d/llm-d-router (endpoint picker), default profile: queue-scorer 2, kv-cache-utilization-
    scorer 2, prefix-cache-scorer 3, max-score-picker.
    """

    name = "weighted_scorers"

    def __init__(self, *, queue: float = 2.0, kv: float = 2.0, prefix: float = 3.0) -> None:
        self.queue = queue
        self.kv = kv
        self.prefix = prefix

    def choose(self, ready: Ready) -> Choice:
        """Return the candidate of the highest score."""
        blocks = ready.call.prefix
        queues = [state.in_flight - state.decoding for state in ready.candidates]
        longest, spread = max(queues), max(queues) - min(queues)
        scores = []
        for state, queue in zip(ready.candidates, queues, strict=True):
            short = (longest - queue) / spread if spread else 1.0
            free = 1.0 - min(1.0, state.context_tokens / state.endpoint.kv_tokens)
            held = state.prefix.match(blocks) / len(blocks) if blocks else 0.0
            scores.append(-(self.queue * short + self.kv * free + self.prefix * held))
        return Choice(ready.candidates[least(scores)].index, "score")
