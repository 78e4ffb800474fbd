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
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from planner.dispatch.events import (
    Call,
    CallArrived,
    CallFinished,
    FirstToken,
    RunEnded,
    RunStarted,
    Send,
)
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies.base import Policy
from planner.dispatch.router import Router
from planner.domain.blocks import BLOCK_TOKENS, Segment, block_hashes
from planner.domain.errors import NoEndpointAvailable
from planner.domain.fleet import Fleet
from planner.domain.run import RunSpec, Task
from planner.domain.trace import BranchRecord, CallRecord, RunRecord, ToolRecord, TraceRecord
from planner.sim.engine import Engine, EngineConfig, EngineRequest, Finished
from planner.sim.engine import FirstToken as EngineFirstToken
from planner.sim.steptime import RowStepTime

__all__ = ["simulate"]


@dataclass(slots=True)
class _Run:
    spec: RunSpec
    predicted_s: float | None
    waiting: list[int]
    children: list[list[int]]
    left: int
    calls: int = 0
    branch_visits: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Flight:
    run: _Run
    task: Task
    call: Call
    sent_s: float
    send: Send
    request: EngineRequest
    decision_us: float | None
    first_token_s: float | None = None


class _Simulation:
    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        forecaster: Forecaster,
        rng: np.random.Generator,
        noise_cv: float,
        dispatch_s: float,
        timer: Callable[[], float] | None,
    ) -> None:
        self.fleet = fleet
        self.router = Router(fleet, policy, forecaster)
        self.forecaster = forecaster
        self.policy = policy
        self.dispatch_s = dispatch_s
        self.timer = timer
        self.engines = [
            Engine(
                EngineConfig.from_endpoint(endpoint),
                RowStepTime(endpoint.latency),
                rng=child,
                noise_cv=noise_cv,
            )
            for endpoint, child in zip(
                fleet.endpoints, rng.spawn(len(fleet.endpoints)), strict=True
            )
        ]
        self.engine_due = [math.inf] * len(self.engines)
        self.heap: list[tuple[float, int, int, Callable[[float], None]]] = []
        self.sequence = 0
        self.flights: dict[str, _Flight] = {}
        self.records: list[TraceRecord] = []

    def at(self, time_s: float, kind: int, action: Callable[[float], None]) -> None:
        self.sequence += 1
        heapq.heappush(self.heap, (time_s, kind, self.sequence, action))

    def run(self, specs: Iterable[RunSpec]) -> list[TraceRecord]:
        for spec in specs:
            self.at(spec.arrival_s, 2, lambda now, spec=spec: self.start(spec, now))  # type: ignore[misc]
        heap, due, engines = self.heap, self.engine_due, self.engines
        while True:
            soonest = min(due)
            if heap and heap[0][0] < soonest:
                time_s, _, _, action = heapq.heappop(heap)
                action(time_s)
            elif soonest < math.inf:
                index = due.index(soonest)
                for event in engines[index].advance(soonest):
                    self.engine_event(event)
                due[index] = engines[index].next_event_s()
            else:
                break
        if self.flights or self.router.held:
            raise NoEndpointAvailable(
                f"{len(self.flights) + self.router.held} calls never finished: "
                "no endpoint of the fleet serves their model"
            )
        return self.records

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
            left=len(spec.tasks),
        )
        self.router.handle(
            RunStarted(run_id=spec.run_id, workflow_hash=spec.workflow_hash, now_s=now_s)
        )
        for task in spec.tasks:
            if not task.preds:
                self.release(run, task, now_s)
        if not spec.tasks:
            self.end(run, now_s)

    def release(self, run: _Run, task: Task, now_s: float) -> None:
        if task.kind == "llm":
            self.at(
                now_s + task.delay_s + self.dispatch_s,
                1,
                lambda now, ready=now_s + task.delay_s: self.send(run, task, ready, now),  # type: ignore[misc]
            )
        else:
            self.at(now_s + task.delay_s, 1, lambda now: self.tool_done(run, task, now_s, now))

    def tool_done(self, run: _Run, task: Task, start_s: float, now_s: float) -> None:
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

    def send(self, run: _Run, task: Task, ready_s: float, now_s: float) -> None:
        spec = run.spec
        run.calls += 1
        chain = block_hashes((*task.prompt, Segment(task.output_key, task.output_tokens)))
        prompt_tokens = task.prompt_tokens
        call = Call(
            call_id=f"{spec.run_id}/{task.index}",
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
        )
        before = self.timer() if self.timer else 0.0
        commands = self.router.handle(CallArrived(call=call, now_s=now_s))
        decision_us = (self.timer() - before) * 1e6 if self.timer else None
        for command in commands:
            if not isinstance(command, Send):
                continue
            endpoint = self.fleet.endpoints[command.endpoint]
            request = EngineRequest(
                request_id=call.call_id,
                prompt_tokens=prompt_tokens,
                output_tokens=task.output_tokens,
                block_hashes=chain,
                priority=command.priority if endpoint.scheduling == "priority" else 0,
                arrival_s=now_s,
            )
            engine = self.engines[command.endpoint]
            engine.submit(request, now_s)
            self.engine_due[command.endpoint] = engine.next_event_s()
            self.flights[call.call_id] = _Flight(
                run, task, call, now_s, command, request, decision_us
            )

    def engine_event(self, event: object) -> None:
        if isinstance(event, EngineFirstToken):
            flight = self.flights[event.request.request_id]
            flight.first_token_s = event.time_s
            self.router.handle(FirstToken(call_id=event.request.request_id, now_s=event.time_s))
        elif isinstance(event, Finished):
            self.finish(self.flights.pop(event.request.request_id), event.time_s)

    def finish(self, flight: _Flight, now_s: float) -> None:
        task, call, send = flight.task, flight.call, flight.send
        self.router.handle(
            CallFinished(
                call_id=call.call_id,
                now_s=now_s,
                output_tokens=task.output_tokens,
                prompt_tokens=call.prompt_tokens,
                cached_tokens=flight.request.cached_tokens,
            )
        )
        self.records.append(
            CallRecord(
                run_id=call.run_id,
                call_id=call.call_id,
                workflow_hash=call.workflow_hash,
                node=call.node,
                site=call.site,
                ready_s=call.ready_s,
                sent_s=flight.sent_s,
                endpoint=self.fleet.endpoints[send.endpoint].id,
                prompt_tokens=call.prompt_tokens,
                output_tokens=task.output_tokens,
                first_token_s=flight.first_token_s,
                finish_s=now_s,
                cached_tokens=flight.request.cached_tokens,
                max_tokens=call.max_tokens,
                visit=task.visit,
                policy=self.policy.name,
                reason=send.reason,
                predicted_finish_s=send.predicted_finish_s,
                predicted_output_tokens=send.predicted_output_tokens,
                in_flight=send.in_flight,
                decision_us=flight.decision_us,
            )
        )
        self.done(flight.run, task, now_s)

    def done(self, run: _Run, task: Task, now_s: float) -> None:
        spec = run.spec
        for branch, outcome in task.outcomes:
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
            self.end(run, now_s)

    def end(self, run: _Run, now_s: float) -> None:
        spec = run.spec
        self.router.handle(RunEnded(run_id=spec.run_id, now_s=now_s))
        self.records.append(
            RunRecord(
                run_id=spec.run_id,
                workflow=spec.workflow,
                workflow_hash=spec.workflow_hash,
                arrival_s=spec.arrival_s,
                finish_s=now_s,
                session_id=spec.session_id,
                tenant=spec.tenant,
                predicted_s=run.predicted_s,
                calls=run.calls,
            )
        )


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
        Of the engines' step-time noise.
    noise_cv
        Coefficient of variation of each step's time, >= 0.
    dispatch_s
        Decision time charged to every call, s.
    timer
        A clock in seconds to measure decisions with, or None for none (the records then hold
        no ``decision_us``, and are the same in each repetition).

    Returns
    -------
    list of TraceRecord
        In order of completion.

    Raises
    ------
    NoEndpointAvailable
        If a call fits no endpoint.
    """
    simulation = _Simulation(
        fleet, policy, forecaster, np.random.default_rng(seed), noise_cv, dispatch_s, timer
    )
    return simulation.run(specs)
