"""One execution of a workflow with everything realised: the ground truth of simulations.

A policy never sees these records. It sees `planner.dispatch.events.CallArrived` and what follows,
built from them piece by piece as a run unfolds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from planner.domain.blocks import Segment, block_hashes, total_tokens
from planner.domain.errors import WorkflowError
from planner.domain.ids import NodeId, RunId, SiteId, WorkflowHash

__all__ = ["RunSpec", "Task", "TaskKind"]

TaskKind = Literal["llm", "tool", "code"]

_MOST_CHAINS = 8192
"""Tasks whose block hashes are kept: some 20 kilobytes each where prompts are long."""
_CHAINED: deque[Task] = deque()
"""The tasks that have theirs, the oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One node execution of a run.

    Parameters
    ----------
    index
        Position in the run; predecessors have smaller positions.
    node
        The workflow's node.
    kind
        ``llm`` for a call, ``tool`` or ``code`` for a delay.
    preds
        Positions of the tasks that must finish first.
    site
        Call site, for calls.
    prompt
        Prompt segments, for calls.
    output_tokens
        Realised output length, >= 1 for calls.
    output_key
        Identity of the output text, so that later prompts can contain it as a segment.
    max_tokens
        Declared limit on the output, or None.
    delay_s
        Realised delay of a tool or code task, or the client's own delay before a call is sent.
    visit
        How many times the run has entered this node before (0 the first time).
    outcomes
        (branch id, outcome id) pairs of the choices made when this task has finished.
    """

    index: int
    node: NodeId
    kind: TaskKind
    preds: tuple[int, ...] = ()
    site: SiteId | None = None
    prompt: tuple[Segment, ...] = ()
    output_tokens: int = 0
    output_key: int = 0
    max_tokens: int | None = None
    delay_s: float = 0.0
    visit: int = 0
    outcomes: tuple[tuple[str, str], ...] = ()
    _chain: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if any(pred >= self.index or pred < 0 for pred in self.preds):
            raise WorkflowError(
                f"task {self.index} waits for {self.preds}", where="preds", remedy="order the tasks"
            )
        if self.kind == "llm" and (self.site is None or self.output_tokens < 1 or not self.prompt):
            raise WorkflowError(
                f"call {self.index} of node {self.node!r} lacks a site, a prompt or an output",
                where="tasks",
                remedy="give all three",
            )
        if not self.delay_s >= 0:
            raise WorkflowError(
                f"delay {self.delay_s!r} s of task {self.index}", where="delay_s", remedy="use >= 0"
            )

    @property
    def prompt_tokens(self) -> int:
        """Prompt length in tokens."""
        return total_tokens(self.prompt)

    @property
    def chain(self) -> tuple[int, ...]:
        """Hashes of the full blocks of prompt and answer; see `planner.domain.blocks`.

        Kept for a while: a simulation, its figures and every policy compared on the same runs ask.
        """
        chain = self._chain
        if chain is None:
            chain = block_hashes((*self.prompt, Segment(self.output_key, self.output_tokens)))
            object.__setattr__(self, "_chain", chain)
            _CHAINED.append(self)
            if len(_CHAINED) > _MOST_CHAINS:
                object.__setattr__(_CHAINED.popleft(), "_chain", None)
        return chain


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """A run as it will unfold.

    Parameters
    ----------
    run_id
        Unique within a workload.
    workflow, workflow_hash
        Name and content hash of the template.
    arrival_s
        When the run starts, seconds from the start of the workload.
    tasks
        In topological order.
    session_id
        Runs of one session share history; None for a run of its own.
    deadline_s
        Hard limit after arrival, or None; missing it ends nothing.
    patience_s
        The client gives up that long after arrival, or None.
    """

    run_id: RunId
    workflow: str
    workflow_hash: WorkflowHash
    arrival_s: float
    tasks: tuple[Task, ...]
    session_id: str | None = None
    tenant: str = "default"
    deadline_s: float | None = None
    patience_s: float | None = None

    def __post_init__(self) -> None:
        for position, task in enumerate(self.tasks):
            if task.index != position:
                raise WorkflowError(
                    f"task at position {position} has index {task.index}",
                    where=f"run {self.run_id}",
                    remedy="number tasks from 0",
                )
