"""One run of an instrumented graph: its identity, its counters, its lifecycle events.

The record travels in LangGraph's own ``config["callbacks"]``, which every node, tool, thread,
task and sub-graph of a run inherits and no other run sees. So two runs with the same
``thread_id`` never mix, and there is no global state to clean up.

As a callback handler it hears of the start and the end of every node and of what every router
answered. It looks at node names and routers' answers only, never at prompts or states.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig
from langgraph.errors import GraphInterrupt, ParentCommand
from langgraph.types import Command, Send

from runtime.langgraph.declare import CallDeclaration
from runtime.langgraph.ir import SEPARATOR, outcome_id, walk

__all__ = ["RunTracker", "Shape", "node_path", "tracker_of"]

Event = dict[str, Any]

_STEP_TAG, _PART_TAG = "graph:step:", "seq:step:"


class Shape:
    """Lookups by path that a run needs, made once from a workflow graph.

    Parameters
    ----------
    ir
        The workflow graph, or None if it could not be read: all lookups are then empty.
    declared
        What is declared about call sites, by id.
    """

    __slots__ = ("declared", "kinds", "labels", "routers", "sites")

    def __init__(
        self,
        ir: Mapping[str, Any] | None,
        declared: Mapping[str, CallDeclaration] | None = None,
    ) -> None:
        self.declared = declared or {}
        self.kinds: dict[str, str] = {}
        self.sites: dict[str, tuple[str, ...]] = {}
        self.routers: dict[str, tuple[str, ...]] = {}
        self.labels: dict[str, dict[str, list[str]]] = {}
        if ir is None:
            return
        for path, node in walk(ir):
            self.kinds[path] = node["kind"]
            self.sites[path] = tuple(site["id"] for site in node["call_sites"])
            if node["subgraph"] is not None:
                self._add_branches(node["subgraph"], path + SEPARATOR)
        self._add_branches(ir, "")

    def _add_branches(self, ir: Mapping[str, Any], prefix: str) -> None:
        for branch in ir["branches"]:
            path = prefix + branch["source"]
            self.routers[path] = (*self.routers.get(path, ()), branch["id"])
            labels = self.labels.setdefault(branch["id"], {})
            for outcome in branch["outcomes"]:
                if len(outcome["targets"]) == 1:
                    labels.setdefault(outcome["targets"][0], []).append(outcome["id"])

    def branch_of(self, path: str, router: str) -> str | None:
        """Return the id of a router's branch, or None if it is not known.

        A router without a name of its own (a lambda) is known if it is the node's only one.
        """
        known = [b for b in self.routers.get(path, ()) if not b.endswith(":goto")]
        wanted = f"{path}:{router}"
        if wanted in known:
            return wanted
        return known[0] if len(known) == 1 else None

    def outcome_of(self, branch: str, answer: Any) -> str:
        """Return the outcome id of a router's answer: labels, nodes, `Send`, or several of them."""
        labels = self.labels.get(branch, {})
        parts = answer if isinstance(answer, (list, tuple)) else (answer,)
        taken = []
        for part in parts:
            if isinstance(part, Send):
                taken.append(min(labels.get(part.node, ()), default=part.node))
            else:
                taken.append(str(part))
        return outcome_id(taken)


def node_path(namespace: str, root: str = "") -> str:
    """Return the path ``outer|inner`` of a task from LangGraph's checkpoint namespace.

    Parameters
    ----------
    namespace
        ``outer:<task id>|inner:<task id>``; a bare number counts repeated sub-graphs of one task.
    root
        Namespace of the task the run itself was started in, left out of the path.
    """
    if root and namespace.startswith(root + SEPARATOR):
        namespace = namespace[len(root) + 1 :]
    return SEPARATOR.join(
        part.partition(":")[0] for part in namespace.split(SEPARATOR) if not part.isdigit()
    )


def tracker_of(config: RunnableConfig | Mapping[str, Any] | None) -> RunTracker | None:
    """Return the run a LangChain config belongs to, or None outside an instrumented run."""
    callbacks: Any = (config or {}).get("callbacks")
    handlers = callbacks if isinstance(callbacks, list) else getattr(callbacks, "handlers", ())
    return next((handler for handler in handlers if isinstance(handler, RunTracker)), None)


class RunTracker(BaseCallbackHandler):
    """Identity and counters of one run.

    Parameters
    ----------
    run_id, session_id
        Unique id of the run; id shared by runs with a common history, or None.
    workflow, workflow_hash
        Name and content hash of the workflow; both empty if its graph could not be read.
    shape
        Lookups by path.
    deadline_s, priority
        Declared hints: hard limit in seconds after the run's start; priority class. None if not
        given.
    root
        Checkpoint namespace of the task the run was started in; empty at top level.
    visits
        Of a run that goes on: node to the number of times it was entered before.
    emit
        Takes a lifecycle event; must neither block nor raise. None drops events.
    """

    # Called in place, on the thread of the node: the order of events is that of the run.
    run_inline = True
    ignore_llm = True
    ignore_chat_model = True
    ignore_agent = True
    ignore_retriever = True
    ignore_retry = True
    ignore_custom_event = True

    def __init__(
        self,
        *,
        run_id: str,
        workflow: str = "",
        workflow_hash: str = "",
        shape: Shape | None = None,
        session_id: str | None = None,
        deadline_s: float | None = None,
        priority: str | int | None = None,
        root: str = "",
        visits: Mapping[str, int] | None = None,
        emit: Callable[[Event], None] | None = None,
    ) -> None:
        self.run_id, self.session_id = run_id, session_id
        self.workflow, self.workflow_hash = workflow, workflow_hash
        self.deadline_s, self.priority = deadline_s, priority
        self.interrupted = False
        self._shape = shape or Shape(None)
        self._root, self._emit = root, emit
        self._lock = threading.Lock()
        self._start_s = time.monotonic()
        self._entered = dict(visits or {})  # path -> visits so far
        self._visits: dict[str, int] = {}  # namespace of a task -> its visit
        self._calls: dict[tuple[str, int], int] = {}  # (namespace, attempt) -> calls so far
        self._choices = {  # branch -> choices so far
            branch: count
            for path, count in self._entered.items()
            for branch in self._shape.routers.get(path, ())
        }
        self._nodes: dict[UUID, tuple[str, int]] = {}  # open node runs: path, visit
        self._routers: dict[UUID, str] = {}  # open router runs: branch

    def path(self, namespace: str) -> str:
        """Return the path of a task from its checkpoint namespace."""
        return node_path(namespace, self._root)

    def visit(self, namespace: str) -> int:
        """Return how many times the run entered a task's node before it entered this task."""
        with self._lock:
            if (visit := self._visits.get(namespace)) is None:
                path = self.path(namespace)
                visit = self._entered.get(path, 0)
                self._entered[path] = visit + 1
                self._visits[namespace] = visit
            return visit

    def site(self, namespace: str, attempt: int, *, repeated: bool) -> str:
        """Return the call site of the next request of a task.

        The n-th request of a task belongs to the n-th site of its node, the last one taking all
        that follow; ``repeated`` says that this is another try of the request before.
        """
        path = self.path(namespace)
        sites = self._shape.sites.get(path) or (f"{path}#0",)
        if len(sites) == 1:
            return sites[0]
        with self._lock:
            done = self._calls.get((namespace, attempt), 0)
            position = max(done - 1, 0) if repeated else done
            self._calls[namespace, attempt] = position + 1
        return sites[min(position, len(sites) - 1)]

    def priority_of(self, site: str) -> str | int | None:
        """Return the declared priority of a call site, or else of the run."""
        declared = self._shape.declared.get(site)
        if declared is None or declared.priority is None:
            return self.priority
        return declared.priority

    def deadline_of(self, site: str) -> float | None:
        """Return the limit of a call made now, seconds after the start of the run, or None."""
        declared = self._shape.declared.get(site)
        if declared is None or declared.deadline_s is None:
            return self.deadline_s
        own_s = round(time.monotonic() - self._start_s + declared.deadline_s, 3)
        return own_s if self.deadline_s is None else min(own_s, self.deadline_s)

    def event(self, kind: str, **facts: Any) -> None:
        """Hand one lifecycle event on, with the run's identity."""
        if self._emit is not None:
            self._emit(
                {
                    "type": kind,
                    "run_id": self.run_id,
                    "workflow_hash": self.workflow_hash,
                    "workflow": self.workflow,
                    "session_id": self.session_id,
                    **facts,
                }
            )

    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,  # noqa: ARG002 the interface of LangChain
        inputs: Any,  # noqa: ARG002
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note that a node or a router has started."""
        for tag in tags or ():
            if tag.startswith(_STEP_TAG):
                namespace = str((metadata or {}).get("langgraph_checkpoint_ns", ""))
                path, visit = self.path(namespace), self.visit(namespace)
                self._nodes[run_id] = (path, visit)
                if self._shape.kinds.get(path) == "tool":
                    self.event("tool_start", node=path, visit=visit)
                return
            # Part 1 of a node is its function; what follows are writers and routers.
            if (
                tag.startswith(_PART_TAG)
                and tag != f"{_PART_TAG}1"
                and parent_run_id in self._nodes
            ):
                path, _ = self._nodes[parent_run_id]
                branch = self._shape.branch_of(path, str(kwargs.get("name")))
                if branch is not None:
                    self._routers[run_id] = branch
                return

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """Report a router's answer, a node's jump and the end of a tool."""
        if (branch := self._routers.pop(run_id, None)) is not None:
            self._chosen(branch, outputs)
        elif (node := self._nodes.pop(run_id, None)) is not None:
            path, visit = node
            if self._shape.kinds.get(path) == "tool":
                self.event("tool_end", node=path, visit=visit, status="ok")
            parts = outputs if isinstance(outputs, (list, tuple)) else (outputs,)
            jumps = [p.goto for p in parts if isinstance(p, Command) and p.graph is None and p.goto]
            if jumps:
                goto = [t for g in jumps for t in (g if isinstance(g, (list, tuple)) else (g,))]
                self._chosen(f"{path}:goto", goto)

    def on_chain_error(
        self,
        error: BaseException,
        *,
        run_id: UUID,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Report the failure of a tool; note an interrupt, which is no failure."""
        self._routers.pop(run_id, None)
        interrupt = isinstance(error, GraphInterrupt)
        self.interrupted |= interrupt
        if (node := self._nodes.pop(run_id, None)) is not None:
            path, visit = node
            if self._shape.kinds.get(path) == "tool":
                status = "interrupted" if interrupt else "failed"
                if isinstance(error, ParentCommand):  # a jump out of a sub-graph
                    status = "ok"
                elif isinstance(error, asyncio.CancelledError):
                    status = "cancelled"
                self.event("tool_end", node=path, visit=visit, status=status)

    def _chosen(self, branch: str, answer: Any) -> None:
        outcome = self._shape.outcome_of(branch, answer)
        with self._lock:
            visit = self._choices.get(branch, 0)
            self._choices[branch] = visit + 1
        self.event("branch", branch=branch, outcome=outcome, visit=visit)
