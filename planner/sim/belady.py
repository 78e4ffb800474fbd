"""What a prefix cache could have held: a recorded run replayed under the best eviction there is.

Belady's rule evicts the block whose next use lies farthest in the future, which no online rule can
beat for blocks of one size. The next use of a block is never later than that of the blocks behind
it in a prompt, so, ties going to the later block, it keeps prefixes whole, as vLLM's lookup needs.

The replay is serial: calls come in the order they were sent, the cache takes in each prompt and
answer whole, and blocks in use by running calls are not set aside. Its hit ratio is thus a bound on
what an engine with that many blocks can reach, and `lru_hits` is the same replay under LRU, to
compare like with like.

References
----------
L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems J. 1966.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import repeat

from planner.domain.blocks import BLOCK_TOKENS
from planner.domain.fleet import Fleet
from planner.domain.ids import EndpointId
from planner.domain.run import RunSpec
from planner.domain.trace import CallRecord, TraceRecord

__all__ = [
    "CacheHits",
    "CostRatios",
    "Prompt",
    "belady_hits",
    "cost_ratios",
    "leading",
    "lru_hits",
    "recorded_prompts",
]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The blocks of one call, in order.

    Parameters
    ----------
    blocks
        Block hashes of prompt and answer, a chain: equal ones have equal blocks before them.
    sought
        How many of the leading ones are looked for in the cache, 0 to ``len(blocks)``.
    """

    blocks: tuple[int, ...]
    sought: int


@dataclass(frozen=True, slots=True)
class CacheHits:
    """Blocks found among those looked for."""

    hits: int
    sought: int

    @property
    def ratio(self) -> float:
        """Share found, [0, 1]; 0 if nothing was looked for."""
        return self.hits / self.sought if self.sought else 0.0


def recorded_prompts(
    specs: Iterable[RunSpec], records: Iterable[TraceRecord]
) -> Mapping[str, list[Prompt]]:
    """Return what a simulated run asked of each endpoint's cache, in the order of sending.

    Parameters
    ----------
    specs
        The runs simulated.
    records
        What the simulation returned; calls that did not end well are left out. Of a call split
        over pools the prompt counts where it was computed.
    """
    tasks = {f"{spec.run_id}/{task.index}": task for spec in specs for task in spec.tasks}
    prompts: dict[str, list[Prompt]] = {}
    calls = [one for one in records if isinstance(one, CallRecord) and one.status == "ok"]
    for call in sorted(calls, key=lambda one: (one.sent_s, one.call_id)):
        task = tasks[call.call_id.partition("#")[0]]
        split = call.prefill_endpoint is not None
        answer = 0 if split else task.output_tokens - 1  # the last token's KV is not computed
        # The chain of a text begins with those of its beginnings.
        chain = task.chain[: (task.prompt_tokens + answer) // BLOCK_TOKENS]
        where = call.prefill_endpoint or call.endpoint
        prompts.setdefault(where, []).append(
            Prompt(chain, (task.prompt_tokens - 1) // BLOCK_TOKENS)
        )
    return prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRatios:
    """What a simulated run computed over what Belady's rule would have computed; 1 is the best.

    Same calls, same endpoints, in the same order; what calls under way at the same time could not
    share counts against the run.

    Parameters
    ----------
    computed
        Over all blocks; None if nothing had to be computed.
    refilled
        Over blocks that had been computed on that endpoint before, which is all that eviction can
        change; None if Belady's rule computes none again.
    """

    computed: float | None
    refilled: float | None


def cost_ratios(
    specs: Iterable[RunSpec], records: Sequence[TraceRecord], fleet: Fleet
) -> CostRatios:
    """Return the blocks computed in a simulated run over those that Belady's rule would compute."""
    cached = sum(
        (record.cached_tokens or 0) // BLOCK_TOKENS
        for record in records
        if isinstance(record, CallRecord) and record.status == "ok"
    )
    sought = best = first = 0
    for name, prompts in recorded_prompts(specs, records).items():
        endpoint = fleet.endpoints[fleet.index_of(EndpointId(name))]
        found = belady_hits(prompts, endpoint.kv_tokens // BLOCK_TOKENS)
        sought += found.sought
        best += found.sought - found.hits
        first += _first_uses(prompts)
    own = sought - cached
    return CostRatios(
        computed=own / best if best else None,
        refilled=(own - first) / (best - first) if best > first else None,
    )


def _first_uses(prompts: Sequence[Prompt]) -> int:
    """Return the blocks looked for that no prompt or answer before has held."""
    seen: set[int] = set()
    count = 0
    for prompt in prompts:
        known = leading(prompt.blocks, seen)
        count += max(0, prompt.sought - known)
        seen.update(prompt.blocks[known:])
    return count


def belady_hits(prompts: Sequence[Prompt], capacity: int) -> CacheHits:
    """Return the hits of a cache of ``capacity`` blocks (>= 0) that knows the future."""
    after = _next_uses(prompts)
    held: set[int] = set()
    # Blocks with the same next use, of which the last in the prompt goes first: minus the number
    # of the prompt that uses them, minus their end, their start, and a prompt that has them.
    farthest: list[tuple[int, int, int, int]] = []
    hits = sought = 0
    for number, (prompt, runs) in enumerate(zip(prompts, after, strict=True)):
        hits += leading(prompt.blocks[: prompt.sought], held)
        sought += prompt.sought
        start = 0
        for next_use, end in runs:
            held.update(prompt.blocks[start:end])
            heappush(farthest, (-next_use, -end, start, number))
            start = end
        held.difference_update(prompt.blocks[start:])  # the first that would go
        # What has been used since it was put there lies behind all that has not.
        while len(held) > capacity:
            next_use, minus_end, start, owner = farthest[0]
            end = -minus_end
            left = max(start, end - (len(held) - capacity))
            held.difference_update(prompts[owner].blocks[left:end])
            if left > start:
                heapreplace(farthest, (next_use, -left, start, owner))
            else:
                heappop(farthest)
    return CacheHits(hits, sought)


def _next_uses(prompts: Sequence[Prompt]) -> list[list[tuple[int, int]]]:
    """Return for each prompt which of the next ones uses its blocks next, and up to where.

    In order of the blocks, and so of the prompts that use them; behind the last one are those that
    are used no more.
    """
    found: list[list[tuple[int, int]]] = []
    following: dict[int, int] = {}  # block -> prompt
    for number in reversed(range(len(prompts))):
        blocks = prompts[number].blocks
        runs: list[tuple[int, int]] = []
        start, most = 0, leading(blocks, following)
        while start < most:
            next_use = following[blocks[start]]
            start = bisect_right(blocks, next_use, start, most, key=following.__getitem__)
            runs.append((next_use, start))
        found.append(runs)
        following.update(zip(blocks, repeat(number), strict=False))
    found.reverse()
    return found


def lru_hits(prompts: Sequence[Prompt], capacity: int) -> CacheHits:
    """Return the hits of a cache of ``capacity`` blocks that evicts the least recently used."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = sought = 0
    for prompt in prompts:
        hits += leading(prompt.blocks[: prompt.sought], held)
        sought += prompt.sought
        # As vLLM frees: the tail first, so that a prefix outlives it.
        for block in reversed(prompt.blocks):
            held[block] = None
            held.move_to_end(block)
        while len(held) > capacity:
            held.popitem(last=False)
    return CacheHits(hits, sought)


def leading(blocks: Sequence[int], held: Container[int]) -> int:
    """Return how many leading blocks of a chain are held, where none is without those before it."""
    return bisect_left(blocks, True, key=lambda block: block not in held)
