"""HexAGenT: the largest projected stretch first, prefill and decode placed together.

The ratio of a waiting call is the projected latency of its run's revealed part over the time that
part would take alone on the fleet (its horizon): ``((now - arrival) + projected) / horizon``, with
the projected time to the call's end on its best pair of endpoints. A greedy planner takes the call
with the largest ratio, gives it its best pair, books the load there, and goes on until no call is
left. It runs beside serving: a plan counts ``planner_latency_s`` after the snapshot it was made
from; until then, and for calls it does not know, older runs go first to the earliest finish.

References
----------
HexAGenT (arXiv 2605.16637). The text was not available to us; ratio, greedy joint planner,
triggers and asynchronous application follow a reader's notes, the rest is reconstruction:

* The horizon is the longest chain of revealed calls on their best idle endpoints, real lengths for
  those that are over, but at least their sum spread over all slots where a fan-out is wide.
* Tool gaps count in the horizon once they have passed (switch).
* A pair's projected time is that of `planner.dispatch.cost`, so it knows cached prefixes.

Deviations: the decode endpoint is fixed when a call is sent; the check of its KV capacity falls
there, a call whose pair has no room waits in the router, and the end of a transfer asks for no
new plan. The greedy planner sees the calls of the largest ratios, with their time on the idle fleet
for the projected one, up to `MOST_PLANNED`. Lengths are the forecaster's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from planner.dispatch.events import Call, CallArrived, Event, RunEnded
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies.base import Choice, Ready, Wait
from planner.dispatch.policies.outlook import Outlook
from planner.dispatch.policies.placement import Ahead, Route, Routes, has_room, service_s
from planner.dispatch.policies.progress import Ended, RunProgress, first_attempt
from planner.dispatch.policies.queued import QueuedPolicy
from planner.dispatch.policies.response import ratios
from planner.dispatch.view import EndpointState, FleetView

__all__ = ["MOST_PLANNED", "HexAGenT", "Horizon"]


MOST_PLANNED = 64
"""Calls that one plan places. What would come after them waits for a later plan, which each arrival
brings; it keeps a plan at a few milliseconds however many calls wait."""


@dataclass(slots=True)
class Horizon:
    """How long the revealed part of one run takes alone on the fleet.

    Attributes
    ----------
    starts, ends
        Call -> when it would begin and end after the run's arrival, s.
    total_s
        Service of all its calls, s.
    """

    starts: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    total_s: float = 0.0

    def reveal(self, call: Call, run: RunProgress, seconds: float, *, tools: bool) -> None:
        """Add a call of ``seconds``; the observed gap before it counts if ``tools``."""
        parents = run.parents(call)
        free_s = max((one.finish_s for one in parents), default=run.arrival_s)
        name = first_attempt(call.call_id)
        start = max(
            (self.ends.get(first_attempt(one.call.call_id), 0.0) for one in parents), default=0.0
        )
        if tools:
            start += max(0.0, call.ready_s - free_s)
        if name not in self.starts:
            self.total_s += seconds
        self.starts[name], self.ends[name] = start, start + seconds

    def correct(self, call: Call, seconds: float) -> None:
        """Give a call that is over its real time."""
        name = first_attempt(call.call_id)
        if name in self.starts:
            self.total_s += self.starts[name] + seconds - self.ends[name]
            self.ends[name] = self.starts[name] + seconds

    def seconds(self, slots: int) -> float:
        """Return the standalone completion, s, with that many slots in the fleet."""
        return max(max(self.ends.values(), default=0.0), self.total_s / slots)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where the plan sends a call, and which it is in the order of the plan."""

    rank: int
    endpoint: int
    decode: int | None


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A waiting call as the planner sees it, with its ways through the fleet."""

    call: Call
    elapsed_s: float
    horizon_s: float
    ways: Routes


class HexAGenT(QueuedPolicy):
    """Largest projected stretch first, see the module.

    Parameters
    ----------
    full_horizon
        Whether the horizon holds what the graph's forecasts promise of the rest of the run, not
        only what is revealed; the first ablation row of the notes.
    includes_tools
        Whether observed tool gaps count in the horizon.
    planner_latency_s
        Time from a plan's snapshot until it counts, s, >= 0.

    Attributes
    ----------
    plans, dropped
        Plans made; entries dropped because their call had started or their pair was gone.
    """

    name = "hexagent"

    def __init__(
        self,
        *,
        full_horizon: bool = False,
        includes_tools: bool = True,
        planner_latency_s: float = 0.01,
    ) -> None:
        super().__init__()
        self.full_horizon = bool(full_horizon)
        self.includes_tools = bool(includes_tools)
        self.planner_latency_s = planner_latency_s
        self.plans = self.dropped = 0
        self._outlook: Outlook | None = None
        self._horizons: dict[str, Horizon] = {}
        self._revealed: dict[str, list[Call]] = {}
        self._plan: dict[str, _Entry] = {}
        self._coming: tuple[float, dict[str, _Entry]] | None = None
        self._wanted = False
        self._woken = False

    # -- horizons -----------------------------------------------------------------------------

    def observe(self, event: Event, fleet: FleetView) -> None:
        """Follow what is revealed; whatever is asks for a new plan."""
        super().observe(event, fleet)
        if isinstance(event, CallArrived):
            self._revealed.setdefault(self.runs.of(event.call).run_id, []).append(event.call)
        elif isinstance(event, RunEnded):
            self._horizons.pop(event.run_id, None)
            self._revealed.pop(event.run_id, None)
        self._wanted = self._wanted or isinstance(event, CallArrived)

    def ended(self, ended: Ended, now_s: float) -> None:  # noqa: ARG002 - the signature
        """Put a real length into the horizon."""
        call = ended.call
        if not call.run_id:  # a run of its own, over with it
            self._horizons.pop(call.call_id, None)
            self._revealed.pop(call.call_id, None)
        horizon = self._horizons.get(call.run_id)
        if horizon is not None and self.fleet is not None:
            tokens = max(1, ended.output_tokens)
            horizon.correct(
                call, service_s(call.prompt_tokens, tokens, self.fleet.states, call.model)
            )

    @property
    def tracked(self) -> int:
        """Runs whose horizon is kept."""
        return len(self._horizons.keys() | self._revealed.keys())

    def horizon_s(self, run: RunProgress, forecaster: Forecaster, fleet: FleetView) -> float:
        """Return the standalone completion of the revealed part of a run, s."""
        horizon = self._horizons.setdefault(run.run_id, Horizon())
        for call in self._revealed.pop(run.run_id, ()):
            output = forecaster.of(call).output_tokens
            seconds = service_s(call.prompt_tokens, output, fleet.states, call.model)
            horizon.reveal(call, run, seconds, tools=self.includes_tools)
        slots = sum(
            state.endpoint.max_num_seqs
            for state in fleet.states
            if state.endpoint.role != "prefill"
        )
        seconds = horizon.seconds(slots)
        if self.full_horizon:
            if self._outlook is None:
                self._outlook = Outlook(fleet, forecaster)
            for call, _ in run.open.values():
                start_s = horizon.starts.get(first_attempt(call.call_id), 0.0)
                seconds = max(seconds, start_s + self._outlook.ahead(call).remaining_s)
        return seconds

    # -- the plan -----------------------------------------------------------------------------

    def order(self, held: Sequence[Call], fleet: FleetView, now_s: float) -> Iterable[Call]:
        """Put a plan that is due into force, start the next one, and offer by it."""
        if self._coming is not None and now_s >= self._coming[0]:
            waiting = {call.call_id for call in held}
            due = self._coming[1]
            self._plan = {name: entry for name, entry in due.items() if name in waiting}
            self.dropped += len(due) - len(self._plan)
            self._coming, self._changed = None, True
        if self._wanted and self._coming is None and self.forecaster is not None:
            self._wanted = self._woken = False
            plan = self.plan(held, fleet, self.forecaster, now_s)
            self.plans += 1
            if self.planner_latency_s > 0:
                self._coming = now_s + self.planner_latency_s, plan
            else:
                self._plan, self._changed = plan, True
        return super().order(held, fleet, now_s)

    def key(self, call: Call, now_s: float) -> tuple[float, float, float]:  # noqa: ARG002
        """Return the rank in the plan; calls it does not know come after, older runs first."""
        entry = self._plan.get(call.call_id)
        rank = float("inf") if entry is None else entry.rank
        return rank, call.run_arrival_s, call.ready_s

    def plan(
        self, held: Sequence[Call], fleet: FleetView, forecaster: Forecaster, now_s: float
    ) -> dict[str, _Entry]:
        """Return a place in the order and a pair for each waiting call that can be served."""
        waiting: list[_Waiting] = []
        horizons: dict[str, float] = {}
        for call in self._shortlist(held, fleet, forecaster, now_s):
            serving = fleet.candidates(call.model, tokens=call.least_tokens)
            if not serving.entries:
                continue
            run = self.runs.of(call)
            if run.run_id not in horizons:
                horizons[run.run_id] = self.horizon_s(run, forecaster, fleet)
            waiting.append(
                _Waiting(
                    call,
                    now_s - run.arrival_s,
                    horizons[run.run_id],
                    self.placement.routes(
                        Ready(call, serving.entries, fleet, forecaster, now_s, serving.decoders),
                        imposed=False,
                    ),
                )
            )
        return _greedy(waiting, fleet.states) if waiting else {}

    def _shortlist(
        self, held: Sequence[Call], fleet: FleetView, forecaster: Forecaster, now_s: float
    ) -> Sequence[Call]:
        """Return the calls worth a closer look."""
        if len(held) <= MOST_PLANNED:
            return held
        horizons: dict[str, float] = {}
        elapsed: list[float] = []
        for call in held:
            run = self.runs.of(call)
            if run.run_id not in horizons:
                horizons[run.run_id] = self.horizon_s(run, forecaster, fleet)
            ends = self._horizons[run.run_id]
            name = first_attempt(call.call_id)
            elapsed.append(now_s - run.arrival_s + ends.ends[name] - ends.starts[name])
        horizon_s = np.array([horizons[self.runs.of(call).run_id] for call in held])
        urgent = np.argsort(-ratios(np.array(elapsed), horizon_s), kind="stable")
        return [held[place] for place in np.sort(urgent[:MOST_PLANNED])]

    def place(self, ready: Ready) -> Route | None:
        """Return the planned pair if it has room; unplanned calls go by earliest finish."""
        entry = self._plan.get(ready.call.call_id)
        if entry is not None:
            fleet, decode = ready.fleet, entry.decode
            planned = any(one.index == entry.endpoint for one in ready.candidates)
            if planned and (decode is None or any(one.index == decode for one in ready.decoders)):
                narrow = Ready(
                    ready.call,
                    fleet.only(entry.endpoint),
                    fleet,
                    ready.forecaster,
                    ready.now_s,
                    () if decode is None else fleet.only(decode),
                )
                return self.placement.place(narrow)
            del self._plan[ready.call.call_id]
            self.dropped += 1
        return self.placement.place(ready)

    def found(self, call: Call, ahead: Ahead) -> Route | None:
        """Return the same for a call that was looked at with others."""
        entry = self._plan.get(call.call_id)
        if entry is not None:
            decode = -1 if entry.decode is None else entry.decode
            way = ahead.pairs.places.get((entry.endpoint, decode))
            if way is not None:
                return self.placement.found(call, ahead, way)
            del self._plan[call.call_id]
            self.dropped += 1
        return super().found(call, ahead)

    def unseen(self, call: Call) -> bool:
        """Return whether a call is to be offered, be it to ask for the plan that is coming."""
        return super().unseen(call) or (self._coming is not None and not self._woken)

    def choose(self, ready: Ready) -> Choice | Wait:
        """Return where the offered call goes now; a wait asks for the plan that is coming."""
        choice = super().choose(ready)
        if isinstance(choice, Choice):
            self._plan.pop(ready.call.call_id, None)
        elif self._coming is not None and not self._woken:
            self._woken = True
            return Wait("plan", until_s=self._coming[0])
        return choice


def _greedy(waiting: Sequence[_Waiting], states: Sequence[EndpointState]) -> dict[str, _Entry]:
    """Give the call of the largest ratio its best pair, book it, and repeat."""
    kinds = {id(one.ways.pairs): one.ways.pairs.indices for one in waiting}
    names = list(dict.fromkeys(pair for indices in kinds.values() for pair in indices))
    pairs = {pair: place for place, pair in enumerate(names)}
    columns = {kind: [pairs[pair] for pair in indices] for kind, indices in kinds.items()}
    own_s = np.full((len(waiting), len(pairs)), np.inf)
    for row, one in enumerate(waiting):
        own_s[row, columns[id(one.ways.pairs)]] = one.ways.own_s
    # By endpoint, the pairs that have it.
    users = np.array([[index in pair for pair in names] for index in range(len(states))])
    places = [having.nonzero()[0] for having in users]
    elapsed_s = np.array([one.elapsed_s for one in waiting])
    horizon_s = np.array([one.horizon_s for one in waiting])
    best = own_s.argmin(axis=1)
    projected_s = own_s[np.arange(len(waiting)), best]
    left = np.ones(len(waiting), dtype=bool)
    stretch = ratios(elapsed_s + projected_s, horizon_s)
    books = _Books(len(states))
    plan: dict[str, _Entry] = {}
    for rank in range(len(waiting)):
        row = int(stretch.argmax())
        left[row], stretch[row] = False, -np.inf
        call, chosen = waiting[row].call, names[best[row]]
        plan[call.call_id] = _Entry(rank, chosen[0], None if chosen[1] < 0 else chosen[1])
        ways = waiting[row].ways
        for state, seconds in ways.ends(ways.pairs.places[chosen]):
            added_s = books.add(state, call, seconds)
            if added_s:
                # Only what meant to go there can change its mind: waits never get shorter.
                own_s[:, places[state.index]] += added_s
                hit = (left & users[state.index][best]).nonzero()[0]
                if hit.size:
                    best[hit] = own_s[hit].argmin(axis=1)
                    projected_s[hit] = own_s[hit, best[hit]]
                    stretch[hit] = ratios(elapsed_s[hit] + projected_s[hit], horizon_s[hit])
    return plan


class _Books:
    """What the planner has given to each endpoint beyond what it holds already."""

    def __init__(self, size: int) -> None:
        self._calls = [0] * size
        self._tokens = [0.0] * size

    def add(self, state: EndpointState, call: Call, seconds: float) -> float:
        """Book a call, and return by how much it lengthens the wait of those after it, s."""
        index, endpoint = state.index, state.endpoint
        slots = endpoint.max_num_seqs
        need = call.least_tokens
        held = state.in_flight + self._calls[index]
        free = has_room(state) and held < slots
        free = free and state.context_tokens + self._tokens[index] + need < endpoint.kv_tokens
        self._calls[index] += 1
        self._tokens[index] += need
        if endpoint.role == "prefill":
            return seconds  # prefills follow one another
        if free:
            return 0.0
        return seconds / max(1.0, min(slots, endpoint.kv_tokens / need))
