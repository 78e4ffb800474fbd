"""KV blocks taken away from an engine by requests that never run.

A request whose KV lies elsewhere takes all its blocks and waits without a slot until it arrives;
one that waits for ever is dead weight, and what a leak or a greedy neighbour looks like to the
others: less room, preemptions, usage near 1. It is admitted like any request, so while every slot
is taken it waits for the next one to become free.
"""

from __future__ import annotations

from itertools import count

from planner.sim.engine import Engine, EngineRequest

__all__ = ["Ballast"]

_PIECES = 16  # a large one would wait for its blocks at the head of the queue, and block it


class Ballast:
    """Blocks of one engine taken out of use."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._names: list[str] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._names)

    def set(self, share: float, now_s: float) -> None:
        """Take a share of the engine's blocks, [0, 1], in place of what was taken before."""
        engine, config = self._engine, self._engine.config
        for name in self._names:
            engine.abort(name, now_s)
        self._names.clear()
        wanted = round(share * (config.kv_blocks - 1))
        piece = max(1, min(-(-wanted // _PIECES), config.max_model_len // config.block_tokens - 1))
        while wanted > 0:
            # Also the token to come has its place, so a piece fits exactly.
            tokens = min(piece, wanted) * config.block_tokens
            name = f"ballast-{next(self._numbers)}"
            request = EngineRequest(
                request_id=name,
                prompt_tokens=tokens,
                output_tokens=1,
                priority=-(2**62),
                remote_tokens=tokens,
            )
            engine.submit(request, now_s)
            self._names.append(name)
            wanted -= piece
