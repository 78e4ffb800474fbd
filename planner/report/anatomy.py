"""One run taken apart: its steps, which of them it waited for, and where the seconds went.

The critical path is read from the trace alone: the last step to finish is on it, and before each
step on it comes the one that finished last before that step became ready. With the graph, nodes of
the same layer do not come before each other (they started together, though one may have reached
the gateway late). Where an unrelated step of another layer ended in between, it is taken for the
predecessor. What an application does itself is the time between two steps, and is shown as such.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from planner.domain.errors import InvalidInput
from planner.domain.ids import NodeId
from planner.domain.trace import BranchRecord, CallRecord, RunRecord, ToolRecord, TraceRecord
from planner.domain.workflow import END, START, Workflow
from planner.report.layout import lay_out

__all__ = [
    "PARTS",
    "GraphWeights",
    "RunAnatomy",
    "Step",
    "graph_weights",
    "mean_parts",
    "run_anatomy",
]

PARTS = ("router", "prefill", "decode", "tool", "between")
"""What a second of the critical path may be spent on: waiting in the router, from dispatch to the
first token (engine queue and prefill), decoding, a tool, or none of them."""
_CLOCK_S = 1e-6
"""Traces state times to the microsecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A call attempt or a tool of a run; times in seconds from the run's arrival.

    A tool has no endpoint, and starts, for ``sent_s`` and ``first_token_s`` alike, when it is
    ready. ``critical`` says that the run would have ended sooner without it.
    """

    name: str
    node: str
    ready_s: float
    sent_s: float
    first_token_s: float
    finish_s: float
    endpoint: str = ""
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    output_tokens: int = 0
    predicted_finish_s: float | None = None
    reason: str = ""
    attempt: int = 0
    failed: bool = False
    critical: bool = False

    @property
    def begin_s(self) -> float:
        """When it could begin: a further attempt only once the one before had failed."""
        return self.sent_s if self.attempt else self.ready_s


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAnatomy:
    """A run with its steps, in the order they became ready.

    ``predicted_s`` is the run latency forecast at arrival, or None.
    """

    run_id: str
    latency_s: float
    steps: tuple[Step, ...]
    predicted_s: float | None = None

    @property
    def critical_path(self) -> tuple[Step, ...]:
        """The steps the run waited for, first to last."""
        return tuple(sorted((one for one in self.steps if one.critical), key=_when))

    @property
    def parts_s(self) -> dict[str, float]:
        """Seconds of the run latency by `PARTS`; they add up to it."""
        spent = dict.fromkeys(PARTS, 0.0)
        for one in self.critical_path:
            if one.endpoint:
                spent["router"] += one.sent_s - one.begin_s
                spent["prefill"] += one.first_token_s - one.sent_s
                spent["decode"] += one.finish_s - one.first_token_s
            else:
                spent["tool"] += one.finish_s - one.begin_s
        spent["between"] = max(0.0, self.latency_s - sum(spent.values()))
        return spent

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per step; times in seconds."""
        return [
            {
                "step": one.name,
                "critical": one.critical,
                "endpoint": one.endpoint or "tool",
                "reason": one.reason,
                "ready_s": one.ready_s,
                "router_s": one.sent_s - one.ready_s,
                "first_token_s": one.first_token_s - one.sent_s,
                "decode_s": one.finish_s - one.first_token_s,
                "finish_s": one.finish_s,
                "predicted_finish_s": one.predicted_finish_s,
                "prompt_tokens": one.prompt_tokens,
                "cached_tokens": one.cached_tokens,
                "output_tokens": one.output_tokens,
            }
            for one in self.steps
        ]

    def to_frame(self) -> Any:
        """Return the rows as a pandas data frame."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return f"<p>{escape(str(self))}</p>" + str(
            self.to_frame().to_html(index=False, float_format=lambda value: f"{value:.2f}")
        )

    def __str__(self) -> str:
        """Return what it came to, in a sentence."""
        forecast = "" if self.predicted_s is None else f", {self.predicted_s:.2f} s predicted"
        return f"run {self.run_id}: {len(self.steps)} steps, {self.latency_s:.2f} s{forecast}"


def run_anatomy(
    records: Sequence[TraceRecord],
    run_id: str | None = None,
    *,
    workflow: Workflow | None = None,
) -> RunAnatomy:
    """Return the anatomy of a run of a trace, of the slowest that ended well unless it is named.

    ``workflow`` is the graph of the run, if it is known.

    Raises
    ------
    InvalidInput
        If the trace does not hold the run, or no run that ended well.
    """
    if run_id is None:
        ended = [one for one in records if isinstance(one, RunRecord) and one.status == "ok"]
        if not ended:
            raise InvalidInput("no run ended well", where="trace", remedy="give a trace with runs")
        run_id = max(ended, key=lambda one: (one.finish_s - one.arrival_s, one.run_id)).run_id
    return _anatomy([one for one in records if one.run_id == run_id], run_id, _layers(workflow))


def _layers(workflow: Workflow | None) -> dict[str, float]:
    if workflow is None:
        return {}
    return {node: place[0] for node, place in lay_out(workflow).positions.items()}


def _anatomy(mine: Sequence[TraceRecord], run_id: str, layers: Mapping[str, float]) -> RunAnatomy:
    runs = [one for one in mine if isinstance(one, RunRecord)]
    starts = [one.arrival_s for one in runs]
    starts = starts or [one.ready_s for one in mine if isinstance(one, CallRecord)]
    if not starts:
        raise InvalidInput(f"no run {run_id!r}", where="trace", remedy="name a run of that trace")
    origin = min(starts)
    steps = [one for record in mine if (one := _step(record, origin)) is not None]
    steps.sort(key=lambda one: (one.ready_s, one.finish_s, one.name))
    chain = _chain(steps, layers)
    return RunAnatomy(
        run_id=run_id,
        latency_s=(
            runs[0].finish_s - origin if runs else max((one.finish_s for one in steps), default=0.0)
        ),
        steps=tuple(
            replace(one, critical=True) if number in chain else one
            for number, one in enumerate(steps)
        ),
        predicted_s=runs[0].predicted_s if runs else None,
    )


def _step(one: TraceRecord, origin: float) -> Step | None:
    if isinstance(one, CallRecord):
        end = one.finish_s if one.finish_s is not None else one.sent_s
        first = end if one.first_token_s is None else one.first_token_s
        visit = f" ({one.visit + 1})" if one.visit else ""
        again = f" try {one.attempt + 1}" if one.attempt else ""
        forecast = one.predicted_finish_s
        return Step(
            name=f"{one.node}{visit}{again}",
            node=one.node,
            ready_s=one.ready_s - origin,
            sent_s=one.sent_s - origin,
            first_token_s=first - origin,
            finish_s=end - origin,
            endpoint=one.endpoint,
            prompt_tokens=one.prompt_tokens,
            cached_tokens=one.cached_tokens,
            output_tokens=one.output_tokens,
            predicted_finish_s=None if forecast is None else forecast - origin,
            reason=one.reason,
            attempt=one.attempt,
            failed=one.status != "ok",
        )
    if isinstance(one, ToolRecord):
        start = one.start_s - origin
        return Step(
            name=one.node,
            node=one.node,
            ready_s=start,
            sent_s=start,
            first_token_s=start,
            finish_s=one.finish_s - origin,
            failed=one.status != "ok",
        )
    return None


def _when(one: Step) -> tuple[float, float]:
    return one.finish_s, one.begin_s


def _chain(steps: Sequence[Step], layers: Mapping[str, float]) -> set[int]:
    """Return the places of the steps on the critical path."""

    def apart(one: Step, other: Step) -> bool:
        layer = layers.get(one.node)
        return one.node == other.node or layer is None or layer != layers.get(other.node)

    chain: set[int] = set()
    before = range(len(steps))
    candidates = list(before)
    while candidates:
        last = max(candidates, key=lambda number: _when(steps[number]))
        chain.add(last)
        begin_s = steps[last].begin_s + _CLOCK_S
        candidates = [
            number
            for number in before
            if number not in chain
            and steps[number].finish_s <= begin_s
            and apart(steps[number], steps[last])
        ]
    return chain


def _by_run(records: Iterable[TraceRecord]) -> dict[str, list[TraceRecord]]:
    """Return the records of each run that ended well."""
    grouped: dict[str, list[TraceRecord]] = {}
    well = []
    for one in records:
        grouped.setdefault(one.run_id, []).append(one)
        if isinstance(one, RunRecord) and one.status == "ok":
            well.append(one.run_id)
    return {run_id: grouped[run_id] for run_id in well}


def mean_parts(
    records: Iterable[TraceRecord], *, workflow: Workflow | None = None
) -> dict[str, float]:
    """Return where the seconds of the mean run went, by `PARTS`, over runs that ended well.

    ``workflow`` is the graph of all runs, if they have the same and it is known.

    Raises
    ------
    InvalidInput
        If there is no such run.
    """
    layers = _layers(workflow)
    spent = [_anatomy(mine, run_id, layers).parts_s for run_id, mine in _by_run(records).items()]
    if not spent:
        raise InvalidInput("no run ended well", where="trace", remedy="give a trace with runs")
    return {part: sum(one[part] for one in spent) / len(spent) for part in PARTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphWeights:
    """What a trace says of one level of a graph.

    Parameters
    ----------
    runs
        Runs behind it, >= 1.
    reached
        Node -> share of the runs that entered it.
    critical
        Node -> share of the runs whose critical path it was on.
    followed
        (source, target) -> share of the runs on whose critical path target came after source.
    taken
        (branch, outcome) -> share of the branch's choices.
    """

    runs: int
    reached: Mapping[NodeId, float]
    critical: Mapping[NodeId, float]
    followed: Mapping[tuple[NodeId, NodeId], float]
    taken: Mapping[tuple[str, str], float]


def graph_weights(workflow: Workflow, records: Iterable[TraceRecord]) -> GraphWeights:
    """Return how often the runs of a workflow reached, chose and waited for what.

    Nodes inside a sub-graph count as its node. Runs of other workflows are left out.

    Raises
    ------
    InvalidInput
        If no run of the workflow ended well.
    """
    reached: Counter[NodeId] = Counter()
    critical: Counter[NodeId] = Counter()
    followed: Counter[tuple[NodeId, NodeId]] = Counter()
    taken: Counter[tuple[str, str]] = Counter()
    count, layers = 0, _layers(workflow)
    for run_id, mine in _by_run(records).items():
        if mine[0].workflow_hash != workflow.content_hash:
            continue
        count += 1
        whole = _anatomy(mine, run_id, layers)
        inner = [_node_at(workflow, one.node) for one in whole.critical_path]
        reached.update({_node_at(workflow, one.node) for one in whole.steps})
        critical.update(set(inner))
        path = [START, *inner, END]
        followed.update(set(itertools.pairwise(path)))
        taken.update((one.branch, one.outcome) for one in mine if isinstance(one, BranchRecord))
    if not count:
        raise InvalidInput(
            f"no run of workflow {workflow.name!r} ({workflow.content_hash}) ended well",
            where="trace",
            remedy="give a trace of this workflow",
        )
    choices: Counter[str] = Counter()
    for (branch, _), times in taken.items():
        choices[branch] += times
    return GraphWeights(
        runs=count,
        reached={node: times / count for node, times in reached.items()},
        critical={node: times / count for node, times in critical.items()},
        followed={edge: times / count for edge, times in followed.items()},
        taken={one: times / choices[one[0]] for one, times in taken.items()},
    )


def _node_at(workflow: Workflow, node: str) -> NodeId:
    """Return the node of this level that a step belongs to."""
    return NodeId(node if workflow.has_node(node) else re.split(r"[/|]", node, maxsplit=1)[0])
