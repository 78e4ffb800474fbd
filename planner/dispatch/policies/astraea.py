"""Astraea: stateful multi-level feedback queues with a response ratio that remembers all waits.

A request (here: a run) sits in one of m queues. When a segment (a call) ends, it is demoted if the
segment's token cost exceeded the queue's quota, and promoted if it gave way to a tool before. In
each scheduling cycle the first queue that is not empty is served, by descending
``(W + T) / T``: W what the run has waited for all its segments so far, T the time of this one.
Runs of the last queue whose ratio exceeds ``tau_age`` go to the first.

References
----------
Astraea (arXiv 2512.14142), sections 4.1 to 4.3. The KV manager of 4.4 is
`planner.sim.companions.AdaptiveKv`.

Deviations: output lengths are the forecaster's, where the paper takes the true one of the current
segment; T is the time on the best idle endpoint, since there is a fleet and placement by least
expected finish; engines batch continuously, so a cycle admits to what is running. Number of
queues and quotas are those of a third-party port, unverified; ``tau_age`` and watermark are ours.
Where the text is open, switches decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from planner.dispatch.events import Call, CallArrived, Event, RunEnded
from planner.dispatch.policies.gaps import Gaps
from planner.dispatch.policies.placement import Alone, Placement
from planner.dispatch.policies.progress import Ended
from planner.dispatch.policies.queued import QueuedPolicy
from planner.dispatch.policies.response import ResponseRatio
from planner.dispatch.view import EndpointState, FleetView

__all__ = ["Astraea"]


class Astraea(QueuedPolicy):
    """Multi-level queues with the response ratio, see the module.

    Parameters
    ----------
    queues
        m, >= 1; 1 switches the feedback off.
    quantum_tokens
        Quota of the first queue; that of queue k is (k + 1) times it. The last queue has the
        quota of the one before it.
    tau_age
        Ratio that lifts a run from the last queue into the first, > 1; infinite switches it off.
    watermark
        KV usage below which idle KV is always preserved, [0, 1].
    adaptive_kv
        Whether the KV manager is at work where one can be (in simulations).
    response_ratio
        Whether a queue is served by the ratio; else in order of arrival.
    count_prefill
        Whether uncached prompts count as token cost, besides what is generated.
    cumulative
        Whether cost adds up over segments since the last change of queue.
    tool_time
        Whether T holds the mean gap after the segment.
    one_queue
        Whether a cycle draws from one queue only, as the printed algorithm does; else lower
        queues fill what room is left.
    barrier
        Whether an endpoint takes new calls only when it is empty (classic batching).
    """

    name = "astraea"

    def __init__(
        self,
        *,
        queues: float = 6,
        quantum_tokens: float = 128,
        tau_age: float = 10.0,
        watermark: float = 0.9,
        adaptive_kv: bool = True,
        response_ratio: bool = True,
        count_prefill: bool = False,
        cumulative: bool = False,
        tool_time: bool = False,
        one_queue: bool = True,
        barrier: bool = False,
    ) -> None:
        super().__init__()
        self.queues = max(1, int(queues))
        self.quantum_tokens = quantum_tokens
        self.tau_age = tau_age
        self.watermark = watermark
        self.adaptive_kv = bool(adaptive_kv)
        self.response_ratio = bool(response_ratio)
        self.count_prefill = bool(count_prefill)
        self.cumulative = bool(cumulative)
        self.tool_time = bool(tool_time)
        self.one_queue = bool(one_queue)
        if barrier:
            self.placement = _Barrier()
        self.gaps = Gaps()
        self.level: dict[str, int] = {}  # run -> queue
        self._spent: dict[str, float] = {}
        self._alone = Alone()
        self._now_s = 0.0
        self._ratio: ResponseRatio[Call] = ResponseRatio(
            numerator=lambda call: self._waited_s(call) + self._segment_s(call),
            denominator=self._segment_s,
        )

    # -- queues -------------------------------------------------------------------------------

    def observe(self, event: Event, fleet: FleetView) -> None:
        """Follow the runs, and learn how long they pause."""
        super().observe(event, fleet)
        if isinstance(event, CallArrived):
            self.gaps.arrived(event.call, self.runs.of(event.call))
        elif isinstance(event, RunEnded):
            self.level.pop(event.run_id, None)
            self._spent.pop(event.run_id, None)

    def ended(self, ended: Ended, now_s: float) -> None:  # noqa: ARG002 - the signature
        """Demote or promote the run whose segment is over."""
        run_id = ended.call.run_id
        if not run_id:
            return  # a run of its own, over with it
        cost = float(ended.output_tokens)
        if self.count_prefill:
            cost += ended.call.prompt_tokens
        if self.cumulative:
            cost += self._spent.get(run_id, 0.0)
        level = self.level.get(run_id, 0)
        quota = self.quantum_tokens * (1 + min(level, max(0, self.queues - 2)))
        step = 1 if cost > quota else -1
        after = min(max(level + step, 0), self.queues - 1)
        self.level[run_id] = after
        self._spent[run_id] = 0.0 if after != level else cost

    def _waited_s(self, call: Call) -> float:
        return self.runs.of(call).waited_s + self._now_s - call.ready_s

    def _segment_s(self, call: Call) -> float:
        if self.forecaster is None or self.fleet is None:
            return 1.0
        output = self.forecaster.of(call).output_tokens
        seconds = self._alone.service_s(call.prompt_tokens, output, self.fleet, call.model)
        return seconds + ((self.gaps.mean_s(call) or 0.0) if self.tool_time else 0.0)

    def key(self, call: Call, now_s: float) -> tuple[float, float]:
        """Return minus the response ratio, then when the call became ready."""
        self._now_s = now_s
        return (-self._ratio.of(call) if self.response_ratio else 0.0), call.ready_s

    def ranked(self, held: Sequence[Call], now_s: float) -> Iterable[Call]:
        """Return the calls of the first queue that is not empty, or all, queue by queue."""
        self._now_s = now_s
        queues: list[list[Call]] = [[] for _ in range(self.queues)]
        last = self.queues - 1
        for call in held:
            level = self.level.get(call.run_id, 0)
            if level == last > 0 and self._ratio.of(call) > self.tau_age:
                level = self.level[call.run_id] = 0
            queues[level].append(call)
        return self._drawn(queues, now_s)

    def _drawn(self, queues: Sequence[Sequence[Call]], now_s: float) -> Iterator[Call]:
        for queue in queues:
            yield from super().ranked(queue, now_s)
            # A queue whose calls no endpoint could take counts as empty.
            if self.one_queue and any(self._servable(call) for call in queue):
                return

    def _servable(self, call: Call) -> bool:
        if self.fleet is None:
            return False
        return bool(self.fleet.candidates(call.model, tokens=call.least_tokens).entries)


class _Barrier(Placement):
    """Only endpoints that were empty when the pass began take calls."""

    def __init__(self) -> None:
        super().__init__()
        self._empty: set[int] = set()

    def begin(self, fleet: FleetView) -> None:
        super().begin(fleet)
        self._empty = {state.index for state in fleet.states if state.in_flight == 0}

    def admits(self, state: EndpointState, tokens: float = 0.0) -> bool:
        return state.index in self._empty and super().admits(state, tokens)
