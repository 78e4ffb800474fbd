"""KV caches on the move: flows that share links, and how prefill/decode pools use them.

A flow waits for its set-up and then moves its bytes over some links at once (the sender's way out
and the receiver's way in; or one PCIe bus). Flows share links by max-min fairness, which is what
many streams over one switch come to: the tightest link is split evenly among its flows, what they
leave elsewhere is split among the others, and so on. Rates change only when a flow starts or ends.

References
----------
vllm 0.33.0: vllm/distributed/kv_transfer/kv_connector/v1/nixl/pull_scheduler.py (lease, failure
policy). Bandwidths: llm-d/llm-d-inference-sim docs/latency-profiles.md (60-80 % of the rated).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from planner.domain.errors import IllegalEvent, InvalidInput

__all__ = ["Links", "Transfers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfers:
    """How prefill/decode pools hand KV over.

    Parameters
    ----------
    setup_s
        Set-up of each pull, s, >= 0. RDMA takes 0.5 to 2 ms, TCP 2 to 10 ms.
    lease_s
        How long a prefill endpoint keeps blocks for a decode endpoint that is gone, s, > 0.
    on_failure
        ``fail`` the call, as vLLM does by default, or ``recompute`` its prefill where it decodes.
    failure_ratio
        Share of pulls that fail when they end, [0, 1].
    """

    setup_s: float = 0.001
    lease_s: float = 30.0
    on_failure: Literal["fail", "recompute"] = "fail"
    failure_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not (
            self.setup_s >= 0
            and self.lease_s > 0
            and 0 <= self.failure_ratio <= 1
            and self.on_failure in ("fail", "recompute")
        ):
            raise InvalidInput(
                f"{self!r} breaks a limit", where="transfers", remedy="see the ranges it documents"
            )


@dataclass(slots=True)
class _Flow:
    links: tuple[Hashable, ...]
    left: float  # bytes
    rate: float = 0.0  # bytes per second


class Links:
    """Flows over shared links.

    Parameters
    ----------
    bandwidth
        Bytes per second of each link, > 0.

    Notes
    -----
    The driver advances it to each `next_event_s`, as it does with engines, and to the present
    before it starts or cancels a flow.
    """

    __slots__ = ("_bandwidth", "_end_s", "_flows", "now_s")

    def __init__(self, bandwidth: Mapping[Hashable, float]) -> None:
        self._bandwidth = bandwidth
        self._flows: dict[str, _Flow] = {}  # in the order of their start
        self._end_s = math.inf
        self.now_s = 0.0

    def __len__(self) -> int:
        return len(self._flows)

    def next_event_s(self) -> float:
        """Return when the next flow ends; inf if there is none."""
        return self._end_s

    def start(self, name: str, links: Sequence[Hashable], size_bytes: float, now_s: float) -> None:
        """Let a flow begin at ``now_s``.

        Raises
        ------
        IllegalEvent
            If a flow of this name is under way, or ``now_s`` was not advanced to.
        """
        if name in self._flows or self._end_s < now_s:
            raise IllegalEvent(f"flow {name!r} cannot start at {now_s} s")
        self._move(now_s)
        self._flows[name] = _Flow(tuple(links), float(size_bytes))
        self._share()

    def cancel(self, name: str, now_s: float) -> bool:
        """Stop a flow; False if it is not under way."""
        if name not in self._flows:
            return False
        self._move(now_s)
        del self._flows[name]
        self._share()
        return True

    def advance(self, now_s: float) -> list[str]:
        """Move on to ``now_s`` and return the flows that ended at it, in order of their start."""
        if now_s < self._end_s:
            return []
        self._move(self._end_s)
        # A flow whose rest would take less than a nanosecond ends with the others.
        ended = [name for name, flow in self._flows.items() if flow.left <= flow.rate * 1e-9]
        for name in ended:
            del self._flows[name]
        self._share()
        return ended

    def _move(self, now_s: float) -> None:
        elapsed = now_s - self.now_s
        if elapsed > 0:
            for flow in self._flows.values():
                flow.left = max(0.0, flow.left - flow.rate * elapsed)
            self.now_s = now_s

    def _share(self) -> None:
        """Give each flow its max-min fair rate."""
        crowd: dict[Hashable, list[_Flow]] = {}
        for flow in self._flows.values():
            for link in flow.links:
                crowd.setdefault(link, []).append(flow)
        room = {link: self._bandwidth[link] for link in crowd}
        open_flows = {id(flow) for flow in self._flows.values()}
        while open_flows:
            shares = {
                link: room[link] / sum(id(flow) in open_flows for flow in flows)
                for link, flows in crowd.items()
                if any(id(flow) in open_flows for flow in flows)
            }
            tightest = min(shares, key=shares.__getitem__)
            rate = shares[tightest]
            for flow in crowd[tightest]:
                if id(flow) in open_flows:
                    flow.rate = rate
                    open_flows.discard(id(flow))
                    for link in flow.links:
                        room[link] = max(0.0, room[link] - rate)
        self._end_s = min(
            (self.now_s + flow.left / flow.rate for flow in self._flows.values()),
            default=math.inf,
        )
