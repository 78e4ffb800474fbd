"""Runs as a trace shows them, made into runs that can be simulated again.

A trace has lengths and times but no prompts and no dependencies. Both are inferred:

* A task waits for the last executions, in the same run, of the nodes that precede it in its graph
  (nodes without records, such as routers, are looked through) and had ended when it began; with
  supersteps also for whatever ended last before, since a step waits for all of the one before. In
  a run whose graph is unknown a task waits for what ended last before it began.
* What passed between the last of these ends and the task's own begin was not the fleet's doing; it
  stays as a delay.
* Prompts share what the forecasts say they share: the site's static prefix among all runs, and,
  where prompts grow, the previous prompt and answer of the site inside the run.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from planner.domain.blocks import Segment
from planner.domain.estimates import EstimateTable
from planner.domain.ids import NodeId, RunId, SiteId, WorkflowHash
from planner.domain.run import RunSpec, Task
from planner.domain.trace import CallRecord, RunRecord, ToolRecord, TraceRecord
from planner.domain.workflow import START, Workflow
from planner.graph.sampling import stable_key

__all__ = ["runs_from_trace"]

_EPSILON_S = 1e-6
"""Traces are rounded to the microsecond."""


def runs_from_trace(
    records: Iterable[TraceRecord],
    workflows: Iterable[Workflow] = (),
    estimates: EstimateTable | None = None,
    *,
    last: int | None = None,
) -> tuple[RunSpec, ...]:
    """Return the runs of a trace that ended well, by arrival; the first arrives at 0.

    Parameters
    ----------
    records
        In any order.
    workflows, estimates
        Graphs and forecasts, as far as they are known.
    last
        Keep only the latest arrivals, >= 1; None keeps all.

    Notes
    -----
    Runs without a finished call are left out. Of a call that was tried again the attempt that
    ended well counts.
    """
    graphs = {workflow.content_hash: workflow for workflow in workflows}
    steps: defaultdict[str, list[_Step]] = defaultdict(list)
    ended: list[RunRecord] = []
    for record in records:
        if isinstance(record, RunRecord):
            if record.status == "ok":
                ended.append(record)
        elif isinstance(record, CallRecord):
            if record.status == "ok" and record.finish_s is not None:
                steps[record.run_id].append(_Step(record.ready_s, record.finish_s, record))
        elif isinstance(record, ToolRecord) and record.status == "ok":
            steps[record.run_id].append(_Step(record.start_s, record.finish_s, record))
    ended.sort(key=lambda run: (run.arrival_s, run.run_id))
    ended = [
        run for run in ended if any(isinstance(s.record, CallRecord) for s in steps[run.run_id])
    ]
    if last is not None:
        ended = ended[-last:]
    origin_s = ended[0].arrival_s if ended else 0.0
    table = estimates or EstimateTable()
    return tuple(
        _run(run, steps[run.run_id], graphs.get(WorkflowHash(run.workflow_hash)), table, origin_s)
        for run in ended
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """A call or tool: when it could begin, when it ended."""

    begin_s: float
    finish_s: float
    record: CallRecord | ToolRecord


def _run(
    run: RunRecord,
    steps: list[_Step],
    workflow: Workflow | None,
    estimates: EstimateTable,
    origin_s: float,
) -> RunSpec:
    steps.sort(key=lambda s: (s.begin_s, s.finish_s, s.record.node))
    before = {} if workflow is None else _predecessors(workflow, {s.record.node for s in steps})
    prompts = _Prompts(run.run_id, run.workflow_hash, estimates)
    visits: defaultdict[str, int] = defaultdict(int)
    tasks: list[Task] = []
    for index, step in enumerate(steps):
        record = step.record
        preds = _waits_for(index, steps, workflow, before)
        ready_s = max((steps[pred].finish_s for pred in preds), default=run.arrival_s)
        lag_s = max(0.0, step.begin_s - ready_s)
        if isinstance(record, CallRecord):
            prompt, output = prompts.of(record, index)
            tasks.append(
                Task(
                    index=index,
                    node=NodeId(record.node),
                    kind="llm",
                    preds=preds,
                    site=SiteId(record.site),
                    prompt=prompt,
                    output_tokens=output.tokens,
                    output_key=output.key,
                    max_tokens=record.max_tokens,
                    delay_s=lag_s,
                    visit=record.visit,
                )
            )
        else:
            tasks.append(
                Task(
                    index=index,
                    node=NodeId(record.node),
                    kind="tool",
                    preds=preds,
                    delay_s=lag_s + max(0.0, step.finish_s - step.begin_s),
                    visit=visits[record.node],
                )
            )
            visits[record.node] += 1
    return RunSpec(
        run_id=RunId(run.run_id),
        workflow=run.workflow,
        workflow_hash=WorkflowHash(run.workflow_hash),
        arrival_s=run.arrival_s - origin_s,
        tasks=tuple(tasks),
        session_id=run.session_id,
        tenant=run.tenant,
        deadline_s=run.deadline_s,
    )


def _waits_for(
    index: int,
    steps: Sequence[_Step],
    workflow: Workflow | None,
    before: Mapping[str, frozenset[str]],
) -> tuple[int, ...]:
    """Return the steps that a step waits for; all come earlier in the list."""
    step = steps[index]
    over = [n for n in range(index) if steps[n].finish_s <= step.begin_s + _EPSILON_S]
    if not over:
        return ()
    latest = max(over, key=lambda n: (steps[n].finish_s, n))
    wanted = before.get(step.record.node)
    if workflow is None or wanted is None:
        return (latest,)
    last: dict[tuple[str, str], int] = {}
    for n in over:
        record = steps[n].record
        if record.node in wanted or _same_visit(record, step.record):
            site = record.site if isinstance(record, CallRecord) else ""
            last[record.node, site] = n
    if workflow.execution == "supersteps":
        last["", ""] = latest
    return tuple(sorted(set(last.values())))


def _same_visit(one: CallRecord | ToolRecord, other: CallRecord | ToolRecord) -> bool:
    """Whether two calls belong to the same entry into one node; they then follow each other."""
    return (
        isinstance(one, CallRecord)
        and isinstance(other, CallRecord)
        and (one.node, one.visit) == (other.node, other.visit)
    )


def _predecessors(workflow: Workflow, seen: set[str]) -> dict[str, frozenset[str]]:
    """Return, by node of the graph, the nodes with records that come right before it."""
    behind: defaultdict[NodeId, set[NodeId]] = defaultdict(set)
    for source, targets in workflow.successors.items():
        for target in targets:
            behind[target].add(source)
    found = {}
    for node in workflow.nodes:
        reached: set[NodeId] = set()
        stack = [node.id]
        while stack:
            for source in behind[stack.pop()] - reached - {START}:
                reached.add(source)
                if source not in seen:
                    stack.append(source)
        found[str(node.id)] = frozenset(str(one) for one in reached if one in seen)
    return found


class _Prompts:
    """The prompts of one run, as segments."""

    def __init__(self, run_id: str, workflow_hash: str, estimates: EstimateTable) -> None:
        self._run_id = run_id
        self._workflow_hash = workflow_hash
        self._estimates = estimates
        self._last: dict[str, tuple[Segment, ...]] = {}

    def of(self, record: CallRecord, index: int) -> tuple[tuple[Segment, ...], Segment]:
        """Return prompt and answer of a call; its lengths are those of the record."""
        estimate = self._estimates.site(self._workflow_hash, record.site)
        length = max(1, record.prompt_tokens)
        head = self._last.get(record.site, ()) if estimate.growth_tokens is not None else ()
        if not head or sum(segment.tokens for segment in head) >= length:
            static = min(math.floor(estimate.shared_prefix_tokens), length - 1)
            key = stable_key(self._workflow_hash, record.site, "static")
            head = (Segment(key, static),) if static > 0 else ()
        fresh = length - sum(segment.tokens for segment in head)
        own = Segment(stable_key(self._run_id, record.site, index, "prompt"), fresh)
        output = Segment(
            stable_key(self._run_id, record.site, index, "output"), max(1, record.output_tokens)
        )
        self._last[record.site] = (*head, own, output)
        return (*head, own), output
