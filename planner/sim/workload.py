"""Workloads: when runs arrive, and what each of them will do.

Arrival times are seconds from 0, sorted. Runs come from a workflow graph with forecasts taken as
the truth, or from recorded agent sessions, call by call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace

import numpy as np
from numpy.typing import NDArray

from planner.domain.arrivals import ArrivalWindow
from planner.domain.blocks import Segment, total_tokens
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.ids import NodeId, RunId, SiteId, WorkflowHash
from planner.domain.run import RunSpec, Task
from planner.domain.workflow import Workflow
from planner.graph.sampling import sample_run, stable_key

__all__ = [
    "SessionCall",
    "burst_arrivals",
    "gamma_arrivals",
    "poisson_arrivals",
    "replayed_arrivals",
    "run_from_session",
    "sampled_workload",
    "windowed_arrivals",
    "with_clients",
]

Times = NDArray[np.float64]


def poisson_arrivals(rate_rps: float, count: int, rng: np.random.Generator) -> Times:
    """Return ``count`` arrival times of a Poisson process with ``rate_rps`` arrivals per second."""
    if not rate_rps > 0 or count < 1:
        raise InvalidInput(
            f"rate {rate_rps!r} /s, count {count!r}",
            where="arrivals",
            remedy="use a positive rate and count",
        )
    return np.cumsum(rng.exponential(1.0 / rate_rps, size=count))


def gamma_arrivals(rate_rps: float, cv: float, count: int, rng: np.random.Generator) -> Times:
    """Return ``count`` arrivals with gamma gaps of coefficient of variation ``cv`` (> 0).

    1 is Poisson; 2 to 5 are the bursts of real services. The mean rate holds in expectation only.
    """
    if not rate_rps > 0 or count < 1 or not 0 < cv < math.inf:
        raise InvalidInput(
            f"rate {rate_rps!r} /s, cv {cv!r}, count {count!r}",
            where="arrivals",
            remedy="use a positive rate, cv and count",
        )
    return np.cumsum(rng.gamma(cv**-2, cv**2 / rate_rps, size=count))


def burst_arrivals(count: int) -> Times:
    """Return ``count`` arrivals at 0: a burst that drains."""
    if count < 1:
        raise InvalidInput(f"count {count!r}", where="arrivals", remedy="use at least 1")
    return np.zeros(count)


_LEAST_SHAPE = 0.02  # below it a window is one burst, and its gamma function overflows


def windowed_arrivals(
    windows: Sequence[ArrivalWindow], rate_rps: float, count: int, rng: np.random.Generator
) -> tuple[Times, tuple[str, ...]]:
    """Return ``count`` arrivals of many clients with their rates and gaps by window.

    Each client is a renewal process whose gaps follow its present window; a gap that crosses into
    the next window goes on at that window's rate. All rates are scaled together, so that clients,
    their bursts and their rise and fall over the day stay as recorded. It begins with a window
    taken at random, wraps round, and is brought to the mean rate in the end.

    Parameters
    ----------
    windows
        Recorded, in any order; not empty.
    rate_rps
        Mean rate wanted, > 0.

    Returns
    -------
    Times, shape (count,), and the client of each.
    """
    if not windows or not rate_rps > 0 or count < 1:
        raise InvalidInput(
            f"{len(windows)} windows, rate {rate_rps!r} /s, count {count!r}",
            where="arrivals",
            remedy="give at least one window and a positive rate and count",
        )
    starts = sorted({window.start_s for window in windows})
    begin_s = starts[int(rng.integers(len(starts)))]
    length_s = max(window.end_s for window in windows) - starts[0]
    scale = rate_rps / sum(window.rate_rps for window in windows if window.start_s == begin_s)
    by_client: dict[str, list[ArrivalWindow]] = {}
    for window in windows:
        by_client.setdefault(window.client, []).append(window)
    clients = [
        _Client(name, by_client[name], begin_s, length_s, scale, rng) for name in sorted(by_client)
    ]
    soonest = [(client.next_s(), number) for number, client in enumerate(clients)]
    heapify(soonest)
    times: list[float] = []
    names: list[str] = []
    while len(times) < count:
        time_s, number = soonest[0]
        times.append(time_s)
        names.append(clients[number].name)
        heapreplace(soonest, (clients[number].next_s(), number))
    return np.asarray(times) * (count / rate_rps / max(times[-1], 1e-9)), tuple(names)


class _Client:
    """The arrivals of one client, one after the other, from 0 on."""

    def __init__(
        self,
        name: str,
        windows: Sequence[ArrivalWindow],
        begin_s: float,
        length_s: float,
        scale: float,
        rng: np.random.Generator,
    ) -> None:
        self.name = name
        # In the order in which they come round.
        self._windows = sorted(windows, key=lambda window: (window.start_s - begin_s) % length_s)
        self._begin_s, self._length_s = begin_s, length_s
        self._scale, self._rng = scale, rng
        self._position = self._rounds = 0
        self._now_s = 0.0
        self._first = True

    def next_s(self) -> float:
        """Return the next arrival."""
        window = self._windows[self._position]
        shape = max(window.shape, _LEAST_SHAPE)
        if window.law == "gamma":
            left = float(self._rng.gamma(shape)) / shape
        else:
            left = float(self._rng.weibull(shape)) / math.gamma(1 + 1 / shape)
        if self._first:  # the recording began somewhere inside a gap
            left *= float(self._rng.random())
            self._first = False
        while True:
            window = self._windows[self._position]
            start_s = (window.start_s - self._begin_s) % self._length_s
            start_s += self._rounds * self._length_s
            end_s = start_s + window.end_s - window.start_s
            self._now_s = max(self._now_s, start_s)
            rate = window.rate_rps * self._scale
            if self._now_s + left / rate <= end_s:
                self._now_s += left / rate
                return self._now_s
            left -= max(0.0, end_s - self._now_s) * rate
            self._now_s = max(self._now_s, end_s)
            self._position += 1
            if self._position == len(self._windows):
                self._position = 0
                self._rounds += 1


def with_clients(
    runs: Sequence[RunSpec],
    tenants: Mapping[str, float] | Sequence[str],
    rng: np.random.Generator,
    *,
    deadline_s: float | None = None,
    patience_s: float | None = None,
) -> tuple[RunSpec, ...]:
    """Return the runs with tenants, a deadline and a patience.

    Parameters
    ----------
    tenants
        Shares by name, drawn at random; or the tenant of each run.
    deadline_s
        Hard limit after arrival, > 0, or None.
    patience_s
        Mean of the exponential time after which clients give up, > 0, or None.
    """
    if isinstance(tenants, Mapping):
        names = sorted(tenants)
        shares = np.array([tenants[name] for name in names], dtype=float)
        if not shares.size or shares.min() < 0 or not shares.sum() > 0:
            raise InvalidInput(
                f"shares {dict(tenants)!r}", where="tenants", remedy="give positive shares"
            )
        picks = rng.choice(len(names), size=len(runs), p=shares / shares.sum())
        tenants = [names[int(pick)] for pick in picks]
    for name, value in (("deadline_s", deadline_s), ("patience_s", patience_s)):
        if value is not None and not value > 0:
            raise InvalidInput(f"{value!r}", where=name, remedy="use a number > 0, or None")
    return tuple(
        replace(
            run,
            tenant=tenant,
            deadline_s=deadline_s,
            patience_s=None if patience_s is None else float(rng.exponential(patience_s)),
        )
        for run, tenant in zip(runs, tenants, strict=True)
    )


def replayed_arrivals(
    recorded_s: Times, rate_rps: float, count: int, rng: np.random.Generator
) -> Times:
    """Return ``count`` arrivals with the recorded pattern, stretched to a mean rate.

    A window of the recording is taken at a random start (wrapping round), so that seeds differ
    while bursts stay as recorded.

    Parameters
    ----------
    recorded_s
        Recorded arrival times, s, shape (n,), n >= 2.
    rate_rps
        Mean rate wanted, > 0.
    """
    gaps = np.diff(np.sort(np.asarray(recorded_s, dtype=float)))
    if gaps.size < 1 or not gaps.sum() > 0 or not rate_rps > 0:
        raise InvalidInput(
            f"{gaps.size + 1} recorded arrivals",
            where="arrivals",
            remedy="give at least two different times and a positive rate",
        )
    start = int(rng.integers(gaps.size))
    window = np.resize(np.roll(gaps, -start), count)
    # The window, not the whole recording, is brought to the mean rate: seeds then differ in their
    # bursts and not in their load.
    scale = (count / rate_rps) / max(float(window.sum()), 1e-9)
    return np.cumsum(window) * scale


def sampled_workload(
    workflow: Workflow,
    truth: WorkflowEstimate,
    arrivals_s: Sequence[float] | Times,
    *,
    seed: int,
    defaults: EstimateTable | None = None,
) -> tuple[RunSpec, ...]:
    """Return one run per arrival, drawn from a graph and the distributions taken as the truth."""
    rng = np.random.default_rng(seed)
    return tuple(
        sample_run(
            workflow,
            truth,
            rng,
            run_id=f"s{seed}-r{number}",
            arrival_s=float(arrival_s),
            defaults=defaults,
        )
        for number, arrival_s in enumerate(arrivals_s)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionCall:
    """One recorded call of an agent session.

    Parameters
    ----------
    node
        Call site of the agent.
    prompt_tokens, output_tokens
        Recorded lengths, >= 1.
    shared_prefix_tokens
        Leading prompt tokens shared with the previous call of the session, >= 0.
    gap_s
        Tool or client time between the previous call's end and this call, >= 0.
    """

    node: str
    prompt_tokens: int
    output_tokens: int
    shared_prefix_tokens: int
    gap_s: float


def run_from_session(
    calls: Sequence[SessionCall],
    *,
    run_id: str,
    arrival_s: float,
    workflow: str,
    workflow_hash: WorkflowHash,
    static_tokens: int,
    most_prompt_tokens: int,
) -> RunSpec:
    """Return a recorded session as a run: a chain of calls with the recorded gaps between them.

    Parameters
    ----------
    static_tokens
        Leading tokens that all sessions of this agent share (its system prompt).
    most_prompt_tokens
        Prompts are cut to this length, so that they fit the fleet's model.

    Notes
    -----
    Only the length of the prefix shared with the previous prompt is recorded. Where the new
    prompt also has room for the previous answer, the answer is taken to follow the shared part,
    as chat transcripts do.
    """
    tasks: list[Task] = []
    previous: tuple[Segment, ...] = ()
    previous_output: Segment | None = None
    visits: dict[str, int] = {}
    for index, call in enumerate(calls):
        length = max(1, min(call.prompt_tokens, most_prompt_tokens))
        shared = min(call.shared_prefix_tokens, length, total_tokens(previous))
        if index == 0:
            head = [Segment(stable_key(workflow_hash, "static"), min(static_tokens, length))]
        else:
            head = list(_take(previous, shared))
            whole = shared >= total_tokens(previous) - 16
            if whole and previous_output and shared + previous_output.tokens <= length:
                head.append(previous_output)
        fresh = length - total_tokens(head)
        prompt = [*head, Segment(stable_key(workflow_hash, run_id, index), fresh)]
        output = Segment(
            stable_key(workflow_hash, run_id, index, "out"), max(1, call.output_tokens)
        )
        visit = visits.get(call.node, 0)
        visits[call.node] = visit + 1
        tasks.append(
            Task(
                index=index,
                node=NodeId(call.node),
                kind="llm",
                preds=(index - 1,) if index else (),
                site=SiteId(f"{call.node}#0"),
                prompt=tuple(piece for piece in prompt if piece.tokens),
                output_tokens=output.tokens,
                output_key=output.key,
                delay_s=call.gap_s if index else 0.0,
                visit=visit,
            )
        )
        previous, previous_output = tasks[-1].prompt, output
    return RunSpec(
        run_id=RunId(run_id),
        workflow=workflow,
        workflow_hash=workflow_hash,
        arrival_s=arrival_s,
        tasks=tuple(tasks),
    )


def _take(segments: Sequence[Segment], tokens: int) -> tuple[Segment, ...]:
    """Return the first ``tokens`` tokens of a prompt."""
    taken: list[Segment] = []
    for segment in segments:
        if tokens <= 0:
            break
        taken.append(Segment(segment.key, min(segment.tokens, tokens)))
        tokens -= segment.tokens
    return tuple(taken)
