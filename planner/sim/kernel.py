"""Discrete-event simulation of runs over a fleet, through the same router that runs live.

Rules
-----
* Time only moves forward; simultaneous events go by kind (engine, then tool, then arrival) and
  then by order of scheduling, so a seed fixes every record.
* The router is told what a gateway would be told, when it would be told: a call's prompt when the
  call is ready, its first token and its end when they happen. Output lengths, tool delays and
  branch outcomes stay inside this module until they have come to pass.
* A task is ready when all its predecessors have finished; a call is then sent after the client's
  own delay, plus ``dispatch_s`` for the decision.
* A call that fails is tried again at once, under an id of its own, up to ``max_attempts`` times;
  then its run fails. A crash is known at once. A client that gives up takes its calls with it.
* Where the policy's endpoint only prefills, the call makes two requests: one that stops after its
  first token and keeps its blocks, then one on the decode endpoint that pulls them. The client's
  first token is the second request's.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from planner.dispatch.events import (
    BranchTaken,
    Call,
    CallArrived,
    CallCancelled,
    CallFailed,
    CallFinished,
    Command,
    EndpointDown,
    EndpointUp,
    Event,
    FirstToken,
    PrefillFinished,
    RunEnded,
    RunStarted,
    Send,
    Tick,
    ToolFinished,
    ToolStarted,
)
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies.base import Observing, Policy
from planner.dispatch.router import Router, elsewhere
from planner.domain.blocks import BLOCK_TOKENS
from planner.domain.errors import InvalidInput, NoEndpointAvailable
from planner.domain.fleet import Fleet
from planner.domain.run import RunSpec, Task
from planner.domain.trace import BranchRecord, CallRecord, RunRecord, ToolRecord, TraceRecord
from planner.sim.blockpool import Eviction
from planner.sim.cluster import Cluster
from planner.sim.disturbance import Disturbance
from planner.sim.engine import EngineEvent, EngineRequest, Finished, Preempted, PullStarted
from planner.sim.horizon import POLL_S, Horizon
from planner.sim.retention import Idle, Keeper, Retention
from planner.sim.transfer import Transfers

__all__ = ["ClosedLoop", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """Clients that each start a run when their last one has ended and they have thought.

    Parameters
    ----------
    clients
        How many, >= 1.
    think_s
        Mean of the exponential think time between two runs, s, >= 0.
    """

    clients: int
    think_s: float = 0.0

    def __post_init__(self) -> None:
        if self.clients < 1 or not 0 <= self.think_s < math.inf:
            raise InvalidInput(
                f"{self.clients!r} clients thinking {self.think_s!r} s",
                where="closed loop",
                remedy="use at least one client and a think time >= 0",
            )


@dataclass(slots=True)
class _Run:
    spec: RunSpec
    predicted_s: float | None
    waiting: list[int]
    children: list[list[int]]
    parents: list[tuple[str, ...]]
    left: int
    calls: int = 0
    over: bool = False
    branch_visits: dict[str, int] = field(default_factory=dict)
    flights: dict[str, _Flight] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Flight:
    """One attempt of a call; ``send`` is None while the router holds it.

    ``at`` is the endpoint that has its live request: first the prefill's, then the decode's.
    """

    run: _Run
    task: Task
    call: Call
    chain: tuple[int, ...]
    attempt: int
    decision_us: float | None = None
    send: Send | None = None
    sent_s: float = 0.0
    at: int = -1
    request: EngineRequest | None = None
    cached_tokens: int = 0
    first_token_s: float | None = None

    @property
    def prefilling(self) -> bool:
        """Whether its first of two requests is live."""
        return self.send is not None and self.send.decode_endpoint not in (None, self.at)

    @property
    def handed_over(self) -> bool:
        """Whether its second of two requests is live."""
        return self.send is not None and self.send.decode_endpoint == self.at


class _Simulation:
    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        forecaster: Forecaster,
        rng: np.random.Generator,
        *,
        noise_cv: float,
        dispatch_s: float,
        timer: Callable[[], float] | None,
        transfers: Transfers,
        retention: Retention | None,
        eviction: Callable[[], Eviction] | None,
        max_attempts: int,
        horizon: Horizon | None,
    ) -> None:
        self.fleet = fleet
        self.router = Router(fleet, policy, forecaster)
        # Told only to who listens: most policies do not, and runs have many tools and branches.
        self.observed = isinstance(policy, Observing)
        self.forecaster = forecaster
        self.policy = policy
        self.dispatch_s = dispatch_s
        self.timer = timer
        self.transfers = transfers
        self.max_attempts = max_attempts
        self.horizon = horizon
        self.cluster = Cluster(fleet, rng, noise_cv, eviction)
        (self.rng,) = rng.spawn(1)
        self.keeper = Keeper(self.cluster, retention, self.at) if retention else None
        self.heap: list[tuple[float, int, int, Callable[[float], None]]] = []
        self.sequence = 0
        self.flights: dict[str, _Flight] = {}
        self.kept: dict[str, int] = {}  # call -> endpoint that keeps its prefill's blocks
        self.records: list[TraceRecord] = []
        self.queue: Iterator[RunSpec] = iter(())  # runs that wait for a client
        self.think_s = 0.0

    def at(self, time_s: float, kind: int, action: Callable[[float], None]) -> None:
        self.sequence += 1
        heapq.heappush(self.heap, (time_s, kind, self.sequence, action))

    def run(
        self,
        specs: Sequence[RunSpec],
        disturbances: Sequence[Disturbance],
        clients: ClosedLoop | None,
    ) -> list[TraceRecord]:
        for number, disturbance in enumerate(disturbances):
            self.disturb(number, disturbance)
        if clients is None:
            for spec in specs:
                self.at(spec.arrival_s, 2, lambda now, spec=spec: self.start(spec, now))  # type: ignore[misc]
        else:
            self.queue, self.think_s = iter(specs), clients.think_s
            for _ in range(clients.clients):
                self.at(0.0, 2, self.next_run)
        if self.horizon:
            self.at(0.0, 3, self.look_ahead)
        heap, cluster = self.heap, self.cluster
        while True:
            soonest = cluster.next_event_s()
            if heap and heap[0][0] < soonest:
                time_s, _, _, action = heapq.heappop(heap)
                action(time_s)
            elif soonest < math.inf:
                cluster.advance(soonest, self.engine_event)
            else:
                break
        if self.flights:
            raise NoEndpointAvailable(
                f"{len(self.flights)} calls never finished: "
                "no endpoint that is up serves their model and has room for them"
            )
        return self.records

    def look_ahead(self, now_s: float) -> None:
        """Let the rolling horizon plan, for as long as anything else is to happen."""
        assert self.horizon is not None  # noqa: S101 - scheduled only with one
        if not self.heap and self.cluster.next_event_s() == math.inf:
            return
        up = [
            one.id for one, well in zip(self.fleet.endpoints, self.cluster.up, strict=True) if well
        ]
        answer = self.horizon.look(now_s, up, self.records)
        if answer is not None:
            self.at(answer[0], 1, answer[1])
        self.at(now_s + POLL_S, 3, self.look_ahead)

    # -- runs ---------------------------------------------------------------------------------

    def next_run(self, now_s: float) -> None:
        spec = next(self.queue, None)
        if spec is not None:
            self.start(replace(spec, arrival_s=now_s), now_s)

    def start(self, spec: RunSpec, now_s: float) -> None:
        children: list[list[int]] = [[] for _ in spec.tasks]
        for task in spec.tasks:
            for pred in task.preds:
                children[pred].append(task.index)
        estimate = self.forecaster.estimates.workflows.get(spec.workflow_hash)
        predicted = None
        if estimate is not None:
            starts = [task.node for task in spec.tasks if not task.preds]
            known = [estimate.remaining_s[n] for n in starts if n in estimate.remaining_s]
            predicted = max(known) if known else None
        run = _Run(
            spec=spec,
            predicted_s=predicted,
            waiting=[len(task.preds) for task in spec.tasks],
            children=children,
            parents=_parent_calls(spec),
            left=len(spec.tasks),
        )
        self.tell(
            RunStarted(
                run_id=spec.run_id,
                workflow_hash=spec.workflow_hash,
                now_s=now_s,
                tenant=spec.tenant,
            )
        )
        if self.horizon:
            self.horizon.arrived(spec.workflow_hash, now_s)
        if spec.patience_s is not None:
            self.at(now_s + spec.patience_s, 1, lambda now: self.give_up(run, "cancelled", now))
        for task in spec.tasks:
            if not task.preds:
                self.release(run, task, now_s)
        if not spec.tasks:
            self.end(run, "ok", now_s)

    def release(self, run: _Run, task: Task, now_s: float) -> None:
        if task.kind == "llm":
            self.at(
                now_s + task.delay_s + self.dispatch_s,
                1,
                lambda now, ready=now_s + task.delay_s: self.send(run, task, ready, now),  # type: ignore[misc]
            )
        else:
            if self.observed:
                self.tell(ToolStarted(run_id=run.spec.run_id, node=task.node, now_s=now_s))
            self.at(now_s + task.delay_s, 1, lambda now: self.tool_done(run, task, now_s, now))

    def tool_done(self, run: _Run, task: Task, start_s: float, now_s: float) -> None:
        if run.over:
            return
        if self.observed:
            self.tell(ToolFinished(run_id=run.spec.run_id, node=task.node, now_s=now_s))
        if task.kind == "tool":
            self.records.append(
                ToolRecord(
                    run_id=run.spec.run_id,
                    workflow_hash=run.spec.workflow_hash,
                    node=task.node,
                    start_s=start_s,
                    finish_s=now_s,
                )
            )
        self.done(run, task, now_s)

    def done(self, run: _Run, task: Task, now_s: float) -> None:
        spec = run.spec
        for branch, outcome in task.outcomes:
            if self.observed:
                self.tell(
                    BranchTaken(run_id=spec.run_id, branch=branch, outcome=outcome, now_s=now_s)
                )
            visit = run.branch_visits.get(branch, 0)
            run.branch_visits[branch] = visit + 1
            self.records.append(
                BranchRecord(
                    run_id=spec.run_id,
                    workflow_hash=spec.workflow_hash,
                    branch=branch,
                    outcome=outcome,
                    time_s=now_s,
                    visit=visit,
                )
            )
        run.left -= 1
        for child in run.children[task.index]:
            run.waiting[child] -= 1
            if run.waiting[child] == 0:
                self.release(run, spec.tasks[child], now_s)
        if run.left == 0:
            self.end(run, "ok", now_s)

    def give_up(self, run: _Run, status: str, now_s: float) -> None:
        """End a run early, and all its calls with it."""
        if run.over:
            return
        for flight in list(run.flights.values()):
            self.withdraw(flight, now_s)
            self.tell(CallCancelled(call_id=flight.call.call_id, now_s=now_s))
            self.record(flight, "cancelled", now_s)
        self.end(run, status, now_s)

    def end(self, run: _Run, status: str, now_s: float) -> None:
        spec = run.spec
        run.over = True
        self.tell(RunEnded(run_id=spec.run_id, now_s=now_s))
        if self.keeper:
            self.keeper.ended(spec.run_id, now_s)
        if self.horizon:
            self.horizon.ended(spec.workflow_hash)
        self.records.append(
            RunRecord(
                run_id=spec.run_id,
                workflow=spec.workflow,
                workflow_hash=spec.workflow_hash,
                arrival_s=spec.arrival_s,
                finish_s=now_s,
                status=status,
                session_id=spec.session_id,
                tenant=spec.tenant,
                predicted_s=run.predicted_s,
                calls=run.calls,
                deadline_s=spec.deadline_s,
            )
        )
        think_s = self.rng.exponential(self.think_s) if self.think_s else 0.0
        self.at(now_s + think_s, 2, self.next_run)

    # -- calls --------------------------------------------------------------------------------

    def send(self, run: _Run, task: Task, ready_s: float, now_s: float, attempt: int = 0) -> None:
        if run.over:
            return
        spec = run.spec
        run.calls += attempt == 0
        chain = task.chain
        prompt_tokens = task.prompt_tokens
        call = Call(
            call_id=f"{spec.run_id}/{task.index}" + (f"#{attempt}" if attempt else ""),
            run_id=spec.run_id,
            workflow_hash=spec.workflow_hash,
            node=task.node,
            site=task.site or "",
            prompt_tokens=prompt_tokens,
            prefix=chain[: prompt_tokens // BLOCK_TOKENS],
            prefix_tokens=BLOCK_TOKENS,
            run_arrival_s=spec.arrival_s,
            ready_s=ready_s,
            visit=task.visit,
            max_tokens=task.max_tokens,
            session_id=spec.session_id,
            tenant=spec.tenant,
            deadline_s=spec.deadline_s,
            parents=run.parents[task.index],
        )
        flight = _Flight(run, task, call, chain, attempt)
        self.flights[call.call_id] = run.flights[call.call_id] = flight
        before = self.timer() if self.timer else 0.0
        commands = self.router.handle(CallArrived(call=call, now_s=now_s))
        if self.timer:
            flight.decision_us = (self.timer() - before) * 1e6
        if self.horizon:
            self.horizon.decided(now_s)
        self.obey(commands, now_s)

    def tell(self, event: Event) -> None:
        """Tell the router, and obey once the present event is dealt with everywhere."""
        commands = self.router.handle(event)
        if commands:
            self.at(event.now_s, 1, lambda now: self.obey(commands, now))

    def obey(self, commands: Sequence[Command], now_s: float) -> None:
        for command in commands:
            if isinstance(command, Send):
                flight = self.flights.get(command.call_id)
                if flight is None:
                    continue  # its run was given up in the same instant
                flight.send, flight.sent_s = command, now_s
                if self.cluster.up[command.endpoint]:
                    self.submit(flight, command.endpoint, now_s)
                else:  # it crashed in the same instant
                    self.fail(flight, "endpoint down", now_s)
            elif command.until_s is not None:
                wake_s = max(command.until_s, now_s)
                self.at(wake_s, 1, lambda now: self.tell(Tick(now_s=now)))

    def submit(self, flight: _Flight, index: int, now_s: float) -> None:
        """Send a flight's first request, or hand it over to its decode endpoint."""
        call, send = flight.call, flight.send
        assert send is not None  # noqa: S101 - the caller has just got or kept it
        flight.at = index
        splits = send.decode_endpoint is not None
        remote = call.prompt_tokens if flight.handed_over else 0
        if self.keeper and not splits:
            remote = self.keeper.sent(call.run_id, index, flight.chain, now_s)
        scheduled = self.fleet.endpoints[index].scheduling == "priority"
        flight.request = EngineRequest(
            request_id=call.call_id,
            prompt_tokens=call.prompt_tokens,
            output_tokens=1 if flight.prefilling else flight.task.output_tokens,
            block_hashes=flight.chain,
            priority=send.priority if scheduled else 0,
            arrival_s=now_s,
            remote_tokens=min(remote, call.prompt_tokens),
            keep_blocks=flight.prefilling,
        )
        self.cluster.engine(index).submit(flight.request, now_s)

    def engine_event(self, event: EngineEvent) -> None:
        flight = self.flights.get(event.request.request_id)
        if flight is None or isinstance(event, Preempted):
            return  # None: an event of the same instant has ended its run
        if isinstance(event, PullStarted):
            self.pull(flight, event.tokens, event.time_s)
        elif not isinstance(event, Finished):
            if not flight.prefilling:
                flight.first_token_s = event.time_s
                self.tell(FirstToken(call_id=flight.call.call_id, now_s=event.time_s))
                if self.keeper:
                    self.keeper.let_go(flight.call.run_id, event.time_s)
        elif flight.prefilling:
            self.hand_over(flight, event.time_s)
        else:
            self.finish(flight, event.time_s)

    def finish(self, flight: _Flight, now_s: float) -> None:
        task, call = flight.task, flight.call
        if not flight.handed_over and flight.request:
            flight.cached_tokens = flight.request.cached_tokens
        self.tell(
            CallFinished(
                call_id=call.call_id,
                now_s=now_s,
                output_tokens=task.output_tokens,
                prompt_tokens=call.prompt_tokens,
                cached_tokens=flight.cached_tokens,
            )
        )
        self.record(flight, "ok", now_s)
        if self.keeper and flight.run.left > 1 and not flight.handed_over:
            context_tokens = call.prompt_tokens + task.output_tokens
            engine = self.cluster.engine(flight.at)
            self.keeper.idle(
                Idle(
                    call=call,
                    endpoint=flight.at,
                    context_tokens=context_tokens,
                    kv_usage=engine.kv_usage,
                    now_s=now_s,
                ),
                # The last token's KV was never computed.
                flight.chain[: (context_tokens - 1) // BLOCK_TOKENS],
            )
        self.done(flight.run, task, now_s)

    def fail(self, flight: _Flight, reason: str, now_s: float) -> None:
        """Fail an attempt that is off its engines; try again, or fail the run."""
        self.tell(CallFailed(call_id=flight.call.call_id, now_s=now_s, reason=reason))
        self.record(flight, "failed", now_s)
        if flight.attempt + 1 < self.max_attempts:
            self.send(flight.run, flight.task, flight.call.ready_s, now_s, flight.attempt + 1)
        else:
            self.give_up(flight.run, "failed", now_s)

    def withdraw(self, flight: _Flight, now_s: float, *, lost: bool = False) -> None:
        """Take a flight off its engines, links and leases; ``lost`` if its endpoint has crashed."""
        call_id = flight.call.call_id
        if flight.send is None:
            return
        self.cluster.stop(call_id, now_s)
        if not lost:
            engine = self.cluster.engine(flight.at)
            if not engine.abort(call_id, now_s):
                engine.release(call_id, now_s)
        if call_id in self.kept:
            # A decode endpoint that is gone cannot say that it needs the blocks no more.
            delay_s = self.transfers.lease_s if lost else 0.0
            self.at(now_s + delay_s, 1, lambda now: self.unkeep(call_id, now))

    def record(self, flight: _Flight, status: str, now_s: float) -> None:
        """Write an attempt's record and forget the attempt."""
        task, call, send = flight.task, flight.call, flight.send
        del self.flights[call.call_id], flight.run.flights[call.call_id]
        if send is None:
            return  # it was never sent
        endpoints = self.fleet.endpoints
        ok = status == "ok"
        last = send.endpoint if send.decode_endpoint is None else send.decode_endpoint
        self.records.append(
            CallRecord(
                run_id=call.run_id,
                call_id=call.call_id,
                workflow_hash=call.workflow_hash,
                node=call.node,
                site=call.site,
                ready_s=call.ready_s,
                sent_s=flight.sent_s,
                endpoint=endpoints[last].id,
                prompt_tokens=call.prompt_tokens,
                output_tokens=task.output_tokens if ok else 0,
                first_token_s=flight.first_token_s,
                finish_s=now_s,
                cached_tokens=flight.cached_tokens if ok else None,
                max_tokens=call.max_tokens,
                visit=task.visit,
                attempt=flight.attempt,
                status=status,
                policy=self.policy.name,
                reason=send.reason,
                predicted_finish_s=send.predicted_finish_s,
                predicted_output_tokens=send.predicted_output_tokens,
                in_flight=send.in_flight,
                decision_us=flight.decision_us,
                **elsewhere(send, self.fleet),
                prefill_endpoint=None
                if send.decode_endpoint is None
                else endpoints[send.endpoint].id,
            )
        )

    # -- KV on the move -----------------------------------------------------------------------

    def hand_over(self, flight: _Flight, now_s: float) -> None:
        """Send a prefilled call to its decode endpoint."""
        call_id, send = flight.call.call_id, flight.send
        assert send is not None and send.decode_endpoint is not None  # noqa: S101, PT018
        assert flight.request is not None  # noqa: S101 - it has just finished
        flight.cached_tokens = flight.request.cached_tokens
        self.kept[call_id] = send.endpoint
        self.tell(PrefillFinished(call_id=call_id, now_s=now_s))
        if self.cluster.up[send.decode_endpoint]:
            self.submit(flight, send.decode_endpoint, now_s)
        else:
            self.withdraw(flight, now_s, lost=True)
            self.fail(flight, "decode endpoint down", now_s)

    def pull(self, flight: _Flight, tokens: int, now_s: float) -> None:
        """Bring the KV that a request waits for: from its prefill endpoint, or from the host."""
        call_id, target = flight.call.call_id, flight.at
        if not flight.handed_over:
            self.cluster.move(
                call_id, [("pcie", target)], tokens, target, now_s,
                lambda now: self.cluster.engine(target).pulled(call_id, now),
            )  # fmt: skip
            return

        def begin(now_s: float) -> None:
            if self.flights.get(call_id) is not flight:
                return
            source = self.kept.get(call_id)
            if source is None:
                self.lose(flight, now_s)
                return
            self.cluster.move(
                call_id, [("out", source), ("in", target)], tokens, source, now_s,
                lambda now: self.arrive(flight, now),
            )  # fmt: skip

        self.at(now_s + self.transfers.setup_s, 1, begin)

    def arrive(self, flight: _Flight, now_s: float) -> None:
        """End a pull between endpoints."""
        call_id = flight.call.call_id
        if self.transfers.failure_ratio and self.rng.random() < self.transfers.failure_ratio:
            self.lose(flight, now_s)
            return
        self.unkeep(call_id, now_s)
        self.cluster.engine(flight.at).pulled(call_id, now_s)

    def lose(self, flight: _Flight, now_s: float) -> None:
        """Deal with KV that will not come."""
        call_id = flight.call.call_id
        if self.transfers.on_failure == "fail":
            self.withdraw(flight, now_s)
            self.fail(flight, "KV transfer failed", now_s)
        else:
            self.cluster.engine(flight.at).pulled(call_id, now_s, ok=False)
            self.unkeep(call_id, now_s)

    def unkeep(self, call_id: str, now_s: float) -> None:
        """Let a prefill endpoint have its blocks back."""
        source = self.kept.pop(call_id, None)
        if source is not None:
            self.cluster.engine(source).release(call_id, now_s)

    # -- faults -------------------------------------------------------------------------------

    def disturb(self, number: int, disturbance: Disturbance) -> None:
        """Schedule a fault."""
        index = self.fleet.index_of(disturbance.endpoint)  # type: ignore[arg-type]
        if disturbance.kind == "crash":
            self.at(disturbance.from_s, 1, lambda now: self.crash(index, now))
            if disturbance.to_s < math.inf:
                self.at(disturbance.to_s, 1, lambda now: self.restart(index, now))
        for time_s, factor in disturbance.factors():

            def change(now_s: float, factor: float = factor) -> None:
                self.cluster.set_factor(index, number, factor, now_s)

            self.at(time_s, 1, change)

    def crash(self, index: int, now_s: float) -> None:
        if not self.cluster.up[index]:
            return
        self.cluster.crash(index)
        self.tell(EndpointDown(endpoint=index, now_s=now_s))
        if self.keeper:
            self.keeper.lost(index, now_s)
        orphans = {call_id for call_id, source in self.kept.items() if source == index}
        for call_id in orphans:
            del self.kept[call_id]
        hit = [flight for flight in self.flights.values() if flight.send is not None]
        for flight in hit:
            if self.flights.get(flight.call.call_id) is not flight:
                continue  # its run has failed meanwhile
            if flight.at == index:
                self.withdraw(flight, now_s, lost=True)
                self.fail(flight, "endpoint down", now_s)
            elif flight.call.call_id in orphans and self.cluster.stop(flight.call.call_id, now_s):
                self.lose(flight, now_s)

    def restart(self, index: int, now_s: float) -> None:
        if not self.cluster.up[index]:
            self.cluster.restart(index, now_s)
            self.tell(EndpointUp(endpoint=index, now_s=now_s))


def _parent_calls(spec: RunSpec) -> list[tuple[str, ...]]:
    """Return for each task the ids of the calls that lead to it, directly or through tools."""
    found: list[tuple[str, ...]] = []
    for task in spec.tasks:
        calls: dict[str, None] = {}
        for pred in task.preds:
            if spec.tasks[pred].kind == "llm":
                calls[f"{spec.run_id}/{pred}"] = None
            else:
                calls.update(dict.fromkeys(found[pred]))
        found.append(tuple(calls))
    return found


def simulate(
    specs: Sequence[RunSpec],
    fleet: Fleet,
    policy: Policy,
    forecaster: Forecaster,
    *,
    seed: int = 0,
    noise_cv: float = 0.0,
    dispatch_s: float = 0.0,
    timer: Callable[[], float] | None = None,
    clients: ClosedLoop | None = None,
    disturbances: Sequence[Disturbance] = (),
    transfers: Transfers | None = None,
    retention: Retention | None = None,
    eviction: Callable[[], Eviction] | None = None,
    max_attempts: int = 3,
    horizon: Horizon | None = None,
) -> list[TraceRecord]:
    """Run a workload over a fleet under a policy.

    Parameters
    ----------
    specs
        The realised runs.
    policy
        A fresh policy (it may keep state of its own).
    forecaster
        What the policy may believe; the engines follow the fleet's own latency rows.
    seed
        Of the engines' step-time noise, of think times and of failing transfers.
    noise_cv
        Coefficient of variation of each step's time, >= 0.
    dispatch_s
        Decision time charged to every call, s.
    timer
        A clock in seconds to measure decisions with, or None for none (the records then hold
        no ``decision_us``, and are the same in each repetition).
    clients
        Closed loop: the runs are taken in order as clients come free, their arrival times do not
        count. None is the open loop.
    disturbances
        Stragglers, drift and crashes.
    transfers
        How prefill/decode pools hand KV over; None for the defaults.
    retention
        What becomes of a run's KV between its calls; None leaves it to the cache. It does not
        apply to calls that are split over pools.
    eviction
        Makes each engine's eviction order; None is vLLM's LRU.
    max_attempts
        Attempts of a call before its run fails, >= 1.
    horizon
        Fresh; replaces the policy's table as the simulation goes on.

    Returns
    -------
    list of TraceRecord
        In order of completion.

    Raises
    ------
    NoEndpointAvailable
        If a call fits no endpoint.
    FleetError
        If a disturbance names an unknown endpoint.
    """
    simulation = _Simulation(
        fleet,
        policy,
        forecaster,
        np.random.default_rng(seed),
        noise_cv=noise_cv,
        dispatch_s=dispatch_s,
        timer=timer,
        transfers=transfers or Transfers(),
        retention=retention,
        eviction=eviction,
        max_attempts=max_attempts,
        horizon=horizon,
    )
    return simulation.run(specs, disturbances, clients)
