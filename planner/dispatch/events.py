"""What the router is told (events) and what it answers (commands).

Events carry only what has been revealed: a `Call` holds its prompt's size and fingerprint, never
its output length, its run's future branches or tool times. Times are seconds on the caller's
clock; the router reads no clock of its own.
"""

from __future__ import annotations

from dataclasses import field

from planner.dispatch.ranking import Ranking
from planner.domain.records import record

__all__ = [
    "BranchTaken",
    "Call",
    "CallArrived",
    "CallCancelled",
    "CallFailed",
    "CallFinished",
    "Command",
    "EndpointDown",
    "EndpointUp",
    "Event",
    "FirstToken",
    "Hold",
    "PrefillFinished",
    "RunEnded",
    "RunStarted",
    "Send",
    "Tick",
    "ToolFinished",
    "ToolStarted",
]


@record()
class Call:
    """A call that is ready, as far as it is known before it runs.

    Parameters
    ----------
    call_id
        Unique per attempt.
    run_id, workflow_hash, node, site
        Identity; empty strings when the client gave none.
    prompt_tokens
        Prompt length (an estimate in the gateway, exact in simulation), >= 0.
    prefix
        Fingerprint chain of the prompt: equal leading items mean equal leading text.
    prefix_tokens
        Tokens per item of ``prefix``, > 0.
    run_arrival_s, ready_s
        Arrival of the run, and of this call. The run's is the earlier the more urgent its client
        says it is, so that all orders by age obey.
    visit
        Earlier entries of the run into this node.
    max_tokens
        Declared limit on the output, or None.
    hinted_tokens
        Output length the client expects, >= 1, which is believed instead of the forecast; or None.
    tenant
        Whose run it is.
    deadline_s
        Hard limit of the run after its arrival, s, or None.
    parents
        Ids of the run's calls whose ends, directly or through tools, made this one ready, as far
        as they are known; the first attempt's id each.
    """

    call_id: str
    run_id: str = ""
    workflow_hash: str = ""
    node: str = ""
    site: str = ""
    prompt_tokens: int = 0
    prefix: tuple[int, ...] = ()
    prefix_tokens: float = 16.0
    run_arrival_s: float = 0.0
    ready_s: float = 0.0
    visit: int = 0
    max_tokens: int | None = None
    hinted_tokens: int | None = None
    session_id: str | None = None
    model: str | None = None
    tenant: str = "default"
    deadline_s: float | None = None
    parents: tuple[str, ...] = ()

    @property
    def least_tokens(self) -> int:
        """The least room it needs: its prompt, and what output it declares."""
        return self.prompt_tokens + (self.max_tokens or 1)


@record()
class RunStarted:
    """A run of a workflow began."""

    run_id: str
    workflow_hash: str
    now_s: float
    tenant: str = "default"


@record()
class ToolStarted:
    """A node of a run that is not a call began its work."""

    run_id: str
    node: str
    now_s: float


@record()
class ToolFinished:
    """It ended."""

    run_id: str
    node: str
    now_s: float


@record()
class BranchTaken:
    """A branch of a run was decided."""

    run_id: str
    branch: str
    outcome: str
    now_s: float


@record()
class Tick:
    """Time has passed: a `Hold` asked to be woken at this instant."""

    now_s: float


@record()
class RunEnded:
    """A run is over; nothing more of it will come."""

    run_id: str
    now_s: float


@record()
class CallArrived:
    """A call is ready to be sent; ``exclude`` names endpoints it has already failed on."""

    call: Call
    now_s: float
    exclude: frozenset[int] = frozenset()


@record()
class PrefillFinished:
    """The prefill endpoint of a call has done its part; only with prefill/decode pools."""

    call_id: str
    now_s: float


@record()
class FirstToken:
    """The first token of a call came back; ``seen`` is False where it is only due."""

    call_id: str
    now_s: float
    seen: bool = True


@record()
class CallFinished:
    """A call ended well; the token counts are the engine's, None where it did not say."""

    call_id: str
    now_s: float
    output_tokens: int
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


@record()
class CallFailed:
    """The endpoint failed the call."""

    call_id: str
    now_s: float
    reason: str = ""


@record()
class CallCancelled:
    """The client went away."""

    call_id: str
    now_s: float


@record()
class EndpointDown:
    """An endpoint (by index) takes no more calls."""

    endpoint: int
    now_s: float


@record()
class EndpointUp:
    """An endpoint takes calls again; ``cold`` says its cache is empty."""

    endpoint: int
    now_s: float
    cold: bool = True


Event = (
    RunStarted
    | RunEnded
    | CallArrived
    | PrefillFinished
    | FirstToken
    | CallFinished
    | CallFailed
    | CallCancelled
    | EndpointDown
    | EndpointUp
    | ToolStarted
    | ToolFinished
    | BranchTaken
    | Tick
)


@record()
class Send:
    """Send the call now.

    Parameters
    ----------
    endpoint
        Index in the fleet.
    priority
        For engines with the priority policy: smaller is served first (vLLM's polarity).
    reason
        Decision label for people and metrics.
    predicted_finish_s
        When the policy expects the call to finish there, on the caller's clock.
    predicted_output_tokens
        Length forecast used (mean).
    cached_tokens
        Prompt tokens expected in the endpoint's cache.
    in_flight
        Calls in flight there before this one.
    decode_endpoint
        Index of the endpoint that takes over after the prefill, or None if ``endpoint`` serves
        the call whole.
    ranking
        How the policy ranked the candidates, where it scores them in seconds and one endpoint
        serves the call whole; says why, and is no part of the command.
    """

    call_id: str
    endpoint: int
    priority: int
    reason: str
    predicted_finish_s: float
    predicted_output_tokens: float
    cached_tokens: int
    in_flight: int
    decode_endpoint: int | None = None
    ranking: Ranking | None = field(default=None, compare=False, repr=False)


@record()
class Hold:
    """Keep the call for now; a later event sends it.

    Parameters
    ----------
    reason
        ``no_endpoint`` if none can take it; else the policy's label.
    until_s
        When the router wants a `Tick` at the latest, on the caller's clock, or None.
    """

    call_id: str
    reason: str
    until_s: float | None = None


Command = Send | Hold
