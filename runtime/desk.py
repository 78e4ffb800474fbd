"""What forwarding asks of the gateway's state: one call from its arrival to its end.

`Desk` and `Case` are the seam between passing bytes on and deciding. In a gateway of one process
`LocalDesk` answers from the `Control` beside it; a worker process asks its hub
(`runtime.processes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from itertools import count
from types import TracebackType
from typing import Any, Protocol, Self
from uuid import uuid4

from planner.dispatch.events import Call, Send
from planner.domain.errors import NoEndpointAvailable
from planner.domain.fleet import Endpoint
from runtime.admission import Asked, Pass
from runtime.config import GatewayConfig
from runtime.control import Control
from runtime.dispatcher import Ticket
from runtime.fingerprint import Prompt
from runtime.guard import Patience
from runtime.hedging import Budget
from runtime.hints import deadline_s, head_start_s
from runtime.keys import KeyedTenancy
from runtime.limits import Tenant
from runtime.metrics import GatewayMetrics
from runtime.tracing import SpanLike
from runtime.wire import ApiError, Usage

__all__ = ["Arrival", "Case", "Desk", "LocalCase", "LocalDesk", "Seat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A call as it arrives.

    Parameters
    ----------
    headers
        Of the request, by name in lower case.
    payload
        Its body; what the prompt is made of may be left out.
    prompt
        Fingerprint of that.
    model
        Asked for; None lets any endpoint answer.
    tenant
        Whose it is.
    request_id
        For traces.
    stream
        Whether the answer is streamed.
    """

    headers: Mapping[str, str]
    payload: Mapping[str, Any]
    prompt: Prompt
    model: str | None
    tenant: Tenant
    request_id: str
    stream: bool


class Seat(Protocol):
    """One attempt on one endpoint, settled exactly once; see `runtime.dispatcher.Ticket`."""

    @property
    def send(self) -> Send:
        """What was decided."""
        ...

    @property
    def call_id(self) -> str:
        """Of the attempt."""
        ...

    @property
    def decision_us(self) -> float:
        """Time the decision took, microseconds."""
        ...

    def first_token(self) -> None:
        """Note that the first byte of the answer came."""
        ...

    def expect_first_token(self) -> None:
        """Note the first token when it is due, unseen."""
        ...

    def fail(self, reason: str) -> None:
        """Settle: the endpoint failed the call or refused it."""
        ...

    def __enter__(self) -> Self:
        """Return itself."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Settle it as cancelled if it is not settled."""
        ...


class Case(Protocol):
    """A call that was admitted.

    Attributes
    ----------
    head_start_s
        Seconds that the client's hints put it ahead of others of its age.
    waited_s
        Wall seconds it waited to be admitted.
    """

    head_start_s: float
    waited_s: float

    async def place(self, exclude: frozenset[int], attempt: int) -> Seat:
        """Return a seat for an attempt, the first being 0, on an endpoint not excluded.

        Raises
        ------
        ApiError
            503 if no endpoint can take it.
        """
        ...

    def patience(self, seat: Seat, *, attempt: int, exclude: frozenset[int]) -> Patience:
        """Return how long an attempt just placed is waited for."""
        ...

    def others(self, exclude: frozenset[int]) -> bool:
        """Return whether an endpoint that is up and not excluded could take the call."""
        ...

    def span(self, seat: Seat) -> SpanLike | None:
        """Return a span for an attempt if the call is traced here."""
        ...

    def finish(self, seat: Seat, usage: Usage | None, chunks: int) -> None:
        """Settle: the answer is complete; ``chunks`` are its events if it was streamed."""
        ...


class Desk(Protocol):
    """Where forwarding gets its facts and decisions."""

    @property
    def config(self) -> GatewayConfig:
        """Settings in use."""
        ...

    @property
    def tenancy(self) -> KeyedTenancy:
        """Tells tenants apart."""
        ...

    @property
    def models(self) -> Sequence[str]:
        """That are served."""
        ...

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """All places of the fleet."""
        ...

    @property
    def table_version(self) -> str:
        """Of the dispatch table in use, or an empty string."""
        ...

    @property
    def metrics(self) -> GatewayMetrics:
        """What is counted."""
        ...

    @property
    def hedges(self) -> Budget:
        """Of second attempts."""
        ...

    def case(self, arrival: Arrival) -> AbstractAsyncContextManager[Case]:
        """Return the call, admitted while the block runs.

        Entering it raises `ApiError` if it is refused.
        """
        ...

    def endpoint_failed(self, index: int, reason: str, *, unreachable: bool = False) -> None:
        """Note a failure of an endpoint."""
        ...

    def endpoint_refused(self, index: int) -> None:
        """Note that an endpoint was too busy to take a call."""
        ...


class LocalDesk:
    """The desk of the process that decides."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._ids = count(1)
        self._process = uuid4().hex[:6]  # call ids differ between restarts of one trace
        self.endpoint_failed = control.endpoint_failed
        self.endpoint_refused = control.endpoint_refused

    @property
    def config(self) -> GatewayConfig:
        """See `Desk`."""
        return self.control.config

    @property
    def tenancy(self) -> KeyedTenancy:
        """See `Desk`."""
        return self.control.tenancy

    @property
    def models(self) -> Sequence[str]:
        """See `Desk`."""
        return self.control.models

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """See `Desk`."""
        return self.control.fleet.endpoints

    @property
    def table_version(self) -> str:
        """See `Desk`."""
        return self.control.table_version

    @property
    def metrics(self) -> GatewayMetrics:
        """See `Desk`."""
        return self.control.metrics

    @property
    def hedges(self) -> Budget:
        """See `Desk`."""
        return self.control.guard.hedges

    def case(self, arrival: Arrival) -> LocalCase:
        """See `Desk`."""
        return LocalCase(self.control, arrival, f"{self._process}-{next(self._ids)}")


class LocalCase:
    """See `Case`; an async context manager.

    Parameters
    ----------
    call_id
        Under which the router knows its first attempt.
    """

    def __init__(self, control: Control, arrival: Arrival, call_id: str) -> None:
        self._control = control
        self._arrival = arrival
        now_s = control.clock.now_s()
        tenant, headers, prompt = arrival.tenant, arrival.headers, arrival.prompt
        identity = control.identify(headers, arrival.payload, prompt, tenant)
        hints = control.hints(headers, arrival.payload, tenant)
        self._identity = identity
        self._run = run = control.begin_call(identity, tenant)
        age_s = now_s - run.since_s
        self.head_start_s = head_start_s(hints, age_s=age_s)
        self.waited_s = 0.0
        due_s = deadline_s(hints, age_s=age_s)
        tokens, per_item = control.scale.tokens(prompt, arrival.model)
        max_tokens = _max_tokens(arrival.payload)
        room_tokens = control.room_tokens(arrival.model)
        if tokens + (max_tokens or 1) > room_tokens:
            # By our estimate no endpoint can hold it, so it would wait in vain. An endpoint
            # counts exactly, and refuses in its own words what is really too long.
            tokens, max_tokens = min(tokens, room_tokens - 1), None
        self.call = Call(
            call_id=call_id,
            run_id=run.run_id,
            workflow_hash=run.workflow_hash,
            node=identity.node,
            site=identity.site,
            prompt_tokens=tokens,
            prefix=prompt.chain,
            prefix_tokens=per_item,
            run_arrival_s=run.since_s - self.head_start_s,
            ready_s=now_s,
            visit=identity.visit,
            max_tokens=max_tokens,
            session_id=run.session_id,
            model=arrival.model,
            tenant=tenant.name,
            hinted_tokens=hints.output_tokens,
            deadline_s=None if due_s is None else due_s + self.head_start_s,
        )
        self._urgency = hints.priority or 0
        if control.tenancy.keyed:
            # A client may step back for others of its tenant, not ahead of other tenants.
            self._urgency = min(0, self._urgency)
        self._span = control.tracing.start(
            "call",
            {"run_id": run.run_id, "node": identity.node, "request_id": arrival.request_id},
            parent=None if "traceparent" in headers else run.span,
            headers=headers,
        )
        self._admitted: Pass

    async def __aenter__(self) -> Self:
        control, call, tenant = self._control, self.call, self._arrival.tenant
        try:
            output_tokens = control.router.forecaster.of(call).output_tokens
            asked = Asked(
                tenant=tenant,
                begun=self._run.admitted,
                service_s=control.service_s(call, output_tokens),
                tokens=call.prompt_tokens + output_tokens,
                priority=tenant.priority + self._urgency,
            )
            self._admitted = await control.admission.enter(asked)
        except BaseException:
            self._leave()
            raise
        self._run.admitted = True
        self.waited_s = self._admitted.waited_s
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._admitted.__exit__(kind, error, traceback)
        self._leave()

    def _leave(self) -> None:
        run = self._run
        self._span.end()
        run.open_calls -= 1
        run.last_s = self._control.clock.now_s()
        if self._identity.final and run.open_calls == 0:
            self._control.end_run(run.run_id)

    async def place(self, exclude: frozenset[int], attempt: int) -> Ticket:
        """See `Case`."""
        call = self.call
        # The router knows each attempt as a call of its own.
        tried = call if attempt == 0 else replace(call, call_id=f"{call.call_id}.{attempt}")
        try:
            return await self._control.place(tried, exclude, self._identity.attempt + attempt)
        except NoEndpointAvailable as error:
            raise ApiError(
                503,
                f"{error}. Try again later.",
                retry_after_s=self._control.retry_after_s(call.model),
                reason="no_endpoint",
            ) from error

    def patience(self, seat: Seat, *, attempt: int, exclude: frozenset[int]) -> Patience:
        """See `Case`."""
        assert isinstance(seat, Ticket)  # noqa: S101 - those of this desk are
        return self._control.patience(
            seat, streams=self._arrival.stream, attempt=attempt, exclude=exclude
        )

    def others(self, exclude: frozenset[int]) -> bool:
        """See `Case`."""
        return self._control.others(self.call, exclude)

    def span(self, seat: Seat) -> SpanLike:
        """Return a span for an attempt: what was decided, and what was forecast."""
        control, send = self._control, seat.send
        return control.tracing.start(
            "attempt",
            {
                "endpoint": control.fleet.endpoints[send.endpoint].id,
                "policy": control.router.policy.name,
                "reason": send.reason,
                "plan": control.table_version,
                "prompt_tokens": self.call.prompt_tokens,
                "cached_tokens": send.cached_tokens,
                "predicted_output_tokens": send.predicted_output_tokens,
                "router_us": seat.decision_us,
            },
            parent=self._span,
        )

    def finish(self, seat: Seat, usage: Usage | None, chunks: int) -> None:
        """See `Case`."""
        assert isinstance(seat, Ticket)  # noqa: S101 - as above
        control, call = self._control, seat.call
        if usage is None:
            # Without usage a stream's events are the best count there is.
            seat.finish(output_tokens=chunks, prompt_tokens=None, cached_tokens=None)
            self._admitted.used(call.prompt_tokens + chunks)
            return
        if usage.response_id is not None:
            control.runs.answered(usage.response_id, call.run_id)
        prompt_tokens = usage.prompt_tokens
        if prompt_tokens is not None:
            control.scale.learn(call.model, self._arrival.prompt.size_bytes, prompt_tokens)
        seat.finish(
            output_tokens=usage.output_tokens,
            prompt_tokens=prompt_tokens,
            cached_tokens=usage.cached_tokens,
        )
        if prompt_tokens is None:
            prompt_tokens = call.prompt_tokens
        self._admitted.used(prompt_tokens + usage.output_tokens)


def _max_tokens(payload: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = payload.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
