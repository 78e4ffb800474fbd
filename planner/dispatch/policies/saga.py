"""SAGA: sessions stay with their cache, tenants by urgency, idle endpoints steal what waits.

Each part can be switched off:

* **Affinity.** A session's calls queue for its endpoint while that is not loaded above ``theta``
  and is believed to hold the session; otherwise for the least loaded one.
* **Agent fair share.** Queues are served by tenants, those first whose runs' remaining work over
  time to deadline adds up to most; recomputed each epoch.
* **Stealing.** An endpoint whose queue has been empty for ``idle_s`` takes the oldest waiting
  session of an overloaded one, and the session's affinity with it.
* **Execution graphs** tell work, reuse and successors: from hints (the declared graph with its
  forecasts), inferred from runs that have ended, or not at all.
* WA-LRU eviction and tool TTL are the engines' business: `planner.sim.companions`.

References
----------
SAGA (arXiv 2605.00528), whole paper, and its artifact (researchartifacts2025/SAGA).

Deviations, and what the paper leaves open:

* Only calls that wait in the router are stolen; what an engine has stays there, and no KV is moved:
  the thief computes the session's prefix again. Nothing is preempted for another tenant.
* Load is the artifact's: half the slots, half the KV in use, a hundredth of the queue. Overloaded
  are endpoints without room that calls wait for.
* The paper wants either of two conditions for stealing in one place and both in another;
  ``steal_both`` decides. Idleness alone broke locality in the artifact's own runs.
* "Expected time" of a run is that of its graph on an idle fleet (the artifact has constants).
  Missed deadlines count as due at once, as in the artifact, so hopeless runs come first.
* Prefetch is left out: the artifact's extends entries by the true length of a tool's result,
  which is not known then.
* State is never stale; the fair share is as old as the epoch.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from planner.dispatch.events import Call, CallArrived, CallCancelled, Event, RunEnded
from planner.dispatch.policies.aeg import ExecutionGraph, Step
from planner.dispatch.policies.base import Choice, Ready, Wait
from planner.dispatch.policies.gaps import Gaps
from planner.dispatch.policies.outlook import Outlook
from planner.dispatch.policies.placement import Alone, Route, has_room, service_s
from planner.dispatch.policies.progress import RunProgress
from planner.dispatch.policies.queued import QueuedPolicy
from planner.dispatch.policies.response import ResponseRatio
from planner.dispatch.policies.sessions import NOBODY, Owner, Sessions
from planner.dispatch.policies.sticky import affinity_key
from planner.dispatch.view import EndpointState, FleetView
from planner.domain.blocks import Segment
from planner.domain.run import RunSpec

__all__ = ["Saga", "load"]

_COLD_RUNS = 30
"""Runs of a workflow before its inferred graph counts."""
_LEAST_PROBABILITY = 0.7
_MOST_HOMES = 100_000
_SHARED = 1.0, 0.0


def load(state: EndpointState, queued: int) -> float:
    """Return the artifact's load of an endpoint with ``queued`` calls waiting for it."""
    used = min(1.0, state.in_flight / state.endpoint.max_num_seqs)
    kv = min(1.0, state.context_tokens / state.endpoint.kv_tokens)
    return 0.5 * used + 0.5 * kv + 0.01 * queued


class Saga(QueuedPolicy):
    """Affinity, stealing and fair share over agent execution graphs, see the module.

    Parameters
    ----------
    hints
        Whether declared graphs are used where there are any.
    inferred
        Whether graphs are inferred for workflows without a hint.
    affinity, stealing, fair_share, wa_lru, ttl
        The parts; the last two act in simulations.
    theta
        Load above which a session leaves its endpoint.
    steal_both
        Whether stealing needs idleness and imbalance, or one of them.
    idle_s
        How long an endpoint's queue has to be empty before it steals, s.
    spread
        Most over least load from which the fleet is unbalanced.
    epoch_s
        Time between two computations of the fair share, s.
    slo
        Deadline of a run without one, in expected times.
    seed
        Of the choice of victims.
    """

    name = "saga"
    looks_ahead = 0  # what its endpoint has no room for is not offered anyway

    def __init__(
        self,
        *,
        hints: bool = True,
        inferred: bool = True,
        affinity: bool = True,
        stealing: bool = True,
        fair_share: bool = True,
        wa_lru: bool = True,
        ttl: bool = True,
        theta: float = 0.8,
        steal_both: bool = True,
        idle_s: float = 0.1,
        spread: float = 2.0,
        epoch_s: float = 0.1,
        slo: float = 1.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.hints, self.inferred = bool(hints), bool(inferred)
        self.affinity, self.stealing = bool(affinity), bool(stealing)
        self.fair_share = bool(fair_share)
        self.wa_lru, self.ttl = bool(wa_lru), bool(ttl)
        self.theta = theta
        self.steal_both = bool(steal_both)
        self.idle_s = idle_s
        self.spread = spread
        self.epoch_s = epoch_s
        self.slo = slo
        self.gaps = Gaps()
        self.steals = 0
        self.now_s = 0.0
        self._rng = np.random.default_rng(seed)
        self._sessions = Sessions()
        self._alone = Alone()
        self._reuse: dict[tuple[str, str], float] = {}  # until the next event
        self._outlook: Outlook | None = None
        self._hinted: dict[str, ExecutionGraph | None] = {}
        self._inferred: dict[str, ExecutionGraph] = {}
        self._expected: dict[str, tuple[int, float]] = {}  # workflow -> runs, mean seconds
        self._homes: OrderedDict[str, int] = OrderedDict()
        self._target: dict[str, int] = {}  # waiting call -> endpoint it queues for
        self._queued: Counter[int] = Counter()
        self._idle_since: dict[int, float] = {}
        self._share: dict[str, float] = {}
        self._epoch_due_s = self._alarm_s = -math.inf
        self._urgency: ResponseRatio[RunProgress] = ResponseRatio(
            numerator=self.work_left_s, denominator=self._time_left_s
        )

    # -- graphs -------------------------------------------------------------------------------

    def observe(self, event: Event, fleet: FleetView) -> None:
        """Follow the runs; learn gaps and, from runs that have ended, graphs."""
        self.now_s = max(self.now_s, event.now_s)
        self._reuse.clear()
        if isinstance(event, RunEnded):
            run = self.runs.get(event.run_id)
            if run is not None:
                self._learn(run, fleet)
        super().observe(event, fleet)
        if isinstance(event, CallCancelled):
            self._target.pop(event.call_id, None)
        if isinstance(event, CallArrived):
            self.gaps.arrived(event.call, self.runs.of(event.call))
        if self.wa_lru:
            if isinstance(event, CallArrived):
                self._sessions.arrived(event.call)
            elif isinstance(event, RunEnded):
                self._sessions.ended(event.run_id)

    def held_by(self, items: Sequence[int]) -> list[tuple[float, float] | None]:
        """Return P_reuse and relative size of the sessions that hold pieces of prompt.

        What several runs have used is sure to be reused and counts nothing; None for what no prompt
        has held.
        """
        found: list[tuple[float, float] | None] = []
        last: Owner | None = None
        held: tuple[float, float] = _SHARED
        for owner in self._sessions.owners_of(items):
            if owner is NOBODY:
                found.append(None)
                continue
            if owner is not last:  # pieces of a prompt follow one another
                last, held = owner, _SHARED if owner is None else self._held_by(owner)
            found.append(held)
        return found

    def _held_by(self, owner: Owner) -> tuple[float, float]:
        call = owner.call
        key = call.workflow_hash, call.site
        reuse = self._reuse.get(key)
        if reuse is None:
            graph = self.graph(call.workflow_hash)
            reuse = self._reuse[key] = 0.0 if graph is None else graph.reuse(call.site)
        return reuse, call.prompt_tokens / self._sessions.largest_tokens

    def graph(self, workflow_hash: str) -> ExecutionGraph | None:
        """Return the execution graph of a workflow, or None in the cold."""
        if self.hints and self._outlook is not None and self.fleet is not None:
            if workflow_hash not in self._hinted:
                runs = self._outlook.sampled(workflow_hash)
                self._hinted[workflow_hash] = _hinted(runs, self.fleet) if runs else None
            hinted = self._hinted[workflow_hash]
            if hinted is not None:
                return hinted
        found = self._inferred.get(workflow_hash) if self.inferred else None
        return found if found is not None and found.runs >= _COLD_RUNS else None

    def _learn(self, run: RunProgress, fleet: FleetView) -> None:
        if not self.inferred or not run.ended:
            return
        graph = self._inferred.setdefault(run.workflow_hash, ExecutionGraph(_LEAST_PROBABILITY))
        graph.add(_observed(run, fleet))
        runs, mean_s = self._expected.get(run.workflow_hash, (0, 0.0))
        mean_s += (self.now_s - run.arrival_s - mean_s) / (runs + 1)
        self._expected[run.workflow_hash] = runs + 1, mean_s

    # -- fair share ---------------------------------------------------------------------------

    def work_left_s(self, run: RunProgress) -> float:
        """Return the work of a run that has not ended, by its graph, s; 0 without a graph."""
        graph = self.graph(run.workflow_hash)
        if graph is None or self.forecaster is None or self.fleet is None:
            return 0.0
        if not run.open:
            if not run.ended:
                return graph.work_s
            last = max(run.ended.values(), key=lambda one: one.finish_s)
            return graph.work_after_s(last.call.site)
        own_s = sum(
            self._alone.service_s(
                call.prompt_tokens, self.forecaster.of(call).output_tokens, self.fleet, call.model
            )
            for call, _ in run.open.values()
        )
        # Calls beside each other share what comes after them.
        return own_s + min(graph.work_after_s(call.site) for call, _ in run.open.values())

    def _time_left_s(self, run: RunProgress) -> float:
        due_s = run.deadline_s
        if due_s is None:
            whole_s = self._outlook.whole_s(run.workflow_hash) if self._outlook else None
            if whole_s is None:
                whole_s = self._expected.get(run.workflow_hash, (0, math.inf))[1]
            due_s = self.slo * whole_s
        return run.arrival_s + due_s - self.now_s

    def shares(self) -> dict[str, float]:
        """Return each tenant's fair share: its runs' remaining work over time to deadline."""
        shares: defaultdict[str, float] = defaultdict(float)
        for run in self.runs.all():
            shares[run.tenant] += self._urgency.of(run)
        return dict(shares)

    # -- queues -------------------------------------------------------------------------------

    def key(self, call: Call, now_s: float) -> tuple[float, float]:  # noqa: ARG002 - the epoch's
        """Return minus the tenant's share, then when the call became ready."""
        return -self._share.get(call.tenant, 0.0), call.ready_s

    def order(self, held: Sequence[Call], fleet: FleetView, now_s: float) -> Iterable[Call]:
        """Recompute shares once an epoch, let idle endpoints steal, and offer."""
        if self.fair_share and now_s >= self._epoch_due_s:
            self._epoch_due_s = now_s + self.epoch_s
            self._share = self.shares()
        self._queued = Counter(
            self._target[call.call_id] for call in held if call.call_id in self._target
        )
        if self.stealing:
            self._steal(held, fleet, now_s)
        return super().order(held, fleet, now_s)

    def ranked(self, held: Sequence[Call], now_s: float) -> Iterable[Call]:
        """Return the calls whose endpoint has room, or that have none yet, by key."""
        return self._drawn(held, now_s)

    def _drawn(self, held: Sequence[Call], now_s: float) -> Iterator[Call]:
        blocked: Call | None = None
        fleet = self.fleet
        for call in super().ranked(held, now_s):
            target = self._target.get(call.call_id)
            if target is None or fleet is None:
                yield call
                continue
            state = fleet.states[target]
            if not state.healthy or self.placement.admits(state):
                yield call
            else:
                blocked = blocked or call
        if blocked is not None and self._rings(now_s):
            yield blocked  # it asks to be woken, see `choose`

    def place(self, ready: Ready) -> Route | None:
        """Return the route through the call's endpoint if that has room."""
        call = ready.call
        target = self._target.get(call.call_id)
        chosen = next((one for one in ready.candidates if one.index == target), None)
        if chosen is None:
            chosen = self._route(ready)
            self._queued[chosen.index] += 1
        self._target[call.call_id] = chosen.index
        self._settle(affinity_key(call), chosen.index)
        if chosen.endpoint.role == "both" and self.placement.full(ready, chosen):
            return None
        fleet = ready.fleet
        candidates = fleet.only(chosen.index)
        route = self.placement.place(
            Ready(call, candidates, fleet, ready.forecaster, ready.now_s, ready.decoders)
        )
        if route is not None:
            del self._target[call.call_id]
            self._queued[chosen.index] -= 1
        return route

    def choose(self, ready: Ready) -> Choice | Wait:
        """Return where the offered call goes now; a wait asks for the next look at idleness."""
        if self._outlook is None:
            self._outlook = Outlook(ready.fleet, ready.forecaster)
            self._reuse.clear()
        choice = super().choose(ready)
        if isinstance(choice, Wait) and self._rings(ready.now_s):
            # Idleness is a matter of time: one of the calls that wait asks for a look at it.
            self._alarm_s = ready.now_s + self.idle_s
            return Wait("affinity", until_s=self._alarm_s)
        return choice

    def _rings(self, now_s: float) -> bool:
        """Return whether a look at idleness is due; if any counts at once, events bring it."""
        return self.stealing and self.idle_s > 0.0 and now_s >= self._alarm_s

    def _route(self, ready: Ready) -> EndpointState:
        if self.affinity:
            home = self._homes.get(affinity_key(ready.call))
            for state in ready.candidates:
                if (
                    state.index == home
                    and load(state, self._queued[state.index]) < self.theta
                    and (not ready.call.prefix or state.prefix.match(ready.call.prefix))
                ):
                    return state
        return min(
            ready.candidates,
            key=lambda state: (load(state, self._queued[state.index]), state.index),
        )

    def _settle(self, key: str, index: int) -> None:
        self._homes[key] = index
        self._homes.move_to_end(key)
        if len(self._homes) > _MOST_HOMES:
            self._homes.popitem(last=False)

    # -- stealing -----------------------------------------------------------------------------

    def _steal(self, held: Sequence[Call], fleet: FleetView, now_s: float) -> None:
        entries = [
            state for state in fleet.states if state.healthy and state.endpoint.role != "decode"
        ]
        for state in entries:
            if self._queued[state.index]:
                self._idle_since.pop(state.index, None)
            else:
                self._idle_since.setdefault(state.index, now_s)
        if not self._queued.total() or not entries:
            return
        loads = {state.index: load(state, self._queued[state.index]) for state in entries}
        unbalanced = max(loads.values()) > self.spread * min(loads.values())
        for thief in entries:
            if self._queued[thief.index] or not has_room(thief):
                continue
            idle = now_s - self._idle_since.get(thief.index, now_s) >= self.idle_s - 1e-9
            if not ((idle and unbalanced) if self.steal_both else (idle or unbalanced)):
                continue
            victims = [
                state.index
                for state in entries
                if self._queued[state.index]
                and not has_room(state)
                and state.endpoint.model == thief.endpoint.model
            ]
            if not victims:
                continue
            victim = victims[int(self._rng.integers(len(victims)))]
            waiting = [
                call
                for call in held
                if self._target.get(call.call_id) == victim
                and call.least_tokens <= thief.most_tokens
            ]
            if waiting:
                oldest = min(waiting, key=lambda call: (call.ready_s, call.call_id))
                self._move(affinity_key(oldest), waiting, victim, thief.index)
                self._idle_since.pop(thief.index, None)

    def _move(self, key: str, waiting: Sequence[Call], victim: int, thief: int) -> None:
        """Let a session's waiting calls queue for another endpoint."""
        self.steals += 1
        self._changed = True
        self._settle(key, thief)
        for call in waiting:
            if affinity_key(call) == key:
                self._target[call.call_id] = thief
                self._queued[victim] -= 1
                self._queued[thief] += 1


def _hinted(runs: Sequence[RunSpec], fleet: FleetView) -> ExecutionGraph:
    """Return the graph of runs drawn from a declared workflow."""
    graph = ExecutionGraph()
    for run in runs:
        steps: list[Step] = []
        place: dict[int, int] = {}  # task -> step
        before: list[tuple[int, ...]] = []  # the calls that lead to each task
        for task in run.tasks:
            calls: dict[int, None] = {}
            for pred in task.preds:
                found = (pred,) if run.tasks[pred].kind == "llm" else before[pred]
                calls.update(dict.fromkeys(found))
            before.append(tuple(calls))
            if task.kind != "llm" or task.site is None:
                continue
            overlaps = []
            for pred in calls:
                one = run.tasks[pred]
                text = (*one.prompt, Segment(one.output_key, one.output_tokens))
                shared = 0
                for mine, theirs in zip(task.prompt, text, strict=False):
                    if mine.key != theirs.key:
                        break
                    shared += min(mine.tokens, theirs.tokens)
                overlaps.append(shared / task.prompt_tokens)
            place[task.index] = len(steps)
            steps.append(
                Step(
                    site=task.site,
                    parents=tuple(place[pred] for pred in calls),
                    overlap=tuple(overlaps),
                    work_s=service_s(task.prompt_tokens, task.output_tokens, fleet.states),
                )
            )
        graph.add(steps)
    return graph


def _observed(run: RunProgress, fleet: FleetView) -> list[Step]:
    """Return the calls of a run that has ended; of answers no prefix is known before they recur."""
    ended = sorted(run.ended.items(), key=lambda item: (item[1].call.ready_s, item[0]))
    place = {name: position for position, (name, _) in enumerate(ended)}
    steps: list[Step] = []
    for position, (_, one) in enumerate(ended):
        call = one.call
        parents = [name for name in call.parents if place.get(name, position) < position]
        overlaps = []
        for name in parents:
            other = run.ended[name].call.prefix
            shared = 0
            for mine, theirs in zip(call.prefix, other, strict=False):
                if mine != theirs:
                    break
                shared += 1
            overlaps.append(shared / len(call.prefix) if call.prefix else 0.0)
        steps.append(
            Step(
                site=call.site,
                parents=tuple(place[name] for name in parents),
                overlap=tuple(overlaps),
                work_s=service_s(
                    call.prompt_tokens, max(1, one.output_tokens), fleet.states, call.model
                ),
            )
        )
    return steps
