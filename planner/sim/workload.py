"""Workloads: when runs arrive, and what each of them will do.

Arrival times are seconds from 0, sorted. Runs come from a workflow graph with forecasts taken as
the truth, or from recorded agent sessions, call by call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.domain.blocks import Segment, total_tokens
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.ids import NodeId, RunId, SiteId, WorkflowHash
from planner.domain.run import RunSpec, Task
from planner.domain.workflow import Workflow
from planner.graph.sampling import sample_run, stable_key

__all__ = [
    "SessionCall",
    "poisson_arrivals",
    "replayed_arrivals",
    "run_from_session",
    "sampled_workload",
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
